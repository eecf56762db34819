"""A Llama as transformers names its parameters, bare enough to be captured in a CUDA graph.

The state dict loads into `transformers.LlamaForCausalLM` and back; a test compares the outputs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dashbench.miniature.shape import LlamaShape


class Norm(nn.Module):
    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden.float(), self.weight.shape, self.weight, self.eps)


class Linear(nn.Linear):
    """A matrix kept in fp32 and used in the dtype of its input."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight.to(hidden.dtype))


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of (batch, heads, length, head_dim) with cos, sin of (length, head_dim), halves paired."""
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat([-second, first], -1) * sin


def rotary(length: int, shape: LlamaShape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of RoPE, (length, head_dim) each."""
    half = shape.head_dim // 2
    place = torch.arange(length, device=device, dtype=torch.float32)
    frequency = torch.arange(half, device=device, dtype=torch.float32) * (-math.log(shape.rope_theta) / half)
    angle = (place[:, None] * frequency.exp()).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


class Attention(nn.Module):
    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.shape = shape
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = Linear(shape.hidden_size, query)
        self.k_proj = Linear(shape.hidden_size, key)
        self.v_proj = Linear(shape.hidden_size, key)
        self.o_proj = Linear(query, shape.hidden_size)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        heads = (batch, length, -1, self.shape.head_dim)
        query, key, value = (
            p(hidden).view(heads).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        output = self.core(query, key, value)
        return self.o_proj(output.transpose(1, 2).reshape(batch, length, -1))

    def core(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention after RoPE: dense here; `continuation.swap_attention` replaces it."""
        group = self.shape.num_attention_heads // self.shape.num_key_value_heads
        key, value = (s.repeat_interleave(group, 1) for s in (key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class Mlp(nn.Module):
    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.gate_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = Linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nn.Module):
    def __init__(self, shape: LlamaShape):
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), Mlp(shape)
        self.input_layernorm, self.post_attention_layernorm = Norm(shape), Norm(shape)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden).to(dtype), cos, sin)
        return hidden + self.mlp(self.post_attention_layernorm(hidden).to(dtype))


class Llama(nn.Module):
    """The model; `forward` gives the last hidden states, `logits` turns any of them into logits.

    Args:
        shape: its sizes.
        dtype: of the matrix products; parameters and the residual stream are fp32.
    """

    def __init__(self, shape: LlamaShape, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.model.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.model.norm = Norm(shape)
        if not shape.tie_word_embeddings:
            self.lm_head = Linear(shape.hidden_size, shape.vocab_size)
        self._initialise()

    def _initialise(self) -> None:
        """Variance one over the inputs, so that attention logits of a narrow model are not flat at the start.

        Embeddings are larger than what a layer adds at first, so that tokens keep their identity.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            std = 0.2 if "embed_tokens" in name else parameter.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= 2 * math.sqrt(2 * self.shape.num_hidden_layers)
            nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Last hidden states (batch, length, hidden), normalised, of tokens (batch, length)."""
        cos, sin = rotary(tokens.shape[1], self.shape, self.dtype, tokens.device)
        hidden = self.model.embed_tokens(tokens).float()
        for layer in self.model.layers:
            hidden = layer(hidden, cos, sin, self.dtype)
        return self.model.norm(hidden).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., vocabulary) of normalised hidden states."""
        head = self.model.embed_tokens if self.shape.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight.to(hidden.dtype)).float()
