"""DashAttention in eager PyTorch: the specification of `dashbench.kernels.reference` as a method, slow, for
any device and dtype.

A query routes to chunks of keys by entmax over chunk summaries, as many as it needs. Paper:
https://arxiv.org/abs/2605.18753.

Parameters (`prepare`): scaling_factor (larger is sparser), alpha, sigma, bias_mode (`centered`, `raw`,
`none`), forced (`own`,
`own_and_previous`), visibility (`own`, `completed`); `preset` (`package`, `paper`) gives them the values of
one of the two published
implementations. The chunk size is the problem's block size.

Debts to the paper: a decode step recomputes the summaries of the whole cache, which a cache would keep.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from dashbench.baselines.api import Expected, Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import attention_rows
from dashbench.kernels.reference import PRESETS, DashOptions, dash_attention, kept_tokens, route, summarize

# Scores of this many elements are held at a time.
SLICE_ELEMENTS = 1 << 26
# Routing of a bf16 kernel may differ from fp64 this close to the threshold, in units of (α − 1)·logit. The
# kernels read the same bits as the
# reference, but round k̄ to the working dtype before the product.
TIE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def options_for(problem: Problem, preset: str | None = None, **given) -> DashOptions:
    """Options of a problem: a preset's, changed by what is given, with the problem's block size.

    Raises:
        Unsupported: an unknown preset or parameter.
    """
    if preset is not None and preset not in PRESETS:
        raise Unsupported(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    known = {f.name for f in fields(DashOptions)} - {"chunk_size"}
    if unknown := set(given) - known:
        raise Unsupported(f"DashAttention has no parameter {sorted(unknown)[0]!r}")
    return replace(PRESETS[preset] if preset else DashOptions(), **given, chunk_size=problem.block_size)


def expectation(problem: Problem, options: DashOptions):
    """`Operator.reference` of any DashAttention: exact routing, and exact attention over the selection it is
    given."""

    def reference(rows: torch.Tensor, selected: torch.Tensor | None) -> Expected:
        routing = rows_routing(problem, options, rows, torch.float64)
        output = attention_rows(
            problem.query[:, :, rows],
            problem.key,
            problem.value,
            problem.start + rows,
            selected=routing.active if selected is None else selected,
            block_size=problem.block_size,
            bias=routing.bias,
        )
        return Expected(output, routing.active, routing.margin < TIE[problem.query.dtype])

    return reference


def rows_routing(problem: Problem, options: DashOptions, rows: torch.Tensor, dtype: torch.dtype):
    """Routing of some query rows in the given precision."""
    chunks = -(-problem.key.shape[2] // options.chunk_size)
    summaries = summarize(problem.key.to(dtype), problem.summary_query.to(dtype), options.chunk_size)
    return route(problem.query[:, :, rows].to(dtype), summaries, problem.start + rows, chunks, options)


def prepare(problem: Problem, preset: str | None = None, **given) -> Operator:
    """DashAttention by its specification, in slices of query rows that bound memory."""
    options = options_for(problem, preset, **given)
    q, k, v = problem.query, problem.key, problem.value
    heads, length = q.shape[1], k.shape[2]
    step = max(1, SLICE_ELEMENTS // (q.shape[0] * heads * length))
    slices = torch.arange(q.shape[2], device=q.device).split(step)
    state: dict[str, torch.Tensor] = {}

    def forward(query, key, value, summary_query) -> torch.Tensor:
        parts = [dash_attention(query, key, value, summary_query, options, rows=rows)[0] for rows in slices]
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0]

    def run() -> torch.Tensor:
        with torch.no_grad():
            return forward(q, k, v, problem.summary_query)

    leaves = {"query": q, "key": k, "value": v, "summary_query": problem.summary_query}

    def train() -> torch.Tensor:
        inputs = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        out = forward(*inputs.values())
        state.update(
            zip(inputs, torch.autograd.grad(out, list(inputs.values()), problem.grad_output), strict=True)
        )
        return out.detach()

    def exact_gradients() -> dict[str, torch.Tensor]:
        inputs = [x.detach().double().requires_grad_() for x in leaves.values()]
        out, _ = dash_attention(*inputs, options)
        return dict(zip(leaves, torch.autograd.grad(out, inputs, problem.grad_output.double()), strict=True))

    def selected(rows: torch.Tensor) -> torch.Tensor:
        return rows_routing(problem, options, rows, q.dtype).active

    def kept() -> torch.Tensor:
        counts = [kept_tokens(selected(rows), problem.start + rows, options.chunk_size) for rows in slices]
        return torch.cat(counts, -1)

    training = problem.phase == "train"
    return Operator(
        run=train if training else run,
        reference=expectation(problem, options),
        selected=selected,
        kept=kept,
        gradients=(lambda: dict(state)) if training else None,
        reference_gradients=exact_gradients if training and length <= 1024 else None,
        notes={"preset": preset, "options": {f.name: getattr(options, f.name) for f in fields(DashOptions)}},
    )
