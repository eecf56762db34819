"""Block scores for Hopper GPUs, in Gluon: the same as the scores kernel of `selection`, warp-specialised.

A program is persistent, as `hopper`'s are. The producer brings a tile's queries and the compressed keys up to
its last query; two warpgroups take turns at blocks of 64 windows. Each issues the product of its next block
before it turns the last one into weights and sums them, so exponentials and products overlap within a
warpgroup and between both.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N query rows, L windows, D head dim, T queries a
tile.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dashbench.kernels import hopper
from dashbench.kernels.hopper import barriers, bring, place_of, work_count

LOG2_E = 1.4426950408889634
WINDOWS = 64
"""Of a step, one warpgroup's matrix instruction: four windows for each of sixteen blocks of tokens."""
STAGES = 6
"""Blocks of compressed keys in flight: 6 × 16 KiB at D = 128, beside two tiles of queries."""


@gluon.jit
def _blocks(tile, start, rows, TILE: gl.constexpr, WINDOWS: gl.constexpr, STRIDE: gl.constexpr):
    """Blocks of windows up to the last query's own block, which is all that the choice reads."""
    own = (start + gl.minimum(tile * TILE + TILE, rows) - 1) // (4 * STRIDE)
    return ((own + 1) * 4 + WINDOWS - 1) // WINDOWS


