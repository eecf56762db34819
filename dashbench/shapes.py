"""Attention shapes by name: the layer of a well-known model."""

from __future__ import annotations

from dashbench.rows import Shape

SHAPES: dict[str, tuple[Shape, str]] = {
    shape.name: (shape, note)
    for shape, note in (
        (
            Shape(name="minicpm4-8b", query_heads=32, kv_heads=2, head_dim=128),
            "the released DashAttention checkpoints",
        ),
        (
            Shape(name="llama3-8b", query_heads=32, kv_heads=8, head_dim=128),
            "Llama 3 8B, Mistral 7B, Qwen3 8B",
        ),
        (Shape(name="llama3-70b", query_heads=64, kv_heads=8, head_dim=128), "Llama 3 70B, Qwen3 32B"),
        (Shape(name="tiny", query_heads=4, kv_heads=1, head_dim=64), "for CPUs and tests"),
    )
}


def named(query_heads: int, kv_heads: int, head_dim: int) -> Shape:
    """A shape given by numbers: its preset where there is one, else a name made of the numbers."""
    for shape, _ in SHAPES.values():
        if (shape.query_heads, shape.kv_heads, shape.head_dim) == (query_heads, kv_heads, head_dim):
            return shape
    return Shape(
        name=f"q{query_heads}kv{kv_heads}d{head_dim}",
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
    )
