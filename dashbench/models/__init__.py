"""Checkpoints of four attentions on the stock Llama of transformers.

`load`, `make_checkpoint` and `random_model` of `models.checkpoint` are imported when they are asked for,
because they bring torch and transformers with them.
"""

from __future__ import annotations

from typing import Any

__all__ = ["load", "make_checkpoint", "random_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dashbench.models import checkpoint

    return getattr(checkpoint, name)
