"""Query-outer half of the backward: gradient of q, of the chunk bias, and through the entmax routing.

One pass over the lists of each tile (T consecutive queries x the G heads of one KV head) does everything
that is a reduction over keys. With P = exp(s - lse), D = <dO, o> and dS = P (dO v - D) it accumulates dq =
scale * sum dS k, and e_c = sum over the group's heads and the chunk's tokens of dS: the gradient of the
chunk's bias. The gradient of log w_c is then g_c = (e_c - mean_R e) / sigma (`centered`; without the mean
if it was detached), e_c (`raw`). The head mean w_c = (1/G) sum_h p_hc passes dp_hc = g_c / (G w_c) to every
head, and the entmax Jacobian diag(s) - s s^T / sum(s), s = p^(2 - alpha) (Peters et al. 2019), gives dz_hc
= s_hc (dp_hc - kappa_h) with kappa_h = sum_c s dp / sum_c s. Since kappa needs e of the whole row, e waits
in a scratch row per *running program* (a few MB, in L2) and not in memory per list entry; a second, 64
times cheaper walk over the list then recomputes the routing scores from tau.
"""

import triton
import triton.language as tl

from dashbench.kernels.backward_lists import tile_list_start

BIAS_MODES = {"none": 0, "raw": 1, "centered": 2}
STATISTICS = 6  # rows of the tile-ordered statistics: lse (base 2), D, tau, kappa, mean of log w, mean of e
_LOG2E = tl.constexpr(1.4426950408889634)
# Relative error of a routing score in fp32. An excess over tau below it is noise, and the gradient
# through log w grows like 1 / excess: such a chunk passes no gradient on.
RESOLUTION = tl.constexpr(2.0**-18)


@triton.jit
def entmax_terms(excess, ALPHA_1_5: tl.constexpr, power_p, power_s):
    """Probability p and s = p^(2 - alpha) from the excess over the threshold, max(x - tau, 0), x = (alpha -
    1) z.

    p = excess^(1 / (alpha - 1)) and s = excess^((2 - alpha) / (alpha - 1)); the powers are runtime values
    so that annealing alpha does not recompile.
    """
    if ALPHA_1_5:
        p = excess * excess
        s = excess
    else:
        inside = excess > 0
        logarithm = tl.log2(tl.where(inside, excess, 1.0))
        p = tl.where(inside, tl.exp2(logarithm * power_p), 0.0)
        s = tl.where(inside, tl.exp2(logarithm * power_s), 0.0)
    return p, s


@triton.jit
def trusted_weight(tau, power_p, GROUP: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr):
    """The head mean w from which on some head's excess is above the rounding of its score, `[TILE]`."""
    size = tl.abs(tau)
    noise = RESOLUTION * (1.0 + tl.where(size < float("inf"), size, 0.0))
    worst = tl.max(tl.reshape(noise, [TILE, HEADS]), 1)
    return tl.exp2(power_p * tl.log2(worst)) / GROUP


