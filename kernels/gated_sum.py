"""Σ_b g_b o_b: branches of attention weighed by gates (NSA, arXiv 2502.11089, equation 5).

With gradients in one pass over the branches' outputs (`gated_sum`), which the backward needs one by one;
without, each branch's kernel adds its own to the sum as it writes (`gated_onto`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "heads", "tokens"])
def _gated_sum_kernel(
    first, second, third, gates, out, first_strides, second_strides, third_strides, gate_strides, out_strides,
    rows, heads, tokens,
    BRANCHES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program BLOCK rows, a row being (batch, head, token) with tokens fastest."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = row < rows
    token, head, batch = row % tokens, row // tokens % heads, row // tokens // heads
    dim = tl.arange(0, HEAD_DIM)[None, :]
    p_gate = gates + batch * gate_strides[0] + head * gate_strides[1] + token * gate_strides[2]
    at = batch * first_strides[0] + head * first_strides[1] + token * first_strides[2]
    o = tl.load(first + at[:, None] + dim, real[:, None], 0.0).to(tl.float32)
    result = o * tl.load(p_gate, real, 0.0).to(tl.float32)[:, None]
    at = batch * second_strides[0] + head * second_strides[1] + token * second_strides[2]
    o = tl.load(second + at[:, None] + dim, real[:, None], 0.0).to(tl.float32)
    result += o * tl.load(p_gate + gate_strides[3], real, 0.0).to(tl.float32)[:, None]
    if BRANCHES == 3:
        at = batch * third_strides[0] + head * third_strides[1] + token * third_strides[2]
        o = tl.load(third + at[:, None] + dim, real[:, None], 0.0).to(tl.float32)
        result += o * tl.load(p_gate + 2 * gate_strides[3], real, 0.0).to(tl.float32)[:, None]
    at = batch * out_strides[0] + head * out_strides[1] + token * out_strides[2]
    tl.store(out + at[:, None] + dim, result.to(out.dtype.element_ty), real[:, None])


@triton.jit
def gated_onto(result, gate, target, real, GATED: tl.constexpr, ONTO: tl.constexpr):
    """Rows of an output `[ROWS, D]` fp32 times their gates, plus what `target` holds: the end of a kernel."""
    if GATED:
        result *= tl.load(gate, mask=real, other=0.0).to(tl.float32)[:, None]
    if ONTO:
        result += tl.load(target, mask=real[:, None], other=0.0).to(tl.float32)
    return result


def gate_and_strides(
    gate: torch.Tensor | None, stand_in: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """What a kernel is handed for gates `[B, H, N]`, or for none."""
    return (stand_in, (0, 0, 0)) if gate is None else (gate, gate.stride())


def no_gradients_beside_gates(
    tensors: tuple[torch.Tensor, ...], gate: torch.Tensor | None, onto: torch.Tensor | None
) -> bool:
    """Whether gradients of `tensors` are wanted.

    Raises:
        ValueError: they are, and the output is to be gated or added in place (see `gated_sum`).
    """
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if wanted and (gate is not None or onto is not None):
        raise ValueError("no gradients beside a gate or a sum in place: use gated_sum")
    return wanted


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, *outputs):
        ctx.save_for_backward(gates, *outputs)
        return _forward(gates, outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        gates, *outputs = ctx.saved_tensors
        branches = [
            grad * gates[..., n, None].to(grad.dtype) if ctx.needs_input_grad[n + 1] else None
            for n in range(len(outputs))
        ]
        grad_gates = None
        if ctx.needs_input_grad[0]:
            # Row sums by products of vectors: no float32 copy of a whole branch.
            sums = [(grad[..., None, :] @ o[..., None])[..., 0, 0] for o in outputs]
            grad_gates = torch.stack(sums, -1).to(gates.dtype)
        return grad_gates, *branches


def _forward(gates: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    batch, heads, tokens, dim = outputs[0].shape
    outputs = [x if x.stride(-1) == 1 else x.contiguous() for x in outputs]
    out = torch.empty_like(outputs[0])
    rows, block = batch * heads * tokens, 32
    third = outputs[-1]
    _gated_sum_kernel[(triton.cdiv(rows, block),)](
        outputs[0], outputs[1], third, gates, out, outputs[0].stride()[:3], outputs[1].stride()[:3],
        third.stride()[:3], gates.stride(), out.stride()[:3], rows, heads, tokens,
        BRANCHES=len(outputs), HEAD_DIM=dim, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def gated_sum(gates: torch.Tensor, *outputs: torch.Tensor) -> torch.Tensor:
    """Σ_b gates[..., b] · outputs[b]; differentiable in both.

    Args:
        gates: `[B, H, N, branches]`, any floating dtype and strides; two or three branches.
        outputs: one `[B, H, N, D]` a branch; D a power of two.

    Returns:
        `[B, H, N, D]` in the dtype of the outputs; products and sums are fp32.

    Raises:
        ValueError: gates and branches differ in number.
    """
    if len(outputs) not in (2, 3) or gates.shape[-1] != len(outputs):
        raise ValueError(f"{len(outputs)} branches and {gates.shape[-1]} gates: two or three of each")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (gates, *outputs)):
        return _GatedSum.apply(gates, *outputs)
    return _forward(gates, outputs)
