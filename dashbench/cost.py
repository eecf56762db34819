"""What a point must compute and move: FLOPs, bytes, and the time no machine with these ceilings can beat.

No torch here. B batch, Hq query heads, Hkv KV heads, d head dim, N queries, L keys, C block size, ρ kept
fraction = 1 − s_flop, e bytes an element. One multiply-add is two FLOPs; softmax and entmax are not counted.

Dense causal prefill. Query i meets i + 1 keys, each in two products (Q·Kᵀ and P·V) of d multiply-adds:

    F = B · Hq · Σ_i (i + 1) · 2 · 2d = 2 · B · Hq · d · N(N + 1)

Dense decode meets L keys once: F = 4 · B · Hq · d · L. The backward pass has five such products (the scores
again, dV, dP, dQ, dK) against the forward's two, so training is 3.5 F.

A sparse method keeps ρF of it and pays for routing: products with one vector that stands for many keys. A
visible vector every S keys, scored by one product (half of a dense pair's work), costs F / (2S):

    DashAttention  logits against one summary a chunk, S = C:                            F / (2C)
    InfLLMv2       logits against windows, S = C/4, twice (log-sum-exp, then scores):    2 · F / (2S)
    NSA            compressed attention, both products, S = C/4, its importance again:   F / S + F / (2S)

With C = 64 these are F/128, F/16 and F · 3/32. InfLLMv2's coarse log-sum-exp, with S = C, costs F/32 + F/128
instead; the exact one is assumed.

A layer's training step (phase `layer`) has besides the products of its P parameters, two FLOPs each and
token forward and twice that backward: 6 P B N. With width W = Hq d and an MLP of 4 W

    P = W (Hq + 2 Hkv) d + Hq d W + 3 W · 4 W

Its optimizer touches parameter, gradient and two moments, 16 P bytes in fp32.

Bytes, each once. Queries and output: 2 · B · Hq · N · d · e. Keys and values: K = 2 · B · Hkv · L · d · e. In
prefill some query wants every key, so all of K moves whatever the sparsity; in decode ρK and what routing
reads: one summary vector a chunk, against a key and a value a token, is K/(2C) (DashAttention), K/(2S)
(InfLLMv2); NSA reads compressed keys and values, K/S. Training moves the gradients of all of these too.

Sources of the algorithms: DashAttention arXiv 2605.18753, NSA arXiv 2502.11089, InfLLMv2 arXiv 2509.24663.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dashbench.rows import Point, Shape

ELEMENT = {"bfloat16": 2, "float16": 2, "float32": 4}
TRAIN_FACTOR = 3.5
LAYER_WIDENING = 4
"""Width of a layer's MLP over the layer's, as in MiniCPM-4-8B."""
LAYER_ACTIVATIONS = 24
"""Vectors of a layer's width that a training step holds for each token at its peak, about: 16 of the MLP."""
# The measured ceilings are medians of a warm chip; a cool one clocks higher for a moment.
FLOOR_MARGIN = 0.8


@dataclass(frozen=True)
class Work:
    """Work of one call.

    Attributes:
        flops: attention over what was kept, and routing.
        bytes: what has to be read and written at least once.
        kept_flops: the attention alone; no implementation can do with less.
        dense_flops: of dense attention of the same shape.
    """

    flops: float
    bytes: float
    kept_flops: float
    dense_flops: float


def dense_flops(phase: str, batch: int, query_heads: int, head_dim: int, context: int) -> float:
    """FLOPs of dense causal attention (see the module's derivation)."""
    if phase == "decode":
        return 4.0 * batch * query_heads * head_dim * context
    forward = 2.0 * batch * query_heads * head_dim * context * (context + 1)
    return forward * (TRAIN_FACTOR if phase == "train" else 1.0)


def routing_share(family: str, block: int) -> tuple[float, float]:
    """(share of dense forward FLOPs, share of K and V bytes) that a family's routing costs."""
    stride = block / 4
    return {
        "dash": (1 / (2 * block), 1 / (2 * block)),
        "infllmv2": (2 / (2 * stride), 1 / (2 * stride)),
        "nsa": (1 / stride + 1 / (2 * stride), 1 / stride),
    }.get(family, (0.0, 0.0))


