"""Chunk summaries: every complete chunk of keys becomes one vector, k̄_c = Σ_t softmax_{t∈c}(⟨q̄, k_t⟩ /
√D)_t k_t.

Source: DashAttention (arXiv 2605.18753). A zero summary query gives the mean of the chunk. All sums are fp32.

Letters: B batch, Hkv KV heads, L keys, D head dim, C chunk size, M' = floor(L / C) complete chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "chunks"])
def _summarize_kernel(
    key, summary_query, summaries, padding,
    key_stride_b, key_stride_h, key_stride_n, query_stride_b, query_stride_h, query_stride_c,
    length, chunks, kv_heads, scale,
    CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One program a chunk and KV head."""
    chunk = tl.program_id(0)
    index = tl.program_id(1)
    batch, head = (index // kv_heads).to(tl.int64), (index % kv_heads).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    dim = tl.arange(0, HEAD_DIM)
    base = key + batch * key_stride_b + head * key_stride_h
    keys = tl.load(base + token.to(tl.int64)[:, None] * key_stride_n + dim[None, :]).to(tl.float32)  # [C, D]
    query_base = (
        summary_query + batch * query_stride_b + head * query_stride_h + chunk.to(tl.int64) * query_stride_c
    )
    query = tl.load(query_base + dim).to(tl.float32)  # [D]
    logits = tl.sum(keys * query[None, :], 1) * scale
    if PADDED:
        # A chunk that is all padding keeps equal weights: finite, and never routed to.
        first = tl.load(padding + batch)
        logits = tl.where((token >= first) | (chunk * CHUNK + CHUNK <= first), logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, 0))
    summary = tl.sum(keys * weights[:, None], 0) / tl.sum(weights, 0)
    out = summaries + (index.to(tl.int64) * chunks + chunk) * HEAD_DIM + dim
    tl.store(out, summary.to(summaries.dtype.element_ty))


def summarize_chunks(
    key: torch.Tensor,
    summary_query: torch.Tensor,
    chunk_size: int,
    left_padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Summaries of all complete chunks.

    Args:
        key: `[B, Hkv, L, D]`, bf16 or fp16, any strides with a contiguous last dimension; after position
            embedding.
        summary_query: `[Hkv, D]`, or `[B, Hkv, M, D]` with M ≥ M': one query a chunk.
        chunk_size: C, a power of two.
        left_padding: `[B]` int32, leading padding tokens that take no part, or None.

    Returns:
        `[B, Hkv, M', D]` contiguous, in the dtype of `key`.
    """
    batch, kv_heads, length, dim = key.shape
    chunks = length // chunk_size
    summaries = torch.empty(batch, kv_heads, chunks, dim, dtype=key.dtype, device=key.device)
    if chunks == 0:
        return summaries
    query = summary_query if summary_query.stride(-1) == 1 else summary_query.contiguous()
    strides = (0, query.stride(0), 0) if query.dim() == 2 else query.stride()[:3]
    _summarize_kernel[(chunks, batch * kv_heads)](
        key, query, summaries, left_padding if left_padding is not None else key,
        *key.stride()[:3], *strides, length, chunks, kv_heads, dim**-0.5,
        CHUNK=chunk_size, HEAD_DIM=dim, PADDED=left_padding is not None, num_warps=4,
    )  # fmt: skip
    return summaries
