"""The four attentions of the small model: dense, InfLLMv2, NSA and DashAttention, each with its parameters.

A kind is a function of queries, keys and values after RoPE, the layer's module, which holds its parameters
under the names of the 8B checkpoints of DashAttention's authors (arXiv 2605.18753), and its settings. On a
GPU the kernels run, elsewhere the specifications. What decides the sparsity is a setting: `scaling_factor`
of DashAttention, `top_k` of the others.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashbench.baselines.infllmv2 import infllmv2_attention
from dashbench.baselines.nsa import nsa_attention
from dashbench.kernels.reference import DashOptions
from dashbench.kernels.reference import dash_attention as specified_dash
from dashbench.models.attention import nsa_parameters

DEFAULTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "infllmv2": {"block_size": 64, "top_k": 32, "init_blocks": 1, "local_blocks": 1, "lse_mode": "exact"},
    "nsa": {
        "preset": "nsa_paper", "block_size": 64, "top_k": 32, "init_blocks": 1, "local_blocks": 2,
    },
    "dash": {
        "chunk_size": 64, "scaling_factor": 1.0, "alpha": 1.5, "sigma": 1e6, "bias_mode": "centered",
    },
}  # fmt: skip


def attend(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, kind: str, settings: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of whole sequences, differentiable.

    Args:
        attention: the layer's module, with the kind's parameters.
        query: (batch, heads, length, head_dim), after RoPE.
        key, value: (batch, kv_heads, length, head_dim).
        kind: one of KINDS.
        settings: of the kind; see DEFAULTS.

    Returns:
        (output of the queries' shape; (batch, kv_heads, length) blocks attended, or None for dense).
    """
    if kind == "dense":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True), None
    if kind == "dash":
        summary_query = attention.indexer_q.view(key.shape[1], key.shape[3])
        if query.is_cuda:
            from dashbench.kernels.dash import dash_attention

            found = dash_attention(query, key, value, summary_query, return_active_blocks=True, **settings)
            return found
        out, routing = specified_dash(query, key, value, summary_query.to(key.dtype), DashOptions(**settings))
        return out, routing.active.sum(-1)
    if kind == "infllmv2":
        return infllmv2_attention(query, key, value, return_active_blocks=True, **settings)
    gates, weights = nsa_parameters(attention, query)
    return nsa_attention(
        query, key, value, gates, compression_weights=weights, return_active_blocks=True, **settings
    )


def flop_sparsity(active_blocks: Tensor, block_size: int) -> float:
    """S_flop of a layer: 1 - kept / causal tokens, over all queries; the own block counts up to the query.

    Args:
        active_blocks: (batch, kv_heads, length) blocks attended, the own one included.
        block_size: tokens in a block.
    """
    place = torch.arange(active_blocks.shape[-1], device=active_blocks.device)
    kept = (active_blocks - 1) * block_size + place % block_size + 1
    return 1 - (kept.double().sum() / (place + 1).double().sum() / kept[..., 0].numel()).item()
