"""Frontiers of accuracy against a cost in two dimensions: exact, and on many resampled draws at once.

A configuration is a point (cost, quality): less cost is better, more quality is better. It is dominated when
another has no more cost and no less quality, and is strictly better in one of the two; equal points do not
dominate each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def nondominated(cost: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """Which points are on the frontier, for each draw.

    Args:
        cost, quality: `[..., P]` float64, finite.

    Returns:
        `[..., P]` bool; equal points on the frontier are all true.
    """
    cost, quality = np.asarray(cost, dtype=float), np.asarray(quality, dtype=float)
    dominated = np.zeros(cost.shape, dtype=bool)
    for other in range(cost.shape[-1]):
        c, q = cost[..., other, None], quality[..., other, None]
        dominated |= (c <= cost) & (q >= quality) & ((c < cost) | (q > quality))
    return ~dominated


def _staircase(cost: np.ndarray, quality: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points by ascending cost, and the best quality up to each, along the last axis."""
    order = np.argsort(cost, axis=-1, kind="stable")
    ordered = np.take_along_axis(quality, order, -1)
    return np.take_along_axis(cost, order, -1), np.maximum.accumulate(ordered, -1)


def hypervolume(cost: np.ndarray, quality: np.ndarray, reference: tuple[float, float]) -> np.ndarray:
    """Area that the points dominate, bounded by a reference point.

    Args:
        cost, quality: `[..., P]`.
        reference: (cost, quality) of a point worse than all that count; what is beyond it adds nothing.

    Returns:
        `[...]` float64. More points never make it smaller.
    """
    steps, best = _staircase(np.asarray(cost, dtype=float), np.asarray(quality, dtype=float))
    steps = np.minimum(steps, reference[0])
    ends = np.concatenate([steps[..., 1:], np.full_like(steps[..., :1], reference[0])], axis=-1)
    return ((ends - steps) * np.maximum(0.0, best - reference[1])).sum(-1)


def attainment(
    cost: np.ndarray, quality: np.ndarray, grid: Sequence[float], levels: Sequence[float]
) -> np.ndarray:
    """Empirical attainment surfaces (Grunert da Fonseca et al. 2001) of a set of frontiers.

    Args:
        cost, quality: `[S, P]`, one set of points a draw.
        grid: `[G]` costs.
        levels: shares of draws, 0 to 1.

    Returns:
        `[levels, G]`: the highest quality that at least that share of the draws attains at no more than that
        cost; −inf where fewer do.
    """
    steps, best = _staircase(np.asarray(cost, dtype=float), np.asarray(quality, dtype=float))
    grid = np.asarray(grid, dtype=float)
    reached = np.full((steps.shape[0], grid.size), -np.inf)
    for column, limit in enumerate(grid):
        count = (steps <= limit).sum(axis=1)
        some = count > 0
        reached[some, column] = best[some, count[some] - 1]
    falling = -np.sort(-reached, axis=0)
    ranks = [min(max(int(np.ceil(level * len(reached) - 1e-9)), 1), len(reached)) - 1 for level in levels]
    return falling[ranks]
