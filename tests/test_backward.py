"""Every gradient of the backward against autograd through float64."""

import math
from dataclasses import replace

import pytest
import torch

from dashbench.kernels import reference
from dashbench.kernels.attend import block_sparse_attention, routes_of_mask
from dashbench.kernels.backward import (
    BackwardLaunch,
    RoutingGradient,
    attention_gradients,
    with_gradients,
)
from dashbench.kernels.backward_lists import chunk_lists, tile_lists
from dashbench.kernels.dash import dash_attention
from dashbench.kernels.reference import DashOptions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes in float32, so its errors are rounding and 1 / w of nearly excluded chunks; a GPU
# multiplies bf16.
DTYPE, TOLERANCE = (torch.bfloat16, 1.5e-2) if DEVICE == "cuda" else (torch.float32, 1e-4)


def dash(q, k, v, q_bar, options, detach, storage, pad=0):
    """The specification, with what a forward saves: output, lse, summaries, tau, mask of earlier chunks."""
    batch, query_heads, n, d = q.shape
    chunks, position = math.ceil(n / options.chunk_size), torch.arange(n, device=q.device)
    padding = torch.full((batch,), pad, device=q.device)
    if pad:
        real = (position >= pad).expand(batch, n)
        k_bar = reference._padded_summaries(k, q_bar, options.chunk_size, real)
    else:
        k_bar = reference.summarize(k, q_bar, options.chunk_size)
    # The router reads summaries in the storage dtype; rounding passes the gradient through.
    k_bar = k_bar + (k_bar.to(storage).to(k_bar.dtype) - k_bar).detach()
    routing = reference.route(q, k_bar, position, chunks, options, padding // options.chunk_size)
    bias = routing.bias
    if detach:
        log_w = torch.where(routing.routed, routing.weights, 1.0).log() / options.sigma
        bias = torch.where(routing.routed, log_w + (bias - log_w).detach(), 0.0)
    with torch.no_grad():
        known = k_bar.shape[2]
        x = torch.einsum("brgnd,brcd->brgnc", q.reshape(batch, k.shape[1], -1, n, d), k_bar)
        x = x.reshape(batch, query_heads, n, known) * (options.alpha - 1) * options.scaling_factor * d**-0.5
        visible = reference.visible_chunks(position, known, options.chunk_size, options.visibility)
        visible = visible & (torch.arange(known, device=q.device) >= pad // options.chunk_size)
        tau = reference.threshold(x.masked_fill(~visible, float("-inf")), options.alpha)[..., 0]
    earlier = torch.arange(chunks, device=q.device)[None] < (position // options.chunk_size)[:, None]
    routed = routing.active & earlier
    out, lse = attend(q, k, v, routed, bias, options.chunk_size, pad)
    weakest = routing.weights.detach().masked_fill(~routing.routed, float("inf")).amin(-1)
    return out, lse, k_bar, tau, routed, weakest


def attend(q, k, v, routed, bias, chunk, pad=0):
    batch, query_heads, n, d = q.shape
    kv_heads = k.shape[1]
    own = torch.arange(n, device=q.device) // chunk
    causal = torch.arange(n, device=q.device)[None] <= torch.arange(n, device=q.device)[:, None]
    diagonal = own[None] == own[:, None]
    allowed = (routed[..., own] | diagonal) & causal & (torch.arange(n, device=q.device) >= pad)
    scores = torch.einsum("bhgid,bhtd->bhgit", q.reshape(batch, kv_heads, -1, n, d), k) * d**-0.5
    scores = scores + torch.where(diagonal, 0, bias[..., own])[:, :, None]
    scores = scores.masked_fill(~allowed[:, :, None], float("-inf"))
    empty = ~allowed.any(-1)[:, :, None, :, None]
    out = torch.einsum("bhgit,bhtd->bhgid", scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0), v)
    return out.reshape(q.shape), scores.logsumexp(-1).reshape(batch, query_heads, n)


def pack(routed):
    words = math.ceil(routed.shape[-1] / 32)
    bits = (
        torch.nn.functional.pad(routed, (0, words * 32 - routed.shape[-1])).long().unflatten(-1, (words, 32))
    )
    packed = (bits << torch.arange(32, device=routed.device)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def make(n, group, kv_heads=2, d=64, batch=1, dtype=DTYPE, seed=0, per_chunk=0, token_major=False):
    """q, k, v, summary query and the output's gradient; values are rounded to `dtype` before anything reads
    them."""
    g = torch.Generator().manual_seed(seed)

    def draw(heads):
        if token_major:
            return torch.randn(batch, n, heads, d, generator=g).to(DEVICE, dtype).transpose(1, 2)
        return torch.randn(batch, heads, n, d, generator=g).to(DEVICE, dtype)

    q, k, v, grad = draw(kv_heads * group), draw(kv_heads), draw(kv_heads), draw(kv_heads * group)
    shape = (batch, kv_heads, per_chunk, d) if per_chunk else (kv_heads, d)
    return q, k, v, torch.randn(*shape, generator=g).to(DEVICE, dtype), grad


def relative(ours, exact):
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def well_conditioned(weakest, alpha, group):
    """Queries whose weakest chunk (its weight: `[B, Hkv, N]`) is above the threshold by 2e-3 in some head.

    The gradient through log w grows like 1 / excess, which magnifies the float32 rounding of the scores
    without limit: the other queries get no gradient of the output.
    """
    kept = weakest > 2e-3 ** (1 / (alpha - 1)) / group
    assert kept.float().mean() > 0.5
    return kept


def gradients(n, group, launch=None, deterministic=False, detach=False, pad=0, options=None, **shape):
    """Ours and the exact gradients of q, k, v and the summary query, and the routing that both used.

    Exact for the saved output as it is, rounded: in D = ⟨dO, o⟩ the rounding δo becomes −P ⟨dO, δo⟩ in dS,
    the gradient of −⟨dO, δo⟩ · lse. Through the bias of chunks near the threshold it grows to 2e-2 of dq at
    σ = 1 (LOG.md, Backward).
    """
    q, k, v, q_bar, grad = make(n, group, **shape)
    o = DashOptions(**dict(chunk_size=16, scaling_factor=6.0, sigma=1.0) | (options or {}))
    exact = [x.double().requires_grad_() for x in (q, k, v, q_bar)]
    out, lse, k_bar, tau, routed, weakest = dash(*exact, o, detach, q.dtype, pad)
    grad = grad * well_conditioned(weakest, o.alpha, group).repeat_interleave(group, 1)[..., None]
    rounded = ((out.detach().to(q.dtype) - out.detach()) * grad).sum(-1)
    somewhere = torch.where(lse.isfinite(), lse, 0.0)
    ((out * grad).sum() - (rounded * somewhere).sum()).backward()
    routing = RoutingGradient(
        k_bar.detach().to(q.dtype), q_bar, tau.float(), o.bias_mode, o.scaling_factor, o.sigma, o.alpha,
        detach,
        forced=int(o.forced == "own_and_previous"), completed=o.visibility == "completed",
    )  # fmt: skip
    saved = out.detach().to(q.dtype), lse.detach().float(), pack(routed)
    padding = torch.full((len(q),), pad, dtype=torch.int32, device=DEVICE) if pad else None
    ours = attention_gradients(grad, q, k, v, *saved, o.chunk_size, routing, deterministic, padding, launch)
    return ours, [torch.zeros_like(x) if x.grad is None else x.grad for x in exact], routed


def check(ours, exact, tolerance):
    names = ("q", "k", "v", "summary query")[: len(exact)]
    ours = ours[: len(exact)]
    for name, mine, true in zip(names, ours, exact, strict=True):
        assert mine.shape == true.shape
        if true.abs().max() < 1e-12:
            assert mine.abs().max() < 1e-5, name
        else:
            assert relative(mine, true) < tolerance, f"gradient of {name}: {relative(mine, true):.2e}"


@pytest.mark.parametrize(
    "case",
    [
        dict(n=70, group=4),
        dict(n=70, group=4, detach=True),
        dict(n=70, group=4, options=dict(bias_mode="raw")),
        dict(n=70, group=4, options=dict(alpha=1.25)),
        dict(n=70, group=2, options=dict(alpha=2.0)),
        dict(n=70, group=4, options=dict(sigma=1e6)),
        dict(n=70, group=1, options=dict(sigma=0.5)),
        dict(n=70, group=3),
        dict(n=52, group=16, kv_heads=1),
        dict(n=70, group=4, d=128, kv_heads=1, options=dict(chunk_size=32)),
        dict(n=40, group=2, batch=2, token_major=True),
        dict(n=70, group=4, per_chunk=5),
        dict(n=70, group=4, launch=BackwardLaunch(tile=8, splits=3)),
        dict(n=70, group=4, launch=BackwardLaunch(tile=8, splits=2), deterministic=True),
        dict(n=70, group=4, deterministic=True),
        dict(n=80, group=4, options=dict(visibility="completed", forced="own_and_previous")),
        dict(n=80, group=4, deterministic=True, options=dict(visibility="completed", alpha=2.0)),
        dict(n=70, group=3, deterministic=True, options=dict(bias_mode="raw", alpha=1.25)),
    ],
    ids=lambda case: "-".join(f"{name}={value}" for name, value in case.items() if name != "launch"),
)
def test_gradients_match_float64(case):
    """sigma = 1 makes the routing's share as large as the attention's, so an error in either shows."""
    ours, exact, routed = gradients(**case)
    assert 0 < routed.float().mean() < 0.5 and exact[3].abs().max() > 0
    check(ours, exact, TOLERANCE)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 33])
def test_chunk_borders_and_empty_routing(n):
    ours, exact, routed = gradients(n, 2)
    assert bool(routed.any()) == (n > 16)
    check(ours, exact, TOLERANCE)


@pytest.mark.parametrize("pad", [1, 16, 19])
def test_left_padding_gets_no_gradient(pad):
    for deterministic in (False, True):
        ours, exact, routed = gradients(55, 2, pad=pad, deterministic=deterministic, kv_heads=1)
        assert routed.any() and all(g[..., :pad, :].abs().max() == 0 for g in ours[:3])
        check(ours, exact, TOLERANCE)


def test_no_bias_leaves_only_the_attention():
    ours, exact, _ = gradients(40, 2, options=dict(bias_mode="none"))
    check(ours[:3], exact[:3], TOLERANCE)
    assert ours[3] is None


@pytest.mark.parametrize("density", [0.0, 0.4])
def test_block_sparse_attention_with_a_constant_mask(density):
    q, k, v, _, grad = make(75, 4)
    own = torch.arange(75, device=DEVICE) // 16
    routed = torch.rand(1, 2, 75, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE) < density
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    earlier = routed & (torch.arange(5, device=DEVICE)[None] < own[:, None])
    out, lse = attend(*exact, earlier, torch.zeros_like(routed, dtype=torch.double), 16)
    out.backward(grad.double())
    # Bits at or behind the own chunk are set, too, and must be ignored.
    ours = attention_gradients(grad, q, k, v, out.detach().to(DTYPE), lse.detach().float(), pack(routed), 16)
    check(ours[:3], [x.grad for x in exact], TOLERANCE)
    assert ours[3] is None


def test_deterministic_twice_is_bitwise_equal():
    launch = BackwardLaunch(tile=8, splits=2)
    first, _, _ = gradients(70, 4, deterministic=True, launch=launch)
    second, _, _ = gradients(70, 4, deterministic=True, launch=launch)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autograd_reaches_every_input():
    q, k, v, q_bar, grad = make(40, 2)
    exact = [x.double().requires_grad_() for x in (q, k, v, q_bar)]
    options = DashOptions(chunk_size=16, scaling_factor=6.0, sigma=1.0)
    out, lse, k_bar, tau, routed, _ = dash(*exact, options, False, q.dtype)
    out.backward(grad.double())
    inputs = [x.requires_grad_() for x in (q, k, v, q_bar)]
    routing = RoutingGradient(k_bar.detach().to(DTYPE), q_bar, tau.detach().float(), gamma=6.0, sigma=1.0)
    ours = with_gradients(out.detach().float(), q, k, v, lse.detach().float(), pack(routed), 16, routing)
    assert torch.equal(ours, out.to(DTYPE))
    ours.backward(grad)
    check([x.grad for x in inputs], [x.grad for x in exact], TOLERANCE)


def test_block_sparse_attention_is_differentiable():
    q, k, v, _, grad = make(40, 2)
    routed = torch.rand(1, 2, 40, 3, generator=torch.Generator().manual_seed(4)).to(DEVICE) < 0.5
    routed &= torch.arange(3, device=DEVICE)[None] < (torch.arange(40, device=DEVICE) // 16)[:, None]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    attend(*exact, routed, torch.zeros_like(routed, dtype=torch.double), 16)[0].backward(grad.double())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    routes = routes_of_mask(pack(routed), 16, 2)
    block_sparse_attention(*inputs, routes)[0].backward(grad)
    check([x.grad for x in inputs], [x.grad for x in exact], TOLERANCE)
    with pytest.raises(ValueError, match="bit mask"):
        block_sparse_attention(*inputs, replace(routes, mask=None))


@pytest.mark.parametrize("pad", [0, 19])
def test_whole_operator_trains(pad):
    """The public function, forward and backward, against autograd through the specification."""
    q, k, v, q_bar, grad = make(80, 2)
    chosen = dict(chunk_size=16, scaling_factor=4.0, forced="own_and_previous", visibility="completed")
    padding = torch.full((1,), pad, dtype=torch.int32, device=DEVICE)
    exact = [x.double().requires_grad_() for x in (q, k, v, q_bar)]
    out, _ = reference.dash_attention(*exact, DashOptions(**chosen), left_padding=padding)
    out.backward(grad.double())
    inputs = [x.requires_grad_() for x in (q, k, v, q_bar)]
    dash_attention(*inputs, left_padding=padding if pad else None, **chosen).backward(grad)
    # The summary query's gradient has the routing as its only source; bf16 summaries move the support's edge.
    close = 1e-3 if DEVICE == "cpu" else 0.2
    check([x.grad for x in inputs[:3]], [x.grad for x in exact[:3]], TOLERANCE)
    assert relative(inputs[3].grad, exact[3].grad) < close


def test_lists_enumerate_the_mask():
    n, chunk, tile = 83, 16, 4
    routed = torch.rand(2, 1, n, 6, generator=torch.Generator().manual_seed(2)) < 0.3
    mask = pack(routed).to(DEVICE)
    by_tile, by_chunk = {}, {}
    for b in range(2):
        for i in range(n):
            for c in range(i // chunk):
                if routed[b, 0, i, c]:
                    key = (b, i // tile, c)
                    by_tile[key] = by_tile.get(key, 0) | 1 << i % tile
    by_chunk = {(b, c, t): bits for (b, t, c), bits in by_tile.items()}
    per_chunk, tiles, chunks = chunk // tile, -(-n // tile), -(-n // chunk)
    entries, counts = (x.cpu() for x in tile_lists(mask, chunk, tile))
    found = {}
    for b in range(2):
        for t in range(tiles):
            own = t // per_chunk
            start = per_chunk * own * (own - 1) // 2 + t % per_chunk * own
            row = entries[b, 0, start : start + counts[b, 0, t]].tolist()
            assert row == sorted(row, key=lambda entry: entry & 0xFFFF)
            found |= {(b, t, entry & 0xFFFF): entry >> 16 for entry in row}
    assert found == by_tile and len(found) == counts.sum()
    entries, counts = (x.cpu() for x in chunk_lists(mask, chunk, tile))
    found = {}
    for b in range(2):
        for c in range(chunks):
            start = c * tiles - per_chunk * (c * (c + 1) // 2)
            row = entries[b, 0, start : start + counts[b, 0, c]].tolist()
            assert row == sorted(row)
            found |= {(b, c, entry >> tile): entry & 15 for entry in row}
    assert found == by_chunk and len(found) == counts.sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [(dict(d=32), "head dim 32"), (dict(chunk=24), "chunk size 24")],
    ids=["head dim", "chunk size"],
)
def test_refuses_what_it_does_not_cover(change, message):
    chunk = change.pop("chunk", 16)
    q, k, v, _, grad = make(20, 2, **change)
    mask = torch.zeros(1, 2, 20, 1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        attention_gradients(grad, q, k, v, q, torch.zeros(1, 4, 20, device=DEVICE), mask, chunk)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        dict(group=16, d=128),
        dict(group=16, d=128, deterministic=True),
        dict(group=16, d=128, deterministic=True, options=dict(sigma=1e6)),
        dict(group=16, d=128, dtype=torch.float16),
        dict(group=16, d=128, options=dict(bias_mode="raw", alpha=1.25)),
        dict(group=16, d=128, token_major=True, pad=70),
        dict(group=1, d=64),
        dict(group=4, d=64, batch=2, options=dict(chunk_size=128)),
        dict(group=8, d=128, options=dict(chunk_size=32)),
        dict(group=3, d=128, options=dict(chunk_size=16)),
    ],
    ids=lambda case: "-".join(f"{name}={value}" for name, value in case.items()),
)
def test_real_shapes_match_float64(case):
    ours, exact, routed = gradients(
        n=1100, **case | dict(options=dict(chunk_size=64) | case.get("options", {}))
    )
    assert 0 < routed.float().mean() < 0.5
    check(ours, exact, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("pad", [0, 128])
def test_gradients_of_keys_hardly_change_between_runs(pad):
    """Atomics reorder the float32 sums of the summaries' gradient and nothing else."""
    case = dict(group=16, d=128, token_major=True, pad=pad, options=dict(chunk_size=64))
    first, exact, _ = gradients(1100, **case)
    for _ in range(20):
        again, _, _ = gradients(1100, **case)
        assert relative(again[1], first[1].double()) < 1e-3
    assert relative(first[1], exact[1]) < 5e-3


@pytest.mark.gpu
def test_long_lists_match_a_dense_float32_backward():
    """8k tokens, half of the chunks: lists longer than any block of the kernels."""
    n, chunk = 8192, 64
    q, k, v, _, grad = make(n, 2, kv_heads=1, d=128)
    routed = torch.rand(1, 1, n // 32, n // chunk, generator=torch.Generator().manual_seed(3)) < 0.5
    routed = routed.repeat_interleave(32, 2).to(DEVICE)
    routed &= (
        torch.arange(n // chunk, device=DEVICE)[None] < (torch.arange(n, device=DEVICE) // chunk)[:, None]
    )
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*exact, routed, torch.zeros_like(routed, dtype=torch.float32), chunk)
    out.backward(grad.float())
    saved = out.detach().to(q.dtype), lse.detach(), pack(routed)
    first = attention_gradients(grad, q, k, v, *saved, chunk)
    check(first, [x.grad.double() for x in exact], 1e-2)
    second = attention_gradients(grad, q, k, v, *saved, chunk)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
