"""Device code of DashAttention's decode step: append, scores, route, attend, combine.

Source: DashAttention (arXiv 2605.18753). All kernels take the sequences' lengths from device memory; grids
follow the cache's capacity, so a captured CUDA graph serves every length and nothing recompiles.

Letters: B sequences, T new tokens of a sequence (its last ones), Hq query heads, Hkv KV heads, G = Hq / Hkv,
D head dim, C chunk size, M chunks that the cache can hold, S splits. "Step row" is (sequence, new token), and
"group" (step row, KV head), whose query heads share one list of chunks.

Keys are addressed as page, KV head, token in the page, D; summaries as page, KV head, chunk in the page, D.
A contiguous cache is one page a sequence.
"""

import triton
import triton.language as tl

from dashbench.kernels.route_kernels import LOWEST, first_threshold, within_bracket

EPSILON = tl.constexpr(1e-20)
LOG2_E = tl.constexpr(1.4426950408889634)
DECAY = tl.constexpr(11.541560327111707)  # 8 log2(e)
# τ, in units of x, is settled once it moves by no more; a step inside a fixed support lands on the root.
SETTLED = tl.constexpr(1e-6)
MAX_STEPS = tl.constexpr(80)


@triton.jit
def _after_previous_kernel(PDL: tl.constexpr):
    """Programmatic dependent launch: let the next kernel start, then wait for the previous one's memory."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _page_of(page_table, page_table_stride, sequence, chunk, chunks_per_page, PAGED: tl.constexpr):
    """(page, chunk inside it) of a sequence's chunk."""
    if PAGED:
        page = tl.load(page_table + sequence * page_table_stride + chunk // chunks_per_page).to(tl.int64)
        return page, chunk % chunks_per_page
    else:
        return (chunk * 0).to(tl.int64) + sequence, chunk


@triton.jit
def _append_to_chunk(
    new_key, new_value, key, value, summaries, summary_query, page_table,
    new_key_strides, new_value_strides, key_strides, value_strides, summary_strides, page_table_stride,
    chunks_per_page, chunk, head, sequence, length, new_tokens, first_token, scale,
    C: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Write those new tokens (the ones from `length` on) that fall into one chunk, and summarise it if they
    complete it."""
    position = chunk * C + tl.arange(0, C)
    fresh = (position >= length) & (position < length + new_tokens)
    o_d = tl.arange(0, D)
    page, inside = _page_of(page_table, page_table_stride, sequence, chunk, chunks_per_page, PAGED)
    slot = (inside * C + tl.arange(0, C)).to(tl.int64)
    new = (position - length).to(tl.int64)
    p_new = new_key + sequence * new_key_strides[0] + head * new_key_strides[1]
    b_new = tl.load(p_new + new[:, None] * new_key_strides[2] + o_d[None, :], fresh[:, None], 0.0)  # [C, D]
    p_key = (
        key + page * key_strides[0] + head * key_strides[1] + slot[:, None] * key_strides[2] + o_d[None, :]
    )
    tl.store(p_key, b_new, fresh[:, None])
    p_new = new_value + sequence * new_value_strides[0] + head * new_value_strides[1]
    b_value = tl.load(p_new + new[:, None] * new_value_strides[2] + o_d[None, :], fresh[:, None], 0.0)
    p_value = value + page * value_strides[0] + head * value_strides[1]
    tl.store(p_value + slot[:, None] * value_strides[2] + o_d[None, :], b_value, fresh[:, None])
    if (chunk + 1) * C <= length + new_tokens:
        # Earlier tokens come from the cache and new ones from registers: no read after write.
        b_old = tl.load(p_key, (position < length)[:, None], 0.0)
        b_key = tl.where(fresh[:, None], b_new, b_old).to(tl.float32)
        b_query = tl.load(summary_query + head * D + o_d).to(tl.float32)
        logits = tl.sum(b_key * b_query[None, :], 1) * scale
        if PADDED:
            # A chunk that is all padding keeps equal weights: finite, and never routed to.
            logits = tl.where(
                (position >= first_token) | (first_token >= (chunk + 1) * C), logits, float("-inf")
            )
        weights = tl.exp(logits - tl.max(logits, 0))
        b_summary = tl.sum(b_key * weights[:, None], 0) / tl.sum(weights, 0)
        p_summary = summaries + page * summary_strides[0] + head * summary_strides[1]
        tl.store(p_summary + inside.to(tl.int64) * summary_strides[2] + o_d, b_summary)


@triton.jit
def _write_token(
    new_key, new_value, key, value, page_table, new_key_strides, new_value_strides, key_strides,
    value_strides, page_table_stride, chunks_per_page, position, head, sequence,
    C: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Write one new token of one head to the cache."""
    o_d = tl.arange(0, D)
    page, inside = _page_of(page_table, page_table_stride, sequence, position // C, chunks_per_page, PAGED)
    slot = (inside * C + position % C).to(tl.int64)
    b_key = tl.load(new_key + sequence * new_key_strides[0] + head * new_key_strides[1] + o_d)  # [D]
    b_value = tl.load(new_value + sequence * new_value_strides[0] + head * new_value_strides[1] + o_d)
    tl.store(key + page * key_strides[0] + head * key_strides[1] + slot * key_strides[2] + o_d, b_key)
    p_value = value + page * value_strides[0] + head * value_strides[1]
    tl.store(p_value + slot * value_strides[2] + o_d, b_value)


@triton.jit
def _summarize_chunk(
    key, summaries, summary_query, page_table, key_strides, summary_strides, page_table_stride,
    chunks_per_page, chunk, head, sequence, first_token, scale,
    C: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """k̄ of a complete chunk of one head, 16 rows at a time: few registers."""
    o_d = tl.arange(0, D)
    page, inside = _page_of(page_table, page_table_stride, sequence, chunk, chunks_per_page, PAGED)
    p_key = key + page * key_strides[0] + head * key_strides[1]
    b_query = tl.load(summary_query + head * D + o_d).to(tl.float32)
    peak = tl.sum(b_query, 0) * 0 + float("-inf")
    total = tl.sum(b_query, 0) * 0
    b_summary = tl.zeros([D], tl.float32)
    for first in tl.static_range(0, C, 16):  # unrolled, so that the loads do not wait for one another
        place = (inside * C + first + tl.arange(0, 16)).to(tl.int64)
        b_key = tl.load(p_key + place[:, None] * key_strides[2] + o_d[None, :]).to(tl.float32)  # [16, D]
        logits = tl.sum(b_key * b_query[None, :], 1) * scale
        if PADDED:
            real = chunk * C + first + tl.arange(0, 16) >= first_token
            logits = tl.where(real, logits, float("-inf"))
            b_key = tl.where(real[:, None], b_key, 0.0)
        new_peak = tl.maximum(peak, tl.max(logits, 0))
        finite = tl.where(new_peak == float("-inf"), 0.0, new_peak) if PADDED else new_peak
        rescale = tl.exp(peak - finite)
        weights = tl.exp(logits - finite)
        total = total * rescale + tl.sum(weights, 0)
        b_summary = b_summary * rescale + tl.sum(b_key * weights[:, None], 0)
        peak = new_peak
    p_summary = summaries + page * summary_strides[0] + head * summary_strides[1]
    tl.store(p_summary + inside.to(tl.int64) * summary_strides[2] + o_d, b_summary / tl.maximum(total, 1e-30))


@triton.jit(do_not_specialize=["page_table_stride", "chunks_per_page", "new_tokens"])
def append_kernel(
    new_key, new_value, key, value, summaries, summary_query, lengths, padding, page_table, tickets,
    new_key_strides, new_value_strides, key_strides, value_strides, summary_strides, page_table_stride,
    chunks_per_page, new_tokens, scale,
    C: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the new tokens of one (sequence, KV head) in one chunk; summarise it if that completes it.

    The last program of a sequence adds `new_tokens` to its length.
    """
    part, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    _after_previous_kernel(PDL)
    length = tl.load(lengths + sequence)
    first_token = tl.load(padding + sequence) if PADDED else 0
    chunk = length // C + part
    if chunk * C < length + new_tokens:
        _append_to_chunk(
            new_key, new_value, key, value, summaries, summary_query, page_table,
            new_key_strides, new_value_strides, key_strides, value_strides, summary_strides,
            page_table_stride, chunks_per_page, chunk, head, sequence, length, new_tokens, first_token, scale,
            C, D, PADDED, PAGED,
        )  # fmt: skip
    # Every thread has read the length before this program's ticket says so.
    tl.debug_barrier()
    programs = tl.num_programs(0) * tl.num_programs(1)
    if tl.atomic_add(tickets + sequence, 1) == programs - 1:
        tl.store(tickets + sequence, 0)
        tl.store(lengths + sequence, length + new_tokens)


@triton.jit(do_not_specialize=["page_table_stride", "chunks_per_page", "new_tokens", "capacity"])
def scores_kernel(
    query, summaries, lengths, padding, page_table, scores, weights,
    new_key, new_value, key, value,
    query_strides, summary_strides, new_key_strides, new_value_strides, key_strides, value_strides,
    page_table_stride, chunks_per_page, new_tokens, capacity, scale,
    G: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    COMPLETED: tl.constexpr, APPEND: tl.constexpr, PADDED: tl.constexpr, PAGED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """scores[row, h, c] = γ ⟨q_h, k̄_c⟩ / √D for one tile of visible chunks; clears the tile's weights.

    With `APPEND` the last tile is no tile: its program writes the sequence's one new token to the cache,
    which no score of this step reads.
    """
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _after_previous_kernel(PDL)
    sequence = (row // new_tokens).to(tl.int64)
    token = row % new_tokens
    position = tl.load(lengths + sequence) - new_tokens + token
    visible = (position + 1) // C if COMPLETED else position // C
    if APPEND:  # noqa: SIM102  (compile time, then run time)
        if tile == tl.num_programs(0) - 1:
            visible = 0
            _write_token(
                new_key, new_value, key, value, page_table, new_key_strides, new_value_strides,
                key_strides, value_strides, page_table_stride, chunks_per_page, position, head, sequence,
                C, D, PAGED,
            )  # fmt: skip
    if tile * TILE < visible:
        kv_heads = tl.num_programs(1)
        chunk = tile * TILE + tl.arange(0, TILE)
        inside_sequence = chunk < visible
        o_g, o_d = tl.arange(0, ROWS), tl.arange(0, D)
        p_query = query + sequence * query_strides[0] + token * query_strides[2]
        p_query += (head * G + o_g)[:, None].to(tl.int64) * query_strides[1] + o_d[None, :]
        b_query = tl.load(p_query, (o_g < G)[:, None], 0.0)  # [ROWS, D]
        page, inside = _page_of(
            page_table, page_table_stride, sequence, tl.minimum(chunk, visible - 1), chunks_per_page, PAGED
        )
        p_summary = summaries + head * summary_strides[1] + o_d[:, None]
        p_summary += (page * summary_strides[0] + inside.to(tl.int64) * summary_strides[2])[None, :]
        b_summary = tl.load(p_summary, inside_sequence[None, :], 0.0)  # [D, TILE]
        b_scores = tl.dot(b_query, b_summary, input_precision="ieee") * scale
        if PADDED:
            padded = chunk < tl.load(padding + sequence) // C
            b_scores = tl.where(padded[None, :], float("-inf"), b_scores)
        p_scores = scores + (row.to(tl.int64) * kv_heads * G + head * G + o_g)[:, None] * capacity
        tl.store(p_scores + chunk[None, :], b_scores, (o_g < G)[:, None] & inside_sequence[None, :])
        p_weights = weights + (row.to(tl.int64) * kv_heads + head) * capacity
        tl.store(p_weights + chunk, tl.zeros([TILE], tl.float32), inside_sequence)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_triples(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _power_sums(x, threshold, power, ALPHA_IS_1_5: tl.constexpr):
    """How many entries are above τ, Σ [x − τ]₊^(p−1) and Σ [x − τ]₊^p over them."""
    gap = tl.maximum(x - threshold, 0.0)
    above = (gap > 0).to(tl.float32)
    if ALPHA_IS_1_5:
        return tl.reduce((above, gap, gap * gap), 0, _add_triples)
    else:
        logarithm = tl.log2(tl.where(gap > 0, gap, 1.0))
        lower = tl.where(gap > 0, tl.exp2((power - 1) * logarithm), 0.0)
        return tl.reduce((above, lower, lower * gap), 0, _add_triples)


@triton.jit
def _next_threshold(threshold, low, high, count, lower, upper, power, steps, ALPHA_IS_1_5: tl.constexpr):
    """The next τ inside a bracket: the root of the active entries' quadratic near the solution (α = 1.5), and
    Newton's step on the logarithms of Σ and of −τ elsewhere; see `route`, pass 2, and for the bracket
    `route_kernels.within_bracket`."""
    excess = upper - 1.0
    safe = tl.maximum(upper, 1e-30)
    slope = tl.maximum(power * lower * -threshold / safe, 1e-3)
    following = threshold * tl.exp(-tl.log(safe) / slope)
    if ALPHA_IS_1_5:
        n = tl.maximum(count, 1.0)
        root = lower * lower - n * excess
        quadratic = threshold + (lower - tl.sqrt_rn(tl.maximum(root, 0.0))) / n
        following = tl.where((root >= 0) & (tl.abs(excess) < 0.5), quadratic, following)
    return within_bracket(threshold, following, excess, low, high, steps, SETTLED)


@triton.jit
def _routed_logarithms(weights, chunk, own, FORCE_PREVIOUS: tl.constexpr):
    """Σ ln w of a tile's chunks that were routed and not forced, and how many they are."""
    routed = (weights > EPSILON) & (chunk != own)
    if FORCE_PREVIOUS:
        routed &= chunk != own - 1
    logarithms = tl.where(routed, tl.log(tl.where(routed, weights, 1.0)), 0.0)
    return tl.reduce((logarithms, routed.to(tl.float32)), 0, _add_pairs)


@triton.jit
def _list_chunks(
    weights, start, written, lists, places, biases, page_table, base, sequence, own, mean, inverse_sigma,
    page_table_stride, chunks_per_page,
    TILE: tl.constexpr, BIAS: tl.constexpr, FORCE_PREVIOUS: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """List the active chunks of one tile behind the `written` ones; returns how many there are now."""
    chunk = start + tl.arange(0, TILE)
    forced = chunk == own
    if FORCE_PREVIOUS:
        forced |= chunk == own - 1
    active = (weights > EPSILON) | forced
    rank = base + written + tl.cumsum(active.to(tl.int32), 0) - 1
    tl.store(lists + rank, chunk, active)
    if PAGED:
        # Resolved here, because a third dependent load keeps attend's loads out of the pipeline.
        page, inside = _page_of(
            page_table, page_table_stride, sequence, tl.minimum(chunk, own), chunks_per_page, PAGED
        )
        tl.store(places + rank, (page * chunks_per_page + inside).to(tl.int32), active)
    if BIAS != "none":
        logarithm = tl.log(tl.where(forced, 1.0, tl.maximum(weights, EPSILON)))
        bias = (logarithm - mean) * inverse_sigma if BIAS == "centered" else logarithm
        tl.store(biases + rank, tl.where(forced, 0.0, bias), active)
    return written + tl.sum(active.to(tl.int32), 0)


@triton.jit(do_not_specialize=["page_table_stride", "chunks_per_page", "new_tokens", "capacity"])
def route_kernel(
    scores, weights, lists, places, biases, counts, lengths, padding, page_table, tickets,
    page_table_stride, chunks_per_page, new_tokens, capacity, power, inverse_sigma,
    G: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, ALPHA_IS_1_5: tl.constexpr,
    BIAS: tl.constexpr, FORCE_PREVIOUS: tl.constexpr, COMPLETED: tl.constexpr, PADDED: tl.constexpr,
    PAGED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Entmax of one query head, added to its group's weights; the group's last head lists the chunks.

    α-entmax: p = [x − τ]₊^p with x = (α − 1) z, p = 1 / (α − 1), Σ p = 1 (Peters et al. 2019). Weights are
    added by atomics: their support does not depend on the order, their last bits may.
    """
    query_head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    _after_previous_kernel(PDL)
    kv_heads = tl.num_programs(0) // G
    head = query_head // G
    p_scores = scores + (row * tl.num_programs(0) + query_head) * capacity
    p_weights = weights + (row * kv_heads + head) * capacity
    o_t = tl.arange(0, TILE)
    slope = 1.0 / power  # α − 1
    # Read before the length is known, so that the two loads travel together; what lies behind is dropped.
    x = tl.load(p_scores + o_t, o_t < capacity, 0.0)  # [TILE]
    position = tl.load(lengths + row // new_tokens) - new_tokens + (row % new_tokens).to(tl.int32)
    own = position // C
    visible = (position + 1) // C if COMPLETED else own
    # Chunks of padding have scores of −∞: here only the case that there are no others.
    first_chunk = tl.load(padding + row // new_tokens) // C if PADDED else 0
    if visible > first_chunk:
        x = tl.where(o_t < visible, x * slope, float("-inf"))
        peak = tl.max(x, 0)
        for start in range(TILE, visible, TILE):
            later = tl.load(p_scores + start + o_t, start + o_t < visible, float("-inf")) * slope
            peak = tl.maximum(peak, tl.max(later, 0))
        x -= peak
        threshold = peak * 0 - 1.0
        if ALPHA_IS_1_5:
            decayed = tl.exp2(x * DECAY)
            once, twice = tl.reduce((decayed, decayed * decayed), 0, _add_pairs)
            for start in range(TILE, visible, TILE):
                later = tl.load(p_scores + start + o_t, start + o_t < visible, float("-inf")) * slope - peak
                decayed = tl.exp2(later * DECAY)
                more_once, more_twice = tl.reduce((decayed, decayed * decayed), 0, _add_pairs)
                once += more_once
                twice += more_twice
            threshold = first_threshold(once, twice, 1)
        low, high = peak * 0 + LOWEST, peak * 0
        moving = True
        steps = 0
        while moving:
            count, lower, upper = _power_sums(x, threshold, power, ALPHA_IS_1_5)
            for start in range(TILE, visible, TILE):
                later = tl.load(p_scores + start + o_t, start + o_t < visible, float("-inf")) * slope - peak
                more, more_lower, more_upper = _power_sums(later, threshold, power, ALPHA_IS_1_5)
                count += more
                lower += more_lower
                upper += more_upper
            low = tl.where(upper > 1.0, threshold, low)
            high = tl.where(upper > 1.0, high, threshold)
            following = _next_threshold(threshold, low, high, count, lower, upper, power, steps, ALPHA_IS_1_5)
            steps += 1
            moving = (tl.abs(following - threshold) > SETTLED) & (steps < MAX_STEPS)
            threshold = following
        for start in range(0, visible, TILE):
            z = tl.load(p_scores + start + o_t, start + o_t < visible, float("-inf")) * slope - peak
            gap = tl.maximum(z - threshold, 0.0)
            if ALPHA_IS_1_5:
                probability = gap * gap
            else:
                probability = tl.where(gap > 0, tl.exp2(power * tl.log2(tl.where(gap > 0, gap, 1.0))), 0.0)
            tl.atomic_add(p_weights + start + o_t, probability / G, probability > 0, sem="relaxed")
    # The ticket must follow this program's additions.
    tl.debug_barrier()
    group = row * kv_heads + head
    if tl.atomic_add(tickets + group, 1) == G - 1:
        tl.store(tickets + group, 0)
        # The first tile stays in registers: for most caches it is all there is.
        first = tl.load(p_weights + o_t, o_t < visible, 0.0, cache_modifier=".cg")
        mean = 0.0
        if BIAS == "centered":
            logarithms, routed = _routed_logarithms(first, o_t, own, FORCE_PREVIOUS)
            for start in range(TILE, visible, TILE):
                chunk = start + o_t
                w = tl.load(p_weights + chunk, chunk < visible, 0.0, cache_modifier=".cg")
                more_logarithms, more_routed = _routed_logarithms(w, chunk, own, FORCE_PREVIOUS)
                logarithms += more_logarithms
                routed += more_routed
            mean = logarithms / tl.maximum(routed, 1.0)
        written = _list_chunks(
            first, 0, 0, lists, places, biases, page_table, group * capacity, row // new_tokens, own, mean,
            inverse_sigma, page_table_stride, chunks_per_page, TILE, BIAS, FORCE_PREVIOUS, PAGED,
        )  # fmt: skip
        for start in range(TILE, own + 1, TILE):
            w = tl.load(p_weights + start + o_t, start + o_t < visible, 0.0, cache_modifier=".cg")
            written = _list_chunks(
                w, start, written, lists, places, biases, page_table, group * capacity, row // new_tokens,
                own, mean, inverse_sigma, page_table_stride, chunks_per_page, TILE, BIAS, FORCE_PREVIOUS,
                PAGED,
            )  # fmt: skip
        tl.store(counts + group, written)


@triton.jit
def _attend_blocks(
    query, key, value, lists, places, biases, padding, query_strides, key_strides, value_strides,
    chunks_per_page, capacity, scale_log2, group, count, begin, end, sequence, token, head, position,
    G: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr, PADDED: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """Attention of one group over blocks `begin` to `end` of its `count` listed chunks: (maximum, sum, output
    before division) of each row."""
    CHUNKS: tl.constexpr = BLOCK // C
    o_g, o_d, o_t = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, BLOCK)
    p_query = query + sequence * query_strides[0] + token * query_strides[2]
    p_query += (head * G + o_g)[:, None].to(tl.int64) * query_strides[1] + o_d[None, :]
    b_query = tl.load(p_query, (o_g < G)[:, None], 0.0)  # [ROWS, D]
    p_key, p_value = key + head * key_strides[1], value + head * value_strides[1]
    running_max = tl.full([ROWS], float("-inf"), tl.float32)
    running_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, D], tl.float32)
    front, own_front = 0, 0
    if PADDED:
        # Padding can only be in the first chunk listed and in the own one: how many tokens of each.
        first_token = tl.load(padding + sequence)
        front = first_token - tl.load(lists + group * capacity) * C
        own_front = first_token - position // C * C
    for block in tl.range(begin, end, num_stages=STAGES):
        if CHUNKS == 1:
            entry = block + 0 * o_t
            place = tl.load(places + group * capacity + block)
        else:
            entry = block * CHUNKS + o_t // C
            place = tl.load(places + group * capacity + entry, entry < count, 0)
        page = (place // chunks_per_page).to(tl.int64) if PAGED else sequence
        inside = place % chunks_per_page if PAGED else place
        slot = inside.to(tl.int64) * C + o_t % C
        # The last chunk listed is the query's own; those before it are complete.
        keep = (entry < count - 1) | ((entry == count - 1) & (o_t % C <= position % C))  # [BLOCK]
        if PADDED:
            keep &= ((entry > 0) | (o_t % C >= front)) & ((entry < count - 1) | (o_t % C >= own_front))
        o_key = page * key_strides[0] + slot * key_strides[2]
        o_value = page * value_strides[0] + slot * value_strides[2]
        b_key = tl.load(p_key + o_key[None, :] + o_d[:, None], keep[None, :], 0.0)  # [D, BLOCK]
        logits = tl.dot(b_query, b_key, input_precision="ieee") * scale_log2
        if BIAS != "none":
            logits += (tl.load(biases + group * capacity + entry, entry < count, 0.0) * LOG2_E)[None, :]
        logits = tl.where(keep[None, :], logits, float("-inf"))
        # A block may hold no causal token of a padded entry: -inf - -inf must not reach exp2.
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2(running_max - finite_max)
        probability = tl.exp2(logits - finite_max[:, None])
        running_sum = running_sum * rescale + tl.sum(probability, 1)
        b_value = tl.load(p_value + o_value[:, None] + o_d[None, :], keep[:, None], 0.0)  # [BLOCK, D]
        accumulator = accumulator * rescale[:, None]
        accumulator += tl.dot(probability.to(b_value.dtype), b_value, input_precision="ieee")
        running_max = new_max
    return running_max, running_sum, accumulator


@triton.jit
def _store_partial(
    partial_output, partial_statistics, running_max, running_sum, accumulator, row_index,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write what `_attend_blocks` found of one split to the rows given, one for each of the group's heads."""
    o_g, o_d = tl.arange(0, ROWS), tl.arange(0, D)
    tl.store(partial_output + row_index[:, None] * D + o_d[None, :], accumulator, (o_g < G)[:, None])
    tl.store(partial_statistics + row_index * 2, running_max, o_g < G)
    tl.store(partial_statistics + row_index * 2 + 1, running_sum, o_g < G)


@triton.jit(do_not_specialize=["page_table_stride", "chunks_per_page", "new_tokens", "capacity", "splits"])
def attend_kernel(
    query, key, value, lists, places, biases, counts, lengths, padding, partial_output, partial_statistics,
    summaries, summary_query, page_table,
    query_strides, key_strides, value_strides, summary_strides, page_table_stride, chunks_per_page,
    new_tokens, capacity, splits, scale, scale_log2,
    G: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, BIAS: tl.constexpr, SUMMARIZE: tl.constexpr, PADDED: tl.constexpr,
    PAGED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one group over one split's equal share of the listed chunks, BLOCK tokens at a time.

    With `SUMMARIZE` there is one program more: it summarises the chunk that the sequence's new token
    completes, for the steps to come, while the others attend.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _after_previous_kernel(PDL)
    kv_heads = tl.num_programs(1)
    sequence = (row // new_tokens).to(tl.int64)
    token = row % new_tokens
    position = tl.load(lengths + sequence) - new_tokens + token
    if SUMMARIZE:  # noqa: SIM102  (compile time, then run time)
        if split == splits:
            if position % C == C - 1:
                _summarize_chunk(
                    key, summaries, summary_query, page_table, key_strides, summary_strides,
                    page_table_stride, chunks_per_page, position // C, head, sequence,
                    tl.load(padding + sequence) if PADDED else 0, scale, C, D, PADDED, PAGED,
                )  # fmt: skip
            return
    group = row.to(tl.int64) * kv_heads + head
    count = tl.load(counts + group)
    CHUNKS: tl.constexpr = BLOCK // C
    blocks = (count + CHUNKS - 1) // CHUNKS
    begin, end = blocks * split // splits, blocks * (split + 1) // splits
    running_max, running_sum, accumulator = _attend_blocks(
        query, key, value, lists, places, biases, padding, query_strides, key_strides, value_strides,
        chunks_per_page, capacity, scale_log2, group, count, begin, end, sequence, token, head, position,
        G, ROWS, C, D, BLOCK, STAGES, BIAS, PADDED, PAGED,
    )  # fmt: skip
    row_index = (group * G + tl.arange(0, ROWS)) * splits + split
    _store_partial(
        partial_output, partial_statistics, running_max, running_sum, accumulator, row_index, G, ROWS, D
    )


@triton.jit
def _blocks_of_groups(counts, groups, CHUNKS: tl.constexpr, GROUPS: tl.constexpr):
    """(0 … GROUPS − 1, blocks of CHUNKS listed chunks of each group)."""
    o_groups = tl.arange(0, GROUPS)
    return o_groups, (tl.load(counts + o_groups, o_groups < groups, 0) + CHUNKS - 1) // CHUNKS


@triton.jit
def _first_block(split, share, rest):
    """The first block of a split, where each has `share` and the first `rest` one more."""
    return split * share + tl.minimum(split, rest)


@triton.jit(
    do_not_specialize=[
        "page_table_stride", "chunks_per_page", "new_tokens", "capacity", "kv_heads", "groups", "splits"
    ]
)  # fmt: skip
def attend_balanced_kernel(
    query, key, value, lists, places, biases, counts, lengths, padding, partial_output, partial_statistics,
    spans, summaries, summary_query, page_table,
    query_strides, key_strides, value_strides, summary_strides, page_table_stride, chunks_per_page,
    new_tokens, capacity, kv_heads, groups, splits, scale, scale_log2,
    G: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    GROUPS: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, SUMMARIZE: tl.constexpr,
    PADDED: tl.constexpr, PAGED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention over one split's equal share of all groups' listed chunks laid end to end, BLOCK tokens at a
    time; splits without a block write nothing.

    Split s leaves what it found of group g in slot s + g: both only grow along the blocks, so no two pairs
    that meet share a slot. `spans` gets each group's first and last split, for those that join them; a group
    without a block gets nothing. With `SUMMARIZE` there is one program a group more, as in `attend_kernel`;
    they are the first ones, since they take as long as a whole split and must not be the last to start.
    """
    split = tl.program_id(0)
    _after_previous_kernel(PDL)
    if SUMMARIZE:
        if split < groups:
            sequence = (split // kv_heads // new_tokens).to(tl.int64)
            position = tl.load(lengths + sequence) - new_tokens + split // kv_heads % new_tokens
            if position % C == C - 1:
                _summarize_chunk(
                    key, summaries, summary_query, page_table, key_strides, summary_strides,
                    page_table_stride, chunks_per_page, position // C, split % kv_heads, sequence,
                    tl.load(padding + sequence) if PADDED else 0, scale, C, D, PADDED, PAGED,
                )  # fmt: skip
            return
        split -= groups
    CHUNKS: tl.constexpr = BLOCK // C
    o_groups, blocks = _blocks_of_groups(counts, groups, CHUNKS, GROUPS)
    ends, total = tl.cumsum(blocks, 0), tl.sum(blocks, 0)
    share, rest = total // splits, total % splits
    block, end = _first_block(split, share, rest), _first_block(split + 1, share, rest)
    group = tl.sum((ends <= block).to(tl.int32), 0)
    before = tl.max(tl.where(ends <= block, ends, 0), 0)  # blocks of the groups before this one
    while block < end:
        row, head = group // kv_heads, group % kv_heads
        sequence = (row // new_tokens).to(tl.int64)
        token = row % new_tokens
        position = tl.load(lengths + sequence) - new_tokens + token
        after = tl.min(tl.where(o_groups >= group, ends, 2147483647), 0)
        stop = tl.minimum(end, after)
        running_max, running_sum, accumulator = _attend_blocks(
            query, key, value, lists, places, biases, padding, query_strides, key_strides, value_strides,
            chunks_per_page, capacity, scale_log2, group.to(tl.int64), tl.load(counts + group),
            block - before, stop - before, sequence, token, head, position,
            G, ROWS, C, D, BLOCK, STAGES, BIAS, PADDED, PAGED,
        )  # fmt: skip
        if block == before:
            tl.store(spans + 2 * group, split)
        if stop == after:
            tl.store(spans + 2 * group + 1, split)
        row_index = (split + group).to(tl.int64) * G + tl.arange(0, ROWS)
        _store_partial(
            partial_output, partial_statistics, running_max, running_sum, accumulator, row_index, G, ROWS, D
        )
        block, before = stop, after
        group += 1


@triton.jit(do_not_specialize=["new_tokens", "splits"])
def combine_kernel(
    partial_output, partial_statistics, output, output_strides, new_tokens, splits,
    D: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Join one query head's splits, WIDTH of its D outputs a program; empty splits: max −inf, sum 0."""
    part, query_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    _after_previous_kernel(PDL)
    o_s, o_d = tl.arange(0, SPLITS), part * WIDTH + tl.arange(0, WIDTH)
    row_index = (row * tl.num_programs(1) + query_head) * splits + o_s
    maximum = tl.load(partial_statistics + row_index * 2, o_s < splits, float("-inf"))
    total = tl.load(partial_statistics + row_index * 2 + 1, o_s < splits, 0.0)
    peak = tl.max(maximum, 0)
    factor = tl.exp2(maximum - tl.where(peak == float("-inf"), 0.0, peak))
    b_partial = tl.load(
        partial_output + row_index[:, None] * D + o_d[None, :], (o_s < splits)[:, None], 0.0
    )  # [SPLITS, WIDTH]
    denominator = tl.sum(factor * total, 0)
    result = tl.sum(b_partial * factor[:, None], 0) / tl.where(denominator > 0, denominator, 1.0)
    p_output = output + row // new_tokens * output_strides[0] + query_head.to(tl.int64) * output_strides[1]
    tl.store(p_output + row % new_tokens * output_strides[2] + o_d, result)


@triton.jit(do_not_specialize=["new_tokens"])
def combine_balanced_kernel(
    partial_output, partial_statistics, counts, spans, output, output_strides, new_tokens,
    G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Join what the splits that met a group found, SPLITS at a time, for one query head and WIDTH of its D
    outputs a program. `attend_balanced_kernel` left which ones those are in `spans`."""
    part, query_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _after_previous_kernel(PDL)
    group = row * (tl.num_programs(1) // G) + query_head // G
    first, last = tl.load(spans + 2 * group), tl.load(spans + 2 * group + 1)
    nothing = tl.load(counts + group) == 0
    first, last = tl.where(nothing, 0, first), tl.where(nothing, -1, last)
    o_s, o_d = tl.arange(0, SPLITS), part * WIDTH + tl.arange(0, WIDTH)
    # Every lane of SPLITS joins its own, without a word to the others before the end.
    peaks = tl.full([SPLITS], float("-inf"), tl.float32)
    sums = tl.zeros([SPLITS], tl.float32)
    accumulator = tl.zeros([SPLITS, WIDTH], tl.float32)
    for start in range(first, last + 1, SPLITS):
        inside = start + o_s <= last
        row_index = (start + o_s + group).to(tl.int64) * G + query_head % G
        maximum = tl.load(partial_statistics + row_index * 2, inside, float("-inf"))
        summed = tl.load(partial_statistics + row_index * 2 + 1, inside, 0.0)
        p_partial = partial_output + row_index[:, None] * D + o_d[None, :]
        b_partial = tl.load(p_partial, inside[:, None], 0.0)  # [SPLITS, WIDTH]
        new_peaks = tl.maximum(peaks, maximum)
        finite = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
        rescale, factor = tl.exp2(peaks - finite), tl.exp2(maximum - finite)
        sums = sums * rescale + summed * factor
        accumulator = accumulator * rescale[:, None] + b_partial * factor[:, None]
        peaks = new_peaks
    peak = tl.max(peaks, 0)
    factor = tl.exp2(peaks - tl.where(peak == float("-inf"), 0.0, peak))
    denominator = tl.sum(factor * sums, 0)
    result = tl.sum(accumulator * factor[:, None], 0) / tl.where(denominator > 0, denominator, 1.0)
    p_output = output + (row // new_tokens).to(tl.int64) * output_strides[0]
    p_output += query_head.to(tl.int64) * output_strides[1] + row % new_tokens * output_strides[2]
    tl.store(p_output + o_d, result)
