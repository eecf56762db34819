"""Shapes of models with random weights, and how a path asks for one. Nothing here needs torch."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 384, "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 73448, "max_position_embeddings": 131072,
        "rope_theta": 10000.0,
    },
}  # fmt: skip
"""Llama's numbers by name; `8b` are MiniCPM-4-8B's."""

RANDOM = "random:"
"""What the path of a model with random weights begins with; a size follows."""


def random_size(path: str) -> str | None:
    """The size behind `random:`, known or not; None: the path is a checkpoint's."""
    return path.removeprefix(RANDOM) if path.startswith(RANDOM) else None
