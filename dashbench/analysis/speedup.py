"""Speedup over the best dense attention, and the context length from which a method is ahead."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dashbench.analysis.points import DenseRows, Line, is_dense, lines
from dashbench.analysis.statistics import Interval, ratio_of_rows, row_medians


@dataclass(frozen=True)
class Speedup:
    """One method at one setting against the fastest dense method there.

    Attributes:
        row: the method's row.
        dense: the dense row.
        ratio: dense median over method median, with a 95 % bootstrap interval.
    """

    row: dict[str, Any]
    dense: dict[str, Any]
    ratio: Interval


def speedups(rows: Iterable[dict[str, Any]]) -> dict[Line, list[Speedup]]:
    """Speedup of every sparse row whose setting has a dense row, by line and ascending context."""
    rows = list(rows)
    dense = DenseRows(rows)
    found = {}
    for name, members in lines(rows).items():
        points = [
            Speedup(r, base, ratio_of_rows(base, r, seed=i))
            for i, r in enumerate(members)
            if not is_dense(r) and (base := dense.beside(r)) is not None
        ]
        if points:
            found[name] = points
    return found


@dataclass(frozen=True)
class Crossover:
    """From which context on a line beats the best dense method.

    Attributes:
        line: which method, sparsity and setting.
        verdict: `at` (length and interval given), `always` (ahead at every measured length), `never` (behind
            at the longest one).
        length: tokens, None unless `at`.
        low, high: 95 % interval in tokens; `high` is None when resampling finds "never" too often to bound
            it, `low` likewise for "always".
        shortest, longest: the measured range in tokens.
        chance_never: share of resamples in which the method is behind at the longest length.
    """

    line: Line
    verdict: Literal["at", "always", "never"]
    length: float | None
    low: float | None
    high: float | None
    shortest: int
    longest: int
    chance_never: float


def _crossing(log_context: np.ndarray, log_speedup: np.ndarray) -> np.ndarray:
    """Log-length after which the speedup stays above one, by linear interpolation in log-log.

    Args:
        log_context: `[P]` ascending.
        log_speedup: `[S, P]`.

    Returns:
        `[S]`: −inf where ahead everywhere, +inf where behind at the last length.
    """
    samples, points = log_speedup.shape
    behind = log_speedup <= 0
    last_behind = np.where(behind.any(axis=1), points - 1 - np.argmax(behind[:, ::-1], axis=1), -1)
    out = np.full(samples, -np.inf)
    out[last_behind == points - 1] = np.inf
    inside = (last_behind >= 0) & (last_behind < points - 1)
    rows, left = np.flatnonzero(inside), last_behind[inside]
    y0, y1 = log_speedup[rows, left], log_speedup[rows, left + 1]
    out[rows] = log_context[left] + (log_context[left + 1] - log_context[left]) * (-y0) / (y1 - y0)
    return out


def crossover(name: Line, points: list[Speedup], seed: int = 0) -> Crossover:
    """Finds the crossover of one line with a bootstrap interval over the timing samples.

    Args:
        name: the line.
        points: its speedups by ascending context; at least one.
        seed: of the resampling.
    """
    contexts = np.array([p.row["context"] for p in points], dtype=float)
    log_context = np.log(contexts)
    best = _crossing(log_context, np.log([[p.ratio.value for p in points]]))[0]
    dense = np.stack([row_medians(p.dense, seed * 1009 + 2 * i) for i, p in enumerate(points)], 1)
    ours = np.stack([row_medians(p.row, seed * 1009 + 2 * i + 1) for i, p in enumerate(points)], 1)
    draws = _crossing(log_context, np.log(dense / ours))
    never = float(np.mean(np.isposinf(draws)))
    verdict: Literal["at", "always", "never"] = (
        "never" if np.isposinf(best) else "always" if np.isneginf(best) else "at"
    )
    low, high = np.quantile(draws, [0.025, 0.975], method="nearest")
    at = verdict == "at"
    return Crossover(
        name,
        verdict,
        float(np.exp(best)) if at else None,
        float(np.exp(low)) if at and np.isfinite(low) else None,
        float(np.exp(high)) if at and np.isfinite(high) else None,
        int(contexts[0]),
        int(contexts[-1]),
        never,
    )


def crossovers(rows: Iterable[dict[str, Any]]) -> list[Crossover]:
    """The crossover of every sparse line that has at least one comparable dense row."""
    return [crossover(name, points, i) for i, (name, points) in enumerate(speedups(rows).items())]
