"""DashAttention by our Triton and Gluon kernels (`dashbench.kernels.dash`): prefill, and training with all
gradients.

Paper: https://arxiv.org/abs/2605.18753. Parameters (`prepare`) as in `dash_reference`: scaling_factor (the
knob; larger is sparser), alpha,
sigma, bias_mode, forced, visibility, preset. Timed: summaries, routing and attention, from q, k, v as a
model has them after RoPE.

Debts to the paper: the prior's bias, which at its σ is below what bf16 can hold, is left out of the forward
(its gradient is not);
`bias_mode="raw"` and small σ are not offered. No decode yet.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import small_enough_for_gradients
from dashbench.baselines.dash_reference import expectation, options_for
from dashbench.kernels.attend import block_sparse_attention, kernel_for
from dashbench.kernels.dash import dash_attention
from dashbench.kernels.reference import dash_attention as specified
from dashbench.kernels.route import route_chunks
from dashbench.kernels.summarize import summarize_chunks

NAMES = ("query", "key", "value", "summary_query")


def prepare(
    problem: Problem, *, preset: str | None = None, deterministic: bool = False, **settings: Any
) -> Operator:
    """DashAttention for one prefill or training problem; `settings` are fields of `DashOptions` but for the
    chunk size."""
    if problem.phase == "decode":
        raise Unsupported("dash has no decode kernel yet")
    options = options_for(problem, preset, **settings)
    given = asdict(options)
    chunk = options.chunk_size
    try:
        with torch.no_grad():
            _, routes = dash_attention(*(getattr(problem, n) for n in NAMES), return_routing=True, **given)
    except ValueError as refused:
        raise Unsupported(str(refused)) from None
    notes = {
        "preset": preset,
        "options": given,
        "tile": routes.tile,
        "kernel": kernel_for(problem.query, problem.key, routes),
    }
    routing = {name: given[name] for name in ("scaling_factor", "alpha", "visibility", "forced")}
    summaries = summarize_chunks(problem.key, problem.summary_query, chunk)

    def route():
        return route_chunks(problem.query, summaries, chunk, **routing)

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
        """fp64, over the kernel's own selection; the routing's own gradient is 1/σ of it and tested where σ
        is small."""
        position = torch.arange(problem.query.shape[2], device=problem.query.device)
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
