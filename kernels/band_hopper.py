"""Attention over a band of keys for Hopper GPUs, in Gluon: the same function as `band.band_forward`,
warp-specialised.

The kernel is `hopper`'s. A tile's blocks of keys are taken from the latest to the earliest: first those that
not every row sees to their end, then those that all rows see whole, then, of a window, those that not every
row sees from their beginning. Only the middle ones, which are most, need no mask.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N query rows, L keys of the band, D head dim, T
queries a tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dashbench.kernels import hopper
from dashbench.kernels.gated_sum import gate_and_strides
from dashbench.kernels.hopper import (
    bring_block,
    bring_tile,
    free_output,
    free_query,
    give_rows,
    load_gate,
    open_memory,
    place_of,
    scores_of_first,
    scores_while_pending,
    store_lse,
    take_query,
    weigh_last,
    weigh_values,
    work_count,
)

if TYPE_CHECKING:
    from dashbench.kernels.band import Band

LOG2_E = 1.4426950408889634


@gluon.jit
def _seen(position, count, KERNEL: gl.constexpr, STRIDE: gl.constexpr):
    """Keys that lie wholly in the past of a query at `position`."""
    return gl.minimum(gl.maximum(position + (1 + STRIDE - KERNEL), 0) // STRIDE, count)


@gluon.jit
def _blocks(
    tile, start, rows, count, window,
    TILE: gl.constexpr, BLOCK: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """(last block of a tile, its blocks, how many of them from the last on have an upper mask, how many these
    and those without a mask are); one block at least, which a tile that sees nothing masks whole."""
    earliest = start + tile * TILE
    latest = start + gl.minimum(tile * TILE + TILE, rows) - 1
    begin, unmasked = 0, 0
    if WINDOW:
        begin = gl.maximum(earliest - window + 1, 0) // BLOCK
        unmasked = (gl.maximum(latest - window + 1, 0) + BLOCK - 1) // BLOCK
    end = gl.maximum((_seen(latest, count, KERNEL, STRIDE) + BLOCK - 1) // BLOCK, begin + 1)
    upper = gl.maximum(end - _seen(earliest, count, KERNEL, STRIDE) // BLOCK, 1)
    upper = gl.minimum(upper, end - begin)
    middle = gl.minimum(gl.maximum(end - unmasked, upper), end - begin)
    return end - 1, end - begin, upper, middle


@gluon.jit
def _produce(
    query_descriptor, key_descriptor, value_descriptor, out_descriptor, sizes, rings, queries, outputs,
    GROUP: gl.constexpr, TILE: gl.constexpr, BLOCK: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, STAGES: gl.constexpr, ONTO: gl.constexpr,
):  # fmt: skip
    """Loads every tile's queries and its blocks from the latest to the earliest."""
    heads, rows, count, start, tiles, kv_heads, window = sizes
    turn = 0
    for n in range(work_count(heads * tiles)):
        _, tile, batch, kv_head = place_of(n, heads, kv_heads, tiles)
        last, blocks, _, _ = _blocks(tile, start, rows, count, window, TILE, BLOCK, KERNEL, STRIDE, WINDOW)
        bring_tile(query_descriptor, queries, n, batch, kv_head * GROUP, tile)
        for j in range(blocks):
            bring_block(
                key_descriptor, value_descriptor, rings, turn + j, batch, kv_head, (last - j) * BLOCK, STAGES
            )
        if ONTO:
            bring_tile(out_descriptor, outputs, n, batch, kv_head * GROUP, tile)
        turn += blocks


@gluon.jit
def _masked(s, first, limit, position, window, WINDOW: gl.constexpr, S: gl.constexpr):
    """Scores of the keys from `first` on, -inf where a row does not see one."""
    column = first + gl.arange(0, s.shape[1], gl.SliceLayout(0, S))
    seen = column[None, :] < limit[:, None]
    if WINDOW:
        seen = seen & (column[None, :] > (position - window)[:, None])
    return gl.where(seen, s, -float("inf"))


