"""Selection kernels against the eager definition in fp64: blocks as sets, ties from the left, slabs."""

import pytest
import torch
import triton
import triton.language as tl

from dashbench.baselines.block_selection import (
    TopBlocks,
    Windows,
    scores_to_blocks,
    tie_margin,
    visible_softmax,
)
from dashbench.baselines.selected_blocks import blocks_of_mask
from dashbench.kernels.band import Band, band_forward
from dashbench.kernels.compress import mean_windows
from dashbench.kernels.selection import BlockChoice, choose_blocks, kernel_for_scores, select_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def chosen_by_kernels(query, compressed, choice, **options):
    stride, tokens = choice.stride, query.shape[2]
    lse = band_forward(query, compressed, None, Band(2 * stride, stride))[1]
    mask, active = select_blocks(query, compressed, lse, choice, **options)
    positions = torch.arange(tokens, device=query.device)
    blocks = -(-tokens // choice.block_size)
    assert mask.shape[-1] == -(-blocks // 32)
    chosen = blocks_of_mask(mask, positions, choice.block_size, blocks)
    assert torch.equal(chosen.sum(-1), active)
    assert not blocks_of_mask(mask, positions, choice.block_size, 32 * mask.shape[-1])[..., blocks:].any()
    return chosen


def chosen_by_definition(query, compressed, choice):
    """(exact selection, ties within rounding)."""
    group, tokens = query.shape[1] // compressed.shape[1], query.shape[2]
    positions = torch.arange(tokens, device=query.device)
    windows = Windows(2 * choice.stride, choice.stride)
    grouped = query.double().unflatten(1, (compressed.shape[1], group))
    logits = grouped @ compressed.double()[:, :, None].mT * query.shape[-1] ** -0.5
    visible = windows.visible(positions, compressed.shape[2])
    blocks = -(-tokens // choice.block_size)
    importance = visible_softmax(logits, visible).sum(2)
    scores = scores_to_blocks(importance, windows, choice.block_size, blocks, choice.rule)
    top = TopBlocks(choice.block_size, choice.top_k, choice.init_blocks, choice.local_blocks)
    largest = torch.zeros_like(scores[..., :1])
    if compressed.shape[2]:
        largest = (logits.abs() * visible).amax((2, -1)).unsqueeze(-1)
    return top.select(scores, positions), top.undecided(scores, positions, tie_margin(largest, query.dtype))


def inputs(batch, kv_heads, group, tokens, dim=64, dtype=torch.float32, stride=4):
    draw = torch.Generator().manual_seed(tokens)
    query = (2 * torch.randn(batch, kv_heads * group, tokens, dim, generator=draw)).to(DEVICE, dtype)
    key = torch.randn(batch, kv_heads, tokens, dim, generator=draw).to(DEVICE, dtype)
    return query, mean_windows(key, stride)


@pytest.mark.parametrize("rule", ["max", "sum"])
@pytest.mark.parametrize(
    "batch,kv_heads,group,tokens,top_k,init,local",
    [(1, 2, 4, 90, 4, 1, 2), (2, 1, 3, 75, 3, 0, 1), (1, 1, 2, 10, 2, 1, 1), (1, 1, 1, 70, 40, 1, 1)],
)
def test_blocks_are_those_of_the_definition(rule, batch, kv_heads, group, tokens, top_k, init, local):
    query, compressed = inputs(batch, kv_heads, group, tokens)
    choice = BlockChoice(16, top_k, init, local, rule)
    exact, ties = chosen_by_definition(query, compressed, choice)
    found = chosen_by_kernels(query, compressed, choice)
    assert not ((found != exact) & ~ties).any()
    assert ties.float().mean() < 0.05, "a case of ties alone proves nothing"
    if tokens > 64 and top_k < 5:
        assert (exact.sum(-1) == top_k).any()


def test_slabs_of_queries_change_nothing():
    query, compressed = inputs(1, 1, 64, 70)
    choice = BlockChoice(16, 3, 1, 1, "max")
    whole = chosen_by_kernels(query, compressed, choice)
    # A tile is two queries of 64 heads: the smallest slab.
    assert torch.equal(chosen_by_kernels(query, compressed, choice, scratch_bytes=1), whole)


def test_equal_scores_are_taken_from_the_left():
    """Keys all alike give all windows that a query sees one score; the best blocks are then the first."""
    query, _ = inputs(1, 1, 2, 80)
    compressed = torch.ones(1, 1, 19, 64, device=DEVICE)
    found = chosen_by_kernels(query, compressed, BlockChoice(16, 4, 0, 1, "max"))
    assert found[0, 0, 79].nonzero().flatten().tolist() == [0, 1, 2, 4]


@triton.jit
def _choose(scores, out, own, top_k, init, local, BLOCKS: tl.constexpr, FOURTHS: tl.constexpr):
    row, block = tl.program_id(0), tl.arange(0, BLOCKS)
    score = tl.load(scores + row * BLOCKS + block)
    tl.store(out + row * BLOCKS + block, choose_blocks(score, block, own, top_k, init, local, FOURTHS))


@pytest.mark.parametrize("fourths", [False, True])
def test_any_scores_are_ranked_like_a_stable_sort(fourths):
    """Ties, zeros, infinities, scores that differ in the last bit, all forced, too few blocks."""
    draw = torch.Generator().manual_seed(2)
    rows = torch.rand(6, 64, generator=draw, dtype=torch.float32)
    rows[1] = rows[1].round(decimals=1)
    rows[2] = torch.zeros(64)
    bits = torch.ones(64, dtype=torch.float32).view(torch.int32)
    rows[3] = (bits + torch.randint(0, 3, (64,), generator=draw).int()).view(torch.float32)
    rows[4, ::7] = torch.inf
    rows[5] *= 2.0 ** torch.randint(-120, 5, (64,), generator=draw)
    for own, top_k, init, local in (
        (63, 9, 1, 2),
        (50, 3, 1, 2),
        (60, 61, 1, 1),
        (5, 9, 0, 1),
        (63, 40, 0, 1),
    ):
        out = torch.empty(6, 64, dtype=torch.int32, device=DEVICE)
        _choose[(6,)](rows.to(DEVICE), out, own, top_k, init, local, BLOCKS=64, FOURTHS=fourths)
        for row, scores in enumerate(rows.tolist()):
            rank = {b: (not (b < init or b > own - local), -scores[b], b) for b in range(own + 1)}
            best = sorted(sorted(rank, key=rank.get)[:top_k])
            assert out[row].nonzero().flatten().tolist() == best, (row, own, top_k)


def test_a_planted_block_is_found_wherever_it_lies():
    tokens = 96
    query = torch.zeros(1, 2, tokens, 64, device=DEVICE)
    query[..., 0] = 8.0
    for planted in (0, 2, 4):
        key = torch.zeros(1, 1, tokens, 64, device=DEVICE)
        key[:, :, 16 * planted + 4 : 16 * planted + 12, 0] = 8.0
        found = chosen_by_kernels(query, mean_windows(key, 4), BlockChoice(16, 2, 0, 1, "sum"))
        assert found[0, 0, -1].nonzero().flatten().tolist() == [planted, 5]


def test_what_cannot_be_chosen_is_refused():
    query, compressed = inputs(1, 1, 1, 40)
    with pytest.raises(ValueError, match="forced"):
        BlockChoice(16, 2, 1, 2, "max")
    with pytest.raises(ValueError, match="rule"):
        BlockChoice(16, 2, 0, 1, "mean")
    lse = torch.zeros(1, 1, 40, device=DEVICE)
    with pytest.raises(ValueError, match="not those"):
        select_blocks(query, compressed[:, :, 1:], lse, BlockChoice(16, 2, 0, 1, "max"))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["max", "sum"])
@pytest.mark.parametrize("tokens,top_k", [(2048, 20), (8192, 32), (5000, 100)])
def test_real_shapes_on_a_gpu(rule, tokens, top_k):
    query, compressed = inputs(1, 2, 16, tokens, 128, torch.bfloat16, stride=16)
    choice = BlockChoice(64, top_k, 1, 3, rule)
    exact, ties = chosen_by_definition(query, compressed, choice)
    found = chosen_by_kernels(query, compressed, choice)
    assert not ((found != exact) & ~ties).any()
    assert torch.equal(found.sum(-1), exact.sum(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("rule", ["max", "sum"])
@pytest.mark.parametrize("group,tokens", [(16, 40), (16, 100), (8, 3001), (16, 4096)])
def test_hopper_scores_on_a_gpu(group, tokens, rule):
    """Against the definition in fp64; slabs of one tile, and the portable kernel, choose the same."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    query, compressed = inputs(1, 2, group, tokens, 128, torch.bfloat16, 16)
    choice = BlockChoice(64, 9, 1, 2, rule)
    assert kernel_for_scores(query, compressed) == "hopper"
    exact, ties = chosen_by_definition(query, compressed, choice)
    found = chosen_by_kernels(query, compressed, choice)
    assert not ((found != exact) & ~ties).any()
    assert ties.float().mean() < 0.2
    portable = chosen_by_kernels(query, compressed, choice, kernel="portable")
    assert float((found != portable).float().mean()) < 1e-3
    if tokens < 4096:
        assert torch.equal(chosen_by_kernels(query, compressed, choice, scratch_bytes=1), found)
