"""What NSA and InfLLMv2 share on our kernels: the cache of compressed windows, bit masks as blocks, which
implementation runs.

Letters: B batch, Hq query heads, Hkv KV heads, N query rows, L keys, D head dim, M blocks, W = ceil(M / 32).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dashbench.kernels.compress import window_count

KERNEL_DTYPES = (torch.bfloat16, torch.float16)


class CompressedCache:
    """Compressed windows of the sequences seen so far; keys and values stay with the caller.

    One object a layer: hand it to the operator with the prompt (which clears it) and with every step. Tokens
    that fill no window yet are in the caller's keys, from where they are compressed once their window is
    complete.

    Attributes:
        length: tokens seen.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget the sequences."""
        self.length = 0
        self._levels: dict[int, tuple[torch.Tensor, ...]] = {}
        self._counts: dict[int, int] = {}

    def join(self, parts: list[CompressedCache]) -> None:
        """Take the sequences of `parts`, one part after the other, in place of those known.

        Raises:
            ValueError: the parts have seen different numbers of tokens.
        """
        if len({part.length for part in parts}) != 1:
            raise ValueError(f"parts of {[part.length for part in parts]} tokens are not one batch")
        self.length, self._counts = parts[0].length, dict(parts[0]._counts)
        self._levels = {}
        for stride in parts[0]._levels:
            levels = (part._levels[stride] for part in parts)
            self._levels[stride] = tuple(torch.cat(column) for column in zip(*levels, strict=True))

    def seen(self, length: int, new: int) -> None:
        """Say that `new` of `length` tokens are new; as many new as there are begin other sequences.

        Raises:
            ValueError: the tokens before are not those that the cache has seen.
        """
        if length == new:
            self.clear()
        elif length - new != self.length:
            raise ValueError(f"the cache has seen {self.length} tokens, the keys say {length - new}")
        self.length = length

    def windows(
        self, stride: int, make: Callable[[int], tuple[torch.Tensor, ...]]
    ) -> tuple[torch.Tensor, ...]:
        """Compressed tensors `[B, Hkv, T, D]` of all windows of 2 · stride tokens, made where they are not
        known.

        Args:
            stride: tokens between two windows; tells levels apart.
            make: `make(first token)` compresses the windows from that token on.
        """
        known, count = self._counts.get(stride, 0), window_count(self.length, stride)
        if stride not in self._levels:
            self._levels[stride] = make(0)
        elif count > known:
            new = make(known * stride)
            self._levels[stride] = tuple(
                _extended(old, known, x) for old, x in zip(self._levels[stride], new, strict=True)
            )
        self._counts[stride] = count
        return tuple(x[:, :, :count] for x in self._levels[stride])


def _extended(old: torch.Tensor, known: int, new: torch.Tensor) -> torch.Tensor:
    """`old` with `new` written behind its first `known` windows; grows by half when full."""
    needed = known + new.shape[2]
    if old.shape[2] < needed:
        larger = old.new_empty(*old.shape[:2], max(needed, old.shape[2] * 3 // 2), old.shape[3])
        larger[:, :, :known] = old[:, :, :known]
        old = larger
    old[:, :, known:needed] = new
    return old


def kernels_for(backend: str, query: torch.Tensor, block_size: int) -> bool:
    """Whether the Triton kernels run: `auto` on a GPU, never on a CPU (there the eager specification does).

    Raises:
        ValueError: an unknown backend, or inputs on a GPU that the kernels do not take.
    """
    if backend not in ("auto", "kernels", "reference"):
        raise ValueError(f"backend must be auto, kernels or reference, not {backend!r}")
    if backend == "reference" or (backend == "auto" and not query.is_cuda):
        return False
    if query.is_cuda and query.dtype not in KERNEL_DTYPES:
        raise ValueError(f"the kernels take bfloat16 and float16, not {query.dtype}; ask for the reference")
    if query.shape[-1] not in (64, 128) or block_size not in (16, 32, 64, 128):
        raise ValueError(
            f"the kernels take head dims 64 and 128 and blocks of 16 to 128, not {query.shape[-1]} and "
            f"{block_size}; ask for the reference"
        )
    return True


def blocks_of_mask(mask: torch.Tensor, positions: torch.Tensor, block_size: int, blocks: int) -> torch.Tensor:
    """Bool `[B, Hkv, R, M]` from the words `[B, Hkv, R, W]` of queries at `positions` `[R]`, own block
    added."""
    bits = (mask[..., None] >> torch.arange(32, device=mask.device)) & 1
    before = bits.flatten(-2)[..., :blocks].bool()
    own = torch.arange(blocks, device=mask.device) == (positions // block_size)[:, None]
    return before | own


def kept_of_active(active: torch.Tensor, positions: torch.Tensor, block_size: int) -> torch.Tensor:
    """Attended tokens `[B, Hkv, N]` int64 from attended blocks, the own one included and causal."""
    return (active.long() - 1) * block_size + positions % block_size + 1


def blocks_of_lists(lists: torch.Tensor, counts: torch.Tensor, blocks: int) -> torch.Tensor:
    """Bool `[B, Hkv, T, M]` from a decode step's lists `[B, T, Hkv, M']` and counts `[B, T, Hkv]`."""
    place = torch.arange(lists.shape[-1], device=lists.device)
    listed = torch.where(place < counts[..., None], lists.long(), blocks)
    chosen = torch.zeros(*lists.shape[:3], blocks + 1, dtype=torch.bool, device=lists.device)
    return chosen.scatter_(-1, listed, True)[..., :blocks].transpose(1, 2)


def with_layout(layout: str, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views `[B, H, N, ...]` of tensors in `layout` (`bhnd` or `bnhd`); its own inverse.

    Raises:
        ValueError: another layout.
    """
    if layout not in ("bhnd", "bnhd"):
        raise ValueError(f"layout is bhnd or bnhd, got {layout!r}")
    return tensors if layout == "bhnd" else tuple(x.transpose(1, 2) for x in tensors)