@gluon.jit
def _step(
    q, zero, p, accumulator, peak, total, rings, turn, first, limit, position, window, scale_log2,
    MASKED: gl.constexpr, WINDOW: gl.constexpr, S: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(peak, total, accumulator, weights) after block `turn`, which begins with key `first`."""
    s, o_token = scores_while_pending(q, zero, p, accumulator, rings, turn, STAGES)
    if MASKED:
        s = _masked(s, first, limit, position, window, WINDOW, S)
    new_peak = gl.maximum(peak, gl.max(s, 1) * scale_log2)
    shift = new_peak
    if MASKED:
        # A row that has seen nothing yet: exp2(-inf - 0) = 0 on either side.
        shift = gl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = gl.exp2(s * scale_log2 - shift[:, None])
    rescale = gl.exp2(peak - shift)
    total, accumulator, p = weigh_values(weights, rescale, total, p, o_token, rings, turn, STAGES)
    return new_peak, total, accumulator, p


@gluon.jit
def _consume(
    out_descriptor, lse, lse_stride_h, gate, gate_strides, sizes, scale_log2, rings, queries, outputs,
    PART: gl.constexpr, GROUP: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr, KERNEL: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr,
    STAGES: gl.constexpr, GATED: gl.constexpr, ONTO: gl.constexpr,
):  # fmt: skip
    """Attention of this warpgroup's queries over the blocks as they arrive."""
    QUERIES: gl.constexpr = TILE // 2
    ROWS: gl.constexpr = QUERIES * GROUP
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BLOCK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HEAD_DIM, 16])
    Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S, k_width=2)
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    heads, rows, count, start, tiles, kv_heads, window = sizes
    query_in_part = gl.arange(0, ROWS, S_ROW) % QUERIES
    zero = gl.zeros([ROWS, BLOCK], gl.float32, S)
    turn = 0
    for n in range(work_count(heads * tiles)):
        index, tile, batch, kv_head = place_of(n, heads, kv_heads, tiles)
        first = tile * TILE + PART * QUERIES
        position = start + first + query_in_part
        limit = _seen(position, count, KERNEL, STRIDE)
        last, blocks, upper, middle = _blocks(
            tile, start, rows, count, window, TILE, BLOCK, KERNEL, STRIDE, WINDOW
        )
        if GATED:
            factor = load_gate(gate, gate_strides, batch, kv_head * GROUP, first, rows, QUERIES, ROWS, S_ROW)
        q = take_query(queries, n, PART, ROWS, HEAD_DIM, Q)

        s = scores_of_first(q, zero, rings, turn, STAGES)
        free_query(queries, PART)
        free_output(outputs, n, PART, ONTO)
        s = _masked(s, last * BLOCK, limit, position, window, WINDOW, S)
        peak = gl.max(s, 1) * scale_log2
        shift = gl.where(peak == -float("inf"), 0.0, peak)
        weights = gl.exp2(s * scale_log2 - shift[:, None])
        total = gl.sum(weights, 1)
        p = gl.convert_layout(weights.to(q.dtype), P)
        accumulator = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
        for j in range(1, upper):
            peak, total, accumulator, p = _step(
                q, zero, p, accumulator, peak, total, rings, turn + j, (last - j) * BLOCK, limit, position,
                window, scale_log2, True, WINDOW, S, STAGES,
            )  # fmt: skip
        for j in range(upper, middle):
            peak, total, accumulator, p = _step(
                q, zero, p, accumulator, peak, total, rings, turn + j, (last - j) * BLOCK, limit, position,
                window, scale_log2, False, WINDOW, S, STAGES,
            )  # fmt: skip
        if WINDOW:
            for j in range(middle, blocks):
                peak, total, accumulator, p = _step(
                    q, zero, p, accumulator, peak, total, rings, turn + j, (last - j) * BLOCK, limit,
                    position, window, scale_log2, True, WINDOW, S, STAGES,
                )  # fmt: skip
        accumulator = weigh_last(p, accumulator, rings, turn + blocks - 1, STAGES)
        base = index.to(gl.int64) * GROUP * lse_stride_h
        scale = store_lse(lse, base, lse_stride_h, peak, total, first, rows, QUERIES)
        if GATED:
            scale *= factor
        accumulator *= gl.convert_layout(scale, O_ROW)[:, None]
        give_rows(accumulator, out_descriptor, outputs, n, batch, kv_head * GROUP, first, PART, ONTO)
        turn += blocks
    free_output(outputs, 0, PART, ONTO)


