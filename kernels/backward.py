"""Gradients of block-sparse attention and of DashAttention's routing: the host side.

Two kernels do the work, each a walk over lists built from the routing bit mask (`backward_lists`):
`backward_query` (tiles of queries; dq, the bias gradient, the entmax Jacobian) and `backward_chunk`
(chunks; dk, dv, the summaries). Seven matrix products an entry instead of the five of a single pass,
because that pass would need a float32 dq of 2 GiB at 128k tokens and 32 heads, and as many atomics. Nothing
quadratic is saved by the forward beside the bit mask: scores, probabilities and biases are recomputed from
lse and tau.
"""

from dataclasses import dataclass, replace

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from dashbench.kernels.backward_chunk import _chunk_kernel, _combine_kernel
from dashbench.kernels.backward_lists import chunk_lists, list_capacity, tile_lists
from dashbench.kernels.backward_query import BIAS_MODES, STATISTICS, _query_kernel, route_powers
from dashbench.kernels.tuning import choose, setting_of

# |b| <= 2 * 46 / sigma with weights between 1e-20 and 1: from here on the bias is below bf16 resolution of
# the weights, so the backward keeps its gradient but leaves its value out of the recomputed scores.
_NEGLIGIBLE_BIAS_SIGMA = 1e5


@dataclass(frozen=True)
class RoutingGradient:
    """What the backward needs to differentiate the routing.

    summary: `[B, Hkv, M', D]` chunk summaries with M' >= M - 1 (floor(N / C) with `completed`), in the
    dtype of q. summary_query: `[Hkv, D]`, or one a chunk `[B, Hkv, M, D]`. tau: `[B, Hq, N]` float32,
    entmax threshold in units of x = (alpha - 1) gamma / sqrt(D) <q, k_bar>. bias_mode: `centered` ((log w -
    mean) / sigma) or `raw` (log w, sigma ignored). detach_mean: the mean of `centered` passes no gradient.
    forced: number of chunks directly before a query's own that are attended without a bias. completed: a
    chunk is visible from its last token on, not only from behind. epsilon: weights up to this count as
    unrouted.
    """

    summary: torch.Tensor
    summary_query: torch.Tensor
    tau: torch.Tensor
    bias_mode: str = "centered"
    gamma: float = 1.0
    sigma: float = 1e6
    alpha: float = 1.5
    detach_mean: bool = False
    forced: int = 0
    completed: bool = False
    epsilon: float = 1e-20


@dataclass(frozen=True)
class BackwardLaunch:
    """Launch choices: queries a tile, then warps and pipeline stages of the two kernels, running programs a
    multiprocessor of the query kernel, and parts a chunk's list is split into (None: by the number of
    chunks)."""

    tile: int
    query_warps: int = 4
    query_stages: int = 2
    query_programs: int = 2
    chunk_warps: int = 4
    chunk_stages: int = 2
    splits: int | None = None


