"""Inputs with planted routing: seeded q, k, v in which some chunks deserve attention and we know which.

Random normal inputs cannot test sparse attention: the logits of all chunks are nearly equal (their spread
is 1/√C for mean-pooled chunks of C tokens), so entmax keeps a third of them a head, and the union of
sixteen independent heads covers everything. Here every chunk of keys carries a topic, queries come in
segments that want topics to a graded degree, and most heads of a group agree. With w[s, t] in [0, 1] the
want of segment s for topic t, the routing logit of a query of segment s for a chunk of topic t is

    PEAK · strength(chunk) · w[s, t],        strength in [0.8, 1.2],

so that scaling it (DashAttention's knob) or taking the top k (the others') keeps more or fewer chunks
smoothly. Chunk c is in the support of entmax-1.5 iff Σ_{j: z_j > z_c} (γ(z_j − z_c)/2)² < 1 (Peters et al.
2019), which only shrinks as γ grows: sparsity is exactly monotone in the scaling factor, head by head and
hence for the union. Measured with the defaults (16 heads a group): 0 to 80 % s_flop at 1k tokens, 0 to 92 %
at 4k, 0 to 98 % at 16k, always smooth. `adversarial` plants one topic a query, so its sparsity jumps and
most targets between are out of reach.

Construction, in an orthonormal basis drawn for every batch element and KV head: the first axes are topics,
the rest is content. Content noise of the keys has zero mean in every chunk, so the mean key of a chunk is
exactly its topic while single tokens differ; means over half a chunk (the windows of NSA and InfLLMv2) see
the topic under a jitter of about 0.14 in the logit, against PEAK = 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dashbench.baselines.api import Problem, Unsupported
from dashbench.routings import ROUTINGS
from dashbench.rows import Point

# Attention logit of a fully wanted chunk, before content noise: enough for the wanted chunks to hold most
# of the attention mass.
PEAK = 6.0
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
GRADIENT_STREAM = 7919
SUPPORT_ROWS = 256


@dataclass(frozen=True)
class _Plan:
    """Topic axes of one batch element and KV head; attention divides their inner products by √D.

    Attributes:
        keys: `[M, A]` fp32, topic vector of every chunk.
        table: head of the group -> `[S, A]` fp32, topic vector of every query segment.
        segment: `[N]` int64, segment of every query row.
    """

    keys: torch.Tensor
    table: Callable[[int], torch.Tensor]
    segment: torch.Tensor


def make_problem(point: Point, device: str, variant: int = 0) -> tuple[Problem, dict[str, Any]]:
    """Draws the inputs of a point.

    Args:
        point: what to draw; equal inputs, options, seed and variant give equal bits on one kind of device
            and torch version, whatever the method, knobs, cache or launch.
        device: `cpu` or `cuda`.
        variant: number of an independent draw from the same distribution.

    Returns:
        The problem, and facts for the row: routing options, seed, variant and, for planted routings,
        `planted_support`: how many of the chunks before it a query deserves (entmax-1.5 support of the
        planted logits at scaling factor 1, one head of the first batch element and KV head, at most 256
        queries spread evenly): percentiles, and a histogram by powers of two.

    Raises:
        Unsupported: an unknown option, or a captured file that does not fit the point.
    """
    if point.routing not in ROUTINGS:
        raise Unsupported(f"unknown routing {point.routing!r}")
    defaults = ROUTINGS[point.routing][1]
    known = {*defaults, "path"} if point.routing == "captured" else set(defaults)
    unknown = sorted(set(point.routing_options) - known)
    if unknown:
        raise Unsupported(f"routing {point.routing} has no option {unknown[0]!r}")
    options = {**defaults, **point.routing_options}
    facts: dict[str, Any] = {"options": options, "seed": point.seed, "variant": variant}
    if point.routing == "captured":
        return _captured(point, device, options, variant), facts

    shape, dtype = point.shape, DTYPES[point.dtype]
    length, dim = point.context, shape.head_dim
    rows = 1 if point.phase == "decode" else length
    group = shape.query_heads // shape.kv_heads
    query = torch.empty(point.batch, shape.query_heads, rows, dim, dtype=dtype, device=device)
    key = torch.empty(point.batch, shape.kv_heads, length, dim, dtype=dtype, device=device)
    value = torch.empty_like(key)
    # One batch element and KV head after the other, one query head after the other: the fp32 working set
    # stays that of one head.
    for b in range(point.batch):
        for r in range(shape.kv_heads):
            host = _generator("cpu", point.seed, variant, b, r)
            noise = _generator(device, point.seed, variant, b, r)
            value[b, r] = torch.randn(length, dim, generator=noise, device=device)
            heads = range(r * group, (r + 1) * group)
            if point.routing == "iid":
                key[b, r] = torch.randn(length, dim, generator=noise, device=device)
                for h in heads:
                    query[b, h] = torch.randn(rows, dim, generator=noise, device=device)
                continue
            plan = _plan(point, options, rows, group, host, noise, device)
            if b == r == 0:
                facts |= _support_facts(plan, point)
            if plan.keys.shape[1] >= dim:
                raise Unsupported(f"routing {point.routing} needs head_dim above {plan.keys.shape[1]}")
            topical, content = _basis(dim, host, device).split([plan.keys.shape[1], dim - plan.keys.shape[1]])
            drawn = _centred(length, content.shape[0], point.block_size, noise, device)
            key[b, r] = (plan.keys @ topical).repeat_interleave(point.block_size, 0)[
                :length
            ] + drawn @ content
            for g, h in enumerate(heads):
                drawn = torch.randn(rows, content.shape[0], generator=noise, device=device)
                query[b, h] = (drawn @ content).add_((plan.table(g) @ topical)[plan.segment])
    summary = torch.zeros(shape.kv_heads, dim, dtype=dtype, device=device)
    grad = _grad_output(point, query, variant)
    return Problem(point.phase, query, key, value, summary, grad, point.block_size, point.seed), facts


def clone_problem(problem: Problem) -> Problem:
    """The same problem in other memory, for rotating through more than the L2 cache holds."""
    return replace(
        problem,
        query=problem.query.clone(),
        key=problem.key.clone(),
        value=problem.value.clone(),
        grad_output=None if problem.grad_output is None else problem.grad_output.clone(),
    )


def entmax_support(logits: torch.Tensor) -> torch.Tensor:
    """Support sizes `[...]` of entmax-1.5 over the last axis of `logits` (−inf: not a candidate).

    Counts c with Σ_{j: z_j > z_c} ((z_j − z_c)/2)² < 1, the support by sorting (Peters et al. 2019).
    """
    ranked = (logits.double() / 2).sort(-1, descending=True).values
    finite = ranked.isfinite()
    ranked = ranked.where(finite, 0.0)
    count = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device)
    # Σ (x_j − x_c)² = Σ x_j² − 2 x_c Σ x_j + n x_c², taken around the row's maximum to keep it from
    # cancelling.
    shifted = ranked - ranked[..., :1]
    sums, squares = shifted.cumsum(-1), shifted.square().cumsum(-1)
    return ((squares - 2 * shifted * sums + count * shifted.square() < 1) & finite).sum(-1)


def _generator(device: str, *seeds: int) -> torch.Generator:
    mixed = 0x9E3779B97F4A7C15
    for s in seeds:
        mixed = ((mixed ^ (s + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9) & 0x7FFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return torch.Generator(device=device).manual_seed(mixed)


def _basis(dim: int, host: torch.Generator, device: str) -> torch.Tensor:
    """Random orthonormal rows `[dim, dim]`, fp32."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=host))
    return (q * torch.sign(torch.diagonal(r))).T.contiguous().to(device)


