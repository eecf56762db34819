"""DashAttention written down: the specification that every kernel here is tested against.

Source: DashAttention (arXiv 2605.18753); entmax: Peters, Niculae, Martins 2019 (arXiv 1905.05702). Plain
differentiable PyTorch, on any device and in any floating dtype (tests use float64). Nothing is fast and
scores are materialised; `dash_attention(rows=…)` bounds memory by the rows it is asked for.

    chunks      c covers keys [cC, (c+1)C);  query i sits in its own chunk ⌊i/C⌋
    summary     k̄_c = Σ_t a_t k_t,  a = softmax_{t∈c}(⟨q̄, k_t⟩ / √D)            q̄ = 0 is mean pooling
    routing     p_h = α-entmax_c(γ ⟨q_h, k̄_c⟩ / √D) over visible chunks, w = mean of p_h over the heads of
    the group
    routed set  R = {c : w_c > ε};  always on: the own chunk (optionally the previous one) with zero bias
    bias        centered: (log w − mean_R log w) / σ;  raw: log w;  none: 0
    attention   o_h = softmax_t(⟨q_h, k_t⟩ / √D + bias_c(t)) v_t  over t ≤ i in R and the always-on chunks

Letters: B batch, Hq query heads, Hkv KV heads, G = Hq / Hkv, N query rows, L keys, D head dim, C chunk
size, M = ceil(L / C) chunks. Query row n sits at absolute position start + n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

EPSILON = 1e-20
"""One threshold for everything: a chunk with w ≤ ε is not routed, gets no bias and no gradient."""

BiasMode = Literal["centered", "raw", "none"]
Forced = Literal["own", "own_and_previous"]
Visibility = Literal["own", "completed"]


def check_entmax(alpha: float, scaling_factor: float = 1.0) -> None:
    """Raises ValueError unless alpha is in (1, 2] and γ is a positive number."""
    if not 0 < scaling_factor < float("inf"):
        raise ValueError(f"scaling_factor must be a positive number, got {scaling_factor}")
    if not 1 < alpha <= 2:
        raise ValueError(f"alpha must be in (1, 2], got {alpha}")


@dataclass(frozen=True)
class DashOptions:
    """What distinguishes the published variants of DashAttention.

    Attributes:
        chunk_size: C.
        scaling_factor: γ; larger is sparser.
        alpha: order of entmax, in (1, 2].
        sigma: temperature of the prior in `centered`.
        bias_mode: see the module's docstring.
        forced: always-on chunks.
        visibility: `own`: chunks before the own one can be routed to; `completed`: chunks whose last token
            is at or before the query, so the own chunk joins at its last token.

    Raises:
        ValueError: γ is not a positive number, or alpha is outside (1, 2].
    """

    chunk_size: int = 64
    scaling_factor: float = 1.0
    alpha: float = 1.5
    sigma: float = 1e6
    bias_mode: BiasMode = "centered"
    forced: Forced = "own"
    visibility: Visibility = "own"

    def __post_init__(self) -> None:
        check_entmax(self.alpha, self.scaling_factor)


PRESETS: dict[str, DashOptions] = {
    # As the authors' package computes it with its model's defaults.
    "package": DashOptions(chunk_size=64, bias_mode="raw"),
    # As the authors' benchmark code computes it: a factor log2(e) stays in the logits, so its 0.16 is 0.231
    # here.
    "paper": DashOptions(
        chunk_size=16,
        scaling_factor=0.16 * 1.4426950408889634,
        sigma=1e8,
        forced="own_and_previous",
        visibility="completed",
    ),
}


def entmax(logits: torch.Tensor, alpha: float = 1.5) -> torch.Tensor:
    """α-entmax over the last dimension, entries at −inf excluded; rows without any finite entry give zeros.

    α = 1.5 and 2 by the exact sort-based threshold, differentiable through autograd; others by bisection to
    the precision of the dtype, with the threshold's gradient restored by one Newton step.

    Args:
        logits: `[..., M]`.
        alpha: in (1, 2].

    Returns:
        `[..., M]`, non-negative, each non-empty row sums to one.
    """
    check_entmax(alpha)
    finite = torch.isfinite(logits)
    safe = torch.where(finite, logits, torch.zeros_like(logits))
    x = torch.where(finite, (alpha - 1) * safe, torch.full_like(safe, float("-inf")))
    tau = threshold(x, alpha)
    gap = torch.where(finite & (x > tau), x - tau, torch.zeros_like(safe))
    power = 1 / (alpha - 1)
    return torch.where(gap > 0, gap.clamp_min(torch.finfo(gap.dtype).tiny) ** power, torch.zeros_like(gap))


def threshold(x: torch.Tensor, alpha: float = 1.5) -> torch.Tensor:
    """τ with Σ [x − τ]₊^{1/(α−1)} = 1 over the last dimension.

    Args:
        x: `[..., M]`, (α − 1) times the logits, −inf where excluded.
        alpha: in (1, 2].

    Returns:
        `[..., 1]`; +inf for rows without a finite entry.
    """
    size = x.shape[-1]
    if size == 0:
        return x.new_full((*x.shape[:-1], 1), float("inf"))
    peak = x.amax(-1, keepdim=True)
    empty = ~torch.isfinite(peak)
    shifted = torch.where(
        torch.isfinite(x), x - peak.masked_fill(empty, 0.0), torch.full_like(x, float("-inf"))
    )
    if alpha in (1.5, 2.0):
        tau = _sorted_threshold(shifted, alpha)
    else:
        tau = _bisected_threshold(shifted, alpha)
    return torch.where(empty, torch.full_like(tau, float("inf")), tau + peak.masked_fill(empty, 0.0))


def _sorted_threshold(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Exact: τ_k for each prefix of the sorted entries; the support size is how many k have τ_k ≤ x_(k)."""
    ordered = x.sort(-1, descending=True).values
    finite = torch.isfinite(ordered)
    values = torch.where(finite, ordered, torch.zeros_like(ordered))
    k = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    if alpha == 2.0:
        taus = (values.cumsum(-1) - 1) / k
    else:
        mean = values.cumsum(-1) / k
        mean_square = (values * values).cumsum(-1) / k
        taus = mean - (((1 - k * (mean_square - mean * mean)) / k).clamp_min(0)).sqrt()
    support = (finite & (taus <= ordered)).sum(-1, keepdim=True).clamp_min(1)
    return taus.gather(-1, support - 1)


