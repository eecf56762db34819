"""DashAttention by our Triton and Gluon kernels: prefill, decode with a cache, and training with all
gradients.

Paper: https://arxiv.org/abs/2605.18753. Parameters (`prepare`) as in `dash_reference`: scaling_factor (the
knob; larger is sparser), alpha, sigma, bias_mode, forced, visibility, preset; and `dense_below`: prefill and
training of fewer tokens run dense attention and say so in the notes, with its backend (off by default); and
`balanced`: decode with or without `DecodeLaunch.balanced`, in place of what the tables of launches say.
Timed in prefill and training: summaries, routing and attention, from q, k, v as a model has them after RoPE.
Timed in decode: writing the new token to the cache (with the summary of a chunk that it completes), routing
and attention; the lengths count the new token already, as a model advances them once a step for all its
layers. With visibility `completed` the cache is appended to by a launch of its own, and its length is set
back before every call, a launch that a model would not make.

Debts to the paper: a bias that bf16 weights cannot hold (`centered` with sigma of 1e5 and more) is left out
of the forward; its gradient is not.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from dashbench.baselines.api import Expected, Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import (
    attention_gradients,
    dense_expected,
    dense_gradients,
    small_enough_for_gradients,
)
from dashbench.baselines.dash_reference import expectation, options_for
from dashbench.kernels.attend import block_sparse_attention, kernel_for
from dashbench.kernels.dash import dash_attention, prior_is_negligible, route_with
from dashbench.kernels.decode import DecodeCache, DecodeStep, append, known_launch
from dashbench.kernels.reference import DashOptions
from dashbench.kernels.reference import dash_attention as specified
from dashbench.kernels.route import Routes
from dashbench.kernels.summarize import summarize_chunks

NAMES = ("query", "key", "value", "summary_query")


def prepare(
    problem: Problem,
    *,
    preset: str | None = None,
    deterministic: bool = False,
    dense_below: int | None = None,
    balanced: bool | None = None,
    **settings: Any,
) -> Operator:
    """DashAttention for one problem; `settings` are fields of `DashOptions` but for the chunk size."""
    options = options_for(problem, preset, **settings)
    given = asdict(options)
    chunk = options.chunk_size
    if problem.phase == "decode":
        return _decode(problem, options, balanced, {"preset": preset, "options": given})
    if dense_below is not None and problem.query.shape[2] < dense_below:
        return _dense(problem, dense_below, {"preset": preset, "options": given})
    try:
        with torch.no_grad():
            _, routes = dash_attention(*(getattr(problem, n) for n in NAMES), return_routing=True, **given)
    except ValueError as refused:
        raise Unsupported(str(refused)) from None
    notes = {
        "preset": preset,
        "options": given,
        "tile": routes.tile,
        "path": "sparse",
        "kernel": kernel_for(problem.query, problem.key, problem.value, routes),
    }
    summaries = summarize_chunks(problem.key, problem.summary_query, chunk)

    def route() -> Routes:
        return route_with(problem.query, summaries, options)

    def selected(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(problem.query.device)
        blocks = -(-problem.key.shape[2] // chunk)
        bits = (routes.mask[:, :, rows, :, None] >> torch.arange(32, device=rows.device)) & 1
        before = bits.flatten(-2)[..., :blocks].bool()
        return before | (torch.arange(blocks, device=rows.device) == (rows // chunk)[:, None])

    def kept() -> torch.Tensor:
        position = torch.arange(problem.query.shape[2], device=problem.query.device)
        return (routes.active_blocks.long() - 1) * chunk + position % chunk + 1

    shared = {
        "reference": expectation(problem, options, rounded=True),
        "selected": selected,
        "kept": kept,
        "notes": notes,
    }
    if problem.phase == "prefill":

        def run() -> torch.Tensor:
            with torch.no_grad():
                return dash_attention(*(getattr(problem, n) for n in NAMES), **given)

        plain = route()
        stages = {
            "summarize": lambda: summarize_chunks(problem.key, problem.summary_query, chunk),
            "route": route,
            "attend": lambda: block_sparse_attention(problem.query, problem.key, problem.value, plain)[0],
        }
        return Operator(run=run, stages=stages, **shared)

    leaves = [getattr(problem, n).detach().clone().requires_grad_() for n in NAMES]
    grads: dict[str, torch.Tensor] = {}

    def run_train() -> torch.Tensor:
        out = dash_attention(*leaves, deterministic=deterministic, **given)
        grads.update(zip(NAMES, torch.autograd.grad(out, leaves, problem.grad_output), strict=True))
        return out.detach()

    def exact_gradients() -> dict[str, torch.Tensor]:
        """fp64, over the kernel's own selection. The routing's own gradient is 1/σ of it and tested where σ
        is small; where its prior shows in the output, it is part of the reference."""
        position = torch.arange(problem.query.shape[2], device=problem.query.device)
        if prior_is_negligible(options):
            tensors = (problem.query, problem.key, problem.value, problem.grad_output)
            return attention_gradients(*tensors, selected=selected(position), block_size=chunk)
        exact = [getattr(problem, n).double().requires_grad_() for n in NAMES]
        out, _ = specified(*exact, options, active=selected(position))
        found = torch.autograd.grad(out, exact[:3], problem.grad_output.double())
        return dict(zip(NAMES, found, strict=False))

    return Operator(
        run=run_train,
        gradients=lambda: {n: grads[n] for n in NAMES[:3]},
        reference_gradients=exact_gradients if small_enough_for_gradients(problem) else None,
        **shared,
    )


def _dense(problem: Problem, dense_below: int, notes: dict[str, Any]) -> Operator:
    """The operator below its crossover: dense attention, judged and recorded as such."""
    tensors = [getattr(problem, n) for n in NAMES]

    def run() -> torch.Tensor:
        with torch.no_grad():
            return dash_attention(*tensors, dense_below=dense_below)

    with torch.no_grad():
        _, info = dash_attention(*tensors, dense_below=dense_below, return_info=True)

    def reference(rows: torch.Tensor, selected: torch.Tensor | None) -> Expected:
        return dense_expected(problem, rows)

    if problem.phase == "prefill":
        return Operator(run=run, reference=reference, stages={"attend": run}, notes={**notes, **info})
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    grads: dict[str, torch.Tensor] = {}

    def run_train() -> torch.Tensor:
        out, trained = dash_attention(*leaves, tensors[3], dense_below=dense_below, return_info=True)
        info.update(trained)
        grads.update(zip(NAMES, torch.autograd.grad(out, leaves, problem.grad_output), strict=False))
        return out.detach()

    run_train()  # the backend of a training step may be another one
    return Operator(
        run=run_train,
        reference=reference,
        gradients=lambda: dict(grads),
        reference_gradients=(lambda: dense_gradients(problem))
        if small_enough_for_gradients(problem)
        else None,
        notes={**notes, **info},
    )


def _decode(problem: Problem, options: DashOptions, balanced: bool | None, notes: dict[str, Any]) -> Operator:
    """One new token against a cache that holds all tokens before it, and its summaries."""
    chunk, length = options.chunk_size, problem.key.shape[2]
    batch, kv_heads, _, dim = problem.key.shape
    chunks = -(-length // chunk)
    shape = (batch, kv_heads, chunks * chunk, dim)
    own = (length - 1) // chunk
    cache = DecodeCache(
        key=problem.key.new_zeros(shape),
        value=problem.value.new_zeros(shape),
        summaries=problem.key.new_zeros(batch, kv_heads, chunks, dim),
        lengths=torch.full((batch,), length, dtype=torch.int32, device=problem.key.device),
    )
    cache.key[:, :, : length - 1] = problem.key[:, :, :-1]
    cache.value[:, :, : length - 1] = problem.value[:, :, :-1]
    cache.summaries[:, :, :own] = summarize_chunks(
        problem.key[:, :, : own * chunk], problem.summary_query, chunk
    )
    new = (
        problem.key[:, :, -1:].contiguous(),
        problem.value[:, :, -1:].contiguous(),
        problem.summary_query.contiguous(),
    )
    aside = options.visibility == "own"
    launch = (
        None if balanced is None else replace(known_launch(problem.query, cache, options), balanced=balanced)
    )
    try:
        step = DecodeStep(problem.query, cache, options, launch, new=new if aside else None)
    except ValueError as refused:
        raise Unsupported(str(refused)) from None

    def grow() -> None:
        cache.lengths.fill_(length - 1)
        append(cache, *new, chunk, step.workspace.append_tickets)

    def run() -> torch.Tensor:
        if not aside:
            grow()
        return step.run()

    run()  # the stages below start from a finished step

    def selected(rows: torch.Tensor) -> torch.Tensor:
        space = step.workspace
        counts = space.counts[:, 0].long()  # [B, Hkv]
        place = torch.arange(space.lists.shape[-1], device=counts.device)
        inside = place < counts[..., None]
        chosen = torch.zeros(batch, kv_heads, chunks + 1, dtype=torch.bool, device=counts.device)
        listed = torch.where(inside, space.lists[:, 0].long(), chunks)
        chosen.scatter_(2, listed, True)
        return chosen[:, :, None, :chunks].expand(-1, -1, len(rows), -1)

    def kept() -> torch.Tensor:
        counts = step.workspace.counts[:, 0].long()
        return ((counts - 1) * chunk + (length - 1) % chunk + 1)[..., None]

    return Operator(
        run=run,
        reference=expectation(problem, options, rounded=True),
        selected=selected,
        kept=kept,
        stages={
            **({} if aside else {"append": grow}),
            "scores": step.scores,
            "route": step.route,
            "attend": step.attend,
            "combine": step.combine,
        },
        notes={**notes, "splits": step.workspace.splits, "launch": asdict(step.launch)},
    )