def _centred(length: int, axes: int, block: int, noise: torch.Generator, device: str) -> torch.Tensor:
    """Normal noise `[length, axes]` whose mean over every block is zero, the last, partial one included."""
    drawn = torch.randn(length, axes, generator=noise, device=device)
    whole = length - length % block
    drawn[:whole].view(-1, block, axes).sub_(drawn[:whole].view(-1, block, axes).mean(1, keepdim=True))
    if whole < length:
        drawn[whole:] -= drawn[whole:].mean(0)
    return drawn


def _plan(
    point: Point,
    options: dict[str, Any],
    rows: int,
    group: int,
    host: torch.Generator,
    noise: torch.Generator,
    device: str,
) -> _Plan:
    dim = point.shape.head_dim
    chunks = -(-point.context // point.block_size)
    amplitude = math.sqrt(PEAK * math.sqrt(dim))
    every_row = torch.arange(rows, device=device)
    if point.routing == "flat":
        nothing = torch.zeros(1, 1, device=device)
        return _Plan(nothing.expand(chunks, 1), lambda g: nothing, torch.zeros_like(every_row))
    if point.routing == "sink_local":
        position = torch.arange(chunks, device=device)
        sink = (position == 0).float()[:, None]
        features = _position_features(position, chunks)
        # Queries of one chunk share their own position: row i of a prefill sits at i, the one of a decode
        # at L − 1.
        own = (every_row + point.context - rows) // point.block_size
        table = torch.cat([torch.ones_like(sink), features], 1) * amplitude
        # The first chunk is wanted as a sink by all alike, not by those near it more.
        return _Plan(torch.cat([sink, features * (1 - sink)], 1) * amplitude, lambda g: table, own)

    topics = min(int(options["topics"]), dim // 2)
    eye = torch.eye(topics, device=device) * amplitude
    if point.routing == "adversarial":
        keys = eye[torch.arange(chunks, device=device) % topics]
        # Seven and the number of topics share no factor unless someone asks for it: neighbours always
        # differ.
        return _Plan(keys, lambda g: eye, (every_row + point.context - rows) * 7 % topics)

    of_chunk = _chunk_topics(chunks, topics, options["zipf"], options["persistence"], host)
    # Chunks of one topic are not all alike: their strengths smooth the steps between one topic more and one
    # less.
    strength = 0.8 + 0.4 * torch.rand(chunks, 1, generator=host)
    segment = _segments(rows, options["segment"], host)
    count = int(segment[-1]) + 1
    shared = torch.rand(count, topics, generator=noise, device=device)
    everyone = options["agreement"] >= 1
    follows = None if everyone else torch.rand(group, count, 1, generator=host) < options["agreement"]

    def table(g: int) -> torch.Tensor:
        if everyone:
            return shared * amplitude
        own = torch.rand(shared.shape, generator=noise, device=device)
        return torch.where(follows[g].to(device), shared, own) * amplitude

    return _Plan(eye[of_chunk.to(device)] * strength.to(device), table, segment.to(device))


def _chunk_topics(
    chunks: int, topics: int, zipf: float, persistence: float, host: torch.Generator
) -> torch.Tensor:
    """Topic of every chunk `[chunks]`: Zipf popularity, some repeat the one before, each topic once first."""
    popularity = 1.0 / torch.arange(1, topics + 1, dtype=torch.float64) ** zipf
    drawn = torch.multinomial(popularity, chunks, replacement=True, generator=host)
    placed = min(topics, chunks)
    drawn[:placed] = torch.randperm(topics, generator=host)[:placed]
    repeats = torch.rand(chunks, generator=host) < persistence
    repeats[:placed] = False
    return drawn[torch.where(repeats, -1, torch.arange(chunks)).cummax(0).values]


def _segments(rows: int, mean: float, host: torch.Generator) -> torch.Tensor:
    """Segment of every query `[rows]`; lengths are geometric with the given mean."""
    starts = torch.rand(rows, generator=host) < 1.0 / max(mean, 1.0)
    starts[:1] = True
    return starts.long().cumsum(0) - 1


def _position_features(position: torch.Tensor, chunks: int) -> torch.Tensor:
    """Features `[M, 16]` of chunk positions whose inner products fall smoothly with distance; norm 1."""
    frequency = math.pi / chunks * 2.0 ** torch.arange(8, device=position.device)
    angle = position[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(8)


def _support_facts(plan: _Plan, point: Point) -> dict[str, Any]:
    rows = plan.segment.shape[0]
    sampled = torch.linspace(0, rows - 1, min(rows, SUPPORT_ROWS), dtype=torch.float64).round().long()
    own = (sampled + point.context - rows) // point.block_size
    wanted = plan.table(0)[plan.segment[sampled.to(plan.segment.device)]]
    logits = (wanted @ plan.keys.T / math.sqrt(point.shape.head_dim)).cpu()
    earlier = torch.arange(logits.shape[1]) < own[:, None]
    counts = entmax_support(logits.masked_fill(~earlier, -math.inf))[own > 0]
    if counts.numel() == 0:
        return {"planted_support": {}}
    quantiles = torch.quantile(counts.double(), torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64))
    powers = counts.double().log2().floor().long()
    histogram = {f"{2**p}-{2 ** (p + 1) - 1}": int((powers == p).sum()) for p in sorted(set(powers.tolist()))}
    return {
        "segments": int(plan.segment[-1] - plan.segment[0]) + 1 if point.routing != "adversarial" else rows,
        "planted_support": dict(zip(("p10", "p50", "p90", "p99"), quantiles.tolist(), strict=True)),
        "planted_support_histogram": histogram,
    }


def _grad_output(point: Point, query: torch.Tensor, variant: int) -> torch.Tensor | None:
    if point.phase != "train":
        return None
    grad = torch.empty_like(query)
    generator = _generator(query.device.type, point.seed, variant, GRADIENT_STREAM)
    for b in range(point.batch):
        for h in range(query.shape[1]):
            grad[b, h] = torch.randn(query.shape[2:], generator=generator, device=query.device)
    return grad


def _captured(point: Point, device: str, options: dict[str, Any], variant: int) -> Problem:
    if not options.get("path"):
        raise Unsupported("routing captured needs the option path")
    path = Path(options["path"])
    if not path.exists():
        raise Unsupported(f"captured file {path} does not exist")
    tensors = _load(path)
    missing = {"query", "key", "value"} - tensors.keys()
    if missing:
        raise Unsupported(f"captured file {path} has no tensor {sorted(missing)[0]!r}")
    shape, dtype = point.shape, DTYPES[point.dtype]
    query, key, value = (tensors[name].to(device, dtype) for name in ("query", "key", "value"))
    expected = (point.batch, shape.kv_heads, point.context, shape.head_dim)
    if tuple(key.shape) != expected or tuple(value.shape) != expected:
        raise Unsupported(f"captured keys are {list(key.shape)}, the point asks for {list(expected)}")
    rows = 1 if point.phase == "decode" else point.context
    expected = (point.batch, shape.query_heads, rows, shape.head_dim)
    query = query[:, :, -rows:].contiguous()
    if tuple(query.shape) != expected:
        raise Unsupported(f"captured queries are {list(query.shape)}, the point asks for {list(expected)}")
    summary = tensors.get("summary_query", torch.zeros(shape.kv_heads, shape.head_dim)).to(device, dtype)
    grad = _grad_output(point, query, variant)
    return Problem(
        point.phase, query, key.contiguous(), value.contiguous(), summary, grad, point.block_size, point.seed
    )


def _load(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".pt":
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise Unsupported("captured .safetensors files need: pip install safetensors") from None
    return load_file(path)
