"""The two routing kernels and what they share; `route` says what they compute.

`route_kernel` reads the summaries again in every pass, in blocks, whatever their number. `route_short_kernel`
is for the tiles of the first RESIDENT chunks: it computes a tile's scores once and keeps them in registers,
so a pass is arithmetic alone. Below 8k tokens at chunks of 64 those are all tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dashbench.kernels.backward_lists import tile_list_start

# A chunk whose weight (mean over heads) is at most this is not routed.
EPSILON = 1e-20
# τ is settled once no row moves by more than this, in units of x. The quadratic step is exact up to the k
# entries that it moves across; they change τ by at most k · SETTLED² / 2, under 3e-6 for two thousand of
# them.
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
# Below the τ of a row that has one chunk, -1, which is inside its bracket then.
LOWEST = tl.constexpr(-1.001)
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
def _packed(flags, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """int32 flags of 0 and 1 `[ROWS, BLOCK]` as the bits of integers `[ROWS, BLOCK / 32]`, which are cheaper
    to exchange between threads."""
    return tl.sum(tl.reshape(flags, [ROWS, BLOCK // 32, 32]) << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
def _bit_count(words):
    """Set bits of int32."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return ((words * 0x01010101) >> 24) & 0x3F


@triton.jit
def _bits_below(count):
    """int32 whose lowest `count` bits are set; none below 1, all from 32 on."""
    return tl.where(count >= 32, -1, (1 << tl.minimum(tl.maximum(count, 0), 31)) - 1)