@gluon.jit(do_not_specialize=["heads", "rows", "count", "start", "tiles", "window"])
def _band_kernel(
    query_descriptor, key_descriptor, value_descriptor, out_descriptor, lse, lse_stride_h, gate,
    gate_stride_b, gate_stride_h, gate_stride_n, heads, rows, count, start, tiles, kv_heads, window,
    scale_log2,
    GROUP: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr,
    KERNEL: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, ONTO: gl.constexpr,
):  # fmt: skip
    """A persistent program: its share of all tiles, see `hopper`. heads: KV heads of all sequences."""
    rings, queries, outputs = open_memory(key_descriptor, query_descriptor, STAGES)
    sizes = (heads, rows, count, start, tiles, kv_heads, window)
    strides = (gate_stride_b, gate_stride_h, gate_stride_n)
    gl.warp_specialize(
        [
            (_consume, (
                out_descriptor, lse, lse_stride_h, gate, strides, sizes, scale_log2, rings, queries, outputs,
                0, GROUP, TILE, HEAD_DIM, BLOCK, KERNEL, STRIDE, WINDOW, STAGES, GATED, ONTO,
            )),
            (_consume, (
                out_descriptor, lse, lse_stride_h, gate, strides, sizes, scale_log2, rings, queries, outputs,
                1, GROUP, TILE, HEAD_DIM, BLOCK, KERNEL, STRIDE, WINDOW, STAGES, GATED, ONTO,
            )),
            (_produce, (
                query_descriptor, key_descriptor, value_descriptor, out_descriptor, sizes, rings, queries,
                outputs, GROUP, TILE, BLOCK, KERNEL, STRIDE, WINDOW, STAGES, ONTO,
            )),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # their registers a thread
    )  # fmt: skip


def band_hopper(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: Band,
    start: int,
    lse: torch.Tensor,
    gate: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `band.band_forward` with values, for inputs that `hopper.supports` accepts; the output.

    Args:
        query: `[B, Hq, N, 128]`.
        key, value: `[B, Hkv, L, 128]`.
        band, start, lse, gate, onto: as there; lse `[B, Hq, N]` is written.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, count = key.shape[1], key.shape[2]
    group = heads // kv_heads
    tile = hopper.tile_of(group)
    tiles = triton.cdiv(rows, tile)
    out = torch.empty_like(query) if onto is None else onto
    gates, gate_strides = gate_and_strides(gate, lse)
    boxes = [hopper.descriptor(x, group, tile // hopper.CONSUMERS) for x in (query, out)]
    pairs = [hopper.descriptor(x, 1, hopper.BLOCK) for x in (key, value)]
    _band_kernel[(hopper.programs(tiles * batch * kv_heads, query.device),)](
        boxes[0], *pairs, boxes[1], lse,
        lse.stride(1), gates, *gate_strides,
        batch * kv_heads, rows, count, start, tiles, kv_heads, band.window, dim**-0.5 * LOG2_E,
        GROUP=group, TILE=tile, HEAD_DIM=dim, BLOCK=hopper.BLOCK, KERNEL=band.kernel, STRIDE=band.stride,
        WINDOW=band.window > 0, STAGES=hopper.STAGES, GATED=gate is not None, ONTO=onto is not None,
        num_warps=4,
    )  # fmt: skip
    return out