@gluon.jit
def _produce(
    query_descriptor, key_descriptor, sizes, memory,
    GROUP: gl.constexpr, TILE: gl.constexpr, WINDOWS: gl.constexpr, STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Loads every tile's queries, then its compressed keys from the first on."""
    heads, rows, _, start, tiles, kv_heads, _ = sizes
    queries, query_full, query_empty, ring, key_full, key_empty = memory
    turn = 0
    for n in range(work_count(heads * tiles)):
        _, tile, batch, kv_head = place_of(n, heads, kv_heads, tiles)
        bring(
            query_descriptor,
            batch,
            kv_head * GROUP,
            tile * TILE,
            queries,
            query_full,
            query_empty,
            n & 1,
            n >> 1,
        )
        blocks = _blocks(tile, start, rows, TILE, WINDOWS, STRIDE)
        for j in range(blocks):
            slot, use = (turn + j) % STAGES, (turn + j) // STAGES
            bring(key_descriptor, batch, kv_head, j * WINDOWS, ring, key_full, key_empty, slot, use)
        turn += blocks


@gluon.jit
def _product(q, zero, ring, key_full, turn, STAGES: gl.constexpr):
    """KQᵀ of block `turn`, under way."""
    slot = turn % STAGES
    k = ring.index(slot).reshape([zero.shape[0], q.shape[0]])
    mbarrier.wait(key_full.index(slot), (turn // STAGES) & 1)
    return warpgroup_mma(k, q, zero, use_acc=False, is_async=True)


@gluon.jit
def _give(
    token, later, key_empty, turn, j, own_part, next_part, place,
    GROUP: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, MAX_RULE: gl.constexpr,
):  # fmt: skip
    """Waits until `later` products are under way, which leaves that of a tile's block j; its weights, summed
    over the heads and carried to its blocks, see `selection.block_parts`."""
    level, limit, base, width, first_query, rows, scale_log2 = place
    s = warpgroup_mma_wait(later, deps=(token,))
    mbarrier.arrive(key_empty.index((turn + j) % STAGES), count=1)
    WINDOWS: gl.constexpr = s.shape[0]
    S: gl.constexpr = s.type.layout
    weights = gl.exp2(s * scale_log2 - level[None, :])
    first = j * WINDOWS
    window = first + gl.arange(0, WINDOWS, gl.SliceLayout(1, S))
    weights = gl.where(window[:, None] < limit[None, :], weights, 0.0)
    importance = gl.sum(gl.reshape(weights, [WINDOWS, GROUP, TILE]), 1)
    cell = gl.arange(0, WINDOWS, gl.SliceLayout(1, importance.type.layout)) % 4
    last = gl.sum(gl.reshape(gl.where((cell == 3)[:, None], importance, 0.0), [WINDOWS // 4, 4, TILE]), 1)
    cells = gl.reshape(importance, [WINDOWS // 4, 4, TILE])
    if MAX_RULE:
        own = gl.max(cells, 1)
    else:
        own = 2.0 * gl.sum(cells, 1) - last
    OUT: gl.constexpr = own.type.layout
    block = first // 4 + gl.arange(0, WINDOWS // 4, gl.SliceLayout(1, OUT))
    query = first_query + gl.arange(0, TILE, gl.SliceLayout(0, OUT))
    out = base + query.to(gl.int64)[None, :] * width + block[:, None]
    inside = (query < rows)[None, :] & (block < width)[:, None]
    gl.store(own_part + out, own, mask=inside)
    gl.store(next_part + out, last, mask=inside)


@gluon.jit
def _consume(
    lse, lse_stride_b, lse_stride_h, own_part, next_part, sizes, scale_log2, memory,
    PART: gl.constexpr, GROUP: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr,
    WINDOWS: gl.constexpr, STRIDE: gl.constexpr, STAGES: gl.constexpr, MAX_RULE: gl.constexpr,
):  # fmt: skip
    """Every other block's scores, for all queries of a tile."""
    ROWS: gl.constexpr = GROUP * TILE
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, ROWS, 16])
    heads, rows, count, start, tiles, kv_heads, width = sizes
    queries, query_full, query_empty, ring, key_full, key_empty = memory
    row = gl.arange(0, ROWS, gl.SliceLayout(0, S))
    zero = gl.zeros([WINDOWS, ROWS], gl.float32, S)
    turn = 0
    for n in range(work_count(heads * tiles)):
        index, tile, batch, kv_head = place_of(n, heads, kv_heads, tiles)
        query = tile * TILE + row % TILE
        offset = batch.to(gl.int64) * lse_stride_b + query
        offset += (kv_head * GROUP + row // TILE).to(gl.int64) * lse_stride_h
        level = gl.load(lse + offset, mask=query < rows, other=float("inf")) * 1.4426950408889634
        limit = gl.minimum(gl.maximum(start + query + (1 - STRIDE), 0) // STRIDE, count)
        base = index.to(gl.int64) * rows * width
        blocks = _blocks(tile, start, rows, TILE, WINDOWS, STRIDE)
        # Blocks in turn, whatever tile they belong to.
        mine = (turn + PART) & 1
        half = n & 1
        q = queries.index(half).reshape([ROWS, HEAD_DIM]).permute((1, 0))
        mbarrier.wait(query_full.index(half), (n >> 1) & 1)
        if mine < blocks:
            place = (level, limit, base, width, tile * TILE, rows, scale_log2)
            # While one product is turned into weights the next is under way. Results in flight cannot move
            # between registers: they have two places, and the loop two turns.
            even = _product(q, zero, ring, key_full, turn + mine, STAGES)
            for j in range(mine + 2, blocks - 2, 4):
                odd = _product(q, zero, ring, key_full, turn + j, STAGES)
                _give(
                    even, 1, key_empty, turn, j - 2, own_part, next_part, place, GROUP, TILE, STAGES, MAX_RULE
                )
                even = _product(q, zero, ring, key_full, turn + j + 2, STAGES)
                _give(odd, 1, key_empty, turn, j, own_part, next_part, place, GROUP, TILE, STAGES, MAX_RULE)
            done = mine + (blocks - mine - 1) // 4 * 4
            if done + 2 < blocks:
                odd = _product(q, zero, ring, key_full, turn + done + 2, STAGES)
                _give(
                    even, 1, key_empty, turn, done, own_part, next_part, place, GROUP, TILE, STAGES, MAX_RULE
                )
                _give(
                    odd, 0, key_empty, turn, done + 2, own_part, next_part, place, GROUP, TILE, STAGES,
                    MAX_RULE,
                )  # fmt: skip
            else:
                _give(
                    even, 0, key_empty, turn, done, own_part, next_part, place, GROUP, TILE, STAGES, MAX_RULE
                )
        mbarrier.arrive(query_empty.index(half), count=1)
        turn += blocks


@gluon.jit(do_not_specialize=["heads", "rows", "count", "start", "tiles", "width"])
def _scores_kernel(
    query_descriptor, key_descriptor, lse, own_part, next_part, lse_stride_b, lse_stride_h,
    heads, rows, count, start, tiles, kv_heads, width, scale_log2,
    GROUP: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr, WINDOWS: gl.constexpr,
    STRIDE: gl.constexpr, STAGES: gl.constexpr, MAX_RULE: gl.constexpr,
):  # fmt: skip
    """A persistent program: its share of all tiles. heads: KV heads of all sequences."""
    dtype: gl.constexpr = key_descriptor.dtype
    queries = gl.allocate_shared_memory(dtype, [2, 1, GROUP, TILE, HEAD_DIM], query_descriptor.layout)
    ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, WINDOWS, HEAD_DIM], key_descriptor.layout)
    query_full, query_empty = barriers(2, 1), barriers(2, 2)  # both consumers read a tile's queries
    key_full, key_empty = barriers(STAGES, 1), barriers(STAGES, 1)
    fence_async_shared()
    memory = (queries, query_full, query_empty, ring, key_full, key_empty)
    sizes = (heads, rows, count, start, tiles, kv_heads, width)
    gl.warp_specialize(
        [
            (_consume, (
                lse, lse_stride_b, lse_stride_h, own_part, next_part, sizes, scale_log2, memory,
                0, GROUP, TILE, HEAD_DIM, WINDOWS, STRIDE, STAGES, MAX_RULE,
            )),
            (_consume, (
                lse, lse_stride_b, lse_stride_h, own_part, next_part, sizes, scale_log2, memory,
                1, GROUP, TILE, HEAD_DIM, WINDOWS, STRIDE, STAGES, MAX_RULE,
            )),
            (_produce, (
                query_descriptor, key_descriptor, sizes, memory, GROUP, TILE, WINDOWS, STRIDE, STAGES,
            )),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # their registers a thread
    )  # fmt: skip


def block_scores_hopper(
    query: torch.Tensor,
    compressed: torch.Tensor,
    lse: torch.Tensor,
    own_part: torch.Tensor,
    next_part: torch.Tensor,
    start: int,
    width: int,
    stride: int,
    max_rule: bool,
) -> None:
    """Writes what each block's own windows give to it and what the last of them gives to the next block, for
    inputs that `hopper.supports` accepts.

    Args:
        query: `[B, Hq, N, 128]`; row n at position `start + n`.
        compressed: `[B, Hkv, L, 128]`.
        lse: `[B, Hq, N]` fp32.
        own_part, next_part: B · Hkv · N · width fp32 to write, in this order.
        start, width, stride: position of row 0; blocks of a row; tokens between two windows.
        max_rule: the rule is `max`.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, group = compressed.shape[1], heads // compressed.shape[1]
    tile = hopper.tile_of(group)
    tiles = triton.cdiv(rows, tile)
    _scores_kernel[(hopper.programs(tiles * batch * kv_heads, query.device),)](
        hopper.descriptor(query, group, tile), hopper.descriptor(compressed, 1, WINDOWS), lse, own_part,
        next_part, *lse.stride()[:2], batch * kv_heads, rows, compressed.shape[2], start, tiles, kv_heads,
        width, dim**-0.5 * LOG2_E,
        GROUP=group, TILE=tile, HEAD_DIM=dim, WINDOWS=WINDOWS, STRIDE=stride, STAGES=STAGES,
        MAX_RULE=max_rule, num_warps=4,
    )  # fmt: skip
