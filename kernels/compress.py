"""Compressed keys and values: overlapping windows of tokens become one vector each.

Window t holds the tokens `[stride t, stride t + 2 stride)`; only complete ones exist. `mean_windows` is the
compression of InfLLMv2 (arXiv 2509.24663) and NSA's simplest; `mlp_windows` is a small network that reads
one channel's keys and values of a window and gives that channel's compressed key and value, shared by all
heads and channels. All sums are fp32.

Letters: B batch, Hkv KV heads, L tokens, D head dim, S stride, T = L / S − 1 windows, F width of the network.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint


@triton.jit(do_not_specialize=["count"])
def _mean_kernel(
    x, out, x_stride_b, x_stride_h, x_stride_n, count, heads,
    STRIDE: tl.constexpr, WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One program a window and head."""
    window, index = tl.program_id(0), tl.program_id(1)
    batch, head = (index // heads).to(tl.int64), (index % heads).to(tl.int64)
    token = (window * STRIDE + tl.arange(0, WINDOW)).to(tl.int64)
    dim = tl.arange(0, HEAD_DIM)
    base = x + batch * x_stride_b + head * x_stride_h
    tokens = tl.load(base + token[:, None] * x_stride_n + dim[None, :]).to(tl.float32)
    mean = tl.sum(tokens, 0) / WINDOW
    tl.store(out + (index.to(tl.int64) * count + window) * HEAD_DIM + dim, mean.to(out.dtype.element_ty))


def window_count(length: int, stride: int) -> int:
    """Complete windows of 2 · stride tokens in `length` tokens."""
    return max(0, length - stride) // stride


def _mean_forward(x: torch.Tensor, stride: int) -> torch.Tensor:
    batch, heads, length, dim = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    count = window_count(length, stride)
    out = torch.empty(batch, heads, count, dim, dtype=x.dtype, device=x.device)
    if count:
        _mean_kernel[(count, batch * heads)](
            x, out, *x.stride()[:3], count, heads,
            STRIDE=stride, WINDOW=2 * stride, HEAD_DIM=dim, num_warps=2,
        )  # fmt: skip
    return out


class _MeanWindows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stride: int):
        ctx.shape, ctx.stride = x.shape, stride
        return _mean_forward(x, stride)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        """Token i lies in windows i // S − 1 and i // S."""
        padded = torch.nn.functional.pad(grad.float() / (2 * ctx.stride), (0, 0, 1, 1))
        cells = (padded[:, :, :-1] + padded[:, :, 1:]).to(grad.dtype)
        tokens = cells.repeat_interleave(ctx.stride, 2)
        return torch.nn.functional.pad(tokens, (0, 0, 0, ctx.shape[2] - tokens.shape[2])), None


