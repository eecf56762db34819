"""Block-sparse attention for Hopper GPUs, in Gluon: the same function as `attend`, warp-specialised.

One producer warp walks the tile's list and brings K and V chunks into a ring of shared memory with the bulk
tensor copy engine. Two warpgroups consume them, each with half of the tile's queries (64 rows = 4 queries ×
16 heads): Q stays in registers, QKᵀ of the next chunk is issued before PV of the last one, so the softmax
runs while the tensor cores work, and the two warpgroups fill each other's gaps. They share nothing but the
ring: a barrier over both would march them in step and cost the overlap (measured: LOG.md, attend 2).

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N tokens, D head dim, C chunk size, T queries a
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dashbench.kernels.backward_lists import list_capacity
from dashbench.kernels.route import Routes

LOG2_E = 1.4426950408889634
CONSUMERS = 2
ROWS = 64  # of a consumer: one warpgroup's matrix instruction
STAGES = 4  # K and V chunks in flight: 4 × 32 KiB at C = 64, D = 128


def supports(
    query: torch.Tensor, key: torch.Tensor, routes: Routes, left_padding: torch.Tensor | None
) -> bool:
    """Whether this kernel takes these inputs: Hopper, bf16 or fp16, D = 128, C = 64, G · T = 128, a whole
    chunk at least, no padding.

    Behind the end of a ragged sequence its last tile reads the next head's keys and values, with weight zero.
    """
    group = query.shape[1] // key.shape[1]
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device)[0] == 9
        and left_padding is None
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == 128
        and routes.chunk_size == 64
        and group * routes.tile == CONSUMERS * ROWS
        and routes.tile % CONSUMERS == 0
        and query.shape[2] >= routes.chunk_size
        and key.is_contiguous()
    )


@gluon.jit
def _produce(
    key_descriptor, value_descriptor, entries, count, own, key_row,
    key_ring, value_ring, key_full, value_full, key_empty, value_empty,
    CHUNK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Loads the own chunk, then the listed ones, as slots of the ring become free."""
    for j in range(count + 1):
        slot = j % STAGES
        phase = (j // STAGES) & 1
        chunk = own
        if j > 0:
            chunk = gl.load(entries + j - 1) & 0xFFFF
        row = key_row + chunk * CHUNK
        mbarrier.wait(key_empty.index(slot), phase ^ 1)
        mbarrier.expect(key_full.index(slot), key_descriptor.block_type.nbytes)
        tma.async_copy_global_to_shared(key_descriptor, [row, 0], key_full.index(slot), key_ring.index(slot))
        mbarrier.wait(value_empty.index(slot), phase ^ 1)
        mbarrier.expect(value_full.index(slot), value_descriptor.block_type.nbytes)
        tma.async_copy_global_to_shared(
            value_descriptor, [row, 0], value_full.index(slot), value_ring.index(slot)
        )


@gluon.jit
def _consume(
    query, out, lse, entries, bias, count, own, query_base, query_stride_h, query_stride_n,
    out_base, out_stride_h, out_stride_n, lse_base, tokens, first_query, scale_log2,
    key_ring, value_ring, key_full, value_full, key_empty, value_empty,
    PART: gl.constexpr, GROUP: gl.constexpr, QUERIES: gl.constexpr, HEAD_DIM: gl.constexpr,
    CHUNK: gl.constexpr, STAGES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Attention of this warpgroup's queries over the chunks as they arrive."""
    ROWS: gl.constexpr = QUERIES * GROUP
    WARPS: gl.constexpr = gl.num_warps()
    SHIFT: gl.constexpr = 16 + PART * QUERIES
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, CHUNK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    Q: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=S, k_width=2)
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    O_ROW: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    dtype: gl.constexpr = query.dtype.element_ty
    first = first_query + PART * QUERIES
    row = gl.arange(0, ROWS, gl.SliceLayout(1, Q))
    dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, Q))
    offset = (row % GROUP).to(gl.int64) * query_stride_h + (first + row // GROUP).to(
        gl.int64
    ) * query_stride_n
    q = gl.load(
        query + query_base + offset[:, None] + dim[None, :],
        mask=(first + row // GROUP < tokens)[:, None],
        other=0.0,
    )
    query_in_part = gl.arange(0, ROWS, S_ROW) // GROUP
    p_bias = bias + PART * QUERIES + query_in_part  # of the first entry
    zero = gl.zeros([ROWS, CHUNK], gl.float32, S)

    # The own chunk comes first: every row sees itself there, so every state is finite from then on.
    upcoming = gl.load(entries, mask=count > 0, other=0)
    if BIAS:
        upcoming_bias = gl.load(p_bias, mask=query_in_part < count * QUERIES, other=0.0)
    mbarrier.wait(key_full.index(0), 0)
    s = warpgroup_mma(q, key_ring.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(key_empty.index(0), count=1)
    column = gl.arange(0, CHUNK, gl.SliceLayout(0, S))
    s = gl.where(own * CHUNK + column[None, :] <= (first + query_in_part)[:, None], s, -float("inf"))
    peak = gl.max(s, 1) * scale_log2
    weights = gl.exp2(s * scale_log2 - peak[:, None])
    total = gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(dtype), P)
    accumulator = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)

    for j in range(1, count + 1):
        slot = j % STAGES
        before = (j - 1) % STAGES
        entry = upcoming
        upcoming = gl.load(entries + j, mask=j < count, other=0)
        if BIAS:
            b = upcoming_bias * 1.4426950408889634
            more = query_in_part < (count - j) * QUERIES  # all rows, or none behind the last entry
            upcoming_bias = gl.load(p_bias + j * (2 * QUERIES), mask=more, other=0.0)
        mbarrier.wait(key_full.index(slot), (j // STAGES) & 1)
        s_token = warpgroup_mma(q, key_ring.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(value_full.index(before), ((j - 1) // STAGES) & 1)
        o_token = warpgroup_mma(p, value_ring.index(before), accumulator, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s_token,))
        mbarrier.arrive(key_empty.index(slot), count=1)
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
        total = total * rescale + gl.sum(weights, 1)
        peak = new_peak
        p_next = gl.convert_layout(weights.to(dtype), P)
        accumulator, p = warpgroup_mma_wait(0, deps=(o_token, p))
        mbarrier.arrive(value_empty.index(before), count=1)
        accumulator = accumulator * gl.convert_layout(rescale, O_ROW)[:, None]
        p = p_next

    last = count % STAGES
    mbarrier.wait(value_full.index(last), (count // STAGES) & 1)
    accumulator = warpgroup_mma(p, value_ring.index(last), accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
    accumulator = accumulator / gl.convert_layout(total, O_ROW)[:, None]
    out_row = gl.arange(0, ROWS, O_ROW)
    out_dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, O_LAYOUT))
    out_offset = (out_row % GROUP).to(gl.int64) * out_stride_h + (first + out_row // GROUP).to(
        gl.int64
    ) * out_stride_n
    gl.store(
        out + out_base + out_offset[:, None] + out_dim[None, :],
        accumulator.to(out.dtype.element_ty),
        mask=(first + out_row // GROUP < tokens)[:, None],
    )
    s_row = gl.arange(0, ROWS, S_ROW)
    lse_offset = lse_base + (s_row % GROUP).to(gl.int64) * tokens + first + s_row // GROUP
    gl.store(
        lse + lse_offset,
        (peak + gl.log2(total)) * 0.6931471805599453,
        mask=first + s_row // GROUP < tokens,
    )


@gluon.jit(do_not_specialize=["tokens", "tiles", "capacity"])
def _attend_kernel(
    query, key_descriptor, value_descriptor, out, lse, entries, counts, bias,
    query_stride_b, query_stride_h, query_stride_n, out_stride_b, out_stride_h, out_stride_n,
    tokens, tiles, capacity, kv_heads, scale_log2,
    GROUP: gl.constexpr, TILE: gl.constexpr, HEAD_DIM: gl.constexpr, CHUNK: gl.constexpr,
    STAGES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """One program a tile and KV head; late tiles, which have the longest lists, first."""
    heads = gl.num_programs(0) // tiles
    index = gl.program_id(0) % heads
    tile = tiles - 1 - gl.program_id(0) // heads
    batch = (index // kv_heads).to(gl.int64)
    kv_head = (index % kv_heads).to(gl.int64)
    own = tile * TILE // CHUNK
    # As backward_lists.tile_list_start: tiles of one chunk list at most the chunks before it.
    PER_CHUNK: gl.constexpr = CHUNK // TILE
    wide = own.to(gl.int64)
    start = PER_CHUNK * (wide * (wide - 1) // 2) + (tile % PER_CHUNK) * wide
    own_entries = entries + index.to(gl.int64) * capacity + start
    own_bias = bias + (index.to(gl.int64) * capacity + start) * TILE
    count = gl.load(counts + index.to(gl.int64) * tiles + tile)
    query_base = batch * query_stride_b + kv_head * GROUP * query_stride_h
    out_base = batch * out_stride_b + kv_head * GROUP * out_stride_h
    lse_base = index.to(gl.int64) * GROUP * tokens

    key_ring = gl.allocate_shared_memory(
        key_descriptor.dtype, [STAGES, CHUNK, HEAD_DIM], key_descriptor.layout
    )
    value_ring = gl.allocate_shared_memory(
        value_descriptor.dtype, [STAGES, CHUNK, HEAD_DIM], value_descriptor.layout
    )
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(key_full.index(i), count=1)
        mbarrier.init(value_full.index(i), count=1)
        mbarrier.init(key_empty.index(i), count=2)  # both consumers
        mbarrier.init(value_empty.index(i), count=2)
    fence_async_shared()
    HALF: gl.constexpr = TILE // 2
    gl.warp_specialize(
        [
            (_consume, (
                query, out, lse, own_entries, own_bias, count, own, query_base, query_stride_h,
                query_stride_n, out_base, out_stride_h, out_stride_n, lse_base, tokens, tile * TILE,
                scale_log2,
                key_ring, value_ring, key_full, value_full, key_empty, value_empty,
                0, GROUP, HALF, HEAD_DIM, CHUNK, STAGES, BIAS,
            )),
            (_consume, (
                query, out, lse, own_entries, own_bias, count, own, query_base, query_stride_h,
                query_stride_n, out_base, out_stride_h, out_stride_n, lse_base, tokens, tile * TILE,
                scale_log2,
                key_ring, value_ring, key_full, value_full, key_empty, value_empty,
                1, GROUP, HALF, HEAD_DIM, CHUNK, STAGES, BIAS,
            )),
            (_produce, (
                key_descriptor, value_descriptor, own_entries, count, own, index * tokens,
                key_ring, value_ring, key_full, value_full, key_empty, value_empty, CHUNK, STAGES,
            )),
        ],
        [4, 1],  # warps of the second consumer and of the producer
        [240, 24],  # their registers a thread
    )  # fmt: skip


def attend_hopper(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, routes: Routes
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `attend.block_sparse_attention`, for inputs that `supports` accepts.

    Args:
        query: `[B, Hq, N, 128]`.
        key, value: `[B, Hkv, N, 128]`; value is made contiguous if it is not.
        routes: lists with T · G = 128 rows.

    Returns:
        (output `[B, Hq, N, 128]`, lse `[B, Hq, N]` fp32).
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    chunk = routes.chunk_size
    value = value.contiguous()
    element = gl.bfloat16 if query.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([chunk, dim], element)
    descriptors = [TensorDescriptor.from_tensor(x.view(-1, dim), [chunk, dim], layout) for x in (key, value)]
    out = torch.empty_like(query)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
    tiles = triton.cdiv(tokens, routes.tile)
    _attend_kernel[(tiles * batch * kv_heads,)](
        query, *descriptors, out, lse, routes.entries, routes.counts,
        routes.bias if routes.bias is not None else lse,
        *query.stride()[:3], *out.stride()[:3],
        tokens, tiles, list_capacity(tokens, chunk, routes.tile), kv_heads, dim**-0.5 * LOG2_E,
        GROUP=heads // kv_heads, TILE=routes.tile, HEAD_DIM=dim, CHUNK=chunk, STAGES=STAGES,
        BIAS=routes.bias is not None, num_warps=4,
    )  # fmt: skip
    return out, lse
