"""DashAttention: a drop-in for the module of the method's authors, on our kernels.

Same constructor arguments and call as `dash_attn` in the package that accompanies DashAttention (arXiv
2605.18753), so its users change one import.
It keeps the chunk summaries of the sequence it has seen; keys and values stay with the caller, as a Hugging
Face cache does. Unlike theirs, the summary cache grows without limit, and 128k tokens work.
"""

from __future__ import annotations

import torch

from dashbench.kernels.dash import dash_attention
from dashbench.kernels.decode import DecodeCache, attend_cache
from dashbench.kernels.reference import DashOptions
from dashbench.kernels.summarize import summarize_chunks


class DashAttention(torch.nn.Module):
    """One layer's DashAttention with its summary cache; no parameters of its own.

    Args:
        chunk_size: C.
        enable_gqa: whether there may be fewer KV heads than query heads.
        estimate_diagonal: True: the prior's logarithm is centred and divided by `sigma`; False: it is added
            as it is.
        scaling_factor: γ; larger is sparser.
        return_active_blocks: calls return `(output, active_blocks)`.
        max_chunks: accepted for compatibility; the cache grows as it must.
        sigma: temperature of the centred prior.
        dense_below: a prefill of fewer tokens runs dense attention (see `dash_attention`), which is faster
            there;
            None: never. Steps are always sparse. What the last prefill ran stands in `info`.
    """

    def __init__(
        self,
        chunk_size: int = 64,
        enable_gqa: bool = True,
        estimate_diagonal: bool = True,
        scaling_factor: float = 1.0,
        return_active_blocks: bool = False,
        max_chunks: int | None = None,
        sigma: float = 1e6,
        dense_below: int | None = None,
    ):
        super().__init__()
        mode = "centered" if estimate_diagonal else "raw"
        self.options = DashOptions(chunk_size, scaling_factor, 1.5, sigma, mode)
        self.enable_gqa = enable_gqa
        self.return_active_blocks = return_active_blocks
        self.dense_below = dense_below
        self.info: dict = {}
        self.reset()

    def reset(self) -> None:
        """Forgets the sequence."""
        self._summaries: torch.Tensor | None = None
        self._known = 0
        self._padding: torch.Tensor | None = None

    def forward(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        head_cls: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Prefill where there are as many queries as keys, else a step with the sequences' last tokens.

        Args:
            queries: `[B, Hq, N, D]`, bf16 or fp16, after position embedding; D 64 or 128.
            keys, values: `[B, Hkv, L, D]`, all tokens so far, the queries' own included; one length for the
                batch.
            head_cls: `[Hkv, D]`, the summary query.
            attention_mask: `[B, L]`, zero (or False) where a token is padding, which must be on the left;
                None: no padding, or in a step that of the prefill. Chunks keep their padded places.

        Returns:
            `[B, Hq, N, D]`; with `return_active_blocks` also `[B, Hkv, N]` int32.

        Raises:
            ValueError: head counts or a mask that do not fit.
        """
        if not self.enable_gqa and queries.shape[1] != keys.shape[1]:
            raise ValueError(
                f"enable_gqa=False needs equal heads, got {queries.shape[1]} and {keys.shape[1]}"
            )
        if queries.shape[2] == keys.shape[2]:
            return self._prefill(queries, keys, values, head_cls, _left_padding(keys, attention_mask, True))
        if attention_mask is not None:
            self._padding = _left_padding(keys, attention_mask, False)
        with torch.no_grad():
            return self._step(queries, keys, values, head_cls)

    def _prefill(self, queries, keys, values, head_cls, padding):
        o = self.options
        self.reset()
        self._padding = padding
        *found, self.info = dash_attention(
            queries,
            keys,
            values,
            head_cls,
            chunk_size=o.chunk_size,
            scaling_factor=o.scaling_factor,
            sigma=o.sigma,
            bias_mode=o.bias_mode,
            left_padding=padding,
            dense_below=self.dense_below,
            return_active_blocks=self.return_active_blocks,
            return_info=True,
        )
        if not torch.is_grad_enabled():
            self._learn(keys, head_cls)
        return tuple(found) if self.return_active_blocks else found[0]

    def _learn(self, keys: torch.Tensor, head_cls: torch.Tensor) -> None:
        """Summaries of all chunks before the last token's own; room doubles when it runs out."""
        size = self.options.chunk_size
        needed = (keys.shape[2] - 1) // size
        if needed < self._known or (
            self._summaries is not None and self._summaries.shape[0] != keys.shape[0]
        ):
            self._summaries, self._known = None, 0
        if self._summaries is None or needed > self._summaries.shape[2]:
            room = max(64, 2 * needed)
            grown = keys.new_zeros(keys.shape[0], keys.shape[1], room, keys.shape[3])
            if self._known:
                grown[:, :, : self._known] = self._summaries[:, :, : self._known]
            self._summaries = grown
        if needed > self._known:
            done = self._known * size
            padding = None if self._padding is None else self._padding - done
            fresh = summarize_chunks(keys[:, :, done : needed * size], head_cls, size, padding)
            self._summaries[:, :, self._known : needed] = fresh
            self._known = needed

    def _step(self, queries, keys, values, head_cls):
        self._learn(keys, head_cls)
        lengths = torch.full((keys.shape[0],), keys.shape[2], dtype=torch.int32, device=keys.device)
        cache = DecodeCache(keys, values, self._summaries, lengths, left_padding=self._padding)
        out, active = attend_cache(queries, cache, self.options)
        return (out, active) if self.return_active_blocks else out


def _left_padding(keys: torch.Tensor, mask: torch.Tensor | None, check: bool) -> torch.Tensor | None:
    """`[B]` int32: padding tokens of each sequence. `check` reads the mask back to the host.

    Raises:
        ValueError: a mask of another shape, or with padding behind a token.
    """
    if mask is None:
        return None
    if tuple(mask.shape) != (keys.shape[0], keys.shape[2]):
        raise ValueError(f"attention_mask must be {(keys.shape[0], keys.shape[2])}, got {tuple(mask.shape)}")
    real = (mask != 0).int()
    if check and bool((real.diff(dim=1) < 0).any()):
        raise ValueError("attention_mask: padding must be on the left")
    return (keys.shape[2] - real.sum(1)).int()