def default_launch(group: int, chunk_size: int, chosen: dict | None = None) -> BackwardLaunch:
    """64 rows (queries x padded heads) a tile, as far as 16 query bits and the chunk allow, and what was
    `chosen` instead."""
    heads = triton.next_power_of_2(group)
    return BackwardLaunch(**{"tile": max(1, min(64 // heads, 16, chunk_size)), **(chosen or {})})


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where bulk loads can address it (contiguous rows, 16-byte units), or a copy."""
    unit = 16 // tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(
        stride % unit == 0 or size == 1
        for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    )
    return (
        tensor if aligned and tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)
    )


def _bulk(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """Descriptor of a `[.., .., .., D]` view for bulk (TMA) loads; rows outside the tensor read as zero."""
    unit = 16 // tensor.element_size()
    strides = [
        stride if size > 1 else unit
        for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], block)


def attention_gradients(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
    chunk_size: int,
    routing: RoutingGradient | None = None,
    deterministic: bool = False,
    padding: torch.Tensor | None = None,
    launch: BackwardLaunch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of q, k, v and the summary query.

    q, out, grad_out: `[B, Hq, N, D]`; k, v: `[B, Hkv, N, D]`, bf16 or fp16, any strides with a contiguous
    last dimension (so `[B, N, H, D]` storage passes as a view), N >= 1, D 64 or 128. lse: `[B, Hq, N]`
    float32, natural logarithm of the softmax denominator. mask: `[B, Hkv, N, W]` int32, W >= ceil(M / 32):
    chunks that each query attends before its own, which is always attended causally. Without `routing` the
    mask is a constant (block-sparse attention as NSA and InfLLMv2 use it) and the fourth result is None;
    otherwise it is the summary query's gradient in float32, in the summary query's shape. padding: `[B]`
    int32, tokens at the left of each sequence that are no part of it; they are attended by nobody, their
    summaries' share is zero, and so are their gradients.

    Only the chunk summaries' gradient is summed atomically, in float32; with `deterministic` it is summed
    in list order by the chunk-outer kernel instead, and every result is then bitwise reproducible. Raises
    ValueError for shapes, chunk sizes or head dims that the kernels do not cover.
    """
    batch, query_heads, tokens, head_dim = q.shape
    kv_heads = k.shape[1]
    if query_heads % kv_heads or head_dim not in (64, 128) or chunk_size not in (16, 32, 64, 128):
        raise ValueError(
            f"unsupported: {query_heads} over {kv_heads} heads, head dim {head_dim}, chunk size {chunk_size}"
        )
    group = query_heads // kv_heads
    launch = launch or default_launch(
        group, chunk_size, choose("backward", setting_of(q, kv_heads, chunk_size))
    )
    heads, tile = triton.next_power_of_2(group), launch.tile
    if heads * tile < 16 or chunk_size % tile:
        raise ValueError(
            f"a tile of {tile} queries x {heads} heads needs 16 rows or more and must divide the chunk"
        )
    chunks, tiles = triton.cdiv(tokens, chunk_size), triton.cdiv(tokens, tile)
    batch_heads, capacity = batch * kv_heads, list_capacity(tokens, chunk_size, tile)
    q, k, v, out, grad_out = (_rows(x) for x in (q, k, v, out, grad_out))
    lse, mask = lse.contiguous(), mask.contiguous()

    route = routing is not None and routing.bias_mode != "none"
    summary = _rows(routing.summary) if route else k
    summary_query = routing.summary_query.contiguous() if route else k
    bias_mode = BIAS_MODES[routing.bias_mode] if route else 0
    apply_bias = route and (routing.bias_mode == "raw" or routing.sigma < _NEGLIGIBLE_BIAS_SIGMA)
    gamma, alpha = (routing.gamma, routing.alpha) if route else (1.0, 1.5)
    inverse_sigma = 1.0 / routing.sigma if route and routing.bias_mode == "centered" else 1.0
    scale = head_dim**-0.5
    scalars = (
        scale, gamma * scale, gamma * scale * (alpha - 1.0), inverse_sigma, routing.epsilon if route else 0.0,
        *route_powers(alpha),
    )  # fmt: skip
    forced = routing.forced if route else 0
    shared = dict(
        HEAD_DIM=head_dim, GROUP=group, HEADS=heads, TILE=tile, CHUNK=chunk_size, BIAS=bias_mode,
        APPLY_BIAS=apply_bias,
        ALPHA_1_5=alpha == 1.5, PADDED=padding is not None, COMPLETED=route and routing.completed,
    )  # fmt: skip

    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    float32 = dict(dtype=torch.float32, device=q.device)
    statistics = torch.empty(batch_heads, tiles, STATISTICS, tile * heads, **float32)
    here = route and deterministic  # the chunk kernel sums the summaries' gradient itself
    splits = launch.splits or max(1, min(8, 16 * _multiprocessors(q.device) // (batch_heads * chunks)))
    summary_parts = splits if here else 1
    grad_summary = torch.zeros(summary_parts, batch_heads, chunks, head_dim, **float32) if route else lse
    grad_summary_query = torch.empty(batch, kv_heads, chunks, head_dim, **float32) if route else lse

    # A block of query rows is T positions x the group's heads, so heads stand behind positions.
    q_rows, out_rows, grad_rows = (
        _bulk(x.transpose(1, 2), [1, tile, heads, head_dim]) for x in (q, out, grad_out)
    )
    k_rows, v_rows = (_bulk(x, [1, 1, chunk_size, head_dim]) for x in (k, v))
    entries, counts = tile_lists(mask, chunk_size, tile)
    total = tiles * batch_heads
    programs = min(total, launch.query_programs * _multiprocessors(q.device))
    scratch = torch.empty(programs, 2, chunks, tile, **float32)
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _query_kernel[(programs,)](
        q_rows, k_rows, v_rows, out_rows, grad_rows, lse, routing.tau.contiguous() if route else lse, summary,
        entries, counts, padding, counter, scratch, grad_q, grad_summary, statistics,
        grad_q.stride()[:3], summary.stride()[:3],
        tokens, chunks, tiles, capacity, total, batch_heads, kv_heads, forced, *scalars,
        BLOCK=64, DETACH_MEAN=route and routing.detach_mean, ATOMIC_SUMMARY=route and not deterministic,
        num_warps=launch.query_warps, num_stages=launch.query_stages, **shared,
    )  # fmt: skip
    del entries, scratch

    entries, counts = chunk_lists(mask, chunk_size, tile)
    order = torch.argsort(counts.view(-1), descending=True)
    part_shape = (splits, batch_heads, chunks * chunk_size, head_dim)
    grad_k_parts, grad_v_parts = torch.empty(part_shape, **float32), torch.empty(part_shape, **float32)
    _chunk_kernel[(batch_heads * chunks * splits,)](
        q_rows, k_rows, v_rows, grad_rows, statistics, summary, entries, counts, padding, order,
        grad_k_parts, grad_v_parts, grad_summary, summary.stride()[:3],
        tokens, chunks, tiles, capacity, batch_heads, kv_heads, splits, forced, summary.shape[2], *scalars,
        SUMMARY=here, num_warps=launch.chunk_warps, num_stages=launch.chunk_stages, **shared,
    )  # fmt: skip
    query_strides = (0, 0, 0)
    if route:
        query_strides = (0, head_dim, 0) if summary_query.ndim == 2 else summary_query.stride()[:3]
    _combine_kernel[(batch_heads * chunks,)](
        k, summary_query, padding, grad_k_parts, grad_v_parts, grad_summary, grad_k, grad_v,
        grad_summary_query,
        *(x.stride()[:3] for x in (k, grad_k, grad_v)), query_strides,
        tokens, chunks, batch_heads, kv_heads, splits, summary_parts, scale,
        HEAD_DIM=head_dim, CHUNK=chunk_size, BIAS=bias_mode, PADDED=padding is not None, num_warps=4,
    )  # fmt: skip
    if not route:
        return grad_q, grad_k, grad_v, None
    if summary_query.ndim == 2:
        grad_summary_query = grad_summary_query.sum((0, 2))
    return grad_q, grad_k, grad_v, grad_summary_query


class _Gradients(torch.autograd.Function):
    """Passes a finished output through and answers for its gradients."""

    @staticmethod
    def forward(
        ctx, q, k, v, summary_query, out, lse, mask, summary, tau, padding, chunk_size, routing, deterministic
    ):
        ctx.save_for_backward(q, k, v, summary_query, out, lse, mask, summary, tau, padding)
        ctx.chunk_size, ctx.routing, ctx.deterministic = chunk_size, routing, deterministic
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):
        q, k, v, summary_query, out, lse, mask, summary, tau, padding = ctx.saved_tensors
        routing = ctx.routing
        if routing is not None:
            routing = replace(routing, summary=summary, summary_query=summary_query, tau=tau)
        *grads, grad_summary_query = attention_gradients(
            grad_out, q, k, v, out, lse, mask, ctx.chunk_size, routing, ctx.deterministic, padding
        )
        if grad_summary_query is not None:
            grad_summary_query = grad_summary_query.to(summary_query.dtype)
        return *grads, grad_summary_query, *([None] * 9)


def with_gradients(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor,
    chunk_size: int,
    routing: RoutingGradient | None = None,
    deterministic: bool | None = None,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """`out`, computed by any forward without a graph, connected to q, k, v (and `routing.summary_query`).

    Arguments as for `attention_gradients`; they are what is kept for the backward, so nothing quadratic
    beside the bit mask. `deterministic` None follows `torch.use_deterministic_algorithms`. The backward
    itself is not differentiable again.
    """
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    summary = summary_query = tau = None
    if routing is not None:
        summary, summary_query, tau = routing.summary.detach(), routing.summary_query, routing.tau.detach()
        routing = replace(routing, summary=None, summary_query=None, tau=None)
    return _Gradients.apply(
        q,
        k,
        v,
        summary_query,
        out.detach(),
        lse,
        mask,
        summary,
        tau,
        padding,
        chunk_size,
        routing,
        deterministic,
    )
