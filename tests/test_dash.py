"""Summaries, routing and attention of the kernels against the fp64 specification, stage by stage and
whole."""

import pytest
import torch
import triton
import triton.language as tl

from dashbench.inputs import make_problem
from dashbench.kernels import route_kernels
from dashbench.kernels.attend import block_sparse_attention, kernel_for, routes_of_mask
from dashbench.kernels.dash import dash_attention
from dashbench.kernels.reference import DashOptions, route, summarize
from dashbench.kernels.reference import dash_attention as specified
from dashbench.kernels.route import RESIDENT, route_chunks
from dashbench.kernels.route_kernels import next_threshold
from dashbench.kernels.summarize import summarize_chunks
from dashbench.rows import Point, Shape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32  # the interpreter has no bf16 products


def planted(n, batch=1, kv_heads=2, group=4, dim=64, chunk=16, seed=0, strength=3.0):
    """Chunks carry one of a few directions, queries want two of them: sparse, query-dependent support."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(dim, 8, generator=g)).Q.T * dim**0.5 / 4
    topics = torch.randint(0, 8, (batch, kv_heads, -(-n // chunk)), generator=g)
    k = directions[topics].repeat_interleave(chunk, 2)[:, :, :n] + 0.3 * torch.randn(
        batch, kv_heads, n, dim, generator=g
    )
    wants = torch.randint(0, 8, (2, batch, kv_heads * group, n), generator=g)
    q = strength * (directions[wants[0]] + 0.7 * directions[wants[1]]) + 0.3 * torch.randn(
        batch, kv_heads * group, n, dim, generator=g
    )
    v = torch.randn(batch, kv_heads, n, dim, generator=g)
    s = 0.3 * torch.randn(kv_heads, dim, generator=g)
    return tuple(x.to(DEVICE, DTYPE) for x in (q, k, v, s))


def unpack(mask, chunks):
    bits = (mask[..., None] >> torch.arange(32, device=mask.device)) & 1
    return bits.flatten(-2)[..., :chunks].bool()


def listed(routes, n):
    """The mask `[B, Hkv, N, M]` that a tile's lists spell out."""
    batch, heads, tiles = routes.counts.shape
    per = routes.chunk_size // routes.tile
    chunks = -(-n // routes.chunk_size)
    out = torch.zeros(batch, heads, n, chunks, dtype=torch.bool)
    for tile in range(tiles):
        own = tile // per
        start = per * (own * (own - 1) // 2) + (tile % per) * own
        for b in range(batch):
            for h in range(heads):
                entries = routes.entries[b, h, start : start + int(routes.counts[b, h, tile])].tolist()
                assert entries == sorted(entries, key=lambda e: e & 0xFFFF)
                for e in entries:
                    for t in range(routes.tile):
                        if (e >> (16 + t)) & 1 and tile * routes.tile + t < n:
                            out[b, h, tile * routes.tile + t, e & 0xFFFF] = True
    return out


@pytest.mark.parametrize("n", [15, 16, 17, 32, 75])
def test_summaries(n):
    _, k, _, s = planted(n)
    expected = summarize(k.double(), s.double(), 16)
    torch.testing.assert_close(summarize_chunks(k, s, 16).double(), expected, atol=4e-3, rtol=4e-3)
    per_chunk = s[None, :, None].expand(1, 2, -(-n // 16), 64).contiguous()
    assert torch.equal(summarize_chunks(k, per_chunk, 16), summarize_chunks(k, s, 16))


def check_routes(q, k, s, options, margin=1e-5, **more):
    n = q.shape[2]
    summaries = summarize_chunks(k, s, options.chunk_size)
    routes = route_chunks(
        q, summaries, options.chunk_size, scaling_factor=options.scaling_factor, alpha=options.alpha,
        visibility=options.visibility, forced=options.forced, save=True, **more,
    )  # fmt: skip
    chunks = -(-n // options.chunk_size)
    position = torch.arange(n, device=q.device)
    exact = route(q.double(), summaries.double(), position, chunks, options)
    own = position // options.chunk_size
    expected = exact.active & (torch.arange(chunks, device=q.device) < own[:, None])
    mask = unpack(routes.mask, chunks)
    sure = exact.margin > margin
    assert bool((mask == expected)[sure].all()), "support differs outside the margin"
    assert float(sure.float().mean()) > 0.99
    assert torch.equal(listed(routes, n), mask.cpu())
    assert torch.equal(routes.active_blocks.cpu().long(), mask.sum(-1).cpu() + 1)
    return mask


@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 75])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("resident", [RESIDENT, 0])
def test_routing_equals_the_exact_support(n, group, resident):
    q, k, _, s = planted(n, group=group, seed=n)
    mask = check_routes(q, k, s, DashOptions(chunk_size=16, scaling_factor=1.0), resident=resident)
    if n > 70:
        density = float(mask.float().mean())
        assert 0.02 < density < 0.4, "the case must be neither empty nor full"


@triton.jit
def _one_step(out, tau, low, high, count, s1, s2):
    count, s1, s2 = tl.load(count), tl.load(s1), tl.load(s2)
    new, low, high = next_threshold(
        tl.load(tau), tl.load(low), tl.load(high), count, s1, s2, 2.0, 0.5, 5e-5, 0, True
    )
    tl.store(out, new)
    tl.store(out + 1, low)
    tl.store(out + 2, high)


@pytest.mark.parametrize(
    ("root", "expected"), [(-0.49998, -0.5), (-0.55, -0.55), (-0.6001, -0.55), (-0.7, -0.55), (-0.4, -0.45)]
)
def test_a_step_stays_at_its_end_of_the_bracket_or_halves_it(root, expected):
    """One chunk above τ = -0.5, which is the bracket's upper end, the lower one is -0.6. Sums as rounding may
    have them: a root a hair above τ although they are below one."""
    s1 = 1.0 - (-0.5 - root)  # the root of (x - τ)² = 1 is s1 - 1 above τ
    s2 = min(s1 * s1, 1.0 - 1e-7)
    out = torch.zeros(3, device=DEVICE)
    numbers = (-0.5, -0.6, -0.1, 1.0, s1, s2)
    if root == -0.4:  # as far beyond the other way: τ is the lower end then
        numbers = (-0.5, -0.9, -0.4, 1.0, s1, s1 * s1)
    _one_step[(1,)](out, *(torch.tensor([x], device=DEVICE, dtype=torch.float32) for x in numbers))
    if root == -0.49998:  # the sums say above, the root of the quadratic is at τ
        assert abs(float(out[0]) + 0.5) < 5e-5
    else:
        assert float(out[0]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("alpha", [2.0, 1.75])
def test_steps_do_not_go_from_end_to_end_for_ever(alpha):
    """One chunk far above a band of others: from the bracket's lower end a step leads to its upper one, and
    from there back."""
    chunks, chunk = 40, 16
    n = chunks * chunk
    x = 0.1 + 0.3 * torch.rand(chunks, generator=torch.Generator().manual_seed(0)) - 1
    x[3] = 0.0
    summaries = torch.zeros(1, 1, chunks, 64)
    summaries[0, 0, :, 0] = x
    q = torch.zeros(1, 4, n, 64)
    q[..., 0] = (
        8 / (alpha - 1) * (0.6 + 0.8 * torch.rand(1, 4, n, generator=torch.Generator().manual_seed(1)))
    )
    q, summaries = q.to(DEVICE, DTYPE), summaries.to(DEVICE, DTYPE)
    tau = route_chunks(q, summaries, chunk, alpha=alpha, save=True).tau[0, :, -chunk:].double()
    scores = (q[0, :, -chunk:, :1].double() * summaries[0, 0, : chunks - 1, 0].double()) * (alpha - 1) / 8
    total = (scores - tau[..., None]).clamp_min(0).pow(1 / (alpha - 1)).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=0.01)


@pytest.mark.parametrize("resident", [RESIDENT, 0])
def test_thresholds_settle_in_three_passes(resident, monkeypatch):
    """On a GPU, whose square root is not exact, settled rows once wandered until the last row was done."""
    point = Point(
        method="dash",
        phase="prefill",
        context=1024,
        batch=1,
        shape=Shape(name="one KV head", query_heads=16, kv_heads=1, head_dim=128),
        dtype="bfloat16",
        routing="topics",
        cache="warm",
        launch="eager",
    )
    problem, _ = make_problem(point, DEVICE)
    q, k, s = (x.to(DTYPE) for x in (problem.query, problem.key, problem.summary_query))
    options = DashOptions(scaling_factor=1.4)
    more = {"scaling_factor": options.scaling_factor, "save": True, "resident": resident}
    settled = route_chunks(q, summarize_chunks(k, s, 64), 64, **more).tau
    monkeypatch.setattr("dashbench.kernels.route.MAX_PASSES", 3)
    mask = check_routes(q, k, s, options, margin=1e-4, resident=resident)
    assert 0.02 < float(mask.float().mean()) < 0.4
    early = route_chunks(q, summarize_chunks(k, s, 64), 64, **more).tau
    torch.testing.assert_close(early, settled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("visibility", ["own", "completed"])
@pytest.mark.parametrize("forced", ["own", "own_and_previous"])
@pytest.mark.parametrize("alpha", [1.5, 1.25, 2.0])
def test_routing_variants(visibility, forced, alpha):
    q, k, _, s = planted(70, batch=2, seed=3)
    check_routes(q, k, s, DashOptions(16, 0.8, alpha, 1e6, "centered", forced, visibility), margin=1e-4)


@pytest.mark.parametrize(
    ("padding", "forced"), [(37, "own_and_previous"), *([(None, "own")] if DEVICE == "cuda" else [])]
)
@pytest.mark.parametrize(
    "caution", [None, *([pytest.param(0.3, id="first guess too high")] if DEVICE == "cpu" else [])]
)  # a GPU has compiled the constant
def test_lists_from_candidates_equal_lists_from_all_chunks(padding, forced, caution, monkeypatch):
    """More chunks than a block holds, so bounds and candidates pass from block to block."""
    if caution is not None:
        monkeypatch.setattr(route_kernels, "CAUTION", tl.constexpr(caution))
    chunk, chunks = 16, 66
    n = chunk * chunks
    q, k, _, s = planted(n, kv_heads=1, group=4, seed=5, strength=4.0)
    pad = None if padding is None else torch.tensor([padding], dtype=torch.int32, device=DEVICE)
    summaries = summarize_chunks(k, s, chunk, pad)
    saved, *others = (
        route_chunks(q, summaries, chunk, forced=forced, left_padding=pad, resident=0, **more)
        for more in (
            {"save": True},
            {},
            {"compact": False},
            {"launch": {"LISTING": 32}},
            {"launch": {"LISTING": 128}, "save": True},
            {"compact": False, "save": True},
        )
    )
    mask = unpack(saved.mask, chunks)
    assert 0.02 < float(mask.float().mean()) < 0.4
    for routes in (saved, *others):
        assert torch.equal(listed(routes, n), mask.cpu())
        assert routes.mask is None or torch.equal(routes.mask, saved.mask)
    rows = torch.arange(n - 40, n, device=q.device)
    first = None if pad is None else pad // chunk
    options = DashOptions(chunk_size=chunk, forced=forced)
    exact = route(q[:, :, rows].double(), summaries.double(), rows, chunks, options, first)
    expected = exact.active & (torch.arange(chunks, device=q.device) < (rows // chunk)[:, None])
    sure = exact.margin > 1e-5
    assert bool((mask[:, :, rows] == expected)[sure].all())


@pytest.mark.parametrize("forced", ["own_and_previous", *(["own"] if DEVICE == "cuda" else [])])
def test_packed_sequences_longer_than_a_block_route_as_each_alone(forced):
    """The second begins within a block; two KV heads; by candidates and by all chunks."""
    chunk, ends = 16, [16 * 34 - 5, 16 * 68 - 3]
    firsts = [0] * 34 + [34] * 34
    n = chunk * 68
    q, k, _, s = planted(n, kv_heads=2, group=1, seed=6, strength=4.0)
    sequences = torch.tensor([firsts, [ends[0]] * 34 + [ends[1]] * 34], dtype=torch.int32, device=DEVICE).T
    summaries = summarize_chunks(k, s, chunk)
    given = {"forced": forced, "save": True, "sequences": sequences.contiguous()}
    for more in ({"resident": 0}, {"compact": False, "resident": 0}):
        routes = route_chunks(q, summaries, chunk, **more, **given)
        mask = unpack(routes.mask, 68)
        for first, end in ((0, ends[0]), (34, ends[1])):
            here, chunks = slice(chunk * first, end), slice(first, first + 34)
            alone = route_chunks(
                q[:, :, here],
                summaries[:, :, chunks].contiguous(),
                chunk,
                forced=forced,
                save=True,
                resident=0,
            )
            assert torch.equal(mask[:, :, here, chunks], unpack(alone.mask, 34))
            assert int(mask[:, :, here].sum()) == int(mask[:, :, here, chunks].sum())
            assert torch.equal(routes.active_blocks[:, :, here], alone.active_blocks)
        mask, position = mask.cpu(), torch.arange(n)
        real = (position < ends[0]) | ((position >= chunk * 34) & (position < ends[1]))
        assert torch.equal(listed(routes, n)[:, :, real], mask[:, :, real])
        assert not mask[:, :, ~real].any()


def test_a_forced_chunk_of_padding_is_listed_by_every_kernel():
    """The first real chunk begins a block of chunks, the one before it is the last of another."""
    chunk, chunks, pad = 16, 34, 16 * 32 + 3
    q, k, _, s = planted(chunk * chunks, kv_heads=1, group=1, seed=4)
    padding = torch.tensor([pad], dtype=torch.int32, device=DEVICE)
    given = {"forced": "own_and_previous", "left_padding": padding, "save": True}
    summaries = summarize_chunks(k, s, chunk, padding)
    for more in ({"resident": 0}, {"resident": RESIDENT}, {"launch": {"LISTING": 32}}):
        routes = route_chunks(q, summaries, chunk, **more, **given)
        mask = unpack(routes.mask, chunks)
        assert bool(mask[0, 0, pad : chunk * 33, 31].all())
        assert torch.equal(listed(routes, chunk * chunks)[:, :, pad:], mask[:, :, pad:].cpu())
        assert torch.equal(routes.active_blocks[:, :, pad:].long(), mask[:, :, pad:].sum(-1) + 1)


@pytest.mark.parametrize("forced", ["own", "own_and_previous"])
@pytest.mark.parametrize("bias_mode", ["none", "centered", "raw"])
@pytest.mark.parametrize("bounded", ["", "padded", "packed"])
def test_scores_kept_in_registers_route_like_scores_read_again(forced, bias_mode, bounded):
    """All tiles by one kernel, all by the other, the first three chunks by one; other blocks listed."""
    chunk, chunks, n = 16, 7, 104
    q, k, _, s = planted(n, batch=1 if bounded == "packed" else 2, seed=11)
    pad = torch.tensor([0, 37], dtype=torch.int32, device=DEVICE) if bounded == "padded" else None
    first = [0, 0, 0, 3, 3, 3, 3]
    ends = [45, 45, 45, 104, 104, 104, 104]
    sequences = torch.tensor([first, ends], dtype=torch.int32, device=DEVICE).T.contiguous()
    options = {
        "forced": forced, "bias_mode": bias_mode, "left_padding": pad, "save": True, "sigma": 2.0,
        "scaling_factor": 0.7, "sequences": sequences if bounded == "packed" else None,
    }  # fmt: skip
    summaries = summarize_chunks(k, s, chunk, pad)
    again, *others = (
        route_chunks(q, summaries, chunk, **more, **options)
        for more in ({"resident": 0}, {"resident": RESIDENT}, {"resident": 3}, {"launch": {"LISTING": 32}})
    )
    mask = unpack(again.mask, chunks)
    assert 0.02 < float(mask.float().mean()) < 0.6
    for routes in others:
        assert torch.equal(unpack(routes.mask, chunks), mask)
        assert torch.equal(listed(routes, n), mask.cpu())
        assert torch.equal(routes.active_blocks, again.active_blocks)
        torch.testing.assert_close(routes.tau, again.tau, rtol=1e-4, atol=1e-4)
    if bias_mode != "none":
        tiles = again.counts.shape[-1]
        for routes in others:
            for b in range(q.shape[0]):
                for h in range(2):
                    for tile in range(tiles):
                        own, per_chunk = tile * again.tile // chunk, chunk // again.tile
                        start = per_chunk * (own * (own - 1) // 2) + tile % per_chunk * own
                        here = slice(start, start + int(again.counts[b, h, tile]))
                        bits = again.entries[b, h, here, None] >> (
                            16 + torch.arange(again.tile, device=q.device)
                        )
                        wanted = torch.where(bits & 1 == 1, again.bias[b, h, here], 0.0)
                        found = torch.where(bits & 1 == 1, routes.bias[b, h, here], 0.0)
                        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 1000, 8192, 8256, 16384])
@pytest.mark.parametrize("save", [False, True])
def test_scores_kept_in_registers_on_a_gpu(n, save):
    q, k, _, s = planted(n, 1, 2, 16, 128, 64, strength=2.0)
    summaries = summarize_chunks(k, s, 64)
    again, short = (route_chunks(q, summaries, 64, save=save, resident=r) for r in (0, RESIDENT))
    differ = (again.counts != short.counts).float().mean()
    assert float(differ) < 1e-3  # chunks on the threshold
    if save:
        check_routes(q, k, s, DashOptions(), margin=1e-4, resident=RESIDENT)


@pytest.mark.parametrize("resident", [RESIDENT, 0])
def test_flat_logits_route_everywhere(resident):
    q, k, _, s = planted(130, kv_heads=1, group=4)
    mask = check_routes(q * 1e-3, k, s, DashOptions(chunk_size=16, scaling_factor=1.0), resident=resident)
    own = torch.arange(130) // 16
    assert torch.equal(mask.sum(-1)[0, 0].cpu(), own)


@pytest.mark.parametrize("group", [1, 2, 16])
@pytest.mark.parametrize("n", [1, 16, 50])
def test_attention_over_a_given_mask(group, n):
    q, k, v, _ = planted(n, group=group, kv_heads=1, seed=group)
    g = torch.Generator().manual_seed(n)
    chunks = -(-n // 16)
    chosen = torch.rand(1, 1, n, chunks, generator=g) < 0.5
    chosen &= torch.arange(chunks) < (torch.arange(n) // 16)[:, None]
    words = torch.zeros(1, 1, n, -(-chunks // 32), dtype=torch.int32)
    for c in range(chunks):
        words[..., c // 32] |= chosen[..., c].int() << (c % 32)
    routes = routes_of_mask(words.to(DEVICE), 16, group)
    out, lse = block_sparse_attention(q, k, v, routes)
    allowed = (chosen | (torch.arange(chunks) == (torch.arange(n) // 16)[:, None])).repeat_interleave(16, -1)[
        ..., :n
    ]
    allowed = (allowed & torch.ones(n, n, dtype=torch.bool).tril()).to(DEVICE)
    scores = (q.double() @ k.double().mT * 64**-0.5).masked_fill(~allowed, float("-inf"))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=2e-3, rtol=2e-3)
    expected = scores.softmax(-1) @ v.double()
    assert float((out.double() - expected).norm() / expected.norm()) < 5e-3


def assert_close_given_routing(out, q, k, v, s, options, routes, left_padding=None):
    """Output against the specification over the kernel's own selection, so borderline chunks are not counted
    here."""
    n = q.shape[2]
    chunks = -(-n // options.chunk_size)
    active = unpack(routes.mask, chunks)
    own = torch.arange(n, device=q.device) // options.chunk_size
    active |= torch.arange(chunks, device=q.device) == own[:, None]
    expected, _ = specified(
        *(x.double() for x in (q, k, v, s)), options, active=active, left_padding=left_padding
    )
    assert float((out.double() - expected).abs().max()) < 2e-2
    assert float((out.double() - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_whole_operator(n, layout):
    q, k, v, s = planted(n, batch=2, seed=n)
    options = DashOptions(chunk_size=16)
    stored = [x.transpose(1, 2).contiguous() if layout == "bnhd" else x for x in (q, k, v)]
    out, routes = dash_attention(*stored, s, chunk_size=16, layout=layout, return_routing=True)
    out = out.transpose(1, 2) if layout == "bnhd" else out
    assert_close_given_routing(out, q, k, v, s, options, routes)


# The interpreter takes ten seconds a case: there every value once, on a GPU every pair.
BIASES = [("raw", 1e6, "own"), ("centered", 1.0, "own_and_previous"), ("centered", 1e6, "own")]
if DEVICE == "cuda":
    BIASES += [
        ("raw", 1e6, "own_and_previous"),
        ("centered", 1.0, "own"),
        ("centered", 1e6, "own_and_previous"),
    ]


@pytest.mark.parametrize(("mode", "sigma", "forced"), BIASES)
def test_bias_reaches_the_scores(mode, sigma, forced):
    q, k, v, s = planted(75, seed=6)
    options = DashOptions(16, 0.8, bias_mode=mode, sigma=sigma, forced=forced)
    given = {"chunk_size": 16, "scaling_factor": 0.8, "bias_mode": mode, "sigma": sigma, "forced": forced}
    out, routes = dash_attention(q, k, v, s, **given, return_routing=True)
    assert_close_given_routing(out, q, k, v, s, options, routes)
    unbiased = dash_attention(q, k, v, s, **{**given, "bias_mode": "none"})
    differs = float((out.double() - unbiased.double()).norm() / out.double().norm())
    assert differs > 3e-2 if sigma == 1.0 or mode == "raw" else differs < 1e-4


@pytest.mark.parametrize("padding", [0, 1, 16, 19])
def test_left_padding(padding):
    q, k, v, s = planted(70, seed=9)
    pad = torch.tensor([padding], dtype=torch.int32, device=DEVICE)
    out, routes = dash_attention(q, k, v, s, chunk_size=16, left_padding=pad, return_routing=True)
    assert_close_given_routing(out, q, k, v, s, DashOptions(chunk_size=16), routes, left_padding=pad)
    assert bool((out[:, :, :padding] == 0).all())


def test_options_that_are_not_covered_say_so():
    q, k, v, s = planted(20)
    with pytest.raises(ValueError, match="unknown option 'gamma'"):
        dash_attention(q, k, v, s, gamma=1.0)
    with pytest.raises(ValueError, match="unknown preset"):
        dash_attention(q, k, v, s, preset="papers")
    for tensors, options, message in (
        ((q[..., :32], k[..., :32], v[..., :32], s[:, :32]), {}, "head dim must be 64 or 128, got 32"),
        ((q, k, v, s), {"chunk_size": 24}, "chunk size must be"),
        ((q, k, v, s), {"alpha": 1.0}, r"alpha must be in \(1, 2\]"),
        ((q, k, v, s), {"scaling_factor": 0.0}, "scaling_factor must be a positive number, got 0.0"),
        ((q, k, v, s), {"scaling_factor": -1.0}, "scaling_factor must be a positive number, got -1.0"),
        ((q, k, v, s), {"scaling_factor": float("nan")}, "scaling_factor must be a positive number, got nan"),
        ((q[:, :3], k, v, s), {}, "3 query heads are not a multiple of 2"),
        ((q[:, :, 19:], k, v, s), {}, "attend_cache"),
        ((q, k, v.half() if v.dtype != torch.float16 else v.float(), s), {}, "query, key and value are"),
        ((q, k, v, s[:1]), {}, "summary_query must be"),
        ((q, k, v, s[None, :, None].expand(1, 2, 1, 64)), {"chunk_size": 16}, None),
        (
            (q, k, v, s[None, :, None].expand(1, 2, 1, 64)[:, :, :0]),
            {"chunk_size": 16},
            "one summary query a chunk",
        ),
    ):
        if message is None:
            dash_attention(*tensors, **options)
            continue
        with pytest.raises(ValueError, match=message):
            dash_attention(*tensors, **options)


@pytest.mark.parametrize(("mode", "sigma"), [("centered", 1e6), ("centered", 1.0), ("raw", 1e6)])
def test_gradients_flow_to_all_inputs(mode, sigma):
    q, k, v, s = (x.clone().requires_grad_() for x in planted(40, seed=4, strength=1.0))
    options = DashOptions(16, 0.5, bias_mode=mode, sigma=sigma)
    out = dash_attention(q, k, v, s, chunk_size=16, scaling_factor=0.5, bias_mode=mode, sigma=sigma)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(g)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, s)]
    specified(*exact, options)[0].backward(g.double())
    for x, e in zip((q, k, v), exact, strict=False):
        assert float((x.grad.double() - e.grad).norm() / e.grad.norm()) < 1e-2
    cosine = torch.nn.functional.cosine_similarity(s.grad.double().flatten(), exact[3].grad.flatten(), 0)
    assert torch.float16 == DTYPE or float(cosine) > 0.9  # 1/sigma gradients underflow in fp16


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["hopper", "portable"])
@pytest.mark.parametrize("n", [9, 64, 1000, 4096, 32768, 32771])
@pytest.mark.parametrize("bias_mode", ["none", "raw"])
def test_real_shape_on_a_gpu(n, kernel, bias_mode):
    q, k, v, s = planted(n, 2 if n < 8192 else 1, 2, 16, 128, 64, strength=2.0)
    if kernel == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    summaries = summarize_chunks(k, s, 64)
    routes = route_chunks(q, summaries, 64, save=True, bias_mode=bias_mode)
    out, lse = block_sparse_attention(q, k, v, routes, kernel=kernel)
    drawn = torch.randint(0, n, (23,), generator=torch.Generator().manual_seed(n))
    rows = torch.cat((drawn, torch.tensor([n - 1]))).cuda()
    chunks = -(-n // 64)
    active = unpack(routes.mask[:, :, rows], chunks) | (
        torch.arange(chunks, device="cuda") == (rows // 64)[:, None]
    )
    options = DashOptions(bias_mode=bias_mode)
    expected, _ = specified(*(x.double() for x in (q, k, v, s)), options, rows=rows, active=active)
    assert float((out[:, :, rows].double() - expected).norm() / expected.norm()) < 5e-3
    other, other_lse = block_sparse_attention(q, k, v, routes, kernel="portable")
    assert float((out - other).float().norm() / other.float().norm()) < 5e-3
    torch.testing.assert_close(lse, other_lse, rtol=0, atol=2e-3)


def gated_case(n, kv_heads, group, dim, chunk, strength=1.0):
    q, k, v, s = planted(n, 1, kv_heads, group, dim, chunk, strength=strength)
    routes = route_chunks(q, summarize_chunks(k, s, chunk), chunk, save=True)
    draw = torch.Generator().manual_seed(7)
    gate = torch.rand(1, kv_heads * group, n, 3, generator=draw).to(q)[..., 1]
    before = torch.randn(q.shape, generator=draw).to(q)
    return (q, k, v, routes), gate, before


def test_a_gated_output_is_added_to_what_is_there():
    case, gate, before = gated_case(70, 2, 2, 64, 16)
    plain, lse = block_sparse_attention(*case)
    gated, _ = block_sparse_attention(*case, gate=gate)
    product = plain.double() * gate.double()[..., None]
    bound = 5e-3 if DEVICE == "cuda" else 1e-6
    assert float((gated.double() - product).norm() / product.norm()) < bound
    summed = before.clone()
    out, same = block_sparse_attention(*case, gate=gate, onto=summed)
    assert out is summed
    assert torch.equal(lse, same)
    wanted = before.double() + product
    assert float((out.double() - wanted).norm() / wanted.norm()) < bound
    with pytest.raises(ValueError, match="use gated_sum"):
        block_sparse_attention(case[0].requires_grad_(), *case[1:], gate=gate)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [9, 1000, 16384])
def test_a_gated_sum_on_a_gpu(n):
    """The Hopper kernel and the portable one, from their own plain outputs; heads inside."""
    case, gate, before = gated_case(n, 2, 16, 128, 64, strength=2.0)
    inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case[:3]]
    plain, _ = block_sparse_attention(*case, kernel="portable")
    wanted = before.double() + plain.double() * gate.double()[..., None]
    kernels = {"portable", kernel_for(*case)}
    for kernel in kernels:
        for tensors in (case[:3], inside):
            out, _ = block_sparse_attention(*tensors, case[3], gate=gate, onto=before.clone(), kernel=kernel)
            assert float((out.double() - wanted).norm() / wanted.norm()) < 5e-3, kernel


@pytest.mark.gpu
def test_flat_logits_with_many_chunks_on_a_gpu():
    q, k, _, s = planted(64 * 1500, kv_heads=1, group=16, dim=128, chunk=64)
    q = q * 0.02
    summaries = summarize_chunks(k, s, 64)
    routes = route_chunks(q, summaries, 64, save=True)
    rows = torch.arange(64 * 1500 - 32, 64 * 1500, device="cuda")
    exact = route(q[:, :, rows].double(), summaries.double(), rows, 1500, DashOptions())
    mask = unpack(routes.mask[:, :, rows], 1500)
    expected = exact.active & (torch.arange(1500, device="cuda") < (rows // 64)[:, None])
    sure = exact.margin > 1e-5
    assert bool((mask == expected)[sure].all())
