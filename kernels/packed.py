"""Packed sequences of different lengths, laid out so that every sequence begins a chunk.

Chunks, and with them routing, belong to one sequence, so each sequence's chunks are counted from its own
first token. The kernels number chunks along one axis; a sequence that begins inside a chunk of that axis is
therefore moved to the next chunk border. All sequences then run in one launch of every kernel: routing looks
up, for each chunk, where its sequence begins and ends, and everything behind routing follows its lists. What
is moved is a copy of q, k and v on the way in and of the output on the way out; lengths that are all
multiples of the chunk size, known on the host, need none.

Letters: S sequences, N packed tokens in all, N' tokens of the aligned layout, C chunk size, M = N' / C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Packing:
    """Where packed tokens stand in the aligned layout.

    Attributes:
        place: `[N]` int64, each token's place, or None where it is the token's own number.
        sequences: `[M, 2]` int32: first chunk of the chunk's sequence, and the token behind its last one. A
            chunk of no sequence is a sequence of its own without tokens.
        tokens: N', a multiple of C.
    """

    place: torch.Tensor | None
    sequences: torch.Tensor
    tokens: int

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """`[1, H, N, D]` in the aligned layout `[1, H, N', D]`, zeros between sequences; differentiable."""
        if self.place is None:
            return x
        aligned = x.new_zeros(*x.shape[:2], self.tokens, x.shape[3])
        return aligned.index_copy(2, self.place, x)

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """The packed tokens of `[1, H, N', …]`: `[1, H, N, …]`; differentiable."""
        return x if self.place is None else x.index_select(2, self.place)


def packing(cu_seqlens: torch.Tensor, tokens: int, chunk_size: int, device: torch.device) -> Packing:
    """The aligned layout of packed sequences.

    With `cu_seqlens` on the device nothing is read back to the host, so N' is a bound: N + S (C − 1), rounded
    down to whole chunks. On the CPU N' is exact, and the layout is the packed one if all lengths are
    multiples of C.

    Args:
        cu_seqlens: `[S + 1]` int32 or int64: sequence s holds tokens cu_seqlens[s] to cu_seqlens[s + 1] − 1.
        tokens: N.
        chunk_size: C.
        device: of the tables.

    Raises:
        ValueError: `cu_seqlens` is no `[S + 1]` tensor; or, if it is on the CPU, does not rise from 0 to N.
    """
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be [S + 1] integers, got {tuple(cu_seqlens.shape)}")
    on_host = cu_seqlens.device.type == "cpu"
    ends = cu_seqlens.long()
    lengths = ends.diff()
    if on_host and (int(ends[0]) != 0 or int(ends[-1]) != tokens or bool((lengths < 0).any())):
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens} tokens, got {cu_seqlens.tolist()}")
    chunks = (lengths + chunk_size - 1) // chunk_size
    behind = chunks.cumsum(0)
    first = behind - chunks
    where = ends.device
    if on_host:
        total = int(behind[-1])
    else:
        total = max(1, (tokens + len(lengths) * (chunk_size - 1)) // chunk_size)
    number = torch.arange(total, device=where)
    owner = torch.searchsorted(behind, number, right=True)
    nobody = owner == len(lengths)
    owner = owner.clamp_max(len(lengths) - 1)
    begin = torch.where(nobody, number, first[owner])
    end = torch.where(nobody, 0, first[owner] * chunk_size + lengths[owner])
    table = torch.stack((begin, end), 1).int()
    if on_host and bool((lengths % chunk_size == 0).all()):
        return Packing(None, table.to(device), tokens)
    token = torch.arange(tokens, device=where)
    sequence = torch.searchsorted(ends[1:].contiguous(), token, right=True).clamp_max(len(lengths) - 1)
    place = token - ends[sequence] + first[sequence] * chunk_size
    return Packing(place.to(device), table.to(device), total * chunk_size)