@triton.jit
def _over_heads(rows, TILE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum `[TILE * HEADS, BLOCK]` over the heads of each query: `[TILE, BLOCK]`."""
    return tl.sum(tl.reshape(rows, [TILE, HEADS, BLOCK]), 1)


@triton.jit
def _attend_chunk(
    accumulator, q_rows, grad_rows, keys, values, seen, bias, lse, delta, scale_log2,
):  # fmt: skip
    """Add one chunk's dS k to the accumulator; also returns dS summed over the chunk's tokens, per row."""
    scores = tl.dot(q_rows, tl.trans(keys)) * scale_log2
    weights = tl.exp2(scores + (bias - lse)[:, None])
    weights = tl.where(seen, weights, 0.0)
    grad_scores = weights * (tl.dot(grad_rows, tl.trans(values)) - delta[:, None])
    accumulator = tl.dot(grad_scores.to(keys.dtype), keys, accumulator)
    return accumulator, tl.sum(grad_scores, 1)


@triton.jit
def _routing_block(
    q_rows, tau, tile_entries, block, count, extra_entry, summary, summary_stride, route_scale, power_p,
    power_s, query,
    ALPHA_1_5: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Routing of BLOCK list entries, recomputed from tau: chunk numbers, summaries, p and s `[rows,
    BLOCK]`."""
    slot = block + tl.arange(0, BLOCK)
    entry = tl.load(tile_entries + slot, mask=slot < count, other=0)
    entry = tl.where(slot == count, extra_entry, entry)
    chunk = entry & 0xFFFF
    dim = tl.arange(0, HEAD_DIM)
    k_bar = tl.load(summary + chunk[:, None].to(tl.int64) * summary_stride + dim[None, :])
    member = (((entry >> 16)[None, :] >> query[:, None]) & 1) != 0
    excess = tl.dot(q_rows, tl.trans(k_bar)) * route_scale - tau[:, None]
    p, s = entmax_terms(tl.where(member, tl.maximum(excess, 0.0), 0.0), ALPHA_1_5, power_p, power_s)
    return chunk, k_bar, p, s


@triton.jit
def _grad_probability(
    p, scratch, block, count, biased, mean, floor,
    GROUP: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of each head's p through log w of the head mean w, from the bias gradient in the scratch:
    `[rows, BLOCK]`."""
    slot = block + tl.arange(0, BLOCK)
    query = tl.arange(0, TILE)
    grad_bias = tl.load(
        scratch + slot[None, :] * TILE + query[:, None],
        mask=(slot < count)[None, :] & (query < TILE)[:, None],
        other=0.0,
    )
    w = _over_heads(p, TILE, HEADS, BLOCK) / GROUP
    routed = (w > floor[:, None]) & biased[None, :]
    dp = tl.where(routed, (grad_bias - mean[:, None]) / (GROUP * tl.where(routed, w, 1.0)), 0.0)
    return tl.reshape(tl.broadcast_to(dp[:, None, :], [TILE, HEADS, BLOCK]), [TILE * HEADS, BLOCK])


@triton.jit(do_not_specialize=["tokens", "chunks", "tiles", "capacity", "total", "batch_heads", "forced"])
def _query_kernel(
    q, k, v, out, grad_out, lse, tau, summary, entries, counts, padding, counter, scratch,
    grad_q, grad_summary, statistics, grad_q_strides, summary_strides,
    tokens, chunks, tiles, capacity, total, batch_heads, kv_heads, forced,
    scale, route_scale, logit_scale, inverse_sigma, epsilon, power_p, power_s,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, APPLY_BIAS: tl.constexpr, DETACH_MEAN: tl.constexpr,
    ALPHA_1_5: tl.constexpr, PADDED: tl.constexpr, COMPLETED: tl.constexpr, ATOMIC_SUMMARY: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TILE * HEADS
    TILES_PER_CHUNK: tl.constexpr = CHUNK // TILE
    # bf16 products also for fp16 inputs: the routing's gradient is of order 1 / sigma and would underflow.
    ROUTE_DTYPE: tl.constexpr = tl.float32 if grad_q.dtype.element_ty == tl.float32 else tl.bfloat16
    row = tl.arange(0, ROWS)
    query = row // HEADS
    head = row % HEADS
    dim = tl.arange(0, HEAD_DIM)
    token = tl.arange(0, CHUNK)
    query_in_tile = tl.arange(0, TILE)
    program_scratch = scratch + tl.program_id(0).to(tl.int64) * chunks * TILE * 2
    bias_scratch = program_scratch + chunks.to(tl.int64) * TILE

    # The last tiles have the longest lists: they are handed out first, to whichever program is free.
    work = tl.atomic_add(counter, 1)
    while work < total:
        tile = tiles - 1 - work // batch_heads
        batch_head = (work % batch_heads).to(tl.int64)
        batch, kv_head = batch_head // kv_heads, batch_head % kv_heads
        own = tile // TILES_PER_CHUNK
        position = (tile * TILE + query).to(tl.int64)
        first_valid = tl.load(padding + batch) if PADDED else 0
        inside = (position >= first_valid) & (position < tokens) & (head < GROUP)
        row_head = kv_head * GROUP + head

        first_row = (tile * TILE).to(tl.int32)
        first_head = (kv_head * GROUP).to(tl.int32)
        batch_index, kv_index = batch.to(tl.int32), kv_head.to(tl.int32)
        q_rows = tl.reshape(q.load([batch_index, first_row, first_head, 0]), [ROWS, HEAD_DIM])
        grad_rows = tl.reshape(grad_out.load([batch_index, first_row, first_head, 0]), [ROWS, HEAD_DIM])
        out_rows = tl.reshape(out.load([batch_index, first_row, first_head, 0]), [ROWS, HEAD_DIM])
        delta = tl.sum(grad_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
        offset = (batch * kv_heads * GROUP + row_head) * tokens + position
        # A row outside the sequence gets lse = inf, hence weights of exactly zero everywhere.
        lse_rows = tl.load(lse + offset, mask=inside, other=float("inf")) * _LOG2E
        base = statistics + (batch_head * tiles + tile) * (ROWS * 6)
        tl.store(base + row, lse_rows)
        tl.store(base + ROWS + row, delta)

        count = tl.load(counts + batch_head * tiles + tile)
        tile_entries = entries + batch_head * capacity + tile_list_start(tile, TILES_PER_CHUNK)
        summary_base = summary + batch * summary_strides[0] + kv_head * summary_strides[1]
        if BIAS != 0:
            tau_rows = tl.load(tau + offset, mask=inside, other=float("inf"))
            tl.store(base + 2 * ROWS + row, tau_rows)
            # With COMPLETED, the last query of a chunk routes over its own chunk, too. The own chunk has no
            # bias, but it takes part in entmax: it joins the list of the routing walks as their last entry.
            extra_entry, routed_entries = 0, count
            if COMPLETED:  # noqa: SIM102  (compile time, then run time)
                if ((tile + 1) % TILES_PER_CHUNK == 0) & ((tile + 1) * TILE <= tokens):
                    extra_entry = own | ((own * 0 + (1 << (TILE - 1))) << 16)
                    routed_entries = count + 1
        if APPLY_BIAS:
            log_sum = tl.zeros([TILE], tl.float32)
            members = tl.zeros([TILE], tl.float32)
            for block in range(0, routed_entries, BLOCK):
                chunk, k_bar, p, s = _routing_block(
                    q_rows, tau_rows, tile_entries, block, count, extra_entry, summary_base,
                    summary_strides[2],
                    logit_scale,
                    power_p, power_s, query, ALPHA_1_5, HEAD_DIM, BLOCK,
                )  # fmt: skip
                w = _over_heads(p, TILE, HEADS, BLOCK) / GROUP
                routed = (w > epsilon) & (chunk < own - forced)[None, :]
                log_w = tl.where(routed, tl.log(tl.where(routed, w, 1.0)), 0.0)
                log_sum += tl.sum(log_w, 1)
                members += tl.sum(routed.to(tl.float32), 1)
                slot = block + tl.arange(0, BLOCK)
                tl.store(
                    bias_scratch + slot[None, :] * TILE + query_in_tile[:, None], log_w,
                    mask=(slot < count)[None, :] & (query_in_tile < TILE)[:, None],
                )  # fmt: skip
            log_mean = log_sum / tl.maximum(members, 1.0)
            log_mean_rows = tl.reshape(tl.broadcast_to(log_mean[:, None], [TILE, HEADS]), [ROWS])
            tl.store(base + 4 * ROWS + row, log_mean_rows)
            tl.debug_barrier()

        accumulator = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        no_bias = tl.zeros([ROWS], tl.float32)
        key_position = own * CHUNK + token
        keys = tl.reshape(k.load([batch_index, kv_index, own * CHUNK, 0]), [CHUNK, HEAD_DIM])
        values = tl.reshape(v.load([batch_index, kv_index, own * CHUNK, 0]), [CHUNK, HEAD_DIM])
        causal = (key_position[None, :] <= position[:, None]) & (key_position >= first_valid)[None, :]
        accumulator, per_row = _attend_chunk(
            accumulator, q_rows, grad_rows, keys, values, causal, no_bias, lse_rows, delta, scale * _LOG2E
        )

        grad_bias_sum = tl.zeros([TILE], tl.float32)
        routed_count = tl.zeros([TILE], tl.float32)
        for index in range(count):
            entry = tl.load(tile_entries + index)
            chunk = entry & 0xFFFF
            keys = tl.reshape(k.load([batch_index, kv_index, chunk * CHUNK, 0]), [CHUNK, HEAD_DIM])
            values = tl.reshape(v.load([batch_index, kv_index, chunk * CHUNK, 0]), [CHUNK, HEAD_DIM])
            seen = ((((entry >> 16) >> query) & 1) != 0)[:, None]
            if PADDED:
                seen = seen & (chunk * CHUNK + token >= first_valid)[None, :]
            bias = no_bias
            if APPLY_BIAS:
                routed = chunk < own - forced
                log_w = tl.load(bias_scratch + index * TILE + query)
                if BIAS == 2:
                    log_w = (log_w - log_mean_rows) * inverse_sigma
                bias = tl.where(routed, log_w * _LOG2E, 0.0)
            accumulator, per_row = _attend_chunk(
                accumulator, q_rows, grad_rows, keys, values, seen, bias, lse_rows, delta, scale * _LOG2E
            )
            if BIAS != 0:
                grad_bias = tl.sum(tl.reshape(per_row, [TILE, HEADS]), 1)
                tl.store(program_scratch + index * TILE + query_in_tile, grad_bias)
                routed = ((((entry >> 16) >> query_in_tile) & 1) != 0) & (chunk < own - forced)
                grad_bias_sum += tl.where(routed, grad_bias, 0.0)
                routed_count += routed.to(tl.float32)
        accumulator *= scale

        if BIAS != 0:
            tl.debug_barrier()
            mean = tl.zeros([TILE], tl.float32)
            if (BIAS == 2) and (not DETACH_MEAN):
                mean = grad_bias_sum / tl.maximum(routed_count, 1.0)
            tl.store(base + 5 * ROWS + row, tl.reshape(tl.broadcast_to(mean[:, None], [TILE, HEADS]), [ROWS]))
            floor = tl.maximum(trusted_weight(tau_rows, power_p, GROUP, TILE, HEADS), epsilon)
            s_sum = tl.zeros([ROWS], tl.float32)
            s_dp_sum = tl.zeros([ROWS], tl.float32)
            for block in range(0, routed_entries, BLOCK):
                chunk, k_bar, p, s = _routing_block(
                    q_rows, tau_rows, tile_entries, block, count, extra_entry, summary_base,
                    summary_strides[2],
                    logit_scale,
                    power_p, power_s, query, ALPHA_1_5, HEAD_DIM, BLOCK,
                )  # fmt: skip
                dp = _grad_probability(
                    p,
                    program_scratch,
                    block,
                    count,
                    chunk < own - forced,
                    mean,
                    floor,
                    GROUP,
                    TILE,
                    HEADS,
                    BLOCK,
                )
                s_sum += tl.sum(s, 1)
                s_dp_sum += tl.sum(s * dp, 1)
            kappa = tl.where(s_sum > 0, s_dp_sum / tl.where(s_sum > 0, s_sum, 1.0), 0.0)
            tl.store(base + 3 * ROWS + row, kappa)
            for block in range(0, routed_entries, BLOCK):
                slot = block + tl.arange(0, BLOCK)
                chunk, k_bar, p, s = _routing_block(
                    q_rows, tau_rows, tile_entries, block, count, extra_entry, summary_base,
                    summary_strides[2],
                    logit_scale,
                    power_p, power_s, query, ALPHA_1_5, HEAD_DIM, BLOCK,
                )  # fmt: skip
                dp = _grad_probability(
                    p,
                    program_scratch,
                    block,
                    count,
                    chunk < own - forced,
                    mean,
                    floor,
                    GROUP,
                    TILE,
                    HEADS,
                    BLOCK,
                )
                grad_z = s * (dp - kappa[:, None]) * (inverse_sigma * route_scale)
                grad_z = grad_z.to(ROUTE_DTYPE)
                accumulator = tl.dot(grad_z, k_bar.to(ROUTE_DTYPE), accumulator)
                if ATOMIC_SUMMARY:
                    grad_k_bar = tl.dot(tl.trans(grad_z), q_rows.to(ROUTE_DTYPE))
                    target = grad_summary + (batch_head * chunks + chunk)[:, None] * HEAD_DIM + dim[None, :]
                    tl.atomic_add(target, grad_k_bar, mask=(slot < routed_entries)[:, None], sem="relaxed")
            # The next tile of this program overwrites the scratch rows.
            tl.debug_barrier()

        offset = batch * grad_q_strides[0] + row_head * grad_q_strides[1] + position * grad_q_strides[2]
        tl.store(
            grad_q + offset[:, None] + dim[None, :],
            accumulator.to(grad_q.dtype.element_ty),
            mask=((position < tokens) & (head < GROUP))[:, None],
        )
        work = tl.atomic_add(counter, 1)


def route_powers(alpha: float) -> tuple[float, float]:
    """Powers of the excess over tau that give p and s = p^(2 - alpha)."""
    return 1.0 / (alpha - 1.0), (2.0 - alpha) / (alpha - 1.0)
