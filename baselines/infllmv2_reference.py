"""InfLLMv2 in eager PyTorch: the specification, slow, for any device and dtype.

A query attends the tokens of the blocks that score best against mean-pooled keys, one choice for all heads of
a group; nothing is learned beside the attention itself. Paper: https://arxiv.org/abs/2509.24663.

    windows     kc_t = mean of the keys [16 t, 16 t + 32) after position embedding, seen by query i once
                16 t + 31 <= i
    importance  S_t = sum of exp(q_h kc_t / sqrt(D) - lse_h) over the heads h of a group
                lse_mode exact: lse_h over the same windows; coarse: over means of 128 tokens every 64, each
                seen once 64 t + 127 <= i (exact where none is seen yet)
    scores      score_j = max of S_t over the windows t = 4j-1 .. 4j+3 of block j
    selection   the top_k blocks; the first `init_blocks`, the own one and the `local_blocks` before it are
                forced;  o = causal attention in them

Parameters (`prepare`): `preset` gives the rest their defaults, each of which may be set by itself:
    top_k: blocks selected in total, forced ones included (raised to the number of forced blocks, lowered to
    the number of blocks).
    init_blocks, local_blocks: forced blocks at the start, and before the own one, which is forced too and not
    counted here.
    lse_mode: `exact` or `coarse`.
    dense_len: contexts shorter than this attend everything.

Presets: `paper`, the authors' MiniCPM-4 settings (top 96 with 1 initial and 32 local blocks, dense below
8192, coarse); `infllmv2_paper`, what the benchmark of the DashAttention paper (arXiv 2605.18753) runs and the
default here (top 64, 16 local blocks, never dense, exact). Windows and strides are block_size / 2 and / 4,
the coarse ones 2 block_size and block_size.

Debts to the paper:
    * The authors' kernels fix a group of 16 heads and blocks of 64; this takes any group and block sizes that
      are multiples of 4.
    * Their coarse sum leaves out what no coarse window has covered yet, as here; it changes how heads weigh
      against each other, not the ranking within a head.
    * A decode step keeps no paged cache: keys lie in one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.baselines.block_selection import (
    TopBlocks,
    Windows,
    block_attention,
    scores_to_blocks,
    visible_softmax,
    wide,
)
from dashbench.baselines.block_sparse_reference import BlockSparseReference, State, block_count, make_operator
from dashbench.baselines.nsa_reference import clamp_top_k, largest_logit


@dataclass(frozen=True)
class InfLLMv2Settings:
    """The numbers of one InfLLMv2; `local_blocks` does not count the own block."""

    top_k: int = 64
    init_blocks: int = 1
    local_blocks: int = 16
    lse_mode: str = "exact"
    dense_len: int = 0


PRESETS = {
    "paper": InfLLMv2Settings(top_k=96, local_blocks=32, lse_mode="coarse", dense_len=8192),
    "infllmv2_paper": InfLLMv2Settings(),
}


class InfLLMv2(BlockSparseReference):
    """InfLLMv2 for the shapes and block size of one problem. State: compressed keys, and the coarse ones in
    `coarse` mode.
    """

    def __init__(self, problem: Problem, settings: InfLLMv2Settings):
        block = problem.block_size
        if block % 4:
            raise Unsupported(
                f"InfLLMv2 needs a block size that is a multiple of 4 (stride = block / 4), not {block}"
            )
        fine, coarse = Windows(block // 2, block // 4), Windows(2 * block, block)
        self.levels = (fine, coarse) if settings.lse_mode == "coarse" else (fine,)
        self.dense = problem.key.shape[2] < settings.dense_len
        top_k = block_count(problem.key, block) if self.dense else settings.top_k
        self.top = TopBlocks(block, top_k, settings.init_blocks, settings.local_blocks + 1)
        self.scale = problem.scale

    def compress(self, key: torch.Tensor, value: torch.Tensor) -> State:
        wide_key = key.to(wide(key.dtype))
        return tuple(level.unfold(wide_key).mean(-1).to(key.dtype) for level in self.levels)

    def append(self, state: State, key: torch.Tensor, value: torch.Tensor) -> State:
        appended = []
        for level, means in zip(self.levels, state, strict=True):
            if level.completes(key.shape[2]):
                new = key[:, :, -level.kernel :].to(wide(key.dtype)).mean(2, keepdim=True).to(key.dtype)
                means = torch.cat((means, new), 2)
            appended.append(means)
        return tuple(appended)

    def score(self, query, positions, state, blocks):
        fine = self.levels[0]
        logits = query @ state[0][:, :, None].mT * self.scale
        visible = fine.visible(positions, state[0].shape[2])
        weights = visible_softmax(logits, visible)
        if len(self.levels) == 2:
            coarse_visible = self.levels[1].visible(positions, state[1].shape[2])
            coarse_logits = (query @ state[1][:, :, None].mT * self.scale).masked_fill(
                ~coarse_visible, -torch.inf
            )
            shifted = logits - coarse_logits.logsumexp(-1, keepdim=True)
            approximate = torch.exp(shifted.masked_fill(~visible, -torch.inf))
            weights = torch.where(coarse_visible.any(-1, keepdim=True), approximate, weights)
        scores = scores_to_blocks(weights.sum(2), fine, self.top.block_size, blocks, "max")
        return scores, largest_logit(logits, visible)

    def select(self, query, positions, state, blocks):
        if self.dense:
            eligible = (
                torch.arange(blocks, device=positions.device) <= (positions // self.top.block_size)[:, None]
            )
            return eligible.expand(*query.shape[:2], *eligible.shape)
        return super().select(query, positions, state, blocks)

    def attend(self, query, positions, key, value, state, selected, gates, first, stop):
        return block_attention(query, key, value, positions, selected, self.top.block_size, self.scale, stop)


def settings_for(
    problem: Problem,
    preset: str = "infllmv2_paper",
    *,
    top_k: int | None = None,
    init_blocks: int | None = None,
    local_blocks: int | None = None,
    lse_mode: str | None = None,
    dense_len: int | None = None,
) -> InfLLMv2Settings:
    """A preset with the given settings in place of its own, `top_k` brought into the possible range.

    Raises:
        ValueError: an unknown preset or mode, or a setting below what makes sense.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}")
    given = {
        "top_k": top_k, "init_blocks": init_blocks, "local_blocks": local_blocks, "lse_mode": lse_mode,
        "dense_len": dense_len,
    }  # fmt: skip
    settings = replace(PRESETS[preset], **{name: x for name, x in given.items() if x is not None})
    if settings.lse_mode not in ("exact", "coarse"):
        raise ValueError(f"lse_mode must be 'exact' or 'coarse', not {settings.lse_mode!r}")
    if settings.top_k < 1 or settings.init_blocks < 0 or settings.local_blocks < 0:
        raise ValueError(f"top_k starts at 1, init_blocks and local_blocks at 0: {settings}")
    forced = settings.init_blocks + settings.local_blocks + 1
    return replace(settings, top_k=clamp_top_k(settings.top_k, forced, problem))


def prepare(problem: Problem, *, preset: str = "infllmv2_paper", **settings) -> Operator:
    """InfLLMv2 for one problem; `settings` are those of `settings_for` (see the module's docstring)."""
    chosen = settings_for(problem, preset, **settings)
    method = InfLLMv2(problem, chosen)
    notes = {
        "preset": preset,
        "top_k": settings.get("top_k") or PRESETS[preset].top_k,
        "top_k_used": chosen.top_k,
        "init_blocks": chosen.init_blocks,
        "local_blocks": chosen.local_blocks,
        "lse_mode": chosen.lse_mode,
        "dense_len": chosen.dense_len,
    }
    if method.dense:
        notes["fallback"] = f"dense below {chosen.dense_len}"
    return make_operator(problem, method, notes)
