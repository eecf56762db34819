"""One batch of sequences of equal length in generation: caches of every layer, and the ledger of sparsity.

Keys and values stand in buffers of a fixed capacity, so that a captured CUDA graph of one step serves all
steps. What a kind keeps beside them (summaries of chunks, compressed keys) is here too.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dashbench.baselines.selected_blocks import CompressedCache
from dashbench.kernels.cache import DashCache
from dashbench.kernels.decode import DecodeLaunch, DecodeWorkspace


@dataclass
class _Step:
    """Blocks that one decode step attended, layer by layer, not summed yet."""

    position: int
    block: int
    layers: list[int] = field(default_factory=list)
    active: list[Tensor | None] = field(default_factory=list)

    def alike(self) -> tuple[int, tuple[int, ...], bool]:
        """Steps with the same can be summed together."""
        return self.block, tuple(self.layers), self.active[0] is None


class Ledger:
    """Kept and visible tokens by layer, KV head and phase, summed on the device.

    From the sums follow S_flop = 1 − kept / visible; from the sums of ratios S_mean; from the blocks S_up.
    Sums over a prompt are made at once; of decode steps, whose small operations would cost the host more than
    a layer's attention does, the counts are kept and summed many steps at a time.

    Args:
        layers, kv_heads: of the model.
        device: where the sums are.
    """

    PHASES = ("prefill", "decode")
    STEPS = 256  # decode steps that wait for their sums

    def __init__(self, layers: int, kv_heads: int, device: torch.device | str):
        shape = (len(self.PHASES), layers, kv_heads)
        self.kept, self.visible, self.ratio, self.block_tokens, self.rows = (
            torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(5)
        )
        self._steps: list[_Step] = []

    def clear(self) -> None:
        """Start again from zero."""
        for sums in (self.kept, self.visible, self.ratio, self.block_tokens, self.rows):
            sums.zero_()
        self._steps = []

    def add(self, phase: str, layer: int, active: Tensor | None, start: int, rows: int, block: int) -> None:
        """Counts the queries of one call.

        Args:
            phase: of PHASES.
            layer: index.
            active: `[B, Hkv, rows]` blocks attended, the own one included; None: dense. That of a decode step
                is kept: the caller must not write into it again.
            start: position of the first query.
            rows: queries a sequence.
            block: tokens in a block.
        """
        if phase == "decode" and rows == 1:
            step = self._steps[-1] if self._steps else None
            if step is None or (step.position, step.block) != (start, block) or layer <= step.layers[-1]:
                if len(self._steps) == self.STEPS:
                    self.settle()
                step = _Step(start, block)
                self._steps.append(step)
            step.layers.append(layer)
            step.active.append(active)
            return
        at = self.PHASES.index(phase), layer
        position = torch.arange(start, start + rows, device=self.kept.device)
        visible = (position + 1).double()
        if active is None:
            kept = visible.expand(1, self.kept.shape[2], rows)
            whole = kept
        else:
            kept = ((active - 1) * block + position % block + 1).double()
            whole = active.double() * block
        batch = kept.shape[0]
        self.kept[at] += kept.sum((0, 2))
        self.visible[at] += batch * visible.sum()
        self.ratio[at] += (kept / visible).sum((0, 2))
        self.block_tokens[at] += (whole / (start + rows)).sum((0, 2))
        self.rows[at] += batch * rows

    def settle(self) -> None:
        """Sums the decode steps that wait for it; whoever reads the sums themselves calls it first."""
        for (block, layers, dense), group in groupby(self._steps, key=_Step.alike):
            steps = list(group)
            position = torch.tensor([step.position for step in steps], device=self.kept.device)
            position = position.double()[:, None, None, None]
            visible = position + 1
            if dense:
                kept = whole = visible.expand(-1, len(layers), 1, self.kept.shape[2])
            else:
                active = torch.stack([x for step in steps for x in step.active])  # [S · layers, B, Hkv, 1]
                active = active.squeeze(-1).unflatten(0, (len(steps), len(layers))).double()
                kept = (active - 1) * block + position % block + 1
                whole = active * block
            at = self.PHASES.index("decode"), list(layers)
            batch = kept.shape[2]
            self.kept[at] += kept.sum((0, 2))
            self.visible[at] += batch * visible.sum()
            self.ratio[at] += (kept / visible).sum((0, 2))
            self.block_tokens[at] += (whole / visible).sum((0, 2))
            self.rows[at] += batch * len(steps)
        self._steps = []

    def summary(self) -> dict[str, Any]:
        """`s_flop`, `s_mean` and `s_up` of each phase that has queries, and `s_flop` by layer."""
        self.settle()
        found: dict[str, Any] = {}
        for index, phase in enumerate(self.PHASES):
            rows = self.rows[index].sum()
            if not rows:
                continue
            kept, visible = self.kept[index], self.visible[index]
            found[phase] = {
                "s_flop": float(1 - kept.sum() / visible.sum()),
                "s_mean": float(1 - self.ratio[index].sum() / rows),
                "s_up": float(1 - self.block_tokens[index].sum() / rows),
                "s_flop_by_layer": (1 - kept.sum(-1) / visible.sum(-1)).tolist(),
            }
        return found


class Sequences:
    """State of one batch while it is read and continued.

    Args:
        layers, batch, kv_heads, head_dim: L, B, Hkv, D.
        capacity: tokens a sequence may have.
        kind, settings: of the attention.
        dtype, device: of keys and values.
    """

    def __init__(self, layers, batch, kv_heads, head_dim, capacity, kind, settings, dtype, device):
        self.length = 0
        self.rows = slice(0, batch)
        """Which sequences of the whole batch these are; see `part`."""
        self.capacity = capacity
        self.ledger = Ledger(layers, kv_heads, device)
        self.counting = True
        # One step, repeated at one place, as a captured graph replays it; see `restart_step`.
        self.static = False
        self.chunk_size = settings.get("chunk_size", settings.get("block_size", 64))
        # What a decode step of DashAttention needs beside its cache: made by the first layer of the first
        # step, used again by all others.
        self.dash_step: tuple[DecodeLaunch, DecodeWorkspace] | None = None
        self.dash: list[DashCache] = []
        self.compressed = [CompressedCache() for _ in range(layers)] if kind in ("nsa", "infllmv2") else []
        if kind == "dash":
            shape = (batch, kv_heads, head_dim, self.chunk_size, capacity, dtype, device)
            self.dash = [DashCache(*shape) for _ in range(layers)]
            self.keys = [cache.view.key for cache in self.dash]
            self.values = [cache.view.value for cache in self.dash]
        else:
            buffers = [
                torch.zeros(2, batch, kv_heads, capacity, head_dim, dtype=dtype, device=device)
                for _ in range(layers)
            ]
            self.keys, self.values = [b[0] for b in buffers], [b[1] for b in buffers]

    def part(self, first: int, last: int) -> Sequences:
        """Sequences [first, last) over the same memory, to read a batch in parts; nothing is read yet.

        Raises:
            ValueError: tokens have been read.
        """
        if self.length:
            raise ValueError(f"a batch is read in parts from its beginning, not behind {self.length} tokens")
        part, rows = copy.copy(self), slice(first, last)
        part.rows, part.dash_step = rows, None
        part.keys, part.values = [x[rows] for x in self.keys], [x[rows] for x in self.values]
        part.dash = [cache.part(first, last) for cache in self.dash]
        part.compressed = [CompressedCache() for _ in self.compressed]
        return part

    def join(self, parts: list[Sequences]) -> None:
        """Go on behind what `parts` read, which are this batch in order."""
        self.length = parts[0].length
        for layer, cache in enumerate(self.dash):
            cache.advanced(parts[0].dash[layer].longest - cache.longest)
        for layer, cache in enumerate(self.compressed):
            cache.join([part.compressed[layer] for part in parts])
            for part in parts:  # as soon as it is copied: at 128k tokens a layer's are 34 MB a sequence
                part.compressed[layer].clear()

    def restart_step(self) -> None:
        """Makes the step from `length` to `length` + 1 repeatable: what a step leaves behind on the host is
        taken back, and lengths on the device already count the token."""
        self.static = True
        for cache in self.compressed:
            cache.length = self.length
        for cache in self.dash:
            cache.view.lengths.fill_(self.length + 1)

    def extend(self, layer: int, key: Tensor, value: Tensor, write: bool = True) -> tuple[Tensor, Tensor]:
        """Writes new keys and values `[B, Hkv, T, D]` of a layer; returns all of them so far.

        Args:
            layer: index.
            key, value: of the new tokens.
            write: False: the kind's kernels will write them.

        Raises:
            ValueError: more tokens than the capacity.
        """
        end = self.length + key.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit sequences of {self.capacity}")
        keys, values = self.keys[layer].narrow(2, 0, end), self.values[layer].narrow(2, 0, end)
        if write:
            keys.narrow(2, self.length, key.shape[2]).copy_(key)
            values.narrow(2, self.length, key.shape[2]).copy_(value)
        return keys, values