def work(point: Point, family: str, s_flop: float) -> Work:
    """Work of one call of a method.

    Args:
        point: the shape.
        family: `dense`, `fa3`, `dash`, `infllmv2`, `nsa`, or another (then routing counts as free).
        s_flop: measured sparsity: the work is that which was really kept.
    """
    if point.phase == "layer":
        alone, parameters = work(point.of_attention(), family, s_flop), layer_parameters(point.shape)
        rest = 6.0 * parameters * point.batch * point.context
        moved = alone.bytes + 16.0 * parameters
        return Work(alone.flops + rest, moved, alone.kept_flops + rest, alone.dense_flops + rest)
    shape, size = point.shape, ELEMENT[point.dtype]
    dense = dense_flops(point.phase, point.batch, shape.query_heads, shape.head_dim, point.context)
    forward = dense / (TRAIN_FACTOR if point.phase == "train" else 1.0)
    route_flops, route_bytes = routing_share(family, point.block_size)
    kept = 1.0 - s_flop
    queries = 1 if point.phase == "decode" else point.context
    rows = 2.0 * point.batch * shape.query_heads * queries * shape.head_dim * size
    cache = 2.0 * point.batch * shape.kv_heads * point.context * shape.head_dim * size
    if point.phase == "decode":
        moved = rows + cache * min(1.0, kept + route_bytes)
    elif point.phase == "train":
        moved = 2 * (rows + cache)  # gradients of the same sizes come on top
    else:
        moved = rows + cache
    return Work(dense * kept + forward * route_flops, moved, dense * kept, dense)


def layer_parameters(shape: Shape) -> int:
    """Parameters of a decoder layer around an attention of this shape, norms left out."""
    width, heads = shape.query_heads * shape.head_dim, shape.query_heads + 2 * shape.kv_heads
    return width * heads * shape.head_dim + width * width + 3 * LAYER_WIDENING * width * width


def problem_bytes(point: Point) -> int:
    """Bytes of one copy of a point's inputs and output; of a layer's step also what it holds meanwhile."""
    shape, size = point.shape, ELEMENT[point.dtype]
    if point.phase == "layer":
        width = shape.query_heads * shape.head_dim
        held = LAYER_ACTIVATIONS * width * size * point.batch * point.context
        return problem_bytes(point.of_attention()) + 16 * layer_parameters(shape) + held
    queries = 1 if point.phase == "decode" else point.context
    rows = 2 * point.batch * shape.query_heads * queries * shape.head_dim * size
    cache = 2 * point.batch * shape.kv_heads * point.context * shape.head_dim * size
    return (rows + cache) * (2 if point.phase == "train" else 1)


def rates(done: Work, latency_ms: float, ceilings: dict[str, float]) -> dict[str, float | None]:
    """`tflops`, `tb_per_s` and `percent_of_ceiling` (of the ceiling that binds) of a measured call."""
    seconds = latency_ms / 1e3
    tflops, tb = done.flops / seconds / 1e12, done.bytes / seconds / 1e12
    shares = [
        100 * rate / ceilings[name]
        for rate, name in ((tflops, "matmul_tflops"), (tb, "copy_tb_per_s"))
        if ceilings.get(name)
    ]
    return {"tflops": tflops, "tb_per_s": tb, "percent_of_ceiling": max(shares) if shares else None}


def floor_ms(done: Work, ceilings: dict[str, float], cold: bool, cache_bytes: int) -> float:
    """The physics guard: no honest call is faster than this, in ms.

    Args:
        done: the work; routing is left out, because a method may do it more cheaply than our formula.
        ceilings: measured `matmul_tflops` and `copy_tb_per_s`; a missing one bounds nothing.
        cold: whether the inputs rotate through more than the cache holds. Warm inputs may come from the
            cache, so bytes count only when cold, only beyond the cache's size, and only from twice it on.
        cache_bytes: size of the L2 cache.
    """
    floor = done.kept_flops / (ceilings["matmul_tflops"] * 1e12) if ceilings.get("matmul_tflops") else 0.0
    if cold and done.bytes > 2 * cache_bytes and ceilings.get("copy_tb_per_s"):
        floor = max(floor, (done.bytes - cache_bytes) / (ceilings["copy_tb_per_s"] * 1e12))
    return 1e3 * floor * FLOOR_MARGIN


def estimate_ms(point: Point, device: dict[str, Any] | None) -> float:
    """A guess at one call for planning: dense work at a third of a device's usual rate, never under 20 µs."""
    dense = work(point, "dense", 0.0).flops
    on_gpu = bool(device and device.get("kind") == "cuda")
    rate, bandwidth = (3e14, 2e12) if on_gpu else (3e10, 1e10)
    return max(0.02, 1e3 * max(dense / rate, problem_bytes(point) / bandwidth))
