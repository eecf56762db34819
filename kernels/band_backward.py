"""Gradients of `band.band_attention`: recomputed scores, one walk by queries (dq) and one by keys (dk, dv).

With P = exp(s − lse), δ = ⟨dO, O⟩ and dS = P ∘ (dO Vᵀ − δ): dq = λ dS K, dk = λ dSᵀ Q, dv = Pᵀ dO, summed
over the heads that share a KV head. The key walk is split over the queries, for compressed keys are few;
the parts are added afterwards, so nothing is atomic and results are reproducible.

Letters as in `band`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dashbench.kernels.backward import _bulk, _rows

LOG2_E = 1.4426950408889634


@triton.jit
def _rows_of_tile(x, strides, batch, head, n, dim, real):
    """`[ROWS, D]` of a `[B, H, N, D]` tensor."""
    offset = batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1] + n.to(tl.int64) * strides[2]
    return tl.load(x + offset[:, None] + dim[None, :], mask=real[:, None], other=0.0)


@triton.jit(do_not_specialize=["rows", "count", "start", "tiles", "window"])
def _query_kernel(
    query, keys, values, out, grad_out, lse, delta, grad_query,
    query_strides, out_strides, grad_strides, grad_query_strides,
    rows, count, start, tiles, kv_heads, window, scale, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """dq and δ of one tile of queries and KV head; late tiles first."""
    index = tl.program_id(0) % (tl.num_programs(0) // tiles)
    tile = tiles - 1 - tl.program_id(0) // (tl.num_programs(0) // tiles)
    batch, kv_head = index // kv_heads, index % kv_heads
    row = tl.arange(0, TILE * HEADS)
    head, n = kv_head * GROUP + row % HEADS, tile * TILE + row // HEADS
    real = (row % HEADS < GROUP) & (n < rows)
    dim = tl.arange(0, HEAD_DIM)
    column = tl.arange(0, BLOCK)
    q = _rows_of_tile(query, query_strides, batch, head, n, dim, real)
    o = _rows_of_tile(out, out_strides, batch, head, n, dim, real)
    g = _rows_of_tile(grad_out, grad_strides, batch, head, n, dim, real)
    difference = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    lse_offset = (index.to(tl.int64) * GROUP + row % HEADS) * rows + n
    tl.store(delta + lse_offset, difference, mask=real)
    level = tl.load(lse + lse_offset, mask=real, other=float("inf")) * 1.4426950408889634
    position = start + n
    limit = tl.minimum(tl.maximum(position + (1 + STRIDE - KERNEL), 0) // STRIDE, count)
    last_position = start + tl.minimum(tile * TILE + TILE, rows) - 1
    most = tl.minimum(tl.maximum(last_position + (1 + STRIDE - KERNEL), 0) // STRIDE, count)
    begin = 0
    if WINDOW:
        begin = tl.maximum(start + tile * TILE - window + 1, 0) // BLOCK * BLOCK
    accumulator = tl.zeros([TILE * HEADS, HEAD_DIM], tl.float32)
    for first in range(begin, most, BLOCK):
        k = tl.reshape(keys.load([batch, kv_head, first, 0]), [BLOCK, HEAD_DIM])
        v = tl.reshape(values.load([batch, kv_head, first, 0]), [BLOCK, HEAD_DIM])
        seen = (first + column)[None, :] < limit[:, None]
        if WINDOW:
            seen = seen & ((first + column)[None, :] > (position - window)[:, None])
        p = tl.where(seen, tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - level[:, None]), 0.0)
        ds = p * (tl.dot(g, tl.trans(v)) - difference[:, None])
        accumulator = tl.dot(ds.to(k.dtype), k, accumulator)
    offset = (
        batch.to(tl.int64) * grad_query_strides[0]
        + head.to(tl.int64) * grad_query_strides[1]
        + n.to(tl.int64) * grad_query_strides[2]
    )
    result = (accumulator * scale).to(grad_query.dtype.element_ty)
    tl.store(grad_query + offset[:, None] + dim[None, :], result, mask=real[:, None])


@triton.jit(do_not_specialize=["rows", "count", "start", "blocks", "splits", "window"])
def _key_kernel(
    query, keys, values, grad_out, lse, delta, grad_key_parts, grad_value_parts,
    query_strides, grad_strides,
    rows, count, start, blocks, splits, kv_heads, window, scale, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys from one part of the queries that see it; early blocks first."""
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    index = tl.program_id(1)
    batch, kv_head = index // kv_heads, index % kv_heads
    dim = tl.arange(0, HEAD_DIM)
    key = block * BLOCK + tl.arange(0, BLOCK)
    k = tl.reshape(keys.load([batch, kv_head, block * BLOCK, 0]), [BLOCK, HEAD_DIM])
    v = tl.reshape(values.load([batch, kv_head, block * BLOCK, 0]), [BLOCK, HEAD_DIM])
    first_row = tl.maximum(block * BLOCK * STRIDE + KERNEL - 1 - start, 0)
    last_row = rows
    if WINDOW:
        last_row = tl.minimum(rows, tl.maximum(block * BLOCK + BLOCK - 1 + window - start, 0))
    first_tile, stop_tile = first_row // TILE, tl.cdiv(last_row, TILE)
    share = tl.cdiv(tl.maximum(stop_tile - first_tile, 0), splits)
    begin = first_tile + split * share
    grad_key = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    grad_value = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    row = tl.arange(0, TILE * HEADS)
    head = kv_head * GROUP + row % HEADS
    for tile in range(begin, tl.minimum(begin + share, stop_tile)):
        n = tile * TILE + row // HEADS
        real = (row % HEADS < GROUP) & (n < rows)
        q = _rows_of_tile(query, query_strides, batch, head, n, dim, real)
        g = _rows_of_tile(grad_out, grad_strides, batch, head, n, dim, real)
        lse_offset = (index.to(tl.int64) * GROUP + row % HEADS) * rows + n
        level = tl.load(lse + lse_offset, mask=real, other=float("inf")) * 1.4426950408889634
        difference = tl.load(delta + lse_offset, mask=real, other=0.0)
        position = start + n
        limit = tl.minimum(tl.maximum(position + (1 + STRIDE - KERNEL), 0) // STRIDE, count)
        seen = key[:, None] < limit[None, :]
        if WINDOW:
            seen = seen & (key[:, None] > (position - window)[None, :])
        scores = tl.dot(k, tl.trans(q)) * scale_log2  # [BLOCK, ROWS]
        p = tl.where(seen, tl.exp2(scores - level[None, :]), 0.0)
        grad_value = tl.dot(p.to(g.dtype), g, grad_value)
        ds = p * (tl.dot(v, tl.trans(g)) - difference[None, :])
        grad_key = tl.dot(ds.to(q.dtype), q, grad_key)
    part = (split * tl.num_programs(1) + index).to(tl.int64) * count
    offset = (part + key)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(grad_key_parts + offset, grad_key * scale, mask=(key < count)[:, None])
    tl.store(grad_value_parts + offset, grad_value, mask=(key < count)[:, None])


def band_gradients(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    kernel: int,
    stride: int,
    window: int,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) in the dtypes and shapes of query `[B, Hq, N, D]`, key and value `[B, Hkv, L, D]`.

    grad_out, out: `[B, Hq, N, D]`; lse: `[B, Hq, N]` fp32 as the forward gave it. The rest as in `band.Band`.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, count = key.shape[1], key.shape[2]
    grad_query = torch.empty_like(query)
    if count == 0:
        return grad_query.zero_(), torch.zeros_like(key), torch.zeros_like(value)
    group = heads // kv_heads
    padded = triton.next_power_of_2(group)
    tile = max(1, 64 // padded)
    tiles, blocks = triton.cdiv(rows, tile), triton.cdiv(count, 64)
    query, out, grad_out = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, out, grad_out))
    boxes = [_bulk(_rows(x), [1, 1, 64, dim]) for x in (key, value)]
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    scale = dim**-0.5
    shape = dict(
        GROUP=group, HEADS=padded, TILE=tile, HEAD_DIM=dim, BLOCK=64, KERNEL=kernel, STRIDE=stride,
        WINDOW=window > 0, num_warps=4, num_stages=2,
    )  # fmt: skip
    _query_kernel[(tiles * batch * kv_heads,)](
        query, *boxes, out, grad_out, lse, delta, grad_query,
        query.stride()[:3], out.stride()[:3], grad_out.stride()[:3], grad_query.stride()[:3],
        rows, count, start, tiles, kv_heads, window, scale, scale * LOG2_E, **shape,
    )  # fmt: skip
    programs = blocks * batch * kv_heads
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
    splits = max(1, min(16, 4 * processors // programs))
    parts = torch.empty(2, splits, batch, kv_heads, count, dim, dtype=torch.float32, device=query.device)
    _key_kernel[(blocks * splits, batch * kv_heads)](
        query, *boxes, grad_out, lse, delta, parts[0], parts[1], query.stride()[:3], grad_out.stride()[:3],
        rows, count, start, blocks, splits, kv_heads, window, scale, scale * LOG2_E, **shape,
    )  # fmt: skip
    grad_key, grad_value = (parts[n].sum(0).to(x.dtype) for n, x in enumerate((key, value)))
    return grad_query, grad_key, grad_value
