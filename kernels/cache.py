"""DashCache: one layer's keys, values and chunk summaries, growing without limit."""

from __future__ import annotations

import copy

import torch

from dashbench.kernels.decode import DecodeCache, DecodeLaunch, append, attend_cache
from dashbench.kernels.reference import DashOptions


class DashCache:
    """A contiguous cache that doubles its capacity when appended tokens would not fit.

    Growth moves the tensors, so `view` must be asked for again and captured CUDA graphs become invalid:
    call `reserve` for the longest sequence before capturing. A replayed graph advances the lengths on the
    device only; tell the host by `advanced`, or the check of capacity is blind to it.

    Args:
        batch, kv_heads, head_dim: B, Hkv, D.
        chunk_size: C.
        capacity: tokens a sequence to start with, rounded up to whole chunks.
        dtype, device: of keys, values and summaries.
        left_padding: `[B]` int32 on the device: leading tokens that are padding (they are appended like
            others, never attended, and chunks keep their padded places), or None.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        head_dim: int,
        chunk_size: int = 64,
        capacity: int = 4096,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cuda",
        left_padding: torch.Tensor | None = None,
    ):
        if capacity < 1:
            raise ValueError(f"capacity must be positive, got {capacity}")
        self.chunk_size = chunk_size
        chunks = -(-capacity // chunk_size)
        shape = (batch, kv_heads, chunks * chunk_size, head_dim)
        options = {"dtype": dtype, "device": device}
        self.view = DecodeCache(
            torch.zeros(shape, **options),
            torch.zeros(shape, **options),
            torch.zeros(batch, kv_heads, chunks, head_dim, **options),
            torch.zeros(batch, dtype=torch.int32, device=device),
            left_padding=left_padding,
        )
        self._tickets = torch.zeros(batch, dtype=torch.int32, device=device)
        self.longest = 0
        """Host's upper bound of every sequence's length."""

    @property
    def capacity(self) -> int:
        """Tokens a sequence can hold before the next growth."""
        return self.view.capacity

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens a sequence.

        Raises:
            RuntimeError: growth is needed while a CUDA graph is being captured.
        """
        if tokens <= self.capacity:
            return
        if self.view.key.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the cache must grow during graph capture: reserve before it")
        chunks = -(-max(tokens, 2 * self.capacity) // self.chunk_size)
        old = self.view
        self.view = DecodeCache(
            _grown(old.key, chunks * self.chunk_size),
            _grown(old.value, chunks * self.chunk_size),
            _grown(old.summaries, chunks),
            old.lengths,
            left_padding=old.left_padding,
        )

    def append(self, key: torch.Tensor, value: torch.Tensor, summary_query: torch.Tensor) -> None:
        """Append T tokens to every sequence and summarise the chunks they complete.

        Args:
            key, value: `[B, Hkv, T, D]` in the cache's dtype, after position embedding.
            summary_query: `[Hkv, D]`.

        Raises:
            ValueError: shape or dtype differ from the cache's.
        """
        kept = self.view.key
        for name, x in (("key", key), ("value", value)):
            if x.dtype != kept.dtype:
                raise ValueError(f"{name} is {x.dtype}, the cache {kept.dtype}")
            if (*x.shape[:2], x.shape[3]) != (*kept.shape[:2], kept.shape[3]):
                raise ValueError(f"{name} {tuple(x.shape)} does not fit a cache {tuple(kept.shape)}")
        if tuple(summary_query.shape) != (kept.shape[1], kept.shape[3]):
            raise ValueError(f"summary_query must be {(kept.shape[1], kept.shape[3])}")
        self.reserve(self.longest + key.shape[2])
        append(self.view, key, value, summary_query.contiguous(), self.chunk_size, self._tickets)
        self.advanced(key.shape[2])

    def attend(
        self,
        query: torch.Tensor,
        options: DashOptions | None = None,
        launch: DecodeLaunch | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """DashAttention of the last T tokens of every sequence, for any T; see `decode.attend_cache`.

        Args:
            query: `[B, Hq, T, D]` of tokens that were appended already.
            options: γ, α, σ and modes, of the cache's chunk size; default: `DashOptions` of that size.
            launch: see `decode.DecodeLaunch`; None: what `tuning` knows.

        Returns:
            (output `[B, Hq, T, D]`, active chunks `[B, Hkv, T]` int32).

        Raises:
            ValueError: another chunk size than the cache's.
        """
        options = options or DashOptions(self.chunk_size)
        if options.chunk_size != self.chunk_size:
            raise ValueError(f"chunks of {options.chunk_size}, but the cache has chunks of {self.chunk_size}")
        return attend_cache(query, self.view, options, launch)

    def advanced(self, tokens: int) -> None:
        """Tell the host that replayed graphs appended `tokens` tokens to every sequence."""
        self.longest += tokens

    def part(self, first: int, last: int) -> DashCache:
        """Sequences [first, last) as a cache of their own over the same memory, to fill a batch in parts.

        What is appended to it is in this cache, too, whose host must be told by `advanced` once all parts
        hold the same number of tokens. A part that grows leaves this memory: `reserve` before.
        """
        view, rows = self.view, slice(first, last)
        part = copy.copy(self)
        part.view = DecodeCache(
            view.key[rows],
            view.value[rows],
            view.summaries[rows],
            view.lengths[rows],
            left_padding=None if view.left_padding is None else view.left_padding[rows],
        )
        part._tickets = self._tickets[rows]
        return part

    def clear(self) -> None:
        """Forget every token; capacity stays."""
        self.view.lengths.zero_()
        self.longest = 0


def _grown(x: torch.Tensor, size: int) -> torch.Tensor:
    """A copy of `[B, H, n, D]` with room for `size` in dimension 2."""
    larger = x.new_zeros(*x.shape[:2], size, x.shape[3])
    larger[:, :, : x.shape[2]] = x
    return larger
