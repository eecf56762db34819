"""The specification itself, against loops written straight from the definition and against properties of
entmax."""

import math

import pytest
import torch

from dashbench.kernels.reference import (
    EPSILON,
    PRESETS,
    DashOptions,
    dash_attention,
    entmax,
    kept_tokens,
    summarize,
)


def draw(n, batch=1, kv_heads=2, group=2, dim=8, seed=0, length=None):
    g = torch.Generator().manual_seed(seed)
    length = length or n
    q = torch.randn(batch, kv_heads * group, n, dim, generator=g, dtype=torch.float64)
    k, v = (torch.randn(batch, kv_heads, length, dim, generator=g, dtype=torch.float64) for _ in range(2))
    return 2 * q, k, v, torch.randn(kv_heads, dim, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.05, 1.25, 1.5, 1.75, 2.0])
@pytest.mark.parametrize("scale", [1e-4, 0.3, 1.0, 30.0])
def test_entmax_solves_its_equation(alpha, scale):
    z = scale * torch.randn(20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = entmax(z, alpha)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(20, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(entmax(z + 5.0, alpha), p, atol=1e-9, rtol=0)  # only differences count
    # Optimality: (α − 1) z − p^(α−1) is one constant τ on the support and at most τ off it.
    tau = (alpha - 1) * z - p ** (alpha - 1)
    for row in range(20):
        on = p[row] > 1e-12
        assert (tau[row][on].max() - tau[row][on].min()).abs() < 1e-6
        assert ((alpha - 1) * z[row][~on] <= tau[row][on].max() + 1e-12 ** (alpha - 1) + 1e-9).all()


def test_the_two_algorithms_agree_and_limits_are_right():
    z = torch.randn(30, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(entmax(z, 1.5), entmax(z, 1.5 + 1e-9), atol=1e-6, rtol=0)
    torch.testing.assert_close(entmax(z, 2.0), entmax(z, 2.0 - 1e-9), atol=1e-6, rtol=0)
    torch.testing.assert_close(entmax(z, 1.0005), z.softmax(-1), atol=2e-3, rtol=0)
    assert torch.equal(entmax(torch.full((2, 5), float("-inf"))), torch.zeros(2, 5))
    flat = entmax(torch.zeros(1, 1000, dtype=torch.float64))
    torch.testing.assert_close(flat, torch.full((1, 1000), 1e-3, dtype=torch.float64))


@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_entmax_gradient(alpha):
    z = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entmax(x, alpha), z, atol=1e-5)


def by_definition(q, k, v, summary_query, o, padding=0):
    """One query, head and chunk at a time, from the formulas."""
    batch, heads, n, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    group, size = heads // kv_heads, o.chunk_size
    out = torch.zeros_like(q)
    start = length - n
    for b in range(batch):
        for r in range(kv_heads):
            for row in range(n):
                i = start + row
                if i < padding:
                    continue
                visible = [
                    c
                    for c in range(length // size)
                    if c >= padding // size
                    and (c < i // size if o.visibility == "own" else (c + 1) * size - 1 <= i)
                ]
                bars = []
                for c in visible:
                    keys = k[b, r, max(c * size, padding) : (c + 1) * size]
                    bars.append((keys @ summary_query[r] / math.sqrt(dim)).softmax(0) @ keys)
                w = {}
                if visible:
                    z = (
                        o.scaling_factor
                        / math.sqrt(dim)
                        * torch.stack(bars)
                        @ q[b, r * group : (r + 1) * group, row].T
                    )
                    p = entmax(z.T, o.alpha).mean(0)
                    w = {c: float(p[j]) for j, c in enumerate(visible)}
                on = {i // size} | ({i // size - 1} if o.forced == "own_and_previous" else set())
                routed = [c for c, x in w.items() if x > EPSILON and c not in on]
                logs = {c: math.log(w[c]) for c in routed}
                mean = sum(logs.values()) / max(len(logs), 1)
                bias = {
                    c: {"none": 0.0, "raw": logs[c], "centered": (logs[c] - mean) / o.sigma}[o.bias_mode]
                    for c in routed
                }
                tokens = [t for t in range(padding, i + 1) if t // size in on or t // size in bias]
                for h in range(r * group, (r + 1) * group):
                    s = torch.stack(
                        [
                            q[b, h, row] @ k[b, r, t] / math.sqrt(dim) + bias.get(t // size, 0.0)
                            for t in tokens
                        ]
                    )
                    out[b, h, row] = s.softmax(0) @ v[b, r, tokens]
    return out


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8, 18])
@pytest.mark.parametrize("bias_mode", ["centered", "raw", "none"])
def test_against_the_definition(n, bias_mode):
    q, k, v, s = draw(n)
    o = DashOptions(chunk_size=4, scaling_factor=1.3, sigma=1.0, bias_mode=bias_mode)
    torch.testing.assert_close(dash_attention(q, k, v, s, o)[0], by_definition(q, k, v, s, o))


@pytest.mark.parametrize("forced", ["own", "own_and_previous"])
@pytest.mark.parametrize("visibility", ["own", "completed"])
@pytest.mark.parametrize("alpha", [1.25, 2.0])
def test_variants_against_the_definition(forced, visibility, alpha):
    q, k, v, s = draw(19, seed=5)
    o = DashOptions(4, 0.9, alpha, 0.5, "centered", forced, visibility)
    torch.testing.assert_close(dash_attention(q, k, v, s, o)[0], by_definition(q, k, v, s, o))


@pytest.mark.parametrize("padding", [1, 4, 7])
def test_left_padding_against_the_definition(padding):
    q, k, v, s = draw(18, seed=6)
    o = DashOptions(chunk_size=4, bias_mode="raw")
    out, _ = dash_attention(q, k, v, s, o, left_padding=torch.tensor([padding]))
    torch.testing.assert_close(out, by_definition(q, k, v, s, o, padding))


@pytest.mark.parametrize("bias_mode", ["centered", "raw"])
def test_a_chunk_that_only_the_caller_attends_weighs_next_to_nothing(bias_mode):
    """Another implementation's support may hold a chunk whose weight is zero here: its biased weight is tiny
    too."""
    q, k, v, s = draw(23, seed=7)
    o = DashOptions(chunk_size=4, scaling_factor=6.0, sigma=1.0, bias_mode=bias_mode)
    out, routing = dash_attention(q, k, v, s, o)
    chunks = routing.active.shape[-1]
    earlier = torch.arange(chunks) < (torch.arange(23) // 4)[:, None]
    everything = routing.active | earlier
    assert (everything & ~routing.active).sum() > 10
    more, _ = dash_attention(q, k, v, s, o, active=everything)
    torch.testing.assert_close(more, out, atol=1e-6, rtol=0)


def test_some_rows_and_late_queries_equal_all_rows():
    q, k, v, s = draw(23, seed=7)
    o = DashOptions(chunk_size=4)
    whole, routing = dash_attention(q, k, v, s, o)
    rows = torch.tensor([0, 7, 8, 22])
    part, _ = dash_attention(q, k, v, s, o, rows=rows)
    torch.testing.assert_close(part, whole[:, :, rows])
    late, _ = dash_attention(q[:, :, -2:], k, v, s, o)
    torch.testing.assert_close(late, whole[:, :, -2:])
    kept = kept_tokens(routing.active, torch.arange(23), 4)
    brute = (
        routing.active.repeat_interleave(4, -1)[..., :23] & torch.ones(23, 23, dtype=torch.bool).tril()
    ).sum(-1)
    assert torch.equal(kept, brute)


def test_zero_summary_query_is_mean_pooling_and_presets_exist():
    _, k, _, _ = draw(20)
    torch.testing.assert_close(
        summarize(k, torch.zeros(2, 8, dtype=k.dtype), 4), k.unflatten(2, (5, 4)).mean(3)
    )
    assert PRESETS["paper"].scaling_factor == pytest.approx(0.2308, abs=1e-4)


@pytest.mark.parametrize("bias_mode", ["centered", "raw"])
def test_all_gradients_match_central_differences(bias_mode):
    q, k, v, s = (x.requires_grad_() for x in draw(11, dim=4, seed=8))
    o = DashOptions(chunk_size=3, scaling_factor=0.7, sigma=1.0, bias_mode=bias_mode)
    assert torch.autograd.gradcheck(lambda *x: dash_attention(*x, o)[0], (q, k, v, s), atol=1e-6)
