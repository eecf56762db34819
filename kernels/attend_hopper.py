"""Block-sparse attention for Hopper GPUs, in Gluon: the same function as `attend`, warp-specialised.

The kernel is `hopper`'s: the producer walks the tiles' lists, the consumers a chunk at a time, the own chunk
first.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N tokens, D head dim, C chunk size, T queries a
tile.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dashbench.kernels import hopper
from dashbench.kernels.backward_lists import list_capacity
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
from dashbench.kernels.route import Routes

LOG2_E = 1.4426950408889634


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: Routes,
    left_padding: torch.Tensor | None,
    onto: torch.Tensor | None = None,
) -> bool:
    """Whether this kernel takes these inputs: what `hopper.supports` says, C = 64 and no padding."""
    return (
        left_padding is None
        and routes.chunk_size == hopper.BLOCK
        and hopper.supports(query, key, value, routes.tile, onto)
    )


@gluon.jit
def _list_of(index, tile, tiles, entries, counts, capacity, TILE: gl.constexpr, CHUNK: gl.constexpr):
    """(a tile's own chunk, first entry of its list, entries)."""
    own = tile * TILE // CHUNK
    # As backward_lists.tile_list_start: tiles of one chunk list at most the chunks before it.
    PER_CHUNK: gl.constexpr = CHUNK // TILE
    wide = own.to(gl.int64)
    start = PER_CHUNK * (wide * (wide - 1) // 2) + (tile % PER_CHUNK) * wide
    start += index.to(gl.int64) * capacity
    return own, start, gl.load(counts + index.to(gl.int64) * tiles + tile)


@gluon.jit
def _produce(
    query_descriptor, key_descriptor, value_descriptor, out_descriptor, lists, sizes,
    rings, queries, outputs,
    GROUP: gl.constexpr, TILE: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, ONTO: gl.constexpr,
):  # fmt: skip
    """Loads every tile's queries, its own chunk, then the listed ones."""
    entries, counts, _ = lists
    heads, _, tiles, capacity, kv_heads = sizes
    turn = 0
    for n in range(work_count(heads * tiles)):
        index, tile, batch, kv_head = place_of(n, heads, kv_heads, tiles)
        chunk, start, count = _list_of(index, tile, tiles, entries, counts, capacity, TILE, CHUNK)
        bring_tile(query_descriptor, queries, n, batch, kv_head * GROUP, tile)
        for j in range(count + 1):
            # The next entry is on its way while this chunk waits for its slot.
            upcoming = gl.load(entries + start + j, mask=j < count, other=0)
            bring_block(
                key_descriptor, value_descriptor, rings, turn + j, batch, kv_head, chunk * CHUNK, STAGES
            )
            chunk = upcoming & 0xFFFF
        if ONTO:
            bring_tile(out_descriptor, outputs, n, batch, kv_head * GROUP, tile)
        turn += count + 1


@gluon.jit
def _consume(
    out_descriptor, lse, gate, gate_strides, lists, sizes, scale_log2, rings, queries, outputs,
    PART: gl.constexpr, GROUP: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr,
    CHUNK: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, ONTO: gl.constexpr,
):  # fmt: skip
    """Attention of this warpgroup's queries over the chunks as they arrive."""
    QUERIES: gl.constexpr = TILE // 2
    ROWS: gl.constexpr = QUERIES * GROUP
    SHIFT: gl.constexpr = 16 + PART * QUERIES
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, CHUNK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, HEAD_DIM, 16])
    Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S, k_width=2)
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    entries, counts, bias = lists
    heads, tokens, tiles, capacity, kv_heads = sizes
    query_in_part = gl.arange(0, ROWS, S_ROW) % QUERIES
    column = gl.arange(0, CHUNK, gl.SliceLayout(0, S))
    zero = gl.zeros([ROWS, CHUNK], gl.float32, S)
    turn = 0
    for n in range(work_count(heads * tiles)):
        index, tile, batch, kv_head = place_of(n, heads, kv_heads, tiles)
        own, start, count = _list_of(index, tile, tiles, entries, counts, capacity, TILE, CHUNK)
        first = tile * TILE + PART * QUERIES
        listed = entries + start
        p_bias = bias + start * TILE + PART * QUERIES + query_in_part  # of the first entry
        upcoming = gl.load(listed, mask=count > 0, other=0)
        if BIAS:
            upcoming_bias = gl.load(p_bias, mask=query_in_part < count * QUERIES, other=0.0)
        if GATED:
            factor = load_gate(
                gate, gate_strides, batch, kv_head * GROUP, first, tokens, QUERIES, ROWS, S_ROW
            )
        q = take_query(queries, n, PART, ROWS, HEAD_DIM, Q)

        # The own chunk comes first: every row sees itself there, so every state is finite from then on.
        s = scores_of_first(q, zero, rings, turn, STAGES)
        free_query(queries, PART)
        free_output(outputs, n, PART, ONTO)
        s = gl.where(own * CHUNK + column[None, :] <= (first + query_in_part)[:, None], s, -float("inf"))
        peak = gl.max(s, 1) * scale_log2
        weights = gl.exp2(s * scale_log2 - peak[:, None])
        total = gl.sum(weights, 1)
        p = gl.convert_layout(weights.to(q.dtype), P)
        accumulator = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)

        for j in range(1, count + 1):
            entry = upcoming
            upcoming = gl.load(listed + j, mask=j < count, other=0)
            if BIAS:
                b = upcoming_bias * 1.4426950408889634
                more = query_in_part < (count - j) * QUERIES  # all rows, or none behind the last entry
                upcoming_bias = gl.load(p_bias + j * (2 * QUERIES), mask=more, other=0.0)
            s, o_token = scores_while_pending(q, zero, p, accumulator, rings, turn + j, STAGES)
            # A query that did not choose this chunk keeps its state: its rows' weights are exp2(s − ∞) = 0.
            chosen = ((entry >> SHIFT) >> query_in_part) & 1 == 1
            highest = gl.max(s, 1) * scale_log2
            if BIAS:
                highest += b
            new_peak = gl.where(chosen, gl.maximum(peak, highest), peak)
            shift = new_peak
            if BIAS:
                shift -= b
            shift = gl.where(chosen, shift, float("inf"))
            weights = gl.exp2(s * scale_log2 - shift[:, None])
            rescale = gl.exp2(peak - new_peak)
            peak = new_peak
            total, accumulator, p = weigh_values(weights, rescale, total, p, o_token, rings, turn + j, STAGES)

        accumulator = weigh_last(p, accumulator, rings, turn + count, STAGES)
        base = index.to(gl.int64) * GROUP * tokens
        scale = store_lse(lse, base, tokens, peak, total, first, tokens, QUERIES)
        if GATED:
            scale *= factor
        accumulator *= gl.convert_layout(scale, O_ROW)[:, None]
        give_rows(accumulator, out_descriptor, outputs, n, batch, kv_head * GROUP, first, PART, ONTO)
        turn += count + 1
    free_output(outputs, 0, PART, ONTO)