def _bisected_threshold(x: torch.Tensor, alpha: float) -> torch.Tensor:
    """Bisection between max − 1 and max − M^{1−α} (here max = 0), then one Newton step that carries the
    gradient."""
    power = 1 / (alpha - 1)

    def excess(tau: torch.Tensor) -> torch.Tensor:
        return ((x - tau).clamp_min(0) ** power).sum(-1, keepdim=True) - 1

    with torch.no_grad():
        low = x.new_full((*x.shape[:-1], 1), -1.0)
        high = x.new_full((*x.shape[:-1], 1), -(float(x.shape[-1]) ** (1 - alpha)))
        for _ in range(100 if x.dtype == torch.float64 else 40):
            middle = (low + high) / 2
            above = excess(middle) > 0
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        tau = (low + high) / 2
        gap = (x - tau).clamp_min(0)
        slope = -power * torch.where(gap > 0, gap ** (power - 1), torch.zeros_like(gap)).sum(-1, keepdim=True)
    return tau - excess(tau) / slope.clamp_max(-torch.finfo(x.dtype).tiny)


def summarize(key: torch.Tensor, summary_query: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Chunk summaries k̄ of every complete chunk.

    Args:
        key: `[B, Hkv, L, D]`, after position embedding.
        summary_query: `[Hkv, D]`, or `[B, Hkv, M', D]` with one query a complete chunk.
        chunk_size: C.

    Returns:
        `[B, Hkv, M', D]` with M' = floor(L / C).
    """
    batch, heads, length, dim = key.shape
    chunks = length // chunk_size
    inside = key[:, :, : chunks * chunk_size].reshape(batch, heads, chunks, chunk_size, dim)
    query = summary_query[None, :, None] if summary_query.dim() == 2 else summary_query[:, :, :chunks]
    weights = torch.softmax((inside * query[..., None, :]).sum(-1) * dim**-0.5, -1)
    return (weights[..., None] * inside).sum(-2)


def visible_chunks(
    position: torch.Tensor, chunks: int, chunk_size: int, visibility: Visibility
) -> torch.Tensor:
    """`[N, M]` bool: chunks that queries at absolute `position` `[N]` may be routed to."""
    c = torch.arange(chunks, device=position.device)
    if visibility == "own":
        return c < (position // chunk_size)[:, None]
    return (c + 1) * chunk_size - 1 <= position[:, None]


def forced_chunks(position: torch.Tensor, chunks: int, chunk_size: int, forced: Forced) -> torch.Tensor:
    """`[N, M]` bool: always-on chunks of queries at absolute `position` `[N]`."""
    c = torch.arange(chunks, device=position.device)
    own = (position // chunk_size)[:, None]
    on = c == own
    return on | (c == own - 1) if forced == "own_and_previous" else on


@dataclass(frozen=True)
class Routing:
    """What routing decided for some query rows.

    Attributes:
        weights: `[B, Hkv, N, M]`: w, zero where not routed.
        routed: `[B, Hkv, N, M]` bool: R.
        active: `[B, Hkv, N, M]` bool: R and the always-on chunks.
        bias: `[B, Hkv, N, M]`: added to the logits of a chunk's tokens; zero on always-on chunks.
        margin: `[B, Hkv, N, M]`: how far the nearest head's (α − 1)·logit is from its threshold; a chunk
            whose margin is within rounding may be routed or not.
    """

    weights: torch.Tensor
    routed: torch.Tensor
    active: torch.Tensor
    bias: torch.Tensor
    margin: torch.Tensor


def route(
    query: torch.Tensor,
    summaries: torch.Tensor,
    position: torch.Tensor,
    chunks: int,
    options: DashOptions,
    first_chunk: torch.Tensor | None = None,
) -> Routing:
    """Entmax routing of some query rows.

    Args:
        query: `[B, Hq, N, D]`.
        summaries: `[B, Hkv, M', D]`, k̄ of the complete chunks.
        position: `[N]` absolute positions.
        chunks: M ≥ M', chunks that the keys span.
        options: γ, α, σ and modes.
        first_chunk: `[B]` first chunk that is not all padding, or None.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, known = summaries.shape[1], summaries.shape[2]
    group = heads // kv_heads
    grouped = query.reshape(batch, kv_heads, group, rows, dim)
    logits = options.scaling_factor * dim**-0.5 * torch.einsum("brgnd,brcd->brgnc", grouped, summaries)
    logits = torch.nn.functional.pad(logits, (0, chunks - known), value=float("-inf"))
    visible = visible_chunks(position, chunks, options.chunk_size, options.visibility)[None]
    visible = visible & (torch.arange(chunks, device=query.device) < known)
    if first_chunk is not None:
        visible = visible & (torch.arange(chunks, device=query.device) >= first_chunk[:, None, None])
    visible = visible[:, None, None].expand(batch, kv_heads, group, rows, chunks)
    logits = logits.masked_fill(~visible, float("-inf"))
    p = entmax(logits, options.alpha)
    weights = p.mean(2)
    x = (options.alpha - 1) * logits.detach()
    margin = (x - threshold(x, options.alpha)).abs().nan_to_num(float("inf"), float("inf")).amin(2)
    on = forced_chunks(position, chunks, options.chunk_size, options.forced)[None, None]
    routed = (weights > EPSILON) & ~on
    bias = torch.zeros_like(weights)
    if options.bias_mode != "none":
        # A chunk without weight counts only where the caller attends it all the same (`active` of
        # `dash_attention`, another's support on the threshold): there it must weigh next to nothing.
        log_w = torch.where(on, torch.ones_like(weights), weights.clamp_min(EPSILON)).log()
        if options.bias_mode == "raw":
            bias = log_w
        else:
            count = routed.sum(-1, keepdim=True).clamp_min(1)
            mean = (log_w * routed).sum(-1, keepdim=True) / count
            bias = torch.where(on, torch.zeros_like(log_w), (log_w - mean) / options.sigma)
    active = (routed | on).expand_as(weights)
    return Routing(torch.where(routed, weights, torch.zeros_like(weights)), routed, active, bias, margin)


def dash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    summary_query: torch.Tensor,
    options: DashOptions = DashOptions(),
    start: int | None = None,
    left_padding: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Routing]:
    """DashAttention of all or some query rows, differentiable.

    Args:
        query: `[B, Hq, N, D]`.
        key, value: `[B, Hkv, L, D]`.
        summary_query: `[Hkv, D]` or `[B, Hkv, M', D]`.
        options: see `DashOptions`.
        start: absolute position of query row 0; default L − N (queries are the last rows).
        left_padding: `[B]` number of leading padding tokens; chunks keep their padded places, padding is
            never attended, rows of padding give zeros.
        rows: `[R]` rows to compute; default all N.
        active: `[B, Hkv, R, M]` bool: attend these chunks instead of the routed and forced ones (biases stay
            those of routing).

    Returns:
        (output `[B, Hq, R, D]`, routing of those rows).
    """
    batch, heads, count, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group, size = heads // kv_heads, options.chunk_size
    chunks = -(-length // size)
    start = length - count if start is None else start
    rows = torch.arange(count, device=query.device) if rows is None else rows
    position = start + rows
    first_chunk = None
    real = torch.ones(batch, length, dtype=torch.bool, device=query.device)
    if left_padding is not None:
        real = torch.arange(length, device=query.device) >= left_padding[:, None]
        first_chunk = left_padding // size
        summaries = _padded_summaries(key, summary_query, size, real)
    else:
        summaries = summarize(key, summary_query, size)
    mine = query[:, :, rows]
    routing = route(mine, summaries, position, chunks, options, first_chunk)
    allowed = routing.active if active is None else active
    tokens = torch.arange(length, device=query.device)
    out = []
    for r in range(kv_heads):  # one KV head at a time: scores are [B, G, R, L]
        q = mine[:, r * group : (r + 1) * group]
        scores = torch.einsum("bgnd,btd->bgnt", q, key[:, r]) * dim**-0.5
        scores = scores + routing.bias[:, r, :, tokens // size][:, None]
        keep = allowed[:, r, :, tokens // size] & (tokens <= position[:, None]) & real[:, None]
        scores = scores.masked_fill(~keep[:, None], float("-inf"))
        nothing = ~keep.any(-1)[:, None, :, None]
        probability = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
        out.append(torch.einsum("bgnt,btd->bgnd", probability, value[:, r]))
    output = torch.cat(out, 1)
    if left_padding is not None:
        output = output.masked_fill((position < left_padding[:, None])[:, None, :, None], 0.0)
    return output, routing


def _padded_summaries(
    key: torch.Tensor, summary_query: torch.Tensor, chunk_size: int, real: torch.Tensor
) -> torch.Tensor:
    """Summaries over real tokens only; all-padding chunks give zeros (they are never visible)."""
    batch, heads, length, dim = key.shape
    chunks = length // chunk_size
    inside = key[:, :, : chunks * chunk_size].reshape(batch, heads, chunks, chunk_size, dim)
    query = summary_query[None, :, None] if summary_query.dim() == 2 else summary_query[:, :, :chunks]
    logits = (inside * query[..., None, :]).sum(-1) * dim**-0.5
    mask = real[:, : chunks * chunk_size].reshape(batch, 1, chunks, chunk_size)
    none = ~mask.any(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(~mask & ~none, float("-inf")), -1)
    return (weights.masked_fill(~mask, 0.0)[..., None] * inside).sum(-2)


def kept_tokens(active: torch.Tensor, position: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Distinct causal key tokens of each query.

    Args:
        active: `[B, Hkv, N, M]` bool, the own chunk included.
        position: `[N]` absolute positions.
        chunk_size: C.

    Returns:
        `[B, Hkv, N]` int64: whole chunks before the own one, and the own chunk up to the query.
    """
    own = position // chunk_size
    chunks = torch.arange(active.shape[-1], device=active.device)
    before = (active & (chunks < own[:, None])).sum(-1) * chunk_size
    here = active.gather(-1, own[None, None, :, None].expand(*active.shape[:2], -1, 1))[..., 0]
    return before + here * (position % chunk_size + 1)
