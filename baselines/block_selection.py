"""The steps that NSA and InfLLMv2 share, in eager PyTorch: windows of keys, block scores, top-k with forced
blocks, masked attention.

Both summarise overlapping windows of `kernel` keys every `stride` keys, let each query score the windows that
lie wholly in its past, carry those scores to blocks, and attend the tokens of the best blocks, one choice for
all query heads that share a key/value head (NSA: arXiv 2502.11089, sections 3.3.1 and 3.3.2; InfLLMv2: arXiv
2509.24663, section 3).

Letters: B batch, Hkv key/value heads, G query heads of each, R query rows, L keys, D head dim, T windows, M
blocks. Queries come grouped, `[B, Hkv, G, R, D]`; `positions` is int64 `[R]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Relative rounding of a compressed key in each working dtype (for the wide ones: of the sums that use it),
see `tie_margin`.
"""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: fp64 for fp64 inputs, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Windows:
    """Overlapping windows of keys: window t holds tokens `[stride t, stride t + kernel)`; only complete ones
    exist.
    """

    kernel: int
    stride: int

    def count(self, length: int) -> int:
        """Complete windows in `length` tokens."""
        return 0 if length < self.kernel else (length - self.kernel) // self.stride + 1

    def visible(self, positions: torch.Tensor, count: int) -> torch.Tensor:
        """Bool `[R, T]`: the window's last token is not after the query."""
        last = torch.arange(count, device=positions.device) * self.stride + self.kernel - 1
        return last <= positions[:, None]

    def unfold(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, H, L, D]` to a view `[B, H, T, D, kernel]` (a new empty tensor when there is no window)."""
        if self.count(x.shape[2]) == 0:
            return x.new_zeros((*x.shape[:2], 0, x.shape[3], self.kernel))
        return x.unfold(2, self.kernel, self.stride)

    def completes(self, length: int) -> bool:
        """Whether token `length - 1` is the last of a window."""
        return length >= self.kernel and (length - self.kernel) % self.stride == 0


def visible_softmax(logits: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Softmax over the visible entries of the last dimension; rows without any give zeros. `visible`
    broadcasts to `logits`.
    """
    seen = visible.any(-1, keepdim=True)
    return torch.softmax(logits.masked_fill(~visible, -torch.inf).masked_fill(~seen, 0.0), -1) * visible


def scores_to_blocks(
    importance: torch.Tensor, windows: Windows, block_size: int, blocks: int, rule: str
) -> torch.Tensor:
    """Carry scores of windows `[..., T]` to blocks `[..., M]`.

    Block j takes the windows that overlap it. `sum` weighs each by the number of stride-long cells it shares
    with the block (kernel 32, stride 16, block 64: windows 4j-1 .. 4j+3 with weights 1, 2, 2, 2, 1; NSA
    equation 9); `max` takes the largest (InfLLMv2).

    Raises:
        ValueError: kernel or block is not a multiple of the stride, or the rule is unknown.
    """
    if windows.kernel % windows.stride or block_size % windows.stride:
        raise ValueError(
            f"kernel {windows.kernel} and block {block_size} must be multiples of {windows.stride}"
        )
    if rule not in ("sum", "max"):
        raise ValueError(f"rule must be 'sum' or 'max', not {rule!r}")
    span, cells = windows.kernel // windows.stride, block_size // windows.stride
    right = max(0, cells * blocks - importance.shape[-1])
    padded = torch.nn.functional.pad(importance, (span - 1, right))
    scores = torch.zeros((*importance.shape[:-1], blocks), dtype=importance.dtype, device=importance.device)
    for offset in range(1 - span, cells):
        shared = min(offset + span, cells) - max(offset, 0)
        window_score = padded[..., offset + span - 1 :: cells][..., :blocks]
        scores = scores + shared * window_score if rule == "sum" else torch.maximum(scores, window_score)
    return scores


@dataclass(frozen=True)
class TopBlocks:
    """Top-k choice of blocks with forced ones.

    Attributes:
        block_size: tokens in a block.
        top_k: blocks chosen in total, forced ones included; fewer where the past has fewer.
        init_blocks: the first blocks are forced.
        local_blocks: the last blocks up to the query's own are forced, its own counted.
    """

    block_size: int
    top_k: int
    init_blocks: int
    local_blocks: int

    @property
    def forced_count(self) -> int:
        """Most blocks that can be forced."""
        return self.init_blocks + self.local_blocks

    def _classes(self, positions: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(eligible, forced), both bool `[R, M]`."""
        own = (positions // self.block_size)[:, None]
        block = torch.arange(blocks, device=positions.device)
        eligible = block <= own
        return eligible, eligible & ((block < self.init_blocks) | (block > own - self.local_blocks))

    def _ranked(self, scores: torch.Tensor, positions: torch.Tensor):
        eligible, forced = self._classes(positions, scores.shape[-1])
        return scores.masked_fill(forced, torch.inf).masked_fill(~eligible, -torch.inf), eligible, forced

    def select(self, scores: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Bool `[B, Hkv, R, M]` from scores of that shape; of equal scores the earlier block wins.

        Equal scores are common under the `max` rule: a window across the border of two blocks can be the best
        of both.
        """
        ranked, eligible, _ = self._ranked(scores, positions)
        best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., : self.top_k]
        return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True) & eligible

    def undecided(self, scores: torch.Tensor, positions: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
        """Blocks whose membership hangs on less than a factor `1 + margin` (`[B, Hkv, R, 1]`) between two
        scores.
        """
        blocks = scores.shape[-1]
        ranked, eligible, forced = self._ranked(scores, positions)
        if self.top_k >= blocks:
            return torch.zeros_like(ranked, dtype=torch.bool)
        best = ranked.topk(self.top_k + 1, -1).values
        last_in, first_out = best[..., -2:-1], best[..., -1:]
        free = eligible & ~forced & first_out.ne(-torch.inf)
        chosen = self.select(scores, positions)
        close = torch.where(chosen, ranked <= first_out * (1 + margin), ranked * (1 + margin) >= last_in)
        return close & free


def tie_margin(largest_logit: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Relative error that rounding of the working dtype can put on a block's score.

    A score is a sum of softmax terms exp(z - lse). Rounding the compressed keys moves a logit z by at most
    about `rounding * (1 + max |z|)`, so each term moves by twice that in its exponent.
    """
    return torch.expm1(2 * ROUNDING[dtype] * (1 + largest_logit))


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of grouped queries `[B, Hkv, G, R, D]` over keys `[B, Hkv, K, D]` where `visible` (`[B or 1,
    Hkv or 1, R, K]`); zero for a row that sees nothing.
    """
    batch, kv_heads, group, rows, head_dim = query.shape
    logits = query.reshape(batch, kv_heads, group * rows, head_dim) @ key.mT * scale
    weights = visible_softmax(logits.unflatten(2, (group, rows)), visible[:, :, None])
    return (weights.flatten(2, 3) @ value).unflatten(2, (group, rows))


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    selected: torch.Tensor,
    block_size: int,
    scale: float,
    stop: int,
) -> torch.Tensor:
    """Causal attention over the tokens of the selected blocks; no position is `stop` or beyond, so later keys
    are not read.
    """
    causal = torch.arange(stop, device=key.device) <= positions[:, None]
    visible = selected.repeat_interleave(block_size, -1)[..., :stop] & causal
    return masked_attention(query, key[:, :, :stop], value[:, :, :stop], visible, scale)


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
    window: int,
    scale: float,
    first: int,
    stop: int,
) -> torch.Tensor:
    """Causal attention over the last `window` tokens, the query's own included; positions lie in `[first,
    stop)`.
    """
    begin = max(0, first - window + 1)
    tokens = torch.arange(begin, stop, device=key.device)
    visible = (tokens <= positions[:, None]) & (tokens > positions[:, None] - window)
    return masked_attention(query, key[:, :, begin:stop], value[:, :, begin:stop], visible[None, None], scale)