@triton.jit
def _list_candidates(
    q, base, list_base, level, start, last, previous,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, FORCE_PREVIOUS: tl.constexpr,
):  # fmt: skip
    """Lists the chunks `[start, last)` whose product with any row is above the row's `level`, and the one
    before the own if it is forced; returns how many there are.

    Every chunk passes through here, so a product is compared with one number and nothing else.
    """
    dim = tl.arange(0, HEAD_DIM)
    bit = tl.arange(0, 32)
    word = 32 * tl.arange(0, BLOCK // 32)
    found = 0
    for first in range(start, last, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        place = base + chunk.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        summary = tl.load(place, mask=(chunk < last)[:, None], other=0.0)
        above = (tl.dot(q, tl.trans(summary)) > level[:, None]).to(tl.int32)
        words = tl.reduce(_packed(above, ROWS, BLOCK), 0, _either)  # [BLOCK / 32]
        words = words & _bits_below(last - first - word)
        if FORCE_PREVIOUS:
            at = previous - first - word
            words = words | tl.where((at >= 0) & (at < 32), 1 << (at & 31), 0)
        ones = _bit_count(words)
        slot = found + tl.cumsum(ones, 0) - ones
        rank = _bit_count(words[:, None] & ((1 << bit) - 1)[None, :])
        listed = ((words[:, None] >> bit[None, :]) & 1) != 0
        tl.store(list_base + slot[:, None] + rank, first + word[:, None] + bit[None, :], mask=listed)
        found += tl.sum(ones, 0)
    return found


@triton.jit
def _moments(x, peak, sum_1, sum_2):
    """(row maximum, sums of exp(8 (x - m)) and exp(16 (x - m))) with a block of x more."""
    DECAY: tl.constexpr = 11.541560327111707  # 8 log2(e)
    new_peak = tl.maximum(peak, tl.max(x, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    rescale = tl.where(peak == float("-inf"), 0.0, tl.exp2(DECAY * (peak - shift)))
    decayed = tl.exp2(DECAY * (x - shift[:, None]))
    sum_1 = sum_1 * rescale + tl.sum(decayed, 1)
    sum_2 = sum_2 * rescale * rescale + tl.sum(decayed * decayed, 1)
    return new_peak, sum_1, sum_2


@triton.jit
def first_threshold(decayed, decayed_twice, stride):
    """τ below the maximum from Σ exp(8 (x − max)) and Σ exp(16 (x − max)) of every `stride`-th block; see
    `route`, pass 1. The sums are positive."""
    order = tl.minimum(tl.maximum(tl.log2(decayed / decayed_twice), 1e-3), 6.0)
    log_a = tl.log(decayed * stride) + order * 2.0794415416798357  # ln 8
    z = order + 3.0
    log_gamma = (z - 0.5) * tl.log(z) - z + 0.9189385332046727 + 1.0 / (12.0 * z)  # Stirling
    threshold = -tl.exp((log_gamma - 0.6931471805599453 - log_a) / (order + 2.0))
    return tl.minimum(tl.maximum(threshold, -1.0), -1e-4)


@triton.jit
def within_bracket(tau, new, excess, low, high, passes, slack):
    """The step from τ, an end of its bracket, to `new`, or half of the bracket.

    A settled row's step may point an ulp out of the bracket on a GPU, whose square root is not exact: it
    stays. A step that reaches the other end, where it has been, halves the bracket, as every eighth does that
    still moves: steps may go from end to end for ever.
    """
    inward = tl.where(excess > 0, new - tau, tau - new)
    late = (passes % 8 == 7) & (tl.abs(inward) > slack)
    halve = (inward < -slack) | (inward >= high - low) | late
    return tl.where(halve, 0.5 * (low + high), tl.where(inward < 0, tau, new))


@triton.jit
def next_threshold(tau, low, high, count, s1, s2, power, near, slack, passes, ALPHA_1_5: tl.constexpr):
    """(next τ, and the bracket that it lies in) from Σ 1, Σ gap^(power − 1) and Σ gap^power over the chunks
    above `tau`; see `route`, pass 2."""
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
    return within_bracket(tau, new, excess, low, high, passes, slack), low, high


@triton.jit
def _chosen(total, chunk, own, previous, query_position, end_token, epsilon, FORCE_PREVIOUS: tl.constexpr):
    """(chunks that a query attends, int32; those of them that its heads chose), `[T, BLOCK]`."""
    chosen = (total > epsilon) & (chunk < own)[None, :]
    routed = chosen
    if FORCE_PREVIOUS:
        chosen = chosen | (chunk == previous)[None, :]
        routed = routed & (chunk != previous)[None, :]
    return (chosen & (query_position < end_token)[:, None]).to(tl.int32), routed


@triton.jit
def _chosen_by_bits(
    weight, chunk, previous, query_position, end_token, epsilon,
    TILE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr, FORCE_PREVIOUS: tl.constexpr,
):  # fmt: skip
    """The first of `_chosen` from weights `[T · HEADS, BLOCK]`, zero where a row may not see the chunk.

    A chunk is chosen if any head gives it more than `epsilon`. 32 chunks of a row are one integer.
    """
    bit = tl.arange(0, 32)
    words = _packed((weight > epsilon).to(tl.int32), TILE * HEADS, BLOCK)
    words = tl.reduce(tl.reshape(words, [TILE, HEADS, BLOCK // 32]), 1, _either)
    chosen = tl.reshape((words[:, :, None] >> bit[None, None, :]) & 1, [TILE, BLOCK])
    if FORCE_PREVIOUS:
        chosen = chosen | (chunk == previous)[None, :].to(tl.int32)
    return tl.where((query_position < end_token)[:, None], chosen, 0)


@triton.jit
def _tile(
    tile, query, summaries, padding, sequences, query_stride_b, query_stride_h, query_stride_n, tokens, known,
    heads, kv_heads,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """(number of the KV head among all sequences', head and position of each row, which rows are real,
    queries `[ROWS, D]`, the KV head's summaries, own chunk, the one before, first chunk and end of the
    sequence); a program's KV head is the remainder of its number."""
    ROWS: tl.constexpr = TILE * HEADS
    index = tl.program_id(0) % heads
    batch, kv_head = (index // kv_heads).to(tl.int64), (index % kv_heads).to(tl.int64)
    row = tl.arange(0, ROWS)
    head, position = row % HEADS, tile * TILE + row // HEADS
    real = (head < GROUP) & (position < tokens)
    dim = tl.arange(0, HEAD_DIM)
    offset = (
        batch * query_stride_b
        + (kv_head * GROUP + head) * query_stride_h
        + position.to(tl.int64) * query_stride_n
    )
    q = tl.load(query + offset[:, None] + dim[None, :], mask=real[:, None], other=0.0)
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
    return index, head, position, real, q, base, own, previous, first_chunk, end_token


@triton.jit
def _store_routing(
    level, active, index, head, position, query_position, tau_out, active_out, tokens, GROUP: tl.constexpr
):
    """Thresholds of the rows and attended chunks of the queries, the own one included."""
    tau_offset = (index.to(tl.int64) * GROUP + head) * tokens + position
    tl.store(tau_out + tau_offset, level, mask=(head < GROUP) & (position < tokens))
    tl.store(
        active_out + index.to(tl.int64) * tokens + query_position, active + 1, mask=query_position < tokens
    )


@triton.jit(do_not_specialize=["tokens", "known", "tiles", "capacity", "words", "heads", "kv_heads"])
def route_kernel(
    query, summaries, entries, counts, tau_out, mask_out, active_out, bias_out, padding, sequences,
    query_stride_b, query_stride_h, query_stride_n,
    tokens, known, tiles, capacity, words, heads, kv_heads, scale, power, epsilon, settled, near, max_passes,
    inverse_sigma,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr, ALPHA_1_5: tl.constexpr, COMPLETED: tl.constexpr, FORCE_PREVIOUS: tl.constexpr,
    PADDED: tl.constexpr, PACKED: tl.constexpr, SAVE: tl.constexpr, COMPACT: tl.constexpr,
    LISTING: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One program a tile and KV head; late tiles, which have most to do, first."""
    ROWS: tl.constexpr = TILE * HEADS
    BOUNDED: tl.constexpr = PADDED or PACKED
    tile = tiles - 1 - tl.program_id(0) // heads
    index, head, position, real, q, base, own, previous, first_chunk, end_token = _tile(
        tile, query, summaries, padding, sequences, query_stride_b, query_stride_h, query_stride_n, tokens,
        known, heads, kv_heads, GROUP, HEADS, TILE, CHUNK, HEAD_DIM, PADDED, PACKED,
    )  # fmt: skip
    dim = tl.arange(0, HEAD_DIM)
    column = tl.arange(0, BLOCK)
    # Chunks [first_chunk, row_limit) are visible to a row.
    row_limit = tl.full([ROWS], own, tl.int32)
    last = own
    if COMPLETED:
        row_limit = (position + 1) // CHUNK
        last = ((tile + 1) * TILE) // CHUNK
    row_limit = tl.where(real, tl.minimum(row_limit, known), 0)
    last = tl.minimum(last, known)
    start = first_chunk
    if BOUNDED and FORCE_PREVIOUS:
        # Forced even where it is padding alone, as by the specification; nobody attends its keys.
        start = tl.where(previous >= 0, tl.minimum(start, previous), start)
    start = (start // BLOCK) * BLOCK

    list_base = entries + index.to(tl.int64) * capacity + tile_list_start(tile, CHUNK // TILE)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    sum_1 = tl.zeros([ROWS], tl.float32)
    sum_2 = tl.zeros([ROWS], tl.float32)
    stride = 1
    if COMPACT:
        blocks = tl.cdiv(last - start, BLOCK)
        stride = tl.where(blocks >= 16, 4, tl.where(blocks >= 4, 2, 1))
    skipped = ((last - start + BLOCK - 1) // BLOCK + stride - 1) % stride  # the last block is always read
    for first in range(start + skipped * BLOCK, last, BLOCK * stride):
        chunk = first + column
        x = _scores(q, base, chunk, last, first_chunk, row_limit, dim, scale, HEAD_DIM, BOUNDED)
        peak, sum_1, sum_2 = _moments(x, peak, sum_1, sum_2)
    empty = peak == float("-inf")
    # From here on everything is relative to the row's maximum, where fp32 is finest: τ is in [−1, 0).
    peak = tl.where(empty, 0.0, peak)
    tau = tl.full([ROWS], -1.0, tl.float32)
    if ALPHA_1_5:
        tau = first_threshold(tl.where(empty, 1.0, sum_1), tl.where(empty, 1.0, sum_2), stride)
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
            begin = tl.where(complete != 0, last, start)
            # A hair lower than `sure`, because products are compared before they are scaled.
            level = (sure - 3e-7 * tl.abs(tl.where(empty, 0.0, sure))) / scale
            found = _list_candidates(
                q, base, list_base, level, begin, last, previous, ROWS, LISTING, HEAD_DIM, FORCE_PREVIOUS,
            )  # fmt: skip
            candidates = tl.where(complete != 0, candidates, found)
            begin, end = tl.where(complete != 0, candidates, 0), candidates
            # Other threads read the list than wrote it.
            tl.debug_barrier()
            for first in range(begin, end, BLOCK):
                chunk = _chunks(list_base, first, column, end, True)
                x = _scores(q, base, chunk, last, first_chunk, row_limit, dim, scale, HEAD_DIM, BOUNDED)
                peak = tl.where(empty, peak, tl.maximum(peak, tl.max(x, 1)))
                gap = tl.maximum(x - sure[:, None], 0.0)
                count += tl.sum((gap > 0).to(tl.int32), 1).to(tl.float32)
                s1 += tl.sum(gap, 1)
                s2 += tl.sum(gap * gap, 1)
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
    low = tl.full([ROWS], LOWEST, tl.float32)
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
        new, low, high = next_threshold(
            tau, low, high, count, s1, s2, power, near, settled, passes, ALPHA_1_5
        )
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
    if not COMPACT:
        end = own
    for first in range(begin, end, BLOCK):
        # The list overwrites the candidates: no further than they have been read.
        chunk = _chunks(list_base, first, column, end, COMPACT)
        x = _scores(q, base, chunk, last, first_chunk, row_limit, dim, scale, HEAD_DIM, BOUNDED)
        gap = tl.where(empty[:, None], 0.0, tl.maximum((x - peak[:, None]) - tau[:, None], 0.0))
        if ALPHA_1_5:
            weight = gap * gap
        else:
            weight = tl.where(gap > 0, tl.exp2(power * tl.log2(tl.maximum(gap, 1e-30))), 0.0)
        if COMPACT and BIAS == 0:
            chosen = _chosen_by_bits(
                weight, chunk, previous, query_position, end_token, epsilon, TILE, HEADS, BLOCK,
                FORCE_PREVIOUS,
            )  # fmt: skip
        else:
            total = tl.sum(tl.reshape(weight, [TILE, HEADS, BLOCK]), 1)  # [T, BLOCK], G times w
            chosen, routed = _chosen(
                total, chunk, own, previous, query_position, end_token, epsilon, FORCE_PREVIOUS
            )
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
            # Candidates lie anywhere, so a word's bits may come from several blocks. The mask was zeroed.
            bits = chosen << (chunk & 31)[None, :]
            tl.atomic_or(
                mask_row[:, None] + (chunk >> 5)[None, :], bits, mask=chosen != 0, sem="relaxed", scope="cta"
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
        _store_routing(
            level, active, index, head, position, query_position, tau_out, active_out, tokens, GROUP
        )


@triton.jit
def _route_resident(
    tile, index, head, position, real, q, base, own, previous, first_chunk, end_token,
    entries, counts, tau_out, mask_out, active_out, bias_out,
    tokens, known, tiles, capacity, words, scale, epsilon, settled, near, max_passes, inverse_sigma,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr,
    RESIDENT: tl.constexpr, FORCE_PREVIOUS: tl.constexpr, BOUNDED: tl.constexpr, SAVE: tl.constexpr,
    BIAS: tl.constexpr,
):  # fmt: skip
    """Routes a tile with at most RESIDENT chunks before its own."""
    ROWS: tl.constexpr = TILE * HEADS
    chunk = tl.arange(0, RESIDENT)
    row_limit = tl.where(real, tl.minimum(own, known), 0)
    x = _scores(
        q, base, chunk, tl.minimum(own, known), first_chunk, row_limit, tl.arange(0, HEAD_DIM), scale,
        HEAD_DIM, BOUNDED,
    )  # fmt: skip
    nothing = tl.zeros([ROWS], tl.float32)
    peak, sum_1, sum_2 = _moments(x, tl.full([ROWS], float("-inf"), tl.float32), nothing, nothing)
    empty = peak == float("-inf")
    peak = tl.where(empty, 0.0, peak)
    x -= peak[:, None]
    tau = first_threshold(tl.where(empty, 1.0, sum_1), tl.where(empty, 1.0, sum_2), 1)
    low = tl.full([ROWS], LOWEST, tl.float32)
    high = nothing
    moving = 1
    passes = 0
    while (moving > 0) & (passes < max_passes):
        gap = tl.maximum(x - tau[:, None], 0.0)
        count, s1, s2 = tl.sum(tl.where(gap > 0, 1.0, 0.0), 1), tl.sum(gap, 1), tl.sum(gap * gap, 1)
        new, low, high = next_threshold(tau, low, high, count, s1, s2, 2.0, near, settled, passes, True)
        new = tl.where(empty, tau, new)
        moving = tl.max((tl.abs(new - tau) > settled).to(tl.int32), 0)
        tau = new
        passes += 1

    query_in_tile = tl.arange(0, TILE)
    query_position = tile * TILE + query_in_tile
    gap = tl.where(empty[:, None], 0.0, tl.maximum(x - tau[:, None], 0.0))
    total = tl.sum(tl.reshape(gap * gap, [TILE, HEADS, RESIDENT]), 1)  # [T, RESIDENT], G times w
    chosen, routed = _chosen(total, chunk, own, previous, query_position, end_token, epsilon, FORCE_PREVIOUS)
    query_bits = tl.sum(chosen << query_in_tile[:, None], 0)
    listed = (query_bits != 0).to(tl.int32)
    slot = tl.cumsum(listed, 0) - listed
    list_start = index.to(tl.int64) * capacity + tile_list_start(tile, CHUNK // TILE)
    tl.store(entries + list_start + slot, chunk | (query_bits << 16), mask=listed != 0)
    tl.store(counts + index.to(tl.int64) * tiles + tile, tl.sum(listed, 0))
    if BIAS != 0:
        b = tl.where(routed, tl.log(tl.where(routed, total, GROUP) / GROUP), 0.0)
        if BIAS == 1:
            mean = tl.sum(b, 1) / tl.maximum(tl.sum(routed.to(tl.float32), 1), 1.0)
            b = (b - mean[:, None]) * inverse_sigma
            if FORCE_PREVIOUS:
                b = tl.where((chunk == previous)[None, :], 0.0, b)
        at = (list_start + slot)[None, :] * TILE + query_in_tile[:, None]
        tl.store(bias_out + at, b, mask=(listed != 0)[None, :])
    if SAVE:
        packed = _packed(chosen, TILE, RESIDENT)
        inside = (query_position < tokens)[:, None]
        mask_row = mask_out + (index.to(tl.int64) * tokens + query_position.to(tl.int64)) * words
        word = tl.arange(0, RESIDENT // 32)
        tl.store(mask_row[:, None] + word[None, :], packed, mask=inside & (word < words)[None, :])
        level = tl.where(empty, float("inf"), peak + tau)
        _store_routing(
            level,
            tl.sum(chosen, 1),
            index,
            head,
            position,
            query_position,
            tau_out,
            active_out,
            tokens,
            GROUP,
        )


@triton.jit(
    do_not_specialize=["tokens", "known", "tiles", "short_tiles", "capacity", "words", "heads", "kv_heads"]
)
def route_short_kernel(
    query, summaries, entries, counts, tau_out, mask_out, active_out, bias_out, padding, sequences,
    query_stride_b, query_stride_h, query_stride_n,
    tokens, known, tiles, short_tiles, capacity, words, heads, kv_heads, scale, epsilon, settled, near,
    max_passes, inverse_sigma,
    GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr,
    RESIDENT: tl.constexpr, FORCE_PREVIOUS: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr,
    SAVE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """One program a tile and KV head; late tiles first. α = 1.5; a tile sees the chunks before its own.

    A pass costs what the width costs, so tiles of few chunks have narrower ones. A kernel of each width would
    save another 2 to 4 µs and be compiled at three lengths.
    """
    BOUNDED: tl.constexpr = PADDED or PACKED
    tile = short_tiles - 1 - tl.program_id(0) // heads
    index, head, position, real, q, base, own, previous, first_chunk, end_token = _tile(
        tile, query, summaries, padding, sequences, query_stride_b, query_stride_h, query_stride_n, tokens,
        known, heads, kv_heads, GROUP, HEADS, TILE, CHUNK, HEAD_DIM, PADDED, PACKED,
    )  # fmt: skip
    for halvings in tl.static_range(3):
        narrower_would_do = (halvings < 2) & (own <= (RESIDENT >> halvings) // 2)
        if (own <= (RESIDENT >> halvings)) & (narrower_would_do == 0):
            _route_resident(
                tile, index, head, position, real, q, base, own, previous, first_chunk, end_token,
                entries, counts, tau_out, mask_out, active_out, bias_out,
                tokens, known, tiles, capacity, words, scale, epsilon, settled, near, max_passes,
                inverse_sigma,
                GROUP, HEADS, TILE, CHUNK, HEAD_DIM, RESIDENT >> halvings, FORCE_PREVIOUS, BOUNDED, SAVE,
                BIAS,
            )  # fmt: skip
