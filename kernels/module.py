"""DashAttention: a drop-in for the module of the method's authors, on our kernels.

Same constructor arguments and call as `dash_attn` in the package that accompanies DashAttention (arXiv
2605.18753), so its users change one import.
It keeps the chunk summaries of the sequence it has seen; keys and values stay with the caller, as a Hugging
Face cache does. Unlike theirs, the summary cache grows without limit, and 128k tokens work.
"""

from __future__ import annotations

import torch

from dashbench.kernels.dash import dash_attention
from dashbench.kernels.decode import DecodeCache, DecodeStep
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
    ):
        super().__init__()
        mode = "centered" if estimate_diagonal else "raw"
        self.options = DashOptions(chunk_size, scaling_factor, 1.5, sigma, mode)
        self.enable_gqa = enable_gqa
        self.return_active_blocks = return_active_blocks
        self.reset()

    def reset(self) -> None:
        """Forgets the sequence."""
        self._summaries: torch.Tensor | None = None
        self._known = 0

    def forward(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, head_cls: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Prefill where there are as many queries as keys, else a step with the sequences' last tokens.

        Args:
            queries: `[B, Hq, N, D]`, bf16 or fp16, after position embedding; D 64 or 128.
            keys, values: `[B, Hkv, L, D]`, all tokens so far, the queries' own included; one length for the
                batch.
            head_cls: `[Hkv, D]`, the summary query.

        Returns:
            `[B, Hq, N, D]`; with `return_active_blocks` also `[B, Hkv, N]` int32.

        Raises:
            ValueError: head counts that do not fit, or a step before any prefill that needs gradients.
        """
        if not self.enable_gqa and queries.shape[1] != keys.shape[1]:
            raise ValueError(
                f"enable_gqa=False needs equal heads, got {queries.shape[1]} and {keys.shape[1]}"
            )
        if queries.shape[2] == keys.shape[2]:
            return self._prefill(queries, keys, values, head_cls)
        with torch.no_grad():
            return self._step(queries, keys, values, head_cls)

    def _prefill(self, queries, keys, values, head_cls):
        o = self.options
        self.reset()
        found = dash_attention(
            queries,
            keys,
            values,
            head_cls,
            chunk_size=o.chunk_size,
            scaling_factor=o.scaling_factor,
            sigma=o.sigma,
            bias_mode=o.bias_mode,
            return_active_blocks=self.return_active_blocks,
        )
        if not torch.is_grad_enabled():
            self._learn(keys, head_cls)
        return found

    def _learn(self, keys: torch.Tensor, head_cls: torch.Tensor) -> None:
        """Summaries of all chunks before the last token's own; room doubles when it runs out."""
        size = self.options.chunk_size
        needed = (keys.shape[2] - 1) // size
        if needed < self._known or (
            self._summaries is not None and self._summaries.shape[0] != keys.shape[0]
        ):
            self.reset()
        if self._summaries is None or needed > self._summaries.shape[2]:
            room = max(64, 2 * needed)
            grown = keys.new_zeros(keys.shape[0], keys.shape[1], room, keys.shape[3])
            if self._known:
                grown[:, :, : self._known] = self._summaries[:, :, : self._known]
            self._summaries = grown
        if needed > self._known:
            fresh = keys[:, :, self._known * size : needed * size]
            self._summaries[:, :, self._known : needed] = summarize_chunks(fresh, head_cls, size)
            self._known = needed

    def _step(self, queries, keys, values, head_cls):
        self._learn(keys, head_cls)
        lengths = torch.full((keys.shape[0],), keys.shape[2], dtype=torch.int32, device=keys.device)
        step = DecodeStep(queries, DecodeCache(keys, values, self._summaries, lengths), self.options)
        out = step.run()
        if self.return_active_blocks:
            return out, step.workspace.counts.transpose(1, 2).contiguous()
        return out
