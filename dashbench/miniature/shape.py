"""Sizes of the small Llama. Nothing here needs torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class LlamaShape(BaseModel):
    """Sizes of the model, by transformers' names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vocab_size: int = 3072
    hidden_size: int = 128
    intermediate_size: int = 320
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
