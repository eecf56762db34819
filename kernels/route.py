"""Entmax routing: which chunks each query attends, found without ever writing the scores to memory.

Source: DashAttention (arXiv 2605.18753); entmax and its threshold: Peters, Niculae, Martins 2019 (arXiv
1905.05702). With
x = (α − 1) γ ⟨q, k̄⟩ / √D, a chunk is in a head's support iff x > τ, where Σ [x − τ]₊^{1/(α−1)} = 1 over the
visible chunks.

A tile is T consecutive queries times the heads of one KV head; T divides the chunk size, so a tile sees one
set of earlier chunks. The summaries of one KV head fit into the L2 cache, so a pass that multiplies them
again costs no more than reading stored scores would. Passes:

1.  row maximum m, and the sums of exp(8 (x − m)) and exp(16 (x − m)), which rescale as the maximum grows.
    Were the entries' distances to the maximum spread like A u^(p−1) / Γ(p), the two sums would give A and p
    and hence τ: a start that is off by a few hundredths, where max − 1 is off by a half;
2.  count, Σ(x − τ), Σ(x − τ)² of the entries above the current τ. Far from the solution the next τ is
    Newton's on log Σ(x − τ)² against log(m − τ), which is nearly a straight line; near it, the root of the
    quadratic that the active entries alone define. All inside a bracket that every pass shrinks. Two or three
    passes as a rule, all rows of the tile together;
3.  the lists: chunk numbers in ascending order with one bit for each query of the tile, in storage whose
    offsets have a closed form (`backward_lists.tile_list_start`), so nothing is counted beforehand and
    nothing travels to the host.

For other α the sums have other powers and every step is Newton's on the logarithms.

With `compact` (α = 1.5 only) pass 1 reads a quarter of the blocks, and its τ, lowered by a third, is a guess
from below. One pass over all chunks then lists the tile's candidates, those above the guess of any row, and
one over the candidates sums (x − guess)²: where that is at least 1, the guess is below τ and no chunk of a
support is missing, because f(τ) = Σ [x − τ]₊² falls. Where it is not, f's tangent at the guess, which by
convexity meets 1 below τ, is the next guess, and that one is certain. The passes after it read the candidates
only, the last one too, which also sets the bits of the mask. Until the list is written the candidates stand
in its place.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N queries, D head dim, C chunk size, M chunks,
T queries a tile, W = ceil(M / 32).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from triton.runtime.jit import JITFunction

from dashbench.kernels.backward_lists import list_capacity
from dashbench.kernels.reference import check_entmax
from dashbench.kernels.route_kernels import (
    EPSILON,
    MAX_PASSES,
    MAX_PASSES_GENERAL,
    NEAR,
    SETTLED,
    route_kernel,
    route_short_kernel,
)
from dashbench.kernels.tuning import choose, setting_of

RESIDENT = 128
"""Chunks whose scores a tile keeps in registers: 64 a thread at 128 rows."""
_compiled: set[tuple] = set()


def _compile_once(kernel: JITFunction, device: torch.device, arguments: tuple, options: dict) -> None:
    """Compiles what a launch with these arguments would run, once a process and kind of arguments.

    Their kinds follow from the queries' dtype and the options, which are all that is asked here.
    """
    key = (kernel, device, arguments[0].dtype, *options.items())
    if key not in _compiled:
        compiled = kernel.warmup(*arguments, grid=(1,), **options)
        with suppress(triton.OutOfResources):  # the longer sequence itself will say so
            # Loads it: the longer sequence may come in a graph capture, which may not.
            getattr(compiled, "run", None)
        _compiled.add(key)


@dataclass(frozen=True)
class Routes:
    """Which chunks the tiles of queries attend before their own chunk, which is always attended.

    Attributes:
        entries: `[B, Hkv, capacity]` int32: `chunk | query_bits << 16`, a tile's list from
            `backward_lists.tile_list_start` on, ascending.
        counts: `[B, Hkv, tiles]` int32: lengths of the lists.
        tile: T, queries a tile.
        chunk_size: C.
        tau: `[B, Hq, N]` fp32: thresholds of x (+inf where nothing is visible), or None if not asked for.
        mask: `[B, Hkv, N, W]` int32: bit c % 32 of word c // 32, own chunk not included, or None.
        active_blocks: `[B, Hkv, N]` int32: attended chunks, own one included, or None.
        bias: `[B, Hkv, capacity, T]` fp32: what an entry adds to the scores of each query of its tile
            (natural logarithm; meaningless where the query's bit is not set), or None for nothing.
    """

    entries: torch.Tensor
    counts: torch.Tensor
    tile: int
    chunk_size: int
    tau: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    active_blocks: torch.Tensor | None = None
    bias: torch.Tensor | None = None


@lru_cache  # see list_capacity
def tile_size(group: int, chunk_size: int, rows: int = 128) -> int:
    """Queries a tile: as many as give `rows` rows with the (padded) heads of a group, at most 16 bits and
    one chunk."""
    return max(1, min(rows // triton.next_power_of_2(group), 16, chunk_size))


def _launch(rows: int, compact: bool) -> dict:
    """Measured best (LOG.md, Route 3, 8 and 12): with candidates three programs of 128 rows share a
    multiprocessor."""
    warps = 8 if rows >= 128 else 4
    shape = {"BLOCK": 32 if compact else 64, "LISTING": 64, "num_warps": warps, "num_stages": 2}
    return {**shape, "maxnreg": 80} if compact and rows >= 128 else shape


def route_chunks(
    query: torch.Tensor,
    summaries: torch.Tensor,
    chunk_size: int,
    *,
    scaling_factor: float = 1.0,
    alpha: float = 1.5,
    visibility: str = "own",
    forced: str = "own",
    left_padding: torch.Tensor | None = None,
    sequences: torch.Tensor | None = None,
    tile: int | None = None,
    save: bool = False,
    bias_mode: str = "none",
    sigma: float = 1.0,
    compact: bool = True,
    resident: int | None = None,
    launch: dict | None = None,
) -> Routes:
    """Routes every query of a causal sequence.

    Args:
        query: `[B, Hq, N, D]`, bf16 or fp16, any strides with a contiguous last dimension.
        summaries: `[B, Hkv, M', D]` contiguous, of the complete chunks.
        chunk_size: C.
        scaling_factor: γ; larger is sparser.
        alpha: order of entmax in (1, 2]; 1.5 has the fast path.
        visibility: `own` (chunks before the own one) or `completed` (chunks whose last token is at or before
            the query).
        forced: `own`, or `own_and_previous`.
        left_padding: `[B]` int32, or None.
        sequences: `[M, 2]` int32 of packed sequences: each chunk's sequence begins with this chunk and ends
            before this token (`packed.Packing`), or None.
        tile: T; default: 128 rows.
        save: also return τ, the bit mask and active block counts (training and reports).
        bias_mode: `centered` or `raw` also return the prior's bias, T times as large as the lists; `none`.
        sigma: σ of `centered`.
        compact: search the threshold among the candidates only, not among all chunks again; the result is
            the same. Always off for α other than 1.5, and for `completed`, where the own chunk takes part in
            the threshold but has no place in the list.
        resident: tiles with at most so many chunks before their own keep their scores in registers; 0 to
            `RESIDENT`, the default. Only for α = 1.5 and `own`, else 0; the result is the same.
        launch: Triton launch options that replace the default ones (BLOCK chunks at a time, num_warps,
            num_stages, maxnreg, LISTING) of the kernel that reads the summaries in every pass; it alone runs
            then, unless `resident` is given. LISTING, a multiple of 32, is how many chunks at a time the pass
            that lists the candidates compares. None: what `tuning` knows.

    Raises:
        ValueError: γ or `alpha` out of range, more chunks than 16 bits can number, a tile that does not fit,
            or `resident` above its limit.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, known = summaries.shape[1], summaries.shape[2]
    group = heads // kv_heads
    chunks = triton.cdiv(tokens, chunk_size)
    check_entmax(alpha, scaling_factor)
    if chunks > 1 << 16:
        raise ValueError(f"{tokens} tokens are more than {1 << 16} chunks of {chunk_size}")
    tile = tile or tile_size(group, chunk_size)
    padded_heads = max(triton.next_power_of_2(group), 16 // tile)
    if chunk_size % tile or tile > 16:
        raise ValueError(
            f"a tile of {tile} queries must divide the chunk size {chunk_size} and be at most 16"
        )
    tiles, words = triton.cdiv(tokens, tile), triton.cdiv(chunks, 32)
    capacity = list_capacity(tokens, chunk_size, tile)
    device = query.device
    entries = torch.empty(batch, kv_heads, capacity, dtype=torch.int32, device=device)
    counts = torch.empty(batch, kv_heads, tiles, dtype=torch.int32, device=device)
    tau = mask = active = None
    if save:
        tau = torch.empty(batch, heads, tokens, dtype=torch.float32, device=device)
        mask = torch.zeros(batch, kv_heads, tokens, words, dtype=torch.int32, device=device)
        active = torch.empty(batch, kv_heads, tokens, dtype=torch.int32, device=device)
    bias = None
    if bias_mode != "none":
        bias = torch.empty(batch, kv_heads, capacity, tile, dtype=torch.float32, device=device)
    query = query if query.stride(-1) == 1 else query.contiguous()
    fast = alpha == 1.5
    rows = tile * padded_heads
    own_alone = fast and visibility == "own"
    compact = compact and own_alone
    stage, setting = "route" if compact else "route_all", setting_of(query, kv_heads, chunk_size)
    if resident is None:
        resident = RESIDENT if launch is None else 0
    if not 0 <= resident <= RESIDENT:
        raise ValueError(f"resident is from 0 to {RESIDENT}, not {resident}")
    short_tiles = min(tiles, (resident + 1) * (chunk_size // tile)) if resident and own_alone else 0
    tensors = (
        query, summaries, entries, counts, tau if save else counts, mask if save else counts,
        active if save else counts, bias if bias is not None else counts,
        left_padding if left_padding is not None else counts,
        sequences if sequences is not None else counts, *query.stride()[:3],
    )  # fmt: skip
    scale, all_heads = (alpha - 1.0) * scaling_factor * dim**-0.5, batch * kv_heads
    shape = {
        "GROUP": group, "HEADS": padded_heads, "TILE": tile, "CHUNK": chunk_size, "HEAD_DIM": dim,
        "FORCE_PREVIOUS": forced == "own_and_previous", "PADDED": left_padding is not None,
        "PACKED": sequences is not None, "SAVE": save, "BIAS": ("none", "centered", "raw").index(bias_mode),
    }  # fmt: skip
    numbers = (
        tokens, known, tiles, capacity, words, all_heads, kv_heads, scale, 1.0 / (alpha - 1.0),
        EPSILON * group, SETTLED, NEAR, MAX_PASSES if fast else MAX_PASSES_GENERAL, 1.0 / sigma,
    )  # fmt: skip
    options = {
        **shape, "ALPHA_1_5": fast, "COMPLETED": visibility == "completed", "COMPACT": compact,
        **_launch(rows, compact), **(choose(stage, setting) if launch is None else launch),
    }  # fmt: skip
    if tiles > short_tiles:
        route_kernel[((tiles - short_tiles) * all_heads,)](*tensors, *numbers, **options)
    elif isinstance(route_kernel, JITFunction):
        # Compiled with the first sequence of any length: a longer one, which needs it, does not wait.
        _compile_once(route_kernel, query.device, (*tensors, *numbers), options)
    if short_tiles:
        route_short_kernel[(short_tiles * all_heads,)](
            *tensors, tokens, known, tiles, short_tiles, capacity, words, all_heads, kv_heads, scale,
            EPSILON * group, SETTLED, NEAR, MAX_PASSES, 1.0 / sigma,
            RESIDENT=RESIDENT, num_warps=8 if rows >= 128 else 4, maxnreg=128, **shape,
        )  # fmt: skip
    return Routes(entries, counts, tile, chunk_size, tau, mask, active, bias)
