"""Chunk-outer half of the backward: gradients of k, v, the chunk summaries and the summary query.

A program owns one chunk of one KV head, holds its keys and values, and walks the tiles of queries that read
it (T queries x G heads are the rows of each matrix product, so the sum over the group comes for free): dv =
sum P^T dO, dk = scale * sum dS^T q. Nothing is added atomically and the lists are in ascending order, so
the result is deterministic. A second kernel adds the parts of a chunk whose list was split, and the summary's
backward: with a = softmax(scale * k q_bar) and the summary's gradient r = d k_bar, u_t = <k_t, r>, t_t = a_t
(u_t - sum a u), the keys get a_t r + scale * t_t q_bar and the summary query gets scale * sum_t t_t k_t.
"""

import triton
import triton.language as tl

from dashbench.kernels.backward_lists import chunk_list_start
from dashbench.kernels.backward_query import entmax_terms, trusted_weight

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _head(pointer, strides, batch, head):
    """First row of one head of a `[B, H, N, D]` tensor."""
    return pointer + batch * strides[0] + head * strides[1]


@triton.jit
def _finish_chunk(
    grad_k_rows, keys, present, grad_k_bar, summary_query, grad_summary_query, scale,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Add the summary's share to dk and store this chunk's part of the summary query's gradient."""
    dim = tl.arange(0, HEAD_DIM)
    keys = keys.to(tl.float32)
    q_bar = tl.load(summary_query + dim).to(tl.float32)
    logits = tl.where(present, tl.sum(keys * q_bar[None, :], 1) * scale, -1e30)
    a = tl.exp(logits - tl.max(logits, 0))
    a = a / tl.sum(a, 0)
    u = tl.sum(keys * grad_k_bar[None, :], 1)
    t = a * (u - tl.sum(a * u, 0)) * scale
    tl.store(grad_summary_query + dim, tl.sum(t[:, None] * keys, 0))
    return grad_k_rows + a[:, None] * grad_k_bar[None, :] + t[:, None] * q_bar[None, :]


@triton.jit
def _attend_tile(
    grad_k_rows, grad_v_rows, grad_k_bar, keys, values, k_bar, q, grad_out, batch, first_head, tile, seen,
    member, biased, statistics, scale_log2, route_scale, logit_scale, inverse_sigma, epsilon,
    power_p, power_s,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    ROUTED: tl.constexpr, BIAS: tl.constexpr, APPLY_BIAS: tl.constexpr, SUMMARY: tl.constexpr,
    ALPHA_1_5: tl.constexpr,
):  # fmt: skip
    """Add one tile's contribution to dk, dv and, with SUMMARY, to the gradient of this chunk's summary."""
    ROWS: tl.constexpr = TILE * HEADS
    row = tl.arange(0, ROWS)
    q_rows = tl.reshape(q.load([batch, tile * TILE, first_head, 0]), [ROWS, HEAD_DIM])
    grad_rows = tl.reshape(grad_out.load([batch, tile * TILE, first_head, 0]), [ROWS, HEAD_DIM])
    statistics += tile.to(tl.int64) * (ROWS * 6)
    lse = tl.load(statistics + row)
    delta = tl.load(statistics + ROWS + row)
    if ROUTED and (APPLY_BIAS or SUMMARY):
        tau = tl.load(statistics + 2 * ROWS + row)
        excess = tl.max(tl.dot(k_bar, tl.trans(q_rows)), 0) * logit_scale - tau
        p, s = entmax_terms(tl.where(member, tl.maximum(excess, 0.0), 0.0), ALPHA_1_5, power_p, power_s)
        w = tl.sum(tl.reshape(p, [TILE, HEADS]), 1) / GROUP
        w = tl.reshape(tl.broadcast_to(w[:, None], [TILE, HEADS]), [ROWS])
        positive = (w > epsilon) & biased
        if APPLY_BIAS:
            log_w = tl.where(positive, tl.log(tl.where(positive, w, 1.0)), 0.0)
            if BIAS == 2:
                log_w = (log_w - tl.load(statistics + 4 * ROWS + row)) * inverse_sigma
            lse -= tl.where(positive, log_w, 0.0) * _LOG2E
    weights = tl.exp2(tl.dot(keys, tl.trans(q_rows)) * scale_log2 - lse[None, :])
    weights = tl.where(seen, weights, 0.0)
    grad_v_rows = tl.dot(weights.to(grad_rows.dtype), grad_rows, grad_v_rows)
    grad_scores = weights * (tl.dot(values, tl.trans(grad_rows)) - delta[None, :])
    grad_k_rows = tl.dot(grad_scores.to(q_rows.dtype), q_rows, grad_k_rows)
    if ROUTED and (APPLY_BIAS or SUMMARY):
        # Waits for the product. A tile that also goes through registers, as q_rows does into `excess`, has
        # one buffer in Triton 3.6, and its next load does not wait for a product that still reads it: dk was
        # off by up to 2 %, another way each time (LOG.md, Backward).
        grad_k_rows += 0.0
    if ROUTED and SUMMARY:
        grad_bias = tl.sum(tl.reshape(tl.sum(grad_scores, 0), [TILE, HEADS]), 1)
        grad_bias = tl.reshape(tl.broadcast_to(grad_bias[:, None], [TILE, HEADS]), [ROWS])
        kappa = tl.load(statistics + 3 * ROWS + row)
        mean = tl.load(statistics + 5 * ROWS + row)
        floor = trusted_weight(tau, power_p, GROUP, TILE, HEADS)
        trusted = positive & (w > tl.reshape(tl.broadcast_to(floor[:, None], [TILE, HEADS]), [ROWS]))
        dp = tl.where(trusted, (grad_bias - mean) / (GROUP * tl.where(trusted, w, 1.0)), 0.0)
        grad_z = s * (dp - kappa) * (inverse_sigma * route_scale)
        ROUTE_DTYPE: tl.constexpr = tl.float32 if q_rows.dtype == tl.float32 else tl.bfloat16
        grad_z = tl.broadcast_to(grad_z.to(ROUTE_DTYPE)[None, :], [16, ROWS])
        grad_k_bar = tl.dot(grad_z, q_rows.to(ROUTE_DTYPE), grad_k_bar)
    return grad_k_rows, grad_v_rows, grad_k_bar


@triton.jit(
    do_not_specialize=[
        "tokens",
        "chunks",
        "tiles",
        "capacity",
        "batch_heads",
        "splits",
        "forced",
        "summaries",
    ]
)
def _chunk_kernel(
    q, k, v, grad_out, statistics, summary, entries, counts, padding, order,
    grad_k_parts, grad_v_parts, grad_summary_parts, summary_strides,
    tokens, chunks, tiles, capacity, batch_heads, kv_heads, splits, forced, summaries,
    scale, route_scale, logit_scale, inverse_sigma, epsilon, power_p, power_s,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    BIAS: tl.constexpr, APPLY_BIAS: tl.constexpr, SUMMARY: tl.constexpr, ALPHA_1_5: tl.constexpr,
    PADDED: tl.constexpr, COMPLETED: tl.constexpr,
):  # fmt: skip
    """One program a chunk and split of its list, longest lists first. The sums leave as float32 parts
    `[splits, B * Hkv, M * C, D]` (summaries `[splits, B * Hkv, M, D]`) for `_combine_kernel`: finishing here
    would cost this kernel's loop its last registers."""
    ROWS: tl.constexpr = TILE * HEADS
    TILES_PER_CHUNK: tl.constexpr = CHUNK // TILE
    split = tl.program_id(0) % splits
    owned = tl.load(order + tl.program_id(0) // splits)
    batch_head, chunk = owned // chunks, (owned % chunks).to(tl.int32)
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads

    row = tl.arange(0, ROWS)
    query = row // HEADS
    dim = tl.arange(0, HEAD_DIM)
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    present = position < tokens
    if PADDED:
        present = present & (position >= tl.load(padding + batch))
    batch_index, kv_index = batch.to(tl.int32), kv_head.to(tl.int32)
    keys = tl.reshape(k.load([batch_index, kv_index, chunk * CHUNK, 0]), [CHUNK, HEAD_DIM])
    values = tl.reshape(v.load([batch_index, kv_index, chunk * CHUNK, 0]), [CHUNK, HEAD_DIM])
    k_bar = tl.zeros([16, HEAD_DIM], keys.dtype)
    if APPLY_BIAS or SUMMARY:
        # The summary is repeated to the 16 rows of the smallest matrix product; its gradient comes out
        # likewise. The last chunk may have no summary; then nobody routes to it.
        k_bar = tl.load(
            _head(summary, summary_strides, batch, kv_head) + chunk * summary_strides[2]
            + tl.zeros([16], tl.int32)[:, None] + dim[None, :],
            mask=(dim < HEAD_DIM)[None, :] & (chunk < summaries), other=0.0,
        )  # fmt: skip
    first_head = kv_index * GROUP
    head_statistics = statistics + batch_head * tiles * (ROWS * 6)

    grad_k_rows = tl.zeros([CHUNK, HEAD_DIM], tl.float32)
    grad_v_rows = tl.zeros([CHUNK, HEAD_DIM], tl.float32)
    grad_k_bar = tl.zeros([16, HEAD_DIM], tl.float32)
    count = tl.load(counts + owned)
    first, last = count * split // splits, count * (split + 1) // splits
    list_base = entries + batch_head * capacity + chunk_list_start(chunk, tiles, TILES_PER_CHUNK)
    for index in range(first, last):
        entry = tl.load(list_base + index)
        tile = entry >> TILE
        member = ((entry >> query) & 1) != 0
        seen = member[None, :]
        if PADDED:
            seen = seen & present[:, None]
        grad_k_rows, grad_v_rows, grad_k_bar = _attend_tile(
            grad_k_rows, grad_v_rows, grad_k_bar, keys, values, k_bar, q, grad_out, batch_index, first_head,
            tile, seen, member, chunk < tile // TILES_PER_CHUNK - forced, head_statistics, scale * _LOG2E,
            route_scale, logit_scale, inverse_sigma, epsilon, power_p, power_s,
            HEAD_DIM, GROUP, HEADS, TILE, True, BIAS, APPLY_BIAS, SUMMARY, ALPHA_1_5,
        )  # fmt: skip
    if split == 0:
        own_tile = chunk * TILES_PER_CHUNK
        for index in range(tl.minimum(TILES_PER_CHUNK, tiles - own_tile)):
            tile = own_tile + index
            member = (tile * TILE + query + 1) % CHUNK == 0
            seen = (position[:, None] <= (tile * TILE + query)[None, :]) & present[:, None]
            grad_k_rows, grad_v_rows, grad_k_bar = _attend_tile(
                grad_k_rows, grad_v_rows, grad_k_bar, keys, values, k_bar, q, grad_out, batch_index,
                first_head, tile, seen, member, False, head_statistics, scale * _LOG2E,
                route_scale, logit_scale, inverse_sigma, epsilon, power_p, power_s,
                HEAD_DIM, GROUP, HEADS, TILE, COMPLETED, BIAS, APPLY_BIAS, SUMMARY, ALPHA_1_5,
            )  # fmt: skip
    part = (split.to(tl.int64) * batch_heads * chunks + owned) * HEAD_DIM
    tl.store(
        grad_k_parts + part * CHUNK + tl.arange(0, CHUNK)[:, None] * HEAD_DIM + dim[None, :],
        grad_k_rows * scale,
    )
    tl.store(
        grad_v_parts + part * CHUNK + tl.arange(0, CHUNK)[:, None] * HEAD_DIM + dim[None, :], grad_v_rows
    )
    if SUMMARY:
        tl.store(grad_summary_parts + part + dim, tl.sum(grad_k_bar, 0) / 16)


@triton.jit(do_not_specialize=["tokens", "chunks", "batch_heads", "splits", "summary_parts"])
def _combine_kernel(
    k, summary_query, padding, grad_k_parts, grad_v_parts, grad_summary, grad_k, grad_v, grad_summary_query,
    k_strides, grad_k_strides, grad_v_strides, query_strides,
    tokens, chunks, batch_heads, kv_heads, splits, summary_parts, scale,
    HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr, BIAS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One program a chunk: sum the parts in order, add the summary's share, and store in the inputs'
    dtype."""
    owned = tl.program_id(0).to(tl.int64)
    batch_head, chunk = owned // chunks, owned % chunks
    batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
    dim = tl.arange(0, HEAD_DIM)
    local = tl.arange(0, CHUNK)
    token = chunk * CHUNK + local
    present = token < tokens
    if PADDED:
        present = present & (token >= tl.load(padding + batch))
    grad_k_rows = tl.zeros([CHUNK, HEAD_DIM], tl.float32)
    grad_v_rows = tl.zeros([CHUNK, HEAD_DIM], tl.float32)
    total = batch_heads * chunks
    for split in range(splits):
        part = (split * total + owned) * HEAD_DIM * CHUNK + local[:, None] * HEAD_DIM + dim[None, :]
        grad_k_rows += tl.load(grad_k_parts + part)
        grad_v_rows += tl.load(grad_v_parts + part)
    if BIAS != 0:
        grad_k_bar = tl.zeros([HEAD_DIM], tl.float32)
        for split in range(summary_parts):
            grad_k_bar += tl.load(grad_summary + (split * total + owned) * HEAD_DIM + dim)
        keys = tl.load(
            _head(k, k_strides, batch, kv_head) + token[:, None] * k_strides[2] + dim[None, :],
            mask=(token < tokens)[:, None],
            other=0.0,
        )
        grad_k_rows = _finish_chunk(
            grad_k_rows, keys, present, grad_k_bar,
            _head(summary_query, query_strides, batch, kv_head) + chunk * query_strides[2],
            grad_summary_query + owned * HEAD_DIM, scale, HEAD_DIM,
        )  # fmt: skip
    tl.store(
        _head(grad_k, grad_k_strides, batch, kv_head) + token[:, None] * grad_k_strides[2] + dim[None, :],
        grad_k_rows.to(grad_k.dtype.element_ty),
        mask=(token < tokens)[:, None],
    )
    tl.store(
        _head(grad_v, grad_v_strides, batch, kv_head) + token[:, None] * grad_v_strides[2] + dim[None, :],
        grad_v_rows.to(grad_v.dtype.element_ty),
        mask=(token < tokens)[:, None],
    )
