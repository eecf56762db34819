"""DashAttention as one function: summarise, route, attend; differentiable.

Source: DashAttention (arXiv 2605.18753); the specification is `reference`. The forward leaves the prior's
bias out of the scores where it is below what bf16 weights can hold (`centered` with σ ≥ 1e5: |bias| <
1e-3), otherwise routing stores it beside the lists; its gradient, which trains the routing, is always
there.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dashbench.kernels.attend import block_sparse_attention
from dashbench.kernels.backward import RoutingGradient, attention_gradients
from dashbench.kernels.reference import PRESETS, DashOptions
from dashbench.kernels.route import Routes, route_chunks
from dashbench.kernels.summarize import summarize_chunks

NEGLIGIBLE_BIAS_SIGMA = 1e5
_NAMES = ("chunk_size", "scaling_factor", "alpha", "sigma", "bias_mode", "forced", "visibility")


class _DashAttention(torch.autograd.Function):
    """Saves q, k, v, out, summaries, lse, τ and the bit mask; recomputes scores and weights."""

    @staticmethod
    def forward(
        ctx, query, key, value, summary_query, options: DashOptions, deterministic: bool, left_padding
    ):
        summaries = summarize_chunks(key, summary_query, options.chunk_size, left_padding)
        routes = route_with(query, summaries, options, left_padding, save=True)
        out, lse = block_sparse_attention(query, key, value, routes, left_padding=left_padding)
        ctx.save_for_backward(
            query, key, value, summary_query, out, lse, summaries, routes.tau, routes.mask, left_padding
        )
        ctx.options, ctx.deterministic = options, deterministic
        ctx.mark_non_differentiable(routes.active_blocks)
        return out, routes.active_blocks

    @staticmethod
    def backward(ctx, grad_out, _):
        query, key, value, summary_query, out, lse, summaries, tau, mask, left_padding = ctx.saved_tensors
        o: DashOptions = ctx.options
        routing = RoutingGradient(
            summary=summaries,
            summary_query=summary_query,
            tau=tau,
            bias_mode=o.bias_mode,
            gamma=o.scaling_factor,
            sigma=o.sigma,
            alpha=o.alpha,
            forced=1 if o.forced == "own_and_previous" else 0,
            completed=o.visibility == "completed",
        )
        grads = attention_gradients(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            mask,
            o.chunk_size,
            routing,
            ctx.deterministic,
            left_padding,
        )
        grad_summary = grads[3]
        if grad_summary is None:
            grad_summary = torch.zeros_like(summary_query)
        return *grads[:3], grad_summary.to(summary_query.dtype), None, None, None


def prior_is_negligible(options: DashOptions) -> bool:
    """Whether the prior's bias is below what bf16 weights can hold."""
    if options.bias_mode == "none":
        return True
    return options.bias_mode == "centered" and options.sigma >= NEGLIGIBLE_BIAS_SIGMA


def route_with(
    query: torch.Tensor,
    summaries: torch.Tensor,
    options: DashOptions,
    left_padding: torch.Tensor | None = None,
    save: bool = False,
) -> Routes:
    """`route.route_chunks` with the options of DashAttention; a bias that bf16 cannot hold is left out."""
    return route_chunks(
        query,
        summaries,
        options.chunk_size,
        scaling_factor=options.scaling_factor,
        alpha=options.alpha,
        visibility=options.visibility,
        forced=options.forced,
        bias_mode="none" if prior_is_negligible(options) else options.bias_mode,
        sigma=options.sigma,
        left_padding=left_padding,
        save=save,
    )


def dash_options(preset: str | None = None, **given) -> DashOptions:
    """Options by name; `preset` (`package` or `paper`) supplies what is not given.

    Raises:
        ValueError: an unknown preset or option.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known: {', '.join(PRESETS)}")
    if unknown := set(given) - set(_NAMES):
        raise ValueError(f"unknown option {sorted(unknown)[0]!r}; known: {', '.join(_NAMES)}")
    return replace(PRESETS[preset] if preset else DashOptions(), **given)


def dash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    summary_query: torch.Tensor,
    *,
    preset: str | None = None,
    layout: str = "bhnd",
    left_padding: torch.Tensor | None = None,
    deterministic: bool = False,
    return_active_blocks: bool = False,
    return_routing: bool = False,
    **options,
):
    """Causal DashAttention over whole sequences.

    Args:
        query: `[B, Hq, N, D]` (or `[B, N, Hq, D]` with `layout="bnhd"`), bf16 or fp16, after position
            embedding; D 64 or 128.
        key, value: `[B, Hkv, N, D]` (or `[B, N, Hkv, D]`).
        summary_query: `[Hkv, D]`, or one a chunk `[B, Hkv, M, D]`.
        preset: `package` or `paper`: the options of one of the two published implementations.
        layout: `bhnd` or `bnhd`; neither is copied.
        left_padding: `[B]` int32: leading padding tokens.
        deterministic: gradients bitwise reproducible (a little slower).
        return_active_blocks: also return `[B, Hkv, N]` int32: chunks attended, the own one included.
        return_routing: also return the `Routes`.
        **options: chunk_size (16, 32, 64, 128), scaling_factor γ, alpha in (1, 2], sigma, bias_mode
        (`centered`, `raw`, `none`), forced
            (`own`, `own_and_previous`), visibility (`own`, `completed`); see `reference.DashOptions`.

    Returns:
        The output in the layout and dtype of `query`; with `return_active_blocks` or `return_routing` a
        tuple that begins with it.

    Raises:
        ValueError: an unknown option.
    """
    chosen = dash_options(preset, **options)
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout is bhnd or bnhd, got {layout!r}")
    if layout == "bnhd":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    active = routes = None
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, summary_query)):
        if return_routing:
            raise ValueError("return_routing is for inference: use torch.no_grad()")
        out, active = _DashAttention.apply(
            query, key, value, summary_query, chosen, deterministic, left_padding
        )
    else:
        summaries = summarize_chunks(key, summary_query, chosen.chunk_size, left_padding)
        routes = route_with(
            query, summaries, chosen, left_padding, save=return_active_blocks or return_routing
        )
        out, _ = block_sparse_attention(query, key, value, routes, left_padding=left_padding)
        active = routes.active_blocks
    out = out.transpose(1, 2) if layout == "bnhd" else out
    extras = ([active] if return_active_blocks else []) + ([routes] if return_routing else [])
    return (out, *extras) if extras else out