def mean_windows(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Means of all complete windows; differentiable.

    Args:
        x: `[B, Hkv, L, D]`, any strides with a contiguous last dimension; D a power of two.
        stride: S, a power of two.

    Returns:
        `[B, Hkv, T, D]` contiguous, in the dtype of `x`.
    """
    if torch.is_grad_enabled() and x.requires_grad and window_count(x.shape[2], stride):
        return _MeanWindows.apply(x, stride)
    return _mean_forward(x.detach(), stride)


@triton.jit(do_not_specialize=["count"])
def _mlp_kernel(
    key, value, first, first_bias, second, second_bias, out_key, out_value,
    key_stride_b, key_stride_h, key_stride_n, value_stride_b, value_stride_h, value_stride_n, count, heads,
    WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a window and head: hidden units `[D, F]` of all channels are one matrix product."""
    window, index = tl.program_id(0), tl.program_id(1)
    batch, head = (index // heads).to(tl.int64), (index % heads).to(tl.int64)
    inside = tl.arange(0, WINDOW)
    token = (window * (WINDOW // 2) + inside).to(tl.int64)
    dim, unit = tl.arange(0, HEAD_DIM), tl.arange(0, WIDTH)
    p_key = key + batch * key_stride_b + head * key_stride_h
    p_value = value + batch * value_stride_b + head * value_stride_h
    keys = tl.load(p_key + token[None, :] * key_stride_n + dim[:, None])  # [D, WINDOW]
    values = tl.load(p_value + token[None, :] * value_stride_n + dim[:, None])
    weights = first + unit[None, :] * (2 * WINDOW) + inside[:, None]  # [WINDOW, F]
    hidden = tl.dot(keys, tl.load(weights))
    hidden = tl.dot(values, tl.load(weights + WINDOW), hidden)
    hidden = tl.maximum(hidden + tl.load(first_bias + unit).to(tl.float32)[None, :], 0.0)
    of_key = tl.sum(hidden * tl.load(second + unit).to(tl.float32)[None, :], 1)
    of_value = tl.sum(hidden * tl.load(second + WIDTH + unit).to(tl.float32)[None, :], 1)
    of_key += tl.load(second_bias).to(tl.float32)
    of_value += tl.load(second_bias + 1).to(tl.float32)
    offset = (index.to(tl.int64) * count + window) * HEAD_DIM + dim
    tl.store(out_key + offset, of_key.to(out_key.dtype.element_ty))
    tl.store(out_value + offset, of_value.to(out_value.dtype.element_ty))


def _mlp_forward(key, value, stride: int, first, first_bias, second, second_bias):
    batch, heads, length, dim = key.shape
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    count = window_count(length, stride)
    outs = [torch.empty(batch, heads, count, dim, dtype=key.dtype, device=key.device) for _ in range(2)]
    if count:
        weights = [x.to(key.dtype).contiguous() for x in (first, first_bias, second, second_bias)]
        _mlp_kernel[(count, batch * heads)](
            key, value, *weights, *outs, *key.stride()[:3], *value.stride()[:3], count, heads,
            WINDOW=2 * stride, HEAD_DIM=dim, WIDTH=first.shape[0], num_warps=4,
        )  # fmt: skip
    return tuple(outs)


class _MlpWindows(torch.autograd.Function):
    """The forward kernel; the backward recomputes `mlp_windows_eager`, slice by slice, in fp32: in bf16 the
    sums of overlapping windows and the hidden units' signs cost a value's gradient half a percent."""

    @staticmethod
    def forward(ctx, key, value, stride: int, *weights):
        ctx.save_for_backward(key, value, *weights)
        ctx.stride = stride
        return _mlp_forward(key, value, stride, *weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_key, grad_value):
        saved = ctx.saved_tensors
        leaves = [x.detach().float().requires_grad_() for x in saved]
        with torch.enable_grad():
            outputs = mlp_windows_eager(leaves[0], leaves[1], ctx.stride, *leaves[2:])
        grads = torch.autograd.grad(outputs, leaves, (grad_key.float(), grad_value.float()))
        grads = [grad.to(x.dtype) for grad, x in zip(grads, saved, strict=True)]
        return *grads[:2], None, *grads[2:]


SLICE_BYTES = 256 * 2**20
"""Most bytes of hidden units of a slice in the eager network."""


def mlp_windows_eager(key, value, stride: int, first, first_bias, second, second_bias):
    """As `mlp_windows` in PyTorch: any shape, device and dtype, differentiable; hidden units are recomputed
    slice by slice."""
    count = window_count(key.shape[2], stride)
    if count == 0:
        return key[:, :, :0], value[:, :, :0]

    def part(keys, values, *weights):
        rows = torch.cat((keys, values), -1)  # [B, Hkv, t, D, 4 S]
        hidden = torch.relu(rows @ weights[0].mT + weights[1])
        return (hidden @ weights[2].mT + weights[3]).unbind(-1)

    keys, values = (x.unfold(2, 2 * stride, stride) for x in (key, value))  # [B, Hkv, T, D, 2 S]
    each = keys[:, :, :1].numel() // (2 * stride) * first.shape[0] * key.element_size()
    step = max(1, SLICE_BYTES // each)
    weights = [x.to(key.dtype) for x in (first, first_bias, second, second_bias)]
    parts = []
    for begin in range(0, count, step):
        given = (keys[:, :, begin : begin + step], values[:, :, begin : begin + step], *weights)
        grad = torch.is_grad_enabled()
        parts.append(checkpoint(part, *given, use_reentrant=False) if grad else part(*given))
    return tuple(torch.cat(column, 2) for column in zip(*parts, strict=True))


def mlp_windows(
    key: torch.Tensor,
    value: torch.Tensor,
    stride: int,
    first: torch.Tensor,
    first_bias: torch.Tensor,
    second: torch.Tensor,
    second_bias: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compressed keys and values by a network of one hidden layer; differentiable in all tensors.

    Args:
        key, value: `[B, Hkv, L, D]`, any strides with a contiguous last dimension; D a power of two of at
            least 16.
        stride: S, a power of two; windows of at least 16 tokens, the least that tensor cores take.
        first: `[F, 4 S]`, weights of a window's keys, then of its values; F a power of two.
        first_bias: `[F]`.
        second: `[2, F]`; second_bias: `[2]`: the compressed key's, then the value's.

    Returns:
        (keys, values), `[B, Hkv, T, D]` contiguous, in the dtype of `key`.
    """
    tensors = (first, first_bias, second, second_bias)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (key, value, *tensors))
    if differentiable and window_count(key.shape[2], stride):
        return _MlpWindows.apply(key, value, stride, *tensors)
    return _mlp_forward(key, value, stride, *(x.detach() for x in tensors))
