"""Attention over a band of keys: every query sees the keys that lie wholly in its past, all of them or the
last few.

Key t stands for the tokens `[stride t, stride t + kernel)` and is seen by the query at position i once
`stride t + kernel - 1 <= i`. With kernel 32 and stride 16 this is the compressed attention of NSA (arXiv
2502.11089, equation 7) and the softmax denominator of InfLLMv2's block scores (arXiv 2509.24663); with kernel
and stride 1 and a window it is sliding-window attention. Without values only the logarithm of the softmax
denominator is computed. Online softmax in base 2 as in FlashAttention (arXiv 2205.14135); a tile's rows are T
consecutive queries times the heads of one KV head. On Hopper, where its shapes allow and values are given,
the kernel is the warp-specialised one of `band_hopper`; else this one, which runs on any GPU and in the
interpreter.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N query rows, L keys of the band, D head dim, T
queries a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dashbench.kernels.backward import _bulk, _rows
from dashbench.kernels.band_backward import band_gradients
from dashbench.kernels.gated_sum import gate_and_strides, gated_onto, no_gradients_beside_gates

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Band:
    """Which keys a query sees.

    Attributes:
        kernel: tokens a key stands for.
        stride: tokens between the first tokens of two neighbouring keys.
        window: if not 0, only the last `window` tokens up to the query's own; kernel and stride must be 1.
    """

    kernel: int = 1
    stride: int = 1
    window: int = 0

    def __post_init__(self):
        if self.kernel < 1 or self.stride < 1 or self.window < 0:
            raise ValueError(f"kernel and stride start at 1, window at 0: {self}")
        if self.window and (self.kernel, self.stride) != (1, 1):
            raise ValueError(f"a window is for single tokens: {self}")

    def count(self, length: int) -> int:
        """Keys that `length` tokens make."""
        return 0 if length < self.kernel else (length - self.kernel) // self.stride + 1


@triton.jit
def _softmax_step(scores, peak, total):
    """(weights, new peak, new total, factor for what was accumulated before); scores in base 2."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen nothing yet: exp2(-inf - 0) = 0 on either side.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(peak - shift)
    return weights, new_peak, total * rescale + tl.sum(weights, 1), rescale


