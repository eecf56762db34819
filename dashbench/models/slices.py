"""MLP and norms that take long prompts in slices of tokens, so that what they make on the way stays small.

For 8 sequences of 64k tokens in the 8B shape, each of the MLP's three intermediates is 16 GiB and each fp32
copy inside a norm 8 GiB, beside 16 GiB of weights. No token sees another there, so slices change nothing but
the number of rows of a matrix product. They are of equal size, for libraries choose a product's algorithm,
and with it the order of its sums, by the number of its rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

SLICE = 1 << 15
"""Tokens at a time: the 8B shape then needs 3 GiB on the way; a product of so many rows fills any GPU."""


class _Sliced(nn.Module):
    """Before a module that maps `[..., E]` to the same shape, token by token: more than SLICE tokens go
    through it in parts, unless gradients are recorded, which keep the intermediates anyway."""

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.shape[:-1].numel()
        if tokens <= SLICE or torch.is_grad_enabled():
            return super().forward(hidden)
        flat = hidden.reshape(tokens, hidden.shape[-1])
        out = torch.empty_like(flat)
        size = -(-tokens // -(-tokens // SLICE))
        for begin in range(0, tokens, size):
            out[begin : begin + size] = super().forward(flat[begin : begin + size])
        return out.view(hidden.shape)


class SlicedMLP(_Sliced, LlamaMLP):
    """Llama's MLP."""


class SlicedNorm(_Sliced, LlamaRMSNorm):
    """Llama's norm."""


def sliced(model: nn.Module) -> nn.Module:
    """Puts sliced modules, without weights yet, in the place of a Llama's own; names stay as they are."""
    config = model.config
    size = config.hidden_size, config.rms_norm_eps
    for layer in model.model.layers:
        layer.mlp = SlicedMLP(config)
        layer.input_layernorm, layer.post_attention_layernorm = SlicedNorm(*size), SlicedNorm(*size)
    model.model.norm = SlicedNorm(*size)
    return model
