"""DashAttention in eager PyTorch as a method: `dashbench.kernels.reference` in slices of query rows, slow,
for any device and dtype.

Chunks of keys are summarised, entmax over the summaries routes each query to some of them (one choice for all
heads of a group), and a softmax attends the tokens of those chunks and of the own one. Paper:
https://arxiv.org/abs/2605.18753; the equations stand in `dashbench.kernels.reference`.

Parameters (`prepare`): `preset` (None, or a name in `dashbench.kernels.reference.PRESETS`) gives the rest
    their defaults; scaling_factor (gamma, larger is sparser), alpha, sigma, bias_mode, forced and visibility
    are those of `dashbench.kernels.reference.DashOptions`.
The chunk size is the problem's block size, also where a preset has its own.

Debts and facts:
    * Queries, keys and values are raised to fp32 (fp64 stays fp64), and summaries are not rounded to the
      working dtype as a cache would.
    * A decode step summarises the whole cache again; the paper's keeps summaries and adds one when a chunk is
      complete.
    * All causal keys of a slice are multiplied, routed or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dashbench.baselines.api import Expected, Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import (
    attention_rows,
    kept_tokens,
    row_slices,
    small_enough_for_gradients,
)
from dashbench.baselines.block_selection import wide
from dashbench.baselines.block_sparse_reference import SLICE_ROWS, block_count, bytes_per_row
from dashbench.kernels.reference import PRESETS, DashOptions, Routing, dash_attention, route, summarize

TIE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 5e-3}
"""How near its threshold a chunk's (alpha - 1) logit may be for either answer to be right: a coordinate of a
rounded summary that lies halfway between two numbers of the dtype may go either way."""


def options_for(problem: Problem, preset: str | None = None, **given: Any) -> DashOptions:
    """Options of a problem: a preset's, changed by what is given, with the problem's block size.

    Raises:
        Unsupported: an unknown preset or parameter, or a value out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise Unsupported(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    known = {f.name for f in fields(DashOptions)} - {"chunk_size"}
    if unknown := set(given) - known:
        raise Unsupported(f"DashAttention has no parameter {sorted(unknown)[0]!r}")
    try:
        return replace(PRESETS[preset] if preset else DashOptions(), **given, chunk_size=problem.block_size)
    except ValueError as refused:
        raise Unsupported(str(refused)) from None


@torch.no_grad()
def rows_routing(
    problem: Problem,
    options: DashOptions,
    rows: torch.Tensor,
    dtype: torch.dtype,
    summaries: torch.Tensor | None = None,
    rounded: bool = False,
) -> Routing:
    """Routing of some query rows in the given precision, over `summaries` if they are at hand; `rounded`:
    summaries are rounded to the working dtype first, which is how a cache holds them."""
    rows = rows.to(problem.query.device)
    if summaries is None:
        summaries = summarize(problem.key.to(dtype), problem.summary_query.to(dtype), options.chunk_size)
        if rounded:
            summaries = summaries.to(problem.query.dtype).to(dtype)
    blocks = block_count(problem.key, options.chunk_size)
    return route(problem.query[:, :, rows].to(dtype), summaries, problem.start + rows, blocks, options)


def expectation(
    problem: Problem, options: DashOptions, rounded: bool = False
) -> Callable[[torch.Tensor, torch.Tensor | None], Expected]:
    """`Operator.reference` of any DashAttention: exact routing, and exact attention over the selection it is
    given. `rounded` as for `rows_routing`: what kernels do, which keep summaries in the working dtype."""

    def reference(rows: torch.Tensor, selected: torch.Tensor | None) -> Expected:
        rows = rows.to(problem.query.device)
        routing = rows_routing(problem, options, rows, torch.float64, rounded=rounded)
        output = attention_rows(
            problem.query[:, :, rows],
            problem.key,
            problem.value,
            problem.start + rows,
            selected=routing.active if selected is None else selected.to(rows.device),
            block_size=problem.block_size,
            bias=routing.bias,
        )
        return Expected(output, routing.active, routing.margin < TIE[problem.query.dtype])

    return reference


def prepare(problem: Problem, *, preset: str | None = None, **settings: Any) -> Operator:
    """DashAttention for one problem; `settings` are fields of `DashOptions` but for the chunk size."""
    options = options_for(problem, preset, **settings)
    dtype, start = wide(problem.query.dtype), problem.start
    rows_total = problem.query.shape[2]
    notes = {"preset": preset, "options": {f.name: getattr(options, f.name) for f in fields(DashOptions)}}

    def rows_of(query, key, value, summary_query, first, stop, active):
        """Output `[B, Hq, stop - first, D]` of the rows at positions first .. stop - 1; later keys are not
        read.
        """
        seen = None if active is None else active[..., : -(-stop // problem.block_size)]
        arguments = (key[:, :, :stop], value[:, :, :stop], summary_query, options)
        return dash_attention(query, *arguments, start=first, active=seen)[0]

    def forward(query, key, value, summary_query, active=None) -> torch.Tensor:
        outputs = []
        for part in row_slices(rows_total, bytes_per_row(query, key, key.dtype), most=SLICE_ROWS):
            arguments = (
                query[:, :, part], key, value, summary_query, start + part.start, start + part.stop,
                None if active is None else active[:, :, part],
            )  # fmt: skip
            if torch.is_grad_enabled():
                outputs.append(checkpoint(rows_of, *arguments, use_reentrant=False, preserve_rng_state=False))
            else:
                outputs.append(rows_of(*arguments))
        return torch.cat(outputs, 2)

    names = ("query", "key", "value", "summary_query")

    @torch.no_grad()
    def run() -> torch.Tensor:
        return forward(*(getattr(problem, name).to(dtype) for name in names)).to(problem.query.dtype)

    @torch.no_grad()
    def summaries() -> torch.Tensor:
        return summarize(problem.key.to(dtype), problem.summary_query.to(dtype), problem.block_size)

    prepared_summaries = cache(summaries)

    def selected(rows: torch.Tensor) -> torch.Tensor:
        parts = [
            rows_routing(problem, options, rows[part], dtype, prepared_summaries()).active
            for part in row_slices(len(rows), bytes_per_row(problem.query, problem.key, dtype))
        ]
        return torch.cat(parts, 2)

    def kept() -> torch.Tensor:
        rows = torch.arange(rows_total, device=problem.query.device)
        counts = [
            kept_tokens(selected(rows[part]), rows[part] + start, problem.block_size)
            for part in row_slices(rows_total, bytes_per_row(problem.query, problem.key, dtype))
        ]
        return torch.cat(counts, -1)

    every_row = torch.arange(rows_total)
    shared = {"selected": selected, "kept": kept, "reference": expectation(problem, options), "notes": notes}
    if problem.phase != "train":
        stages = {"summarize": summaries, "route": lambda: selected(every_row)}
        return Operator(run=run, stages=stages, **shared)

    leaves = [getattr(problem, name).detach().clone().requires_grad_() for name in names]
    grads: dict[str, torch.Tensor] = {}

    def backward_through(tensors, as_dtype, active=None):
        output = forward(*(x.to(as_dtype) for x in tensors), active)
        new = torch.autograd.grad(output, tensors, problem.grad_output.to(as_dtype))
        return output.detach(), dict(zip(names, new, strict=True))

    def run_train() -> torch.Tensor:
        output, new = backward_through(leaves, dtype)
        grads.update(new)
        return output.to(problem.query.dtype)

    def reference_gradients() -> dict[str, torch.Tensor]:
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        return backward_through(exact, torch.float64, selected(every_row))[1]

    return Operator(
        run=run_train,
        gradients=lambda: dict(grads),
        reference_gradients=reference_gradients if small_enough_for_gradients(problem) else None,
        **shared,
    )
