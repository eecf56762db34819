"""Continued training with another attention: the swap, the schedule of alpha, the measurements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dashbench.miniature.attentions import DEFAULTS, attend, flop_sparsity
from dashbench.models.attention import add_parameters

ALPHA_START, ALPHA_END = 1.25, 1.5
"""DashAttention's entmax order grows over the continuation, from denser to sparser routing."""


def swap_attention(model: nn.Module, kind: str, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Puts a kind of attention into every layer of a `llama.Llama`; returns the settings in force.

    The settings are one dict for all layers: changing an entry of what is returned changes the model. Layers
    keep the number of blocks they attended in `attention.active` (None for dense).
    """
    chosen = {**DEFAULTS[kind], **(settings or {})}
    for layer in model.model.layers:
        attention = layer.self_attn
        if not hasattr(attention, "indexer_q") and not hasattr(attention, "compress_kv"):
            block_size = chosen.get("block_size", chosen.get("chunk_size", 64))
            sizes = model.shape.num_key_value_heads, model.shape.head_dim, block_size
            add_parameters(attention, kind, *sizes, device=attention.q_proj.weight.device)
        attention.core = _core(attention, kind, chosen)
    return chosen


def _core(attention: nn.Module, kind: str, settings: dict[str, Any]):
    def core(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, active = attend(attention, query, key, value, kind, settings)
        attention.active = None if active is None else active.detach()
        return out

    return core


def sparsity_by_layer(model: nn.Module, settings: dict[str, Any]) -> list[float]:
    """S_flop of the last forward, layer by layer; zero where the attention is dense."""
    block_size = settings.get("block_size", settings.get("chunk_size", 64))
    found = []
    for layer in model.model.layers:
        active = getattr(layer.self_attn, "active", None)
        found.append(0.0 if active is None else flop_sparsity(active, block_size))
    return found


def alpha_at(progress: float) -> float:
    """Entmax order after a share of the continuation: linear to its end at four fifths, then constant."""
    return ALPHA_START + (ALPHA_END - ALPHA_START) * min(1.0, progress / 0.8)


def summary_query_gradient(model: nn.Module) -> float | None:
    """Norm of the summary queries' gradient over all layers; None where there is none."""
    squares = [
        p.grad.double().square().sum()
        for n, p in model.named_parameters()
        if n.endswith("indexer_q") and p.grad is not None
    ]
    return torch.stack(squares).sum().sqrt().item() if squares else None
