"""Entmax routing: which chunks each query attends, found without ever writing the scores to memory.

Source: DashAttention (arXiv 2605.18753); entmax and its threshold: Peters, Niculae, Martins 2019 (arXiv
1905.05702). With
x = (α − 1) γ ⟨q, k̄⟩ / √D, a chunk is in a head's support iff x > τ, where Σ [x − τ]₊^{1/(α−1)} = 1 over the
visible chunks.

A tile is T consecutive queries times the heads of one KV head; T divides the chunk size, so a tile sees one
set of earlier chunks. The summaries of one KV head fit into the L2 cache, so a pass that multiplies them
again costs no more than reading stored scores would. Passes:

1.  row maximum m, and the sums of exp(8 (x − m)) and exp(16 (x − m)), which rescale as the maximum grows.
Were the
    entries' distances to the maximum spread like A u^(p−1) / Γ(p), the two sums would give A and p and
    hence τ: a start that is off by a few hundredths, where max − 1 is off by a half;
2.  count, Σ(x − τ), Σ(x − τ)² of the entries above the current τ. Far from the solution the next τ is
Newton's on
    log Σ(x − τ)² against log(m − τ), which is nearly a straight line; near it, the root of the quadratic
    that the active entries alone define. All inside a bracket that every pass shrinks. Two or three passes
    as a rule, all rows of the tile together;
3.  the lists: chunk numbers in ascending order with one bit for each query of the tile, in storage whose
offsets have
    a closed form (`backward_lists.tile_list_start`), so nothing is counted beforehand and nothing travels to
    the host.

For other α the sums have other powers and every step is Newton's on the logarithms.

With `compact` (α = 1.5 only) pass 1 reads a quarter of the blocks, and its τ, lowered by a third, is a guess
from below. One pass over all chunks then lists the tile's candidates, those above the guess of any row, and
sums (x − guess)² over them: where that is at least 1, the guess is below τ and no chunk of a support is
missing, because f(τ) = Σ [x − τ]₊² falls. Where it is not, f's tangent at the guess, which by convexity
meets 1 below τ, is the next guess, and that one is certain. The passes after it read the candidates only.
Until the list is written the candidates stand in its place.

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N queries, D head dim, C chunk size, M chunks,
T queries a tile, W = ceil(M / 32).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dashbench.kernels.backward_lists import list_capacity, tile_list_start

# A chunk whose weight (mean over heads) is at most this is not routed.
EPSILON = 1e-20
# τ is settled once no row moves by more than this, in units of x. The quadratic step is exact up to the k
# entries
# that it moves across; they change τ by at most k · SETTLED² / 2, under 3e-6 for two thousand of them.
SETTLED = 5e-5
# The quadratic step is taken where Σ(x − τ)² is this close to one.
NEAR = 0.5
MAX_PASSES = 24
# The guess of τ from a sample of the chunks, relative to the maximum, is lowered to CAUTION · τ −
# CAUTION_ABSOLUTE: on planted routings about one tile in twenty then has to list its candidates again.
CAUTION = tl.constexpr(1.35)
CAUTION_ABSOLUTE = tl.constexpr(0.02)
# What fp32 sums may be off by when a lower bound of τ is derived from them.
BOUND_MARGIN = tl.constexpr(1e-4)
MAX_PASSES_GENERAL = 80
# Stands behind a tile's last candidate; above every chunk number.
NO_CHUNK = tl.constexpr(1 << 20)


@triton.jit
def _scores(
    q, base, chunk, count, first_chunk, row_limit, dim, scale, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr
):
    """x of the chunks of a block `[ROWS, BLOCK]`, −inf where a row may not see the chunk."""
    summary = tl.load(
        base + chunk.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :], mask=(chunk < count)[:, None], other=0.0
    )  # [BLOCK, D]
    x = tl.dot(q, tl.trans(summary)) * scale
    seen = chunk[None, :] < row_limit[:, None]
    if PADDED:
        seen = seen & (chunk >= first_chunk)[None, :]
    return tl.where(seen, x, float("-inf"))


@triton.jit
def _chunks(candidates, first, column, count, LISTED: tl.constexpr):
    """Chunk numbers of a block: the candidates from `first` on, or simply the chunks from `first` on."""
    if LISTED:
        return tl.load(candidates + first + column, mask=first + column < count, other=NO_CHUNK)
    return first + column


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _any_row(flags, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Column by column, whether any row's flag is set, `[BLOCK]` of 0 and 1.

    32 columns at a time travel as the bits of one integer: a sixteenth of the exchanges between threads.
    """
    bit = tl.arange(0, 32)
    words = tl.sum(tl.reshape(flags, [ROWS, BLOCK // 32, 32]) << bit[None, None, :], 2)
    words = tl.reduce(words, 0, _either)
    return tl.reshape((words[:, None] >> bit[None, :]) & 1, [BLOCK])


@triton.jit(do_not_specialize=["tokens", "chunks", "known", "tiles", "capacity", "words"])
def _route_kernel(
    query, summaries, entries, counts, tau_out, mask_out, active_out, bias_out, padding, sequences,
    query_stride_b, query_stride_h, query_stride_n,
    tokens, chunks, known, tiles, capacity, words, kv_heads, scale, power, epsilon, settled, near, max_passes,
    inverse_sigma,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr, ALPHA_1_5: tl.constexpr, COMPLETED: tl.constexpr, FORCE_PREVIOUS: tl.constexpr,
    PADDED: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, COMPACT: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """One program a tile and KV head; late tiles, which have most to do, first."""
    index = tl.program_id(0) % (tl.num_programs(0) // tiles)
    tile = tiles - 1 - tl.program_id(0) // (tl.num_programs(0) // tiles)
    batch, kv_head = (index // kv_heads).to(tl.int64), (index % kv_heads).to(tl.int64)
    ROWS: tl.constexpr = TILE * HEADS
    BOUNDED: tl.constexpr = PADDED or PACKED
    row = tl.arange(0, ROWS)
    head, position = row % HEADS, tile * TILE + row // HEADS
    real = (head < GROUP) & (position < tokens)
    dim = tl.arange(0, HEAD_DIM)
    column = tl.arange(0, BLOCK)
    offset = (
        batch * query_stride_b
        + (kv_head * GROUP + head) * query_stride_h
        + position.to(tl.int64) * query_stride_n
    )
    q = tl.load(query + offset[:, None] + dim[None, :], mask=real[:, None], other=0.0)  # [ROWS, D]
    base = summaries + index.to(tl.int64) * known * HEAD_DIM
    own = (tile * TILE) // CHUNK
    first_chunk = 0
    previous = own - 1
    end_token = tokens
    if PADDED:
        first_chunk = tl.load(padding + batch) // CHUNK
        real = real & (position >= tl.load(padding + batch))
    if PACKED:
        first_chunk = tl.load(sequences + own * 2)
        end_token = tl.load(sequences + own * 2 + 1)
        previous = tl.where(previous >= first_chunk, previous, -1)
        real = real & (position < end_token)
    # Chunks [first_chunk, row_limit) are visible to a row.
    row_limit = tl.full([ROWS], own, tl.int32)
    last = own
    if COMPLETED:
        row_limit = (position + 1) // CHUNK
        last = ((tile + 1) * TILE) // CHUNK
    row_limit = tl.where(real, tl.minimum(row_limit, known), 0)
    last = tl.minimum(last, known)
    start = (first_chunk // BLOCK) * BLOCK

    list_base = entries + index.to(tl.int64) * capacity + tile_list_start(tile, CHUNK // TILE)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    sum_1 = tl.zeros([ROWS], tl.float32)
    sum_2 = tl.zeros([ROWS], tl.float32)
    DECAY: tl.constexpr = 11.541560327111707  # 8 log2(e)
    stride = 1
    if COMPACT:
        blocks = tl.cdiv(last - start, BLOCK)
        stride = tl.where(blocks >= 16, 4, tl.where(blocks >= 4, 2, 1))
    skipped = ((last - start + BLOCK - 1) // BLOCK + stride - 1) % stride  # the last block is always read
    for first in range(start + skipped * BLOCK, last, BLOCK * stride):
        chunk = first + column
        x = _scores(q, base, chunk, last, first_chunk, row_limit, dim, scale, HEAD_DIM, BOUNDED)
        new_peak = tl.maximum(peak, tl.max(x, 1))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        rescale = tl.where(peak == float("-inf"), 0.0, tl.exp2(DECAY * (peak - shift)))
        decayed = tl.exp2(DECAY * (x - shift[:, None]))
        sum_1 = sum_1 * rescale + tl.sum(decayed, 1)
        sum_2 = sum_2 * rescale * rescale + tl.sum(decayed * decayed, 1)
        peak = new_peak
    empty = peak == float("-inf")
    # From here on everything is relative to the row's maximum, where fp32 is finest: τ is in [−1, 0).
    peak = tl.where(empty, 0.0, peak)
    tau = tl.full([ROWS], -1.0, tl.float32)
    if ALPHA_1_5:
        order = tl.log2(tl.where(empty, 1.0, sum_1) / tl.where(empty, 1.0, sum_2))
        order = tl.minimum(tl.maximum(order, 1e-3), 6.0)
        log_a = tl.log(tl.where(empty, 1.0, sum_1 * stride)) + order * 2.0794415416798357  # ln 8
        z = order + 3.0
        log_gamma = (z - 0.5) * tl.log(z) - z + 0.9189385332046727 + 1.0 / (12.0 * z)  # Stirling
        tau = -tl.exp((log_gamma - 0.6931471805599453 - log_a) / (order + 2.0))
        tau = tl.minimum(tl.maximum(tau, -1.0), -1e-4)
    begin, end = start, last
    if COMPACT:
        sure = tl.where(empty, float("inf"), peak + tl.maximum(CAUTION * tau - CAUTION_ABSOLUTE, -1.0))
        candidates = 0
        complete = 0
        count = tl.zeros([ROWS], tl.float32)
        s1 = tl.zeros([ROWS], tl.float32)
        s2 = tl.zeros([ROWS], tl.float32)
        # The second guess is certain. Once complete, the inner loop is empty (a `while` with this body fails
        # in Triton 3.6's compiler).
        for _ in range(0, 2):
            candidates = candidates * complete
            count = count * complete
            s1 = s1 * complete
            s2 = s2 * complete
            peak = tl.where(empty | (complete != 0), peak, float("-inf"))
            for first in range(tl.where(complete != 0, last, start), last, BLOCK):
                chunk = first + column
                x = _scores(q, base, chunk, last, first_chunk, row_limit, dim, scale, HEAD_DIM, BOUNDED)
                peak = tl.where(empty, peak, tl.maximum(peak, tl.max(x, 1)))
                gap = tl.maximum(x - sure[:, None], 0.0)
                above = (gap > 0).to(tl.int32)
                count += tl.sum(above, 1).to(tl.float32)
                s1 += tl.sum(gap, 1)
                s2 += tl.sum(gap * gap, 1)
                listed = _any_row(above, ROWS, BLOCK)
                if FORCE_PREVIOUS:
                    listed = listed | (chunk == previous).to(tl.int32)
                slot = candidates + tl.cumsum(listed, 0) - listed
                tl.store(list_base + slot, chunk, mask=listed != 0)
                candidates += tl.sum(listed, 0)
            below = (s2 >= 1.0) | empty
            tangent = tl.where(s1 > 0, sure + (s2 - 1.0) / tl.where(s1 > 0, 2.0 * s1, 1.0), float("-inf"))
            lower = tl.maximum(tangent, peak - 1.0)
            sure = tl.where(below, sure, lower - BOUND_MARGIN * (1.0 + 0.01 * tl.abs(lower)))
            complete = tl.min(below.to(tl.int32), 0)
            # The list may be written once more now, or read, by other threads than wrote it.
            tl.debug_barrier()
        begin, end = 0, candidates
        root = s1 * s1 - tl.maximum(count, 1.0) * (s2 - 1.0)
        step = (s1 - tl.sqrt(tl.maximum(root, 0.0))) / tl.maximum(count, 1.0)
        tau = tl.where(empty, -1.0, tl.minimum(tl.maximum(sure + step - peak, -1.0), -1e-4))
    low = tl.full([ROWS], -1.0, tl.float32)
    high = tl.zeros([ROWS], tl.float32)
    moving = 1
    passes = 0
    while (moving > 0) & (passes < max_passes):
        count = tl.zeros([ROWS], tl.float32)
        s1 = tl.zeros([ROWS], tl.float32)
        s2 = tl.zeros([ROWS], tl.float32)
        for first in range(begin, end, BLOCK):
            chunk = _chunks(list_base, first, column, end, COMPACT)
            x = _scores(q, base, chunk, last, first_chunk, row_limit, dim, scale, HEAD_DIM, BOUNDED)
            gap = tl.maximum((x - peak[:, None]) - tau[:, None], 0.0)
            if ALPHA_1_5:
                count += tl.sum((gap > 0).to(tl.float32), 1)
                s1 += tl.sum(gap, 1)
                s2 += tl.sum(gap * gap, 1)
            else:
                raised = tl.where(gap > 0, tl.exp2((power - 1.0) * tl.log2(tl.maximum(gap, 1e-30))), 0.0)
                s1 += tl.sum(raised, 1)
                s2 += tl.sum(raised * gap, 1)
        excess = s2 - 1.0
        low = tl.where(excess > 0, tl.maximum(low, tau), low)
        high = tl.where(excess > 0, high, tl.minimum(high, tau))
        # Newton on log s2 against log(−τ): its slope is power · s1 · (−τ) / s2.
        safe = tl.maximum(s2, 1e-30)
        slope = tl.maximum(power * s1 * -tau / safe, 1e-3)
        new = tau * tl.exp(-tl.log(safe) / slope)
        if ALPHA_1_5:
            n = tl.maximum(count, 1.0)
            root = s1 * s1 - n * excess
            quadratic = tau + (s1 - tl.sqrt(tl.maximum(root, 0.0))) / n
            new = tl.where((root >= 0) & (tl.abs(excess) < near), quadratic, new)
        new = tl.where((new < low) | (new > high), 0.5 * (low + high), new)
        new = tl.where(empty, tau, new)
        moving = tl.max((tl.abs(new - tau) > settled).to(tl.int32), 0)
        tau = new
        passes += 1

    level = peak + tau
    level = tl.where(empty, float("inf"), level)
    query_in_tile = tl.arange(0, TILE)
    found = 0
    active = tl.zeros([TILE], tl.int32)
    log_sum = tl.zeros([TILE], tl.float32)
    routed_chunks = tl.zeros([TILE], tl.float32)
    bias_base = bias_out + (index.to(tl.int64) * capacity + tile_list_start(tile, CHUNK // TILE)) * TILE
    query_position = tile * TILE + query_in_tile
    mask_row = mask_out + (index.to(tl.int64) * tokens + query_position.to(tl.int64)) * words
    bit = tl.arange(0, 32)
    LISTED: tl.constexpr = COMPACT and not SAVE
    if SAVE:  # the bit mask's words are written whole, so every visible chunk is looked at again
        begin, end = start, own
    elif not COMPACT:
        end = own
    for first in range(begin, end, BLOCK):
        # The list overwrites the candidates: no further than they have been read.
        chunk = _chunks(list_base, first, column, end, LISTED)
        x = _scores(q, base, chunk, last, first_chunk, row_limit, dim, scale, HEAD_DIM, BOUNDED)
        gap = tl.where(empty[:, None], 0.0, tl.maximum((x - peak[:, None]) - tau[:, None], 0.0))
        if ALPHA_1_5:
            weight = gap * gap
        else:
            weight = tl.where(gap > 0, tl.exp2(power * tl.log2(tl.maximum(gap, 1e-30))), 0.0)
        total = tl.sum(tl.reshape(weight, [TILE, HEADS, BLOCK]), 1)  # [T, BLOCK], G times w
        chosen = (total > epsilon) & (chunk < own)[None, :]
        routed = chosen
        if FORCE_PREVIOUS:
            chosen = chosen | (chunk == previous)[None, :]
            routed = routed & (chunk != previous)[None, :]
        chosen = (chosen & (query_position < end_token)[:, None]).to(tl.int32)
        active += tl.sum(chosen, 1)
        query_bits = tl.sum(chosen << query_in_tile[:, None], 0)
        listed = (query_bits != 0).to(tl.int32)
        slot = found + tl.cumsum(listed, 0) - listed
        tl.store(list_base + slot, chunk | (query_bits << 16), mask=listed != 0)
        if BIAS != 0:
            log_w = tl.where(routed, tl.log(tl.where(routed, total, GROUP) / GROUP), 0.0)  # [T, BLOCK]
            log_sum += tl.sum(log_w, 1)
            routed_chunks += tl.sum(routed.to(tl.float32), 1)
            at = slot.to(tl.int64)[None, :] * TILE + query_in_tile[:, None]
            tl.store(bias_base + at, log_w, mask=(listed != 0)[None, :])
        found += tl.sum(listed, 0)
        if SAVE:
            packed = tl.sum(tl.reshape(chosen, [TILE, BLOCK // 32, 32]) << bit[None, None, :], 2)
            word = first // 32 + tl.arange(0, BLOCK // 32)
            tl.store(
                mask_row[:, None] + word[None, :],
                packed,
                mask=(query_position < tokens)[:, None] & (word < words)[None, :],
            )
    tl.store(counts + index.to(tl.int64) * tiles + tile, found)
    if BIAS == 1:  # centred: the mean is known only now
        tl.debug_barrier()
        mean = log_sum / tl.maximum(routed_chunks, 1.0)
        for first in range(0, found, BLOCK):
            slot = first + column
            chunk = tl.load(list_base + slot, mask=slot < found, other=0) & 0xFFFF
            at = slot.to(tl.int64)[None, :] * TILE + query_in_tile[:, None]
            log_w = tl.load(bias_base + at, mask=(slot < found)[None, :], other=0.0)
            b = (log_w - mean[:, None]) * inverse_sigma
            if FORCE_PREVIOUS:
                b = tl.where((chunk == previous)[None, :], 0.0, b)
            tl.store(bias_base + at, b, mask=(slot < found)[None, :])
    if SAVE:
        # Words before the first visible chunk and behind the own one hold nothing.
        done = tl.maximum(tl.cdiv(own, BLOCK) * (BLOCK // 32), start // 32)
        nothing = tl.zeros([TILE, 32], tl.int32)
        inside = (query_position < tokens)[:, None]
        if BOUNDED:
            for first in range(0, start // 32, 32):
                word = first + bit
                here = inside & (word < start // 32)[None, :]
                tl.store(mask_row[:, None] + word[None, :], nothing, mask=here)
        for first in range(done, words, 32):
            word = first + bit
            tl.store(mask_row[:, None] + word[None, :], nothing, mask=inside & (word < words)[None, :])
        tau_offset = (index.to(tl.int64) * GROUP + head) * tokens + position
        tl.store(tau_out + tau_offset, level, mask=(head < GROUP) & (position < tokens))
        tl.store(
            active_out + index.to(tl.int64) * tokens + query_position,
            active + 1,
            mask=query_position < tokens,
        )


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


def tile_size(group: int, chunk_size: int, rows: int = 128) -> int:
    """Queries a tile: as many as give `rows` rows with the (padded) heads of a group, at most 16 bits and
    one chunk."""
    return max(1, min(rows // triton.next_power_of_2(group), 16, chunk_size))


def _launch(rows: int, compact: bool) -> dict:
    """Measured best on an H200 (LOG.md, Route 3 and 8): with candidates three programs of 128 rows share a
    multiprocessor."""
    shape = {"BLOCK": 32 if compact else 64, "num_warps": 8 if rows >= 128 else 4, "num_stages": 2}
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
        launch: Triton launch options that replace the default ones (BLOCK chunks at a time,
            num_warps, num_stages, maxnreg).

    Raises:
        ValueError: more chunks than 16 bits can number, or a tile that does not fit.
    """
    batch, heads, tokens, dim = query.shape
    kv_heads, known = summaries.shape[1], summaries.shape[2]
    group = heads // kv_heads
    chunks = triton.cdiv(tokens, chunk_size)
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
        mask = torch.empty(batch, kv_heads, tokens, words, dtype=torch.int32, device=device)
        active = torch.empty(batch, kv_heads, tokens, dtype=torch.int32, device=device)
    bias = None
    if bias_mode != "none":
        bias = torch.empty(batch, kv_heads, capacity, tile, dtype=torch.float32, device=device)
    query = query if query.stride(-1) == 1 else query.contiguous()
    fast = alpha == 1.5
    rows = tile * padded_heads
    compact = compact and fast and visibility == "own"
    _route_kernel[(tiles * batch * kv_heads,)](
        query, summaries, entries, counts, tau if save else counts, mask if save else counts,
        active if save else counts, bias if bias is not None else counts,
        left_padding if left_padding is not None else counts,
        sequences if sequences is not None else counts,
        *query.stride()[:3],
        tokens, chunks, known, tiles, capacity, words, kv_heads,
        (alpha - 1.0) * scaling_factor * dim**-0.5, 1.0 / (alpha - 1.0), EPSILON * group, SETTLED, NEAR,
        MAX_PASSES if fast else MAX_PASSES_GENERAL, 1.0 / sigma,
        GROUP=group, HEADS=padded_heads, TILE=tile, CHUNK=chunk_size, HEAD_DIM=dim,
        ALPHA_1_5=fast, COMPLETED=visibility == "completed", FORCE_PREVIOUS=forced == "own_and_previous",
        PADDED=left_padding is not None, PACKED=sequences is not None, SAVE=save,
        BIAS=("none", "centered", "raw").index(bias_mode), COMPACT=compact,
        **{**_launch(rows, compact), **(launch or {})},
    )  # fmt: skip
    return Routes(entries, counts, tile, chunk_size, tau, mask, active, bias)
