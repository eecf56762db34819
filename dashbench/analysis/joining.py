"""What a configuration costs: kernel rows brought to the sparsity and length of accuracy rows.

Accuracy and time are measured on different inputs, at sparsities that are near each other but not equal.
Between measured points costs are interpolated (log cost, linear in sparsity, linear in log length), beyond
them never.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dashbench.analysis.points import TIMING_PREFERENCE, DenseRows, finished, is_dense, setting
from dashbench.analysis.statistics import row_medians
from dashbench.cost import routing_share

# How far beyond the outermost measured sparsity a configuration may be and still be given its cost.
SPARSITY_SLACK = 0.015


@dataclass(frozen=True)
class Cost:
    """A cost with its draws.

    Attributes:
        value: point value.
        draws: `[S]`.
        rows: the kernel rows it comes from.
    """

    value: float
    draws: np.ndarray
    rows: list[dict[str, Any]]


class KernelCosts:
    """Latency or memory of methods by sparsity and length, from kernel rows of one environment.

    Args:
        rows: stored rows of one environment.
        phase: `prefill`, `decode` or `train`.
        batch: sequences; None: the smallest there is.
        quantity: `latency_ms` or `peak_bytes`.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], phase: str, batch: int | None, quantity: str):
        mine = [r for r in finished(rows) if r["phase"] == phase and r.get(quantity) is not None]
        batches = sorted({r["batch"] for r in mine})
        self.phase, self.quantity = phase, quantity
        self.batch = batch if batch is not None else batches[0] if batches else None
        mine = [r for r in mine if r["batch"] == self.batch]
        ways = {(r["cache"], r["launch"]) for r in mine if not is_dense(r)} or {
            (r["cache"], r["launch"]) for r in mine
        }
        self.way = next((w for w in TIMING_PREFERENCE if w in ways), None)
        mine = [r for r in mine if (r["cache"], r["launch"]) == self.way]
        dense = DenseRows(mine)
        self.dense = {s.context: dense.at(s) for s in dense.settings()}
        self.sparse: dict[str, dict[int, dict[float, dict[str, Any]]]] = defaultdict(
            lambda: defaultdict(dict)
        )
        usual = [
            r
            for r in mine
            if not (is_dense(r) or r.get("routing_options") or r["routing"] != "topics")
            and not r["method"].endswith("@reference")  # a specification's time is nobody's cost
        ]
        ours = {r["method"] for r in usual if "@" not in r["method"]}
        for r in sorted(usual, key=lambda r: (r["latency_ms"], r["key"]), reverse=True):
            family = r["method"].partition("@")[0]
            # One implementation is one line: others' kernels count where ours was not measured.
            if r["method"] == family or family not in ours:
                self.sparse[family][r["context"]][r["s_flop"]] = r
        self._drawn: dict[str, np.ndarray] = {}

    def _draws(self, row: dict[str, Any]) -> np.ndarray:
        name = f"{row['key']}{row['environment_key']}"
        if name not in self._drawn:
            seed = int.from_bytes(name.encode(), "big") % (2**32)
            times = row_medians(row, seed)
            self._drawn[name] = (
                times if self.quantity == "latency_ms" else np.full(times.shape, float(row["peak_bytes"]))
            )
        return self._drawn[name]

    def _between(self, low: Cost, high: Cost, share: float) -> Cost:
        if share == 0:
            return low

        def mix(a: Any, b: Any) -> Any:
            return np.exp((1 - share) * np.log(np.maximum(a, 1e-9)) + share * np.log(np.maximum(b, 1e-9)))

        return Cost(float(mix(low.value, high.value)), mix(low.draws, high.draws), [*low.rows, *high.rows])

    def _row(self, row: dict[str, Any]) -> Cost:
        return Cost(float(row[self.quantity]), self._draws(row), [row])

    def _at_length(self, method: str, sparsity: float, length: int) -> Cost | None:
        if method == "dense":
            return self._row(self.dense[length]) if length in self.dense else None
        line = sorted(self.sparse.get(method, {}).get(length, {}).items())
        if not line or not line[0][0] - SPARSITY_SLACK <= sparsity <= line[-1][0] + SPARSITY_SLACK:
            return None
        sparsity = min(max(sparsity, line[0][0]), line[-1][0])
        for (s0, r0), (s1, r1) in zip(line, line[1:] or line, strict=False):
            if s0 <= sparsity <= s1:
                share = (sparsity - s0) / (s1 - s0) if s1 > s0 else 0.0
                return self._between(self._row(r0), self._row(r1), share)
        return self._row(line[0][1])

    def lengths(self, method: str) -> list[int]:
        """Lengths at which a method (a family, such as `dash` or `dense`) was measured, ascending."""
        return sorted(self.dense if method == "dense" else self.sparse.get(method, {}))

    def cost(self, method: str, sparsity: float, length: float) -> Cost | None:
        """Cost of a method; None where nothing was measured on both sides."""
        known = [n for n in self.lengths(method) if self._at_length(method, sparsity, n) is not None]
        below, above = [n for n in known if n <= length], [n for n in known if n >= length]
        if not below or not above:
            return None
        low, high = below[-1], above[0]
        share = 0.0 if low == high else np.log(length / low) / np.log(high / low)
        first, second = self._at_length(method, sparsity, low), self._at_length(method, sparsity, high)
        return self._between(first, second, float(share))

    @property
    def shape(self) -> dict[str, Any] | None:
        """Attention shape of the rows, if they agree on one."""
        rows = [
            *self.dense.values(),
            *(r for n in self.sparse.values() for s in n.values() for r in s.values()),
        ]
        names = {setting(r).shape for r in rows}
        return rows[0]["shape"] if len(names) == 1 else None


def relative_flops(method: str, sparsity: Any, block_size: int = 64) -> Any:
    """FLOPs of attention and routing over those of dense attention, by dashbench.cost; `sparsity` may be an
    array."""
    return 1.0 - sparsity + routing_share(method, block_size)[0]
