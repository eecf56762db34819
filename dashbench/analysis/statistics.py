"""Intervals and tests on timing samples.

Latencies are skewed and sometimes bimodal, so everything here rests on medians, ranks and resampling, never
on a normal distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its interval, same unit."""

    value: float
    low: float
    high: float


def resampled_medians(
    samples: Sequence[float], seed: int, slices: Sequence[int] | None = None, resamples: int = RESAMPLES
) -> np.ndarray:
    """Draws of the median: a bootstrap of the samples, widened by what differs between slices.

    Samples of one slice share a clock and a temperature, so treating them as independent gives intervals
    that are far too narrow (the same kernel timed twice then "differs" most of the time). The standard
    error of the slice medians, with Student's t for their small number, is added to the draws; it contains
    part of the bootstrap's own spread, so the result errs on the wide side.

    Args:
        samples: at least one sample, slice after slice.
        seed: of the resampling; different quantities that are combined need different seeds.
        slices: number of samples in each slice; None or a single slice: plain bootstrap.
        resamples: how many draws.

    Returns:
        `[resamples]` float64.
    """
    values = np.asarray(samples, dtype=float)
    if values.size == 0:
        raise ValueError("no samples")
    random = np.random.default_rng(seed)
    draws = np.median(values[random.integers(0, values.size, size=(resamples, values.size))], axis=1)
    sizes = [n for n in slices or () if n > 0]
    if len(sizes) > 1 and sum(sizes) == values.size:
        medians = [np.median(part) for part in np.split(values, np.cumsum(sizes)[:-1])]
        error = float(np.std(medians, ddof=1)) / len(sizes) ** 0.5
        draws = draws + error * random.standard_t(len(sizes) - 1, resamples)
        draws = np.maximum(draws, values.min() / 2)  # a time stays positive
    return draws


def percentile_interval(draws: np.ndarray, value: float, level: float = LEVEL) -> Interval:
    """Percentile bootstrap interval around `value`."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def row_medians(row: dict[str, Any], seed: int) -> np.ndarray:
    """Draws of the median latency of a stored row, `[RESAMPLES]`, its slices respected."""
    return resampled_medians(row["samples"], seed, (row.get("timing") or {}).get("slice_samples"))


def ratio_of_rows(over: dict[str, Any], under: dict[str, Any], seed: int = 0) -> Interval:
    """Ratio of two rows' median latencies with a bootstrap interval; the two are resampled independently.

    For a speedup, `over` is the baseline's row and `under` the method's.
    """
    draws = row_medians(over, 2 * seed + 1) / row_medians(under, 2 * seed + 2)
    return percentile_interval(draws, float(np.median(over["samples"]) / np.median(under["samples"])))


def cliffs_delta(a: Sequence[float], b: Sequence[float]) -> float:
    """Probability that a sample of `a` is larger than one of `b`, minus the opposite; −1 to 1, 0 when they
    overlap evenly."""
    x, y = np.sort(np.asarray(a, dtype=float)), np.sort(np.asarray(b, dtype=float))
    larger = np.searchsorted(y, x, side="left").sum()
    smaller = (y.size - np.searchsorted(y, x, side="right")).sum()
    return float((larger - smaller) / (x.size * y.size))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values that keep the family-wise error rate."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (p.size - rank) * p[index]))
        adjusted[index] = running
    return adjusted.tolist()
