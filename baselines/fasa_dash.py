"""DashAttention by its authors' Triton kernels (package `dash_attn`), forward only, their stages called as
their module calls them.

Install: `pip install git+https://github.com/fasa-org/dash-attention`; written from the source of July 2026,
not tested here: the package is not on PyPI. Paper: https://arxiv.org/abs/2605.18753.

Parameters: scaling_factor (the knob), sigma, bias_mode (`centered` or `raw`).

Debts and facts:
    * Importing the package sets torch's float32 matmul precision for the process.
    * The module's chunk cache grows at every step and stops at 512 chunks; the stages are called here without
      it, on summaries made before a decode's timed region (a step that summarises a completed chunk is
      cheaper here by that).
    * Its prefill materialises float32 scores: 64k tokens of 32 heads take 18 GiB, and 128k overflow 32-bit
      offsets.
"""

from __future__ import annotations

from importlib import util
from typing import Any

import torch

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.baselines.attention_reference import kept_tokens
from dashbench.baselines.block_sparse_reference import block_count
from dashbench.baselines.dash_reference import expectation, options_for

MOST_TOKENS = 1 << 16


def prepare(problem: Problem, **settings: Any) -> Operator:
    """The authors' kernels for one problem.

    Raises:
        Unsupported: no GPU, no library, an option that it has not, or a length that it cannot do.
    """
    options = options_for(problem, None, **settings)
    if not problem.query.is_cuda:
        raise Unsupported("the authors' kernels need a GPU")
    if util.find_spec("dash_attn") is None:
        raise Unsupported(
            "dash_attn is not installed: pip install git+https://github.com/fasa-org/dash-attention"
        )
    if options.alpha != 1.5 or options.bias_mode == "none" or options.forced != "own":
        raise Unsupported(
            "the package has alpha 1.5, bias_mode centered or raw, and only its own chunk forced"
        )
    length, chunk = problem.key.shape[2], options.chunk_size
    if problem.phase == "prefill" and length > MOST_TOKENS:
        raise Unsupported(f"the package's offsets overflow beyond {MOST_TOKENS} tokens")
    from dash_attn import decoding, prefill

    query, key, value = (x.contiguous() for x in (problem.query, problem.key, problem.value))
    step = problem.phase == "decode"
    stages = decoding if step else prefill
    own = (length - 1) // chunk
    prior = {"estimate_diag": options.bias_mode == "centered", "sigma": options.sigma}

    @torch.no_grad()
    def summarize() -> torch.Tensor:
        summaries = prefill.summarize_chunk(key, problem.summary_query, chunk, None)
        return summaries[..., :own, :].contiguous() if step else summaries

    prepared = summarize()

    @torch.no_grad()
    def route(summaries: torch.Tensor):
        scaled = query * options.scaling_factor
        return stages.score_blocks(scaled, summaries, chunk, attn_mask=None, **prior)

    @torch.no_grad()
    def attend(routing) -> torch.Tensor:
        return stages.full_attn(query, key, value, routing[0], chunk, None, routing[1]).to(query.dtype)

    def run() -> torch.Tensor:
        return attend(route(prepared if step else summarize()))

    routing = route(prepared)
    blocks = block_count(key, chunk)

    def selected(rows: torch.Tensor) -> torch.Tensor:
        words = routing[0][:, :, rows.to(query.device)]
        bits = (words[..., None] >> torch.arange(32, device=words.device)) & 1
        return bits.flatten(-2)[..., :blocks].bool()

    def kept() -> torch.Tensor:
        rows = torch.arange(query.shape[2], device=query.device)
        return kept_tokens(selected(rows), rows + problem.start, chunk)

    return Operator(
        run=run,
        reference=expectation(problem, options, rounded=True),
        selected=selected,
        kept=kept,
        stages={
            **({} if step else {"summarize": summarize}),
            "route": lambda: route(prepared),
            "attend": lambda: attend(routing),
        },
        notes={"package": "dash_attn"},
    )
