"""Block-sparse attention over lists: each tile of queries attends the chunks on its list and, causally, its
own chunk.

This is the building block that DashAttention, NSA and InfLLMv2 share; how the lists came about is not its
business. Online softmax as in FlashAttention (Dao et al. 2022, arXiv 2205.14135), in base 2. A tile's rows
are T queries times the heads of one KV head, so one load of K and V serves them all; the bits of a list
entry say which of the queries chose the chunk, and a query that did not gets weight zero.

`block_sparse_attention` picks the kernel: on Hopper, where its shapes allow, the warp-specialised one of
`attend_hopper`; else this one, which runs on any GPU and in Triton's interpreter. `notes` of what ran are
the caller's to ask for (`kernel_for`).

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N tokens, D head dim, C chunk size, T queries a
tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dashbench.kernels.backward import with_gradients
from dashbench.kernels.backward_lists import list_capacity, tile_list_start, tile_lists
from dashbench.kernels.gated_sum import gate_and_strides, gated_onto, no_gradients_beside_gates
from dashbench.kernels.route import Routes, tile_size
from dashbench.kernels.tuning import choose, setting_of

LOG2_E = 1.4426950408889634


@triton.jit
def _online_softmax_step(scores, values, chosen, peak, total, accumulator):
    """One block of an online softmax in base 2; rows that are not chosen keep their state."""
    new_peak = tl.where(chosen, tl.maximum(peak, tl.max(scores, 1)), peak)
    shift = tl.where(chosen & (new_peak > float("-inf")), new_peak, float("inf"))
    probability = tl.exp2(scores - shift[:, None])
    rescale = tl.where(
        peak == float("-inf"), 0.0, tl.exp2(peak - tl.where(new_peak == float("-inf"), 0.0, new_peak))
    )
    total = total * rescale + tl.sum(probability, 1)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(probability.to(values.dtype), values, accumulator)
    return new_peak, total, accumulator


@triton.jit(do_not_specialize=["tokens", "tiles", "capacity"])
def _attend_kernel(
    query, key, value, out, lse, entries, counts, bias, padding, gate,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    value_stride_b, value_stride_h, value_stride_n, out_stride_b, out_stride_h, out_stride_n,
    gate_stride_b, gate_stride_h, gate_stride_n, tokens, tiles, capacity, kv_heads, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ONTO: tl.constexpr,
):  # fmt: skip
    """One program a tile and KV head; late tiles, which have the longest lists, first."""
    index = tl.program_id(0) % (tl.num_programs(0) // tiles)
    tile = tiles - 1 - tl.program_id(0) // (tl.num_programs(0) // tiles)
    batch, kv_head = (index // kv_heads).to(tl.int64), (index % kv_heads).to(tl.int64)
    row = tl.arange(0, TILE * HEADS)
    head, query_in_tile = row % HEADS, row // HEADS
    position = tile * TILE + query_in_tile
    real = (head < GROUP) & (position < tokens)
    dim = tl.arange(0, HEAD_DIM)
    offset = (
        batch * query_stride_b
        + (kv_head * GROUP + head) * query_stride_h
        + position.to(tl.int64) * query_stride_n
    )
    q = tl.load(query + offset[:, None] + dim[None, :], mask=real[:, None], other=0.0)  # [T·H, D]
    key_base = key + batch * key_stride_b + kv_head * key_stride_h
    value_base = value + batch * value_stride_b + kv_head * value_stride_h
    own = (tile * TILE) // CHUNK
    column = tl.arange(0, CHUNK)
    first_token = 0
    if PADDED:
        first_token = tl.load(padding + batch)

    # The own chunk first: every row sees itself there, so every state is finite from then on.
    token = own * CHUNK + column
    inside = token < tokens
    k = tl.load(
        key_base + token.to(tl.int64)[:, None] * key_stride_n + dim[None, :], mask=inside[:, None], other=0.0
    )
    v = tl.load(
        value_base + token.to(tl.int64)[:, None] * value_stride_n + dim[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    scores = tl.dot(q, tl.trans(k)) * scale_log2
    seen = token[None, :] <= position[:, None]
    if PADDED:
        seen = seen & (token >= first_token)[None, :]
    scores = tl.where(seen, scores, float("-inf"))
    peak = tl.full([TILE * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE * HEADS], tl.float32)
    accumulator = tl.zeros([TILE * HEADS, HEAD_DIM], tl.float32)
    peak, total, accumulator = _online_softmax_step(scores, v, real, peak, total, accumulator)

    start = index.to(tl.int64) * capacity + tile_list_start(tile, CHUNK // TILE)
    base = entries + start
    count = tl.load(counts + index.to(tl.int64) * tiles + tile)
    for j in range(0, count):
        entry = tl.load(base + j)
        token = (entry & 0xFFFF) * CHUNK + column
        k = tl.load(key_base + token.to(tl.int64)[:, None] * key_stride_n + dim[None, :])
        v = tl.load(value_base + token.to(tl.int64)[:, None] * value_stride_n + dim[None, :])
        scores = tl.dot(q, tl.trans(k)) * scale_log2
        if PADDED:
            scores = tl.where((token >= first_token)[None, :], scores, float("-inf"))
        if BIAS:
            row_bias = tl.load(bias + (start + j) * TILE + query_in_tile)
            scores += row_bias[:, None] * 1.4426950408889634
        chosen = ((entry >> (16 + query_in_tile)) & 1) == 1
        peak, total, accumulator = _online_softmax_step(scores, v, chosen, peak, total, accumulator)

    safe = tl.where(total > 0, total, 1.0)
    result = accumulator / safe[:, None]
    out_offset = (
        batch * out_stride_b + (kv_head * GROUP + head) * out_stride_h + position.to(tl.int64) * out_stride_n
    )
    target = out + out_offset[:, None] + dim[None, :]
    gate_offset = (
        batch * gate_stride_b
        + (kv_head * GROUP + head) * gate_stride_h
        + position.to(tl.int64) * gate_stride_n
    )
    result = gated_onto(result, gate + gate_offset, target, real, GATED, ONTO)
    tl.store(target, result.to(out.dtype.element_ty), mask=real[:, None])
    lse_offset = (index.to(tl.int64) * GROUP + head) * tokens + position
    # Natural logarithm. A row of padding attends nothing: its weights would be exp(s − ∞) = 0.
    tl.store(
        lse + lse_offset,
        tl.where(total > 0, (peak + tl.log2(safe)) * 0.6931471805599453, float("inf")),
        mask=real,
    )


def routes_of_mask(mask: torch.Tensor, chunk_size: int, group: int, tile: int | None = None) -> Routes:
    """Lists for a given bit mask.

    Args:
        mask: `[B, Hkv, N, W]` int32: bit c % 32 of word c // 32 says that the query attends chunk c; bits
            at or behind the query's own chunk are ignored.
        chunk_size: C.
        group: G.
        tile: T; default: 128 rows.
    """
    tile = tile or tile_size(group, chunk_size)
    entries, counts = tile_lists(mask.contiguous(), chunk_size, tile)
    return Routes(entries, counts, tile, chunk_size, mask=mask)


def kernel_for(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: Routes,
    left_padding: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
) -> str:
    """`hopper` or `portable`: which kernel `block_sparse_attention` runs for these inputs."""
    from dashbench.kernels import attend_hopper

    return "hopper" if attend_hopper.supports(query, key, value, routes, left_padding, onto) else "portable"


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    routes: Routes,
    *,
    left_padding: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
    kernel: str | None = None,
    launch: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query over its listed chunks and, causally, its own chunk.

    Differentiable in query, key and value (the lists are constants); lse carries no gradient.

    Args:
        query: `[B, Hq, N, D]`, bf16 or fp16, any strides with a contiguous last dimension.
        key, value: `[B, Hkv, N, D]`, likewise.
        routes: lists made for the same shape.
        left_padding: `[B]` int32 leading padding tokens, never attended; rows of padding give zeros. Or None.
        gate: `[B, Hq, N]`, any floating dtype and strides, factors of the output's rows. Or None.
        onto: like the output; it is added to this tensor, in place, and this tensor returned. Or None.
        kernel: `hopper` or `portable`; default: what `kernel_for` says.
        launch: Triton launch options of the portable kernel; None: what `tuning` knows.

    Returns:
        (output `[B, Hq, N, D]` with the strides of a `query`-like tensor, lse `[B, Hq, N]` fp32, natural
        logarithm, +inf for padding).

    Raises:
        ValueError: shapes, head dim (64 or 128) or chunk size (16 to 128, a power of two) that the kernels
            do not cover; gradients asked for without `routes.mask`, or with `gate` or `onto`.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    if dim not in (64, 128) or routes.chunk_size not in (16, 32, 64, 128):
        raise ValueError(f"unsupported: head dim {dim}, chunk size {routes.chunk_size}")
    if no_gradients_beside_gates((query, key, value), gate, onto):
        if routes.mask is None:
            raise ValueError(
                "gradients need the routes' bit mask: make them with save=True or routes_of_mask"
            )
        with torch.no_grad():
            out, lse = block_sparse_attention(
                query, key, value, routes, left_padding=left_padding, kernel=kernel, launch=launch
            )
        out = with_gradients(
            out, query, key, value, lse, routes.mask, routes.chunk_size, padding=left_padding
        )
        return out, lse
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if (kernel or kernel_for(query, key, value, routes, left_padding, onto)) == "hopper":
        from dashbench.kernels.attend_hopper import attend_hopper

        return attend_hopper(query, key, value, routes, gate, onto)
    group = heads // kv_heads
    tile, chunk_size = routes.tile, routes.chunk_size
    padded_heads = max(triton.next_power_of_2(group), 16 // tile)
    tiles = triton.cdiv(tokens, tile)
    out = torch.empty_like(query) if onto is None else onto
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=query.device)
    gates, gate_strides = gate_and_strides(gate, lse)
    rows = tile * padded_heads
    chosen = choose("attend", setting_of(query, kv_heads, chunk_size)) if launch is None else launch
    _attend_kernel[(tiles * batch * kv_heads,)](
        query, key, value, out, lse, routes.entries, routes.counts,
        routes.bias if routes.bias is not None else lse,
        left_padding if left_padding is not None else routes.counts, gates,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
        *gate_strides,
        tokens, tiles, list_capacity(tokens, chunk_size, tile), kv_heads, dim**-0.5 * LOG2_E,
        GROUP=group, HEADS=padded_heads, TILE=tile, CHUNK=chunk_size, HEAD_DIM=dim,
        PADDED=left_padding is not None, BIAS=routes.bias is not None, GATED=gate is not None,
        ONTO=onto is not None,
        **{"num_warps": 8 if rows >= 128 else 4, "num_stages": 2, **chosen},
    )  # fmt: skip
    return out, lse
