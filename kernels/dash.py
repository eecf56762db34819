"""DashAttention as one function: summarise, route, attend; differentiable.

Source: DashAttention (arXiv 2605.18753); the specification is `reference`. The forward leaves the prior's
bias out of the scores where it is below what bf16 weights can hold (`centered` with σ ≥ 1e5: |bias| <
1e-3), otherwise routing stores it beside the lists; its gradient, which trains the routing, is always
there.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dashbench.kernels.attend import block_sparse_attention, kernel_for
from dashbench.kernels.backward import RoutingGradient, attention_gradients
from dashbench.kernels.dense import dense_attention
from dashbench.kernels.packed import packing
from dashbench.kernels.reference import PRESETS, DashOptions
from dashbench.kernels.route import Routes, route_chunks
from dashbench.kernels.summarize import summarize_chunks

NEGLIGIBLE_BIAS_SIGMA = 1e5
_NAMES = ("chunk_size", "scaling_factor", "alpha", "sigma", "bias_mode", "forced", "visibility")


class _DashAttention(torch.autograd.Function):
    """Saves q, k, v, out, summaries, lse, τ and the bit mask; recomputes scores and weights."""

    @staticmethod
    def forward(
        ctx,
        query,
        key,
        value,
        summary_query,
        options: DashOptions,
        deterministic: bool,
        left_padding,
        sequences,
        info: dict,
    ):
        summaries = summarize_chunks(key, summary_query, options.chunk_size, left_padding)
        routes = route_with(query, summaries, options, left_padding, save=True, sequences=sequences)
        info.update(_sparse_info(query, key, value, routes, left_padding))
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
        return *grads[:3], grad_summary.to(summary_query.dtype), None, None, None, None, None


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
    sequences: torch.Tensor | None = None,
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
        sequences=sequences,
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
    cu_seqlens: torch.Tensor | None = None,
    deterministic: bool = False,
    dense_below: int | None = None,
    return_active_blocks: bool = False,
    return_routing: bool = False,
    return_info: bool = False,
    **options,
):
    """Causal DashAttention over whole sequences.

    Args:
        query: `[B, Hq, N, D]` (or `[B, N, Hq, D]` with `layout="bnhd"`), bf16 or fp16, after position
            embedding; D 64 or 128. With `cu_seqlens` B = 1, or `[N, Hq, D]`.
        key, value: `[B, Hkv, N, D]` (or `[B, N, Hkv, D]`, or `[N, Hkv, D]`).
        summary_query: `[Hkv, D]`, or one a chunk `[B, Hkv, M, D]`.
        preset: `package` or `paper`: the options of one of the two published implementations.
        layout: `bhnd` or `bnhd`; neither is copied.
        left_padding: `[B]` int32: leading padding tokens. Chunks keep their padded places; padding is
            attended by nobody and its rows are zero.
        cu_seqlens: `[S + 1]` int32: packed sequences, which attend themselves only, chunks counted from each
            one's first token. All sequences run in one launch of every kernel, over a copy in which each
            begins a chunk (`packed`); no copy is made if the tensor is on the CPU and all lengths are
            multiples of C.
        deterministic: gradients bitwise reproducible (a little slower).
        dense_below: run causal dense attention, without summaries and routing, if N is below this; None:
            never. The summary query then has no gradient. Not for packed sequences.
        return_active_blocks: also return `[B, Hkv, N]` int32: chunks attended, the own one included.
        return_routing: also return the `Routes`, or None where dense attention ran.
        return_info: also return a dict of what ran: `path` (`sparse` or `dense`), and for `sparse` the
            attention `kernel` and `tile`, for `dense` the `backend`.
        **options: chunk_size (16, 32, 64, 128), scaling_factor γ, alpha in (1, 2], sigma, bias_mode
        (`centered`, `raw`, `none`), forced
            (`own`, `own_and_previous`), visibility (`own`, `completed`); see `reference.DashOptions`.

    Returns:
        The output in the layout and dtype of `query`; with any `return_…` a tuple that begins with it, in the
        order above.

    Raises:
        ValueError: an unknown option, options that exclude each other, or shapes and dtypes that are not
            covered; the message says which.
    """
    chosen = dash_options(preset, **options)
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout is bhnd or bnhd, got {layout!r}")
    bare = query.dim() == 3
    if bare:
        if cu_seqlens is None:
            raise ValueError("[N, H, D] tensors need cu_seqlens")
        query, key, value = (x[None].transpose(1, 2) for x in (query, key, value))
    elif layout == "bnhd":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    _check(query, key, value, summary_query, chosen)
    training = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value, summary_query))
    if return_routing and training:
        raise ValueError("return_routing is for inference: use torch.no_grad()")
    packed = None
    if cu_seqlens is not None:
        _check_packed(query, summary_query, left_padding, dense_below, return_routing)
        packed = packing(cu_seqlens, query.shape[2], chosen.chunk_size, query.device)
        query, key, value = (packed.spread(x) for x in (query, key, value))
    sequences = None if packed is None else packed.sequences
    active = routes = None
    info: dict = {}
    if dense_below is not None and query.shape[2] < dense_below:
        out, backend = dense_attention(query, key, value, left_padding)
        info |= {"path": "dense", "backend": backend, "dense_below": dense_below}
        if return_active_blocks:
            active = _all_chunks(query, key, chosen.chunk_size, left_padding)
    elif training:
        out, active = _DashAttention.apply(
            query, key, value, summary_query, chosen, deterministic, left_padding, sequences, info
        )
    else:
        summaries = summarize_chunks(key, summary_query, chosen.chunk_size, left_padding)
        save = return_active_blocks or return_routing
        routes = route_with(query, summaries, chosen, left_padding, save, sequences)
        out, _ = block_sparse_attention(query, key, value, routes, left_padding=left_padding)
        active = routes.active_blocks
        info |= _sparse_info(query, key, value, routes, left_padding)
    if packed is not None:
        out = packed.collect(out)
        active = None if active is None else packed.collect(active)
    if bare:
        out = out.transpose(1, 2)[0]
    elif layout == "bnhd":
        out = out.transpose(1, 2)
    wanted = ((return_active_blocks, active), (return_routing, routes), (return_info, info))
    extras = [x for asked, x in wanted if asked]
    return (out, *extras) if extras else out


def _check(query, key, value, summary_query, options: DashOptions) -> None:
    batch, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    if key.shape != value.shape or (key.shape[0], *key.shape[2:]) != (batch, tokens, dim) or tokens == 0:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} must share "
            "batch, tokens (at least one) and head dim; steps against a cache are attend_cache's"
        )
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    if dim not in (64, 128):
        raise ValueError(f"head dim must be 64 or 128, got {dim}: pad it")
    if options.chunk_size not in (16, 32, 64, 128):
        raise ValueError(f"chunk size must be 16, 32, 64 or 128, got {options.chunk_size}")
    if len({x.dtype for x in (query, key, value)}) > 1 or not query.is_floating_point():
        raise ValueError(f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}")
    if summary_query.dim() == 2:
        if tuple(summary_query.shape) != (kv_heads, dim):
            raise ValueError(f"summary_query must be {(kv_heads, dim)}, got {tuple(summary_query.shape)}")
    elif (*summary_query.shape[:2], summary_query.shape[3]) != (batch, kv_heads, dim) or (
        summary_query.shape[2] < tokens // options.chunk_size
    ):
        wanted = f"[{batch}, {kv_heads}, {tokens // options.chunk_size} or more, {dim}]"
        raise ValueError(f"one summary query a chunk is {wanted}, got {tuple(summary_query.shape)}")


def _check_packed(query, summary_query, left_padding, dense_below, return_routing) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"packed sequences are one row: the batch is {query.shape[0]}, not 1")
    if summary_query.dim() != 2:
        raise ValueError("packed sequences take one summary query a KV head, [Hkv, D]")
    for name, given in (
        ("left_padding", left_padding is not None),
        ("dense_below", dense_below is not None),
        ("return_routing", return_routing),
    ):
        if given:
            raise ValueError(f"{name} is not for packed sequences")


def _sparse_info(query, key, value, routes: Routes, left_padding) -> dict:
    kernel = kernel_for(query, key, value, routes, left_padding)
    return {"path": "sparse", "kernel": kernel, "tile": routes.tile}


def _all_chunks(query, key, chunk_size: int, left_padding) -> torch.Tensor:
    """`[B, Hkv, N]` int32: chunks of real tokens from the first to the query's own; one for padding."""
    own = torch.arange(query.shape[2], device=query.device) // chunk_size
    first = 0 if left_padding is None else (left_padding // chunk_size)[:, None, None]
    counted = (own - first + 1).clamp_min(1).int()
    return counted.expand(query.shape[0], key.shape[1], -1).contiguous()