@gluon.jit(do_not_specialize=["heads", "tokens", "tiles", "capacity"])
def _attend_kernel(
    query_descriptor, key_descriptor, value_descriptor, out_descriptor, lse, entries, counts, bias, gate,
    gate_stride_b, gate_stride_h, gate_stride_n, heads, tokens, tiles, capacity, kv_heads, scale_log2,
    GROUP: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr, CHUNK: gl.constexpr,
    STAGES: gl.constexpr, BIAS: gl.constexpr, GATED: gl.constexpr, ONTO: gl.constexpr,
):  # fmt: skip
    """A persistent program: its share of all tiles, see `hopper`. heads: KV heads of all sequences."""
    rings, queries, outputs = open_memory(key_descriptor, query_descriptor, STAGES)
    lists = (entries, counts, bias)
    sizes = (heads, tokens, tiles, capacity, kv_heads)
    strides = (gate_stride_b, gate_stride_h, gate_stride_n)
    gl.warp_specialize(
        [
            (_consume, (
                out_descriptor, lse, gate, strides, lists, sizes, scale_log2, rings, queries, outputs,
                0, GROUP, TILE, HEAD_DIM, CHUNK, STAGES, BIAS, GATED, ONTO,
            )),
            (_consume, (
                out_descriptor, lse, gate, strides, lists, sizes, scale_log2, rings, queries, outputs,
                1, GROUP, TILE, HEAD_DIM, CHUNK, STAGES, BIAS, GATED, ONTO,
            )),
            (_produce, (
                query_descriptor, key_descriptor, value_descriptor, out_descriptor, lists, sizes,
                rings, queries, outputs, GROUP, TILE, CHUNK, STAGES, ONTO,
            )),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # their registers a thread
    )  # fmt: skip


def attend_hopper(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: Routes,
    gate: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend.block_sparse_attention`, for inputs that `supports` accepts.

    Args:
        query: `[B, Hq, N, 128]`.
        key, value: `[B, Hkv, N, 128]`.
        routes: lists with T · G = 128 rows.
        gate, onto: as there.

    Returns:
        (output `[B, Hq, N, 128]`, lse `[B, Hq, N]` fp32).
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, group, tile = key.shape[1], heads // key.shape[1], routes.tile
    out = torch.empty_like(query) if onto is None else onto
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
    tiles = triton.cdiv(tokens, tile)
    gates, gate_strides = gate_and_strides(gate, lse)
    boxes = [hopper.descriptor(x, group, tile // hopper.CONSUMERS) for x in (query, out)]
    _attend_kernel[(hopper.programs(tiles * batch * kv_heads, query.device),)](
        boxes[0], *(hopper.descriptor(x, 1, routes.chunk_size) for x in (key, value)), boxes[1], lse,
        routes.entries, routes.counts, routes.bias if routes.bias is not None else lse,
        gates, *gate_strides,
        batch * kv_heads, tokens, tiles, list_capacity(tokens, routes.chunk_size, tile), kv_heads,
        dim**-0.5 * LOG2_E,
        GROUP=group, TILE=tile, HEAD_DIM=dim, CHUNK=routes.chunk_size, STAGES=hopper.STAGES,
        BIAS=routes.bias is not None, GATED=gate is not None, ONTO=onto is not None, num_warps=4,
    )  # fmt: skip
    return out, lse
