"""Inputs with planted routing: seeded q, k, v whose chunks deserve different amounts of attention, as far as
we say so.

Random normal inputs cannot test sparse attention: the logits of all chunks are nearly equal, and the union
of sixteen independent heads
covers everything. Here every chunk of keys carries a topic, queries come in segments that want topics to a
graded degree, and most
heads of a group agree. With `w[s, t]` the weight that segment s gives to topic t, the routing logit of a
query of segment s for a chunk of
topic t is `PEAK · strength(chunk) · w[s, t]`, so that scaling it (DashAttention's knob) or taking the top k
(the others') keeps more or
fewer chunks smoothly.

Construction, in an orthonormal basis that is rotated at random for every KV head: the first axes are topics,
the rest is content. Content
noise of the keys has zero mean in every chunk, so the mean key of a chunk is exactly its topic, while single
tokens differ.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from dashbench.baselines.api import Problem, Unsupported
from dashbench.routings import ROUTINGS
from dashbench.rows import Point

# Attention logit of a fully wanted chunk, before content noise: enough for the wanted chunks to hold most of
# the attention mass.
PEAK = 6.0
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _generator(device: str, *seeds: int) -> torch.Generator:
    mixed = 0x9E3779B97F4A7C15
    for s in seeds:
        mixed = ((mixed ^ (s + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9) & 0x7FFFFFFFFFFFFFFF
    return torch.Generator(device=device).manual_seed(mixed)


def _rotation(dim: int, generator: torch.Generator, device: str) -> torch.Tensor:
    """Random orthogonal `[dim, dim]`, fp32."""
    q, r = torch.linalg.qr(torch.randn(dim, dim, generator=generator, device=device))
    return q * torch.sign(torch.diagonal(r))


def _chunk_topics(
    chunks: int, topics: int, zipf: float, persistence: float, generator: torch.Generator
) -> torch.Tensor:
    """Topic of every chunk `[chunks]` (CPU): Zipf popularity, repeats of the previous chunk, every topic
    placed early on."""
    popularity = 1.0 / torch.arange(1, topics + 1, dtype=torch.float64) ** zipf
    drawn = torch.multinomial(popularity, chunks, replacement=True, generator=generator)
    placed = min(topics, chunks)
    drawn[:placed] = torch.randperm(topics, generator=generator)[:placed]
    repeats = torch.rand(chunks, generator=generator) < persistence
    repeats[:placed] = False
    # The last chunk that did not repeat, for each chunk.
    source = torch.where(repeats, -1, torch.arange(chunks)).cummax(0).values
    return drawn[source]


def _segments(rows: int, mean: float, generator: torch.Generator) -> torch.Tensor:
    """Segment number of every query `[rows]` (CPU); lengths are geometric with the given mean."""
    if mean <= 1:
        return torch.arange(rows)
    starts = torch.rand(rows, generator=generator) < 1.0 / mean
    starts[:1] = True
    return starts.long().cumsum(0) - 1


def _wants(segments: int, topics: int, generator: torch.Generator) -> torch.Tensor:
    """Graded wants `[segments, topics]` (CPU, fp32): every segment ranks all topics, weights fall evenly
    from 1 to 0."""
    order = torch.rand(segments, topics, generator=generator).argsort(1)
    return 1.0 - order.argsort(1).float() / max(topics - 1, 1)


def _content(rows: int, dim: int, generator: torch.Generator, device: str) -> torch.Tensor:
    return torch.randn(rows, dim, generator=generator, device=device)


def _position_features(position: torch.Tensor, chunks: int) -> torch.Tensor:
    """Features `[rows, 16]` of chunk positions whose inner products fall smoothly with distance; norm 1."""
    frequency = math.pi / chunks * 2.0 ** torch.arange(8, device=position.device)
    angle = position[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(8)


def make_problem(point: Point, device: str, variant: int = 0) -> tuple[Problem, dict[str, Any]]:
    """Draws the inputs of a point.

    Args:
        point: what to draw; equal points and variants give equal bits on one device kind and torch version.
        device: `cpu` or `cuda`.
        variant: number of an independent draw from the same distribution.

    Returns:
        The problem, and facts for the row: the options used, and for planted topics the share of chunks of
        the most and least
        frequent topic.

    Raises:
        Unsupported: an unknown option, or a captured file that does not fit the point.
    """
    if point.routing not in ROUTINGS:
        raise Unsupported(f"unknown routing {point.routing!r}")
    defaults = ROUTINGS[point.routing][1]
    unknown = set(point.routing_options) - set(defaults) - {"path"}
    if unknown:
        raise Unsupported(f"routing {point.routing} has no option {sorted(unknown)[0]!r}")
    options = {**defaults, **point.routing_options}
    if point.routing == "captured":
        return _captured(point, device, options)

    shape, dtype = point.shape, DTYPES[point.dtype]
    length, block, dim = point.context, point.block_size, shape.head_dim
    rows = 1 if point.phase == "decode" else length
    group = shape.query_heads // shape.kv_heads
    chunks = -(-length // block)
    query = torch.empty(point.batch, shape.query_heads, rows, dim, dtype=dtype, device=device)
    key = torch.empty(point.batch, shape.kv_heads, length, dim, dtype=dtype, device=device)
    value = torch.empty_like(key)
    # The last query stays the same process in decode: position L - 1.
    own = (torch.arange(length - rows, length, device=device) // block).float()
    facts: dict[str, Any] = {"options": options, "variant": variant}

    for b in range(point.batch):
        for r in range(shape.kv_heads):
            host = _generator("cpu", point.seed, variant, b, r)
            noise = _generator(device, point.seed, variant, b, r)
            basis = _rotation(dim, noise, device)
            value[b, r] = torch.randn(length, dim, generator=noise, device=device).to(dtype)
            if point.routing == "iid":
                key[b, r] = _content(length, dim, noise, device).to(dtype)
                for g in range(group):
                    query[b, r * group + g] = _content(rows, dim, noise, device).to(dtype)
                continue
            keys, queries, axes = _planted(
                point.routing, options, dim, chunks, rows, group, own, host, device, facts
            )
            # Keys: topic of the chunk, plus content noise whose mean over every chunk is zero.
            content = _content(chunks * block, dim - axes, noise, device)
            content[length:] = 0
            counts = torch.full((chunks, 1, 1), float(block), device=device)
            counts[-1] = length - (chunks - 1) * block
            blocks = content.view(chunks, block, dim - axes)
            blocks -= blocks.sum(1, keepdim=True) / counts
            topical = keys.repeat_interleave(block, 0)[:length]
            key[b, r] = (torch.cat([topical, content[:length]], 1) @ basis.T).to(dtype)
            del content, blocks, topical
            for g in range(group):
                wanted = queries(g)
                raw = torch.cat([wanted, _content(rows, dim - axes, noise, device)], 1)
                query[b, r * group + g] = (raw @ basis.T).to(dtype)

    grad = None
    if point.phase == "train":
        grad = torch.randn(
            query.shape, generator=_generator(device, point.seed, variant, 7919), device=device
        ).to(dtype)
    summary = torch.zeros(shape.kv_heads, dim, dtype=dtype, device=device)
    problem = Problem(point.phase, query, key, value, summary, grad, block, point.seed)
    return problem, facts


def _planted(routing, options, dim, chunks, rows, group, own, host, device, facts):
    """Key axes `[chunks, axes]`, a function of the head giving query axes `[rows, axes]`, and the number of
    axes.

    Inner products of the two are logits times sqrt(dim), because attention divides by it.
    """
    amplitude = math.sqrt(PEAK * math.sqrt(dim))
    if routing == "sink_local":
        axes = 17
        position = torch.arange(chunks, device=device).float()
        keys = torch.cat([(position[:, None] == 0).float(), _position_features(position, chunks)], 1)
        wanted = torch.cat([torch.ones(rows, 1, device=device), _position_features(own, chunks)], 1)
        return keys * amplitude, lambda g: wanted * amplitude, axes
    if routing == "flat":
        return torch.zeros(chunks, 1, device=device), lambda g: torch.zeros(rows, 1, device=device), 1

    axes = topics = min(int(options["topics"]), dim // 2)
    if routing == "adversarial":
        of_chunk = torch.arange(chunks) % topics
        keys = torch.nn.functional.one_hot(of_chunk, topics).float().to(device) * amplitude
        mine = (torch.arange(rows) * 7) % topics
        wanted = torch.nn.functional.one_hot(mine, topics).float().to(device) * amplitude
        return keys, lambda g: wanted, axes

    of_chunk = _chunk_topics(chunks, topics, options["zipf"], options["persistence"], host)
    # Chunks of one topic are not all alike: their strengths smooth the steps between one topic more and one
    # less.
    strength = 0.8 + 0.4 * torch.rand(chunks, generator=host)
    keys = torch.nn.functional.one_hot(of_chunk, topics).float() * strength[:, None]
    segment = _segments(rows, options["segment"], host)
    count = int(segment[-1]) + 1
    shared = _wants(count, topics, host)
    agrees = torch.rand(group, count, generator=host) < options["agreement"]
    share = torch.bincount(of_chunk, minlength=topics).double() / chunks
    facts.update(segments=count, largest_topic=float(share.max()), smallest_topic=float(share.min()))

    def queries(g: int) -> torch.Tensor:
        wants = torch.where(agrees[g][:, None], shared, _wants(count, topics, host))
        return wants.to(device)[segment.to(device)] * amplitude

    return keys.to(device) * amplitude, queries, axes


def _captured(point: Point, device: str, options: dict[str, Any]) -> tuple[Problem, dict[str, Any]]:
    path = options.get("path")
    if not path:
        raise Unsupported("routing captured needs the option path")
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise Unsupported("routing captured needs safetensors: pip install safetensors") from None
    try:
        tensors = load_file(path, device=device)
        query, key, value = (tensors[name].to(DTYPES[point.dtype]) for name in ("query", "key", "value"))
    except FileNotFoundError:
        raise Unsupported(f"captured file {path} does not exist") from None
    except KeyError as missing:
        raise Unsupported(f"captured file {path} has no tensor {missing}") from None
    shape = point.shape
    expected = (point.batch, shape.kv_heads, point.context, shape.head_dim)
    if tuple(key.shape) != expected or tuple(value.shape) != expected:
        raise Unsupported(f"captured keys are {tuple(key.shape)}, the point asks for {expected}")
    rows = 1 if point.phase == "decode" else point.context
    query = query[:, :, -rows:].contiguous()
    if tuple(query.shape) != (point.batch, shape.query_heads, rows, shape.head_dim):
        raise Unsupported(f"captured queries are {tuple(query.shape)}, which does not fit the point")
    grad = torch.randn_like(query) if point.phase == "train" else None
    summary = tensors.get("summary_query", torch.zeros(shape.kv_heads, shape.head_dim)).to(query)
    return Problem(point.phase, query, key, value, summary, grad, point.block_size, point.seed), {
        "path": str(path)
    }


def clone_problem(problem: Problem) -> Problem:
    """The same problem in other memory, for rotating through more than the L2 cache holds."""
    return replace(
        problem,
        query=problem.query.clone(),
        key=problem.key.clone(),
        value=problem.value.clone(),
        grad_output=None if problem.grad_output is None else problem.grad_output.clone(),
    )