@triton.jit
def _attend_block(
    q, keys, values, batch, kv_head, first, seen, peak, total, accumulator, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, VALUES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(peak, total, accumulator) with the keys from `first` on, of which a row sees those of `seen`."""
    k = tl.reshape(keys.load([batch, kv_head, first, 0]), [BLOCK, HEAD_DIM])
    scores = tl.dot(q, tl.trans(k)) * scale_log2
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    weights, peak, total, rescale = _softmax_step(scores, peak, total)
    if VALUES:
        v = tl.reshape(values.load([batch, kv_head, first, 0]), [BLOCK, HEAD_DIM])
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * rescale[:, None])
    return peak, total, accumulator


@triton.jit(do_not_specialize=["rows", "count", "start", "tiles", "window"])
def _band_kernel(
    query, keys, values, out, lse, gate,
    query_stride_b, query_stride_h, query_stride_n, out_stride_b, out_stride_h, out_stride_n, lse_stride_h,
    gate_stride_b, gate_stride_h, gate_stride_n, rows, count, start, tiles, kv_heads, window, scale_log2,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, VALUES: tl.constexpr,
    GATED: tl.constexpr, ONTO: tl.constexpr,
):  # fmt: skip
    """One program a tile and KV head; late tiles, which have most to do, first."""
    index = tl.program_id(0) % (tl.num_programs(0) // tiles)
    tile = tiles - 1 - tl.program_id(0) // (tl.num_programs(0) // tiles)
    batch, kv_head = index // kv_heads, index % kv_heads
    row = tl.arange(0, TILE * HEADS)
    head, n = row % HEADS, tile * TILE + row // HEADS
    real = (head < GROUP) & (n < rows)
    dim = tl.arange(0, HEAD_DIM)
    column = tl.arange(0, BLOCK)
    offset = (
        batch.to(tl.int64) * query_stride_b
        + (kv_head * GROUP + head).to(tl.int64) * query_stride_h
        + n.to(tl.int64) * query_stride_n
    )
    q = tl.load(query + offset[:, None] + dim[None, :], mask=real[:, None], other=0.0)  # [ROWS, D]
    position = start + n
    limit = tl.minimum(tl.maximum(position + (1 + STRIDE - KERNEL), 0) // STRIDE, count)
    first_position, last_position = start + tile * TILE, start + tl.minimum(tile * TILE + TILE, rows) - 1
    least = tl.minimum(tl.maximum(first_position + (1 + STRIDE - KERNEL), 0) // STRIDE, count)
    most = tl.minimum(tl.maximum(last_position + (1 + STRIDE - KERNEL), 0) // STRIDE, count)
    peak = tl.full([TILE * HEADS], float("-inf"), tl.float32)
    total = tl.zeros([TILE * HEADS], tl.float32)
    accumulator = tl.zeros([TILE * HEADS, HEAD_DIM], tl.float32)
    # Blocks that all rows see whole, `begin` to `whole`, need no mask; most have those of a window, but for
    # the first and the last one or two.
    begin, whole = 0, least // BLOCK * BLOCK
    if WINDOW:
        head_begin = tl.maximum(first_position - window + 1, 0) // BLOCK * BLOCK
        begin = tl.cdiv(tl.maximum(last_position - window + 1, 0), BLOCK) * BLOCK
        for first in range(head_begin, tl.minimum(begin, most), BLOCK):
            seen = (first + column)[None, :] < limit[:, None]
            seen = seen & ((first + column)[None, :] > (position - window)[:, None])
            peak, total, accumulator = _attend_block(
                q, keys, values, batch, kv_head, first, seen, peak, total, accumulator, scale_log2,
                HEAD_DIM, BLOCK, VALUES, True,
            )  # fmt: skip
    for first in range(begin, whole, BLOCK):
        peak, total, accumulator = _attend_block(
            q, keys, values, batch, kv_head, first, None, peak, total, accumulator, scale_log2,
            HEAD_DIM, BLOCK, VALUES, False,
        )  # fmt: skip
    for first in range(tl.maximum(begin, whole), most, BLOCK):
        seen = (first + column)[None, :] < limit[:, None]
        peak, total, accumulator = _attend_block(
            q, keys, values, batch, kv_head, first, seen, peak, total, accumulator, scale_log2,
            HEAD_DIM, BLOCK, VALUES, True,
        )  # fmt: skip
    safe = tl.where(total > 0, total, 1.0)
    # Natural logarithm; +inf where nothing is seen, so that weights exp(s - lse) are 0.
    tl.store(
        lse + (index.to(tl.int64) * GROUP + head) * lse_stride_h + n,
        tl.where(total > 0, (peak + tl.log2(safe)) * 0.6931471805599453, float("inf")),
        mask=real,
    )
    if VALUES:
        out_offset = (
            batch.to(tl.int64) * out_stride_b
            + (kv_head * GROUP + head).to(tl.int64) * out_stride_h
            + n.to(tl.int64) * out_stride_n
        )
        target = out + out_offset[:, None] + dim[None, :]
        gate_offset = (
            batch.to(tl.int64) * gate_stride_b
            + (kv_head * GROUP + head).to(tl.int64) * gate_stride_h
            + n.to(tl.int64) * gate_stride_n
        )
        result = gated_onto(accumulator / safe[:, None], gate + gate_offset, target, real, GATED, ONTO)
        tl.store(target, result.to(out.dtype.element_ty), mask=real[:, None])


def _checked(query: torch.Tensor, key: torch.Tensor) -> int:
    """G; raises ValueError for what the kernels do not cover."""
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} KV heads")
    if dim not in (64, 128):
        raise ValueError(f"head dim must be 64 or 128, got {dim}: pad it")
    if query.dtype != key.dtype:
        raise ValueError(f"query is {query.dtype}, key {key.dtype}")
    return heads // kv_heads


def kernel_for_band(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, onto: torch.Tensor | None = None
) -> str:
    """`hopper` or `portable`: which kernel `band_forward` runs for these inputs."""
    from dashbench.kernels import hopper

    tile = hopper.tile_of(query.shape[1] // key.shape[1])
    return "hopper" if value is not None and hopper.supports(query, key, value, tile, onto) else "portable"


def band_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    band: Band,
    start: int = 0,
    lse: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
    kernel: str | None = None,
    launch: dict | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Attention of query rows over the band, without a graph.

    Args:
        query: `[B, Hq, N, D]`, bf16 or fp16, any strides with a contiguous last dimension; row n is at
            position `start + n`.
        key, value: `[B, Hkv, L, D]`, likewise; without value only lse is computed.
        band: what is seen.
        start: position of row 0.
        lse: `[B, Hq, N]` fp32 to write, its first two dimensions contiguous over each other; or None.
        gate: `[B, Hq, N]`, any floating dtype and strides, factors of the output's rows. Or None.
        onto: like the output; it is added to this tensor, in place, and this tensor returned. Or None.
        kernel: `hopper` or `portable`; default: what `kernel_for_band` says.
        launch: launch options of the portable kernel that replace the default ones: ROWS of a tile (queries
            times heads), BLOCK keys at a time, and Triton's num_warps, num_stages, maxnreg.

    Returns:
        (output like `query`, or None; lse `[B, Hq, N]` fp32, natural logarithm). A row that sees nothing has
        output 0 and lse +inf.

    Raises:
        ValueError: head counts, head dim (64 or 128) or dtypes that do not fit.
    """
    group = _checked(query, key)
    batch, heads, rows, dim = query.shape
    kv_heads, count = key.shape[1], key.shape[2]
    if lse is None:
        lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    if count == 0:
        lse.fill_(float("inf"))
        return (None if value is None else onto if onto is not None else torch.zeros_like(query)), lse
    query = query if query.stride(-1) == 1 else query.contiguous()
    if (kernel or kernel_for_band(query, key, value, onto)) == "hopper":
        from dashbench.kernels.band_hopper import band_hopper

        return band_hopper(query, key, value, band, start, lse, gate, onto), lse
    padded = triton.next_power_of_2(group)
    # Two programs a processor: three stages of keys and values would leave shared memory for one alone, more
    # registers likewise (LOG.md, The rivals).
    settings = {"ROWS": 128, "BLOCK": 64, "num_warps": 8, "num_stages": 2, "maxnreg": 128, **(launch or {})}
    tile = max(1, settings.pop("ROWS") // padded)
    tiles = triton.cdiv(rows, tile)
    boxes = [_bulk(_rows(x), [1, 1, settings["BLOCK"], dim]) for x in (key, value) if x is not None]
    out = None if value is None else torch.empty_like(query) if onto is None else onto
    strides = (0, 0, 0) if out is None else out.stride()[:3]
    gates, gate_strides = gate_and_strides(gate, lse)
    _band_kernel[(tiles * batch * kv_heads,)](
        query, boxes[0], boxes[-1], query if out is None else out, lse, gates,
        *query.stride()[:3], *strides, lse.stride(1), *gate_strides,
        rows, count, start, tiles, kv_heads, band.window, dim**-0.5 * LOG2_E,
        GROUP=group, HEADS=padded, TILE=tile, HEAD_DIM=dim, KERNEL=band.kernel, STRIDE=band.stride,
        WINDOW=band.window > 0, VALUES=value is not None, GATED=gate is not None, ONTO=onto is not None,
        **settings,
    )  # fmt: skip
    return out, lse


class _BandAttention(torch.autograd.Function):
    """Saves q, k, v, out and lse; scores are recomputed."""

    @staticmethod
    def forward(ctx, query, key, value, band: Band, start: int):
        out, lse = band_forward(query, key, value, band, start)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.band, ctx.start = band, start
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, _):
        band = ctx.band
        grads = band_gradients(grad_out, *ctx.saved_tensors, band.kernel, band.stride, band.window, ctx.start)
        return *grads, None, None


def band_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: Band,
    start: int = 0,
    *,
    gate: torch.Tensor | None = None,
    onto: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `band_forward` with values; differentiable in query, key and value (lse carries no gradient).

    Raises:
        ValueError: as `band_forward`, and gradients asked for with `gate` or `onto`.
    """
    if no_gradients_beside_gates((query, key, value), gate, onto):
        return _BandAttention.apply(query, key, value, band, start)
    return band_forward(query, key, value, band, start, gate=gate, onto=onto)
