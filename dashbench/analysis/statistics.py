"""Intervals and tests on timing samples.

Latencies are skewed and sometimes bimodal, so everything here rests on medians, ranks and resampling, never
on a normal distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its interval, same unit."""

    value: float
    low: float
    high: float


def resampled_medians(samples: Sequence[float], seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Medians of bootstrap resamples.

    Args:
        samples: at least one sample.
        seed: of the resampling; different quantities that are combined need different seeds.
        resamples: how many.

    Returns:
        `[resamples]` float64.
    """
    values = np.asarray(samples, dtype=float)
    if values.size == 0:
        raise ValueError("no samples")
    draws = np.random.default_rng(seed).integers(0, values.size, size=(resamples, values.size))
    return np.median(values[draws], axis=1)


def percentile_interval(draws: np.ndarray, value: float, level: float = LEVEL) -> Interval:
    """Percentile bootstrap interval around `value`."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(low), float(high))


def ratio_of_medians(over: Sequence[float], under: Sequence[float], seed: int = 0) -> Interval:
    """median(over) / median(under) with a bootstrap interval; the two are resampled independently.

    For a speedup, `over` holds the baseline's samples and `under` the method's.
    """
    draws = resampled_medians(over, 2 * seed + 1) / resampled_medians(under, 2 * seed + 2)
    return percentile_interval(draws, float(np.median(over) / np.median(under)))


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


def bootstrap_of(
    function: Callable[[list[np.ndarray]], np.ndarray], groups: Sequence[Sequence[float]], seed: int = 0
) -> np.ndarray:
    """Resamples several groups of samples independently and applies `function` to their `[resamples]`
    medians.

    Args:
        function: maps a list of arrays `[resamples]`, one a group, to an array `[resamples]`.
        groups: samples of each group.
        seed: of the resampling.

    Returns:
        What `function` returned.
    """
    return function([resampled_medians(g, seed * 1009 + i) for i, g in enumerate(groups)])
