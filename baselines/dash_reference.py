"""DashAttention in eager PyTorch as a method: `dashbench.kernels.reference` in slices of query rows, slow,
for any device and dtype.

Chunks of keys are summarised, entmax over the summaries routes each query to some of them (one choice for all
heads of a group), and a softmax attends the tokens of those chunks and of the own one. Paper:
https://arxiv.org/abs/2605.18753; the equations stand in `dashbench.kernels.reference`.

Parameters (`prepare`): `preset` (None, or a name in `dashbench.kernels.reference.PRESETS`) gives the rest
    their defaults: scaling_factor: gamma; larger is sparser. alpha, sigma, bias_mode, forced, visibility: see
    `dashbench.kernels.reference.DashOptions`.
The chunk size is the problem's block size, also where a preset has its own.

Debts and facts:
    * Queries, keys and values are raised to fp32 (fp64 stays fp64), and summaries are not rounded to the
      working dtype as a cache would.
    * A decode step summarises the whole cache again; the paper's keeps summaries and adds one when a chunk is
      complete.
    * All causal keys of a slice are multiplied, routed or not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dashbench.baselines.api import Expected, Operator, Problem
from dashbench.baselines.attention_reference import kept_tokens, row_slices, small_enough_for_gradients
from dashbench.baselines.block_selection import wide
from dashbench.baselines.block_sparse_reference import SLICE_ROWS, block_count, bytes_per_row
from dashbench.kernels.reference import PRESETS, DashOptions, dash_attention, route, summarize

TIE = {torch.float64: 1e-10}
"""How near its threshold a chunk's (alpha - 1) logit may be for either answer to be right; 1e-4 for dtypes
computed in fp32.
"""


def options_for(problem: Problem, preset: str | None = None, **settings: Any) -> DashOptions:
    """A preset's options, or the defaults, with the given settings in their place and the problem's chunk
    size.

    Raises:
        ValueError: an unknown preset.
        TypeError: an unknown setting.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    options = DashOptions() if preset is None else PRESETS[preset]
    return replace(options, **(settings | {"chunk_size": problem.block_size}))


def prepare(problem: Problem, *, preset: str | None = None, **settings: Any) -> Operator:
    """DashAttention for one problem; `settings` are fields of `DashOptions` but for the chunk size."""
    options = options_for(problem, preset, **settings)
    dtype, start = wide(problem.query.dtype), problem.start
    blocks, rows_total = block_count(problem.key, problem.block_size), problem.query.shape[2]
    notes = {"preset": preset, **vars(options)}

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

    def inputs(as_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        return tuple(
            x.to(as_dtype) for x in (problem.query, problem.key, problem.value, problem.summary_query)
        )

    @torch.no_grad()
    def run() -> torch.Tensor:
        return forward(*inputs(dtype)).to(problem.query.dtype)

    @torch.no_grad()
    def summaries() -> torch.Tensor:
        return summarize(problem.key.to(dtype), problem.summary_query.to(dtype), problem.block_size)

    prepared_summaries = cache(summaries)

    @torch.no_grad()
    def selected(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(problem.query.device)
        active = []
        for part in row_slices(len(rows), bytes_per_row(problem.query, problem.key, dtype)):
            query = problem.query[:, :, rows[part]].to(dtype)
            active.append(route(query, prepared_summaries(), rows[part] + start, blocks, options).active)
        return torch.cat(active, 2)

    def kept() -> torch.Tensor:
        rows = torch.arange(rows_total, device=problem.query.device)
        counts = [
            kept_tokens(selected(rows[part]), rows[part] + start, problem.block_size)
            for part in row_slices(rows_total, bytes_per_row(problem.query, problem.key, dtype))
        ]
        return torch.cat(counts, -1)

    @torch.no_grad()
    def reference(rows: torch.Tensor, chosen: torch.Tensor | None) -> Expected:
        rows = rows.to(problem.query.device)
        query, *rest = inputs(torch.float64)
        parts = []
        for part in row_slices(len(rows), bytes_per_row(query, rest[0])):
            active = None if chosen is None else chosen[:, :, part].to(query.device)
            output, routing = dash_attention(
                query, *rest, options, start=start, rows=rows[part], active=active
            )
            parts.append((output, routing.active, routing.margin < TIE.get(problem.query.dtype, 1e-4)))
        return Expected(*(torch.cat(column, 2) for column in zip(*parts, strict=True)))

    every_row = torch.arange(rows_total)
    shared = {"selected": selected, "kept": kept, "reference": reference, "notes": notes}
    if problem.phase != "train":
        stages = {"summarize": summaries, "route": lambda: selected(every_row)}
        return Operator(run=run, stages=stages, **shared)

    names = ("query", "key", "value")
    leaves = [getattr(problem, name).detach().clone().requires_grad_() for name in names]
    grads: dict[str, torch.Tensor] = {}

    def backward_through(tensors, as_dtype, active=None):
        raised = [x.to(as_dtype) for x in (*tensors, problem.summary_query)]
        output = forward(*raised, active)
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
