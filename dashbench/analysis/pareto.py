"""Accuracy against a cost: which configurations are worth having, how sure that is, and what follows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np

from dashbench.analysis.accuracy import (
    Configuration,
    PairedTest,
    Scores,
    accuracy_rows,
    around,
    draws,
    natural_pairs,
    paired_tests,
    scores,
    task_mean,
)
from dashbench.analysis.frontier import attainment, hypervolume, nondominated
from dashbench.analysis.joining import KernelCosts, relative_flops
from dashbench.analysis.points import AnalysisError, finished, one_environment
from dashbench.analysis.statistics import Interval

Axis = Literal["sparsity", "latency", "memory", "flops"]
AXES: dict[str, str] = {
    "sparsity": "kept tokens (share of causal)",
    "latency": "latency of one layer's attention (ms)",
    "memory": "extra memory of one layer's attention (MiB)",
    "flops": "FLOPs with routing (share of dense)",
}
SURE = 0.95
GRID = 121
# Accuracy that "equal accuracy" may lose against dense, as a share of 1.
ALLOWED_LOSS = 0.01
SPARSITIES = (0.5, 0.75, 0.875, 0.9375)


@dataclass(frozen=True)
class FrontierPoint:
    """A configuration in the plane.

    Attributes:
        configuration: which.
        sparsity: measured `s_flop`, mean over documents.
        cost, accuracy: with 95 % bootstrap intervals.
        probability: share of the draws in which no other configuration dominates it.
        mark: `on` the frontier or `off` it in at least 95 % of the draws; otherwise a `tie`, which the data
            cannot separate from the frontier.
    """

    configuration: Configuration
    sparsity: float
    cost: Interval
    accuracy: Interval
    probability: float
    mark: Literal["on", "tie", "off"]


@dataclass(frozen=True)
class MethodFrontier:
    """The frontier of one method's configurations.

    Attributes:
        method: name.
        grid: `[G]` costs.
        low, middle, high: `[G]` accuracy attained by 97.5, 50 and 2.5 % of the draws; −inf where fewer do.
        hypervolume: share of the rectangle from the reference point to (no cost, all right) it dominates.
    """

    method: str
    grid: np.ndarray
    low: np.ndarray
    middle: np.ndarray
    high: np.ndarray
    hypervolume: Interval


@dataclass(frozen=True)
class Readout:
    """One number read off the frontiers.

    Attributes:
        method: whose.
        question: `speedup at equal accuracy`, `accuracy at equal sparsity` or `accuracy at equal latency`.
        at: what is held equal, in words.
        value: with its interval; None if the method does not get there.
        reached: share of the draws in which the method gets there.
    """

    method: str
    question: str
    at: str
    value: Interval | None
    reached: float


@dataclass(frozen=True)
class Pareto:
    """Everything about one length.

    Attributes:
        axis: the cost.
        table: the scores.
        points: by method and sparsity.
        methods: a frontier for each method.
        differences: hypervolume of a method less that of another over the costs that both reach, with
            intervals.
        readouts, tests: what was read off, and the paired tests.
        left_out: configurations without a place in the plane, and why.
        note: where costs come from.
    """

    axis: Axis
    table: Scores
    points: list[FrontierPoint]
    methods: list[MethodFrontier]
    differences: list[tuple[str, str, Interval]]
    readouts: list[Readout]
    tests: list[PairedTest]
    left_out: dict[Configuration, str] = field(default_factory=dict)
    note: str = ""

    def lines(self) -> dict[tuple[str, str], list[FrontierPoint]]:
        """Points that a figure joins, by cost, for each (method, its name in the table): checkpoints are kept
        apart, the one that bears the method's name first."""
        found: dict[tuple[str, str], list[FrontierPoint]] = {}
        for p in sorted(self.points, key=lambda p: (*p.configuration.order[:3], p.cost.value)):
            found.setdefault((p.configuration.method, p.configuration.name), []).append(p)
        return found


def _costs(
    axis: Axis, table: Scores, sparsity: np.ndarray, kernels: KernelCosts | None
) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Point costs `[C]`, draws `[S, C]`, and why some are missing."""
    values, drawn, missing = [], [], {}
    means = task_mean(table, table.sparsity)
    for i, c in enumerate(table.configurations):
        if axis == "sparsity":
            values.append(1 - means[i])
            drawn.append(1 - sparsity[:, i])
        elif axis == "flops":
            values.append(float(relative_flops(c.method, means[i])))
            drawn.append(relative_flops(c.method, sparsity[:, i]))
        else:
            found = kernels.cost(c.method, float(means[i]), table.length) if kernels else None
            scale = 1.0 if axis == "latency" else 1 / 2**20
            if found is None:
                missing[i] = f"no kernel rows at its sparsity and {table.length} tokens"
                values.append(np.nan)
                drawn.append(np.full(len(sparsity), np.nan))
            else:
                values.append(found.value * scale)
                drawn.append(found.draws * scale)
    return np.array(values), np.stack(drawn, 1), missing


def _interpolated(x: np.ndarray, y: np.ndarray, at: float) -> np.ndarray:
    """`y` at `at` along the curve through each draw's points, `[S, P] -> [S]`; NaN outside of them."""
    order = np.argsort(x, axis=1, kind="stable")
    x, y = np.take_along_axis(x, order, 1), np.take_along_axis(y, order, 1)
    right = np.clip((x < at).sum(1), 1, x.shape[1] - 1) if x.shape[1] > 1 else np.zeros(len(x), dtype=int)
    rows = np.arange(len(x))
    left = np.maximum(right - 1, 0)
    x0, x1, y0, y1 = x[rows, left], x[rows, right], y[rows, left], y[rows, right]
    share = np.where(x1 > x0, (at - x0) / np.where(x1 > x0, x1 - x0, 1.0), 0.0)
    # Measured sparsities wobble about the one asked for; a hair outside still counts as there.
    outside = (share < -0.05) | (share > 1.05) if x.shape[1] > 1 else np.abs(x0 - at) > 0.01
    return np.where(outside, np.nan, y0 + np.clip(share, 0.0, 1.0) * (y1 - y0))


def _cheapest(cost: np.ndarray, accuracy: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """Least cost at which a draw's curve (accuracy over log cost, its points joined) is at least `floor[S]`;
    NaN where it never is."""
    order = np.argsort(cost, axis=1, kind="stable")
    x, y = np.log(np.take_along_axis(cost, order, 1)), np.take_along_axis(accuracy, order, 1)
    enough = y >= floor[:, None]
    first = np.where(enough.any(1), enough.argmax(1), -1)
    out = np.full(len(x), np.nan)
    rows = np.flatnonzero(first >= 0)
    out[rows] = x[rows, first[rows]]
    inside = np.flatnonzero(first > 0)
    right = first[inside]
    y0, y1 = y[inside, right - 1], y[inside, right]
    share = (floor[inside] - y0) / (y1 - y0)
    out[inside] = x[inside, right - 1] + share * (x[inside, right] - x[inside, right - 1])
    return np.exp(out)


def _readout(method: str, question: str, at: str, value: float, values: np.ndarray) -> Readout:
    reached = np.isfinite(values)
    share = float(reached.mean())
    known = np.isfinite(value) and share > 0.5
    return Readout(method, question, at, around(values[reached], value) if known else None, share)


def _read_off(axis: Axis, table: Scores, cost: np.ndarray, accuracy: np.ndarray) -> list[Readout]:
    """Read-outs from draws whose first row is the point estimate."""
    out: list[Readout] = []
    # A knob moves along one checkpoint's curve, not from a checkpoint to another; a method's answer is that
    # of its best one.
    curves: dict[str, dict[str, list[int]]] = {}
    for i, c in enumerate(table.configurations):
        curves.setdefault(c.method, {}).setdefault(c.checkpoint, []).append(i)
    sparse = sorted(curves.keys() - {"dense"})

    def most(m: str, x: np.ndarray, at: float) -> np.ndarray:
        """Highest accuracy of the method's curves at `x` = `at`."""
        found = [_interpolated(x[:, curve], accuracy[:, curve], at) for curve in curves[m].values()]
        return np.fmax.reduce(found)

    if axis == "sparsity":
        for s in SPARSITIES:
            for m in sparse:
                values = most(m, 1 - cost, s)
                if np.isfinite(values).any():
                    at = f"{100 * s:g} % sparsity"
                    out.append(_readout(m, "accuracy at equal sparsity", at, values[0], values[1:]))
    if "dense" not in curves:
        return out
    dense = next(iter(curves["dense"].values()))[0]
    floor = accuracy[:, dense] - ALLOWED_LOSS
    for m in sparse:
        cheapest = [_cheapest(cost[:, curve], accuracy[:, curve], floor) for curve in curves[m].values()]
        values = cost[:, dense] / np.fmin.reduce(cheapest)
        question = {
            "latency": "speedup at equal accuracy",
            "memory": "memory saved at equal accuracy",
            "sparsity": "tokens saved at equal accuracy",
            "flops": "FLOPs saved at equal accuracy",
        }[axis]
        at = f"at most {100 * ALLOWED_LOSS:g} point below dense"
        out.append(_readout(m, question, at, values[0], values[1:]))
    if axis == "latency":
        for share in (0.75, 0.5, 0.33):
            for m in sparse:
                values = most(m, np.log(cost / cost[:, [dense]]), float(np.log(share)))
                if np.isfinite(values).any():
                    at = f"{100 * share:g} % of dense latency"
                    out.append(_readout(m, "accuracy at equal latency", at, values[0], values[1:]))
    return out


def _one_length(axis: Axis, table: Scores, kernels: KernelCosts | None, seed: int) -> Pareto:
    accuracy, sparsity = draws(table, seed)
    values = task_mean(table, table.score)
    means = task_mean(table, table.sparsity)
    costs, cost_draws, missing = _costs(axis, table, sparsity, kernels)
    left_out = {**table.left_out, **{table.configurations[i]: why for i, why in missing.items()}}
    keep = [i for i in range(len(table.configurations)) if i not in missing]
    tests = paired_tests(table, natural_pairs(table), seed + 1)
    if not keep:
        return Pareto(axis, table, [], [], [], [], tests, left_out)
    kept = Scores(
        table.length,
        [table.configurations[i] for i in keep],
        table.tasks,
        table.documents,
        table.score[keep],
        table.sparsity[keep],
    )
    accuracy, cost_draws, costs, values = accuracy[:, keep], cost_draws[:, keep], costs[keep], values[keep]
    on = nondominated(cost_draws, accuracy).mean(0)
    points = [
        FrontierPoint(
            c,
            float(means[keep[i]]),
            around(cost_draws[:, i], float(costs[i])),
            around(accuracy[:, i], float(values[i])),
            float(on[i]),
            "on" if on[i] >= SURE else "off" if on[i] <= 1 - SURE else "tie",
        )
        for i, c in enumerate(kept.configurations)
    ]
    worst = 1.0 if axis in ("sparsity", "flops") else float(costs.max())
    grid = np.geomspace(max(costs.min(), 1e-3 * worst) / 1.3, worst, GRID)
    members = {
        m: [i for i, c in enumerate(kept.configurations) if c.method == m]
        for m in sorted({c.method for c in kept.configurations})
    }

    def volume(mine: list[int], least: float = 0.0) -> tuple[float, np.ndarray]:
        """Hypervolume of points, and of their draws, down to a cost."""
        exact = hypervolume(np.maximum(costs[mine], least), values[mine], (worst, 0.0))
        drawn = hypervolume(np.maximum(cost_draws[:, mine], least), accuracy[:, mine], (worst, 0.0))
        return float(exact) / worst, drawn / worst

    methods = []
    for m, mine in members.items():
        low, middle, high = attainment(cost_draws[:, mine], accuracy[:, mine], grid, (0.975, 0.5, 0.025))
        exact, drawn = volume(mine)
        methods.append(MethodFrontier(m, grid, low, middle, high, around(drawn, exact)))
    differences = []
    for a, b in combinations([m for m in members if m != "dense"], 2):
        # A method that was not run at high sparsity is not said to have lost there.
        both_reach = max(costs[members[m]].min() for m in (a, b))
        (one, ones), (other, others) = (volume(members[m], both_reach) for m in (a, b))
        differences.append((a, b, around(ones - others, one - other)))
    readouts = _read_off(axis, kept, np.vstack([costs, cost_draws]), np.vstack([values, accuracy]))
    note = ""
    if axis in ("latency", "memory") and kernels is not None:
        way = " cache, ".join(kernels.way)
        note = f"{axis} of {kernels.phase}, batch {kernels.batch}, {way}, from kernel rows"
    return Pareto(axis, table, points, methods, differences, readouts, tests, left_out, note)


def pareto(
    rows: Iterable[dict[str, Any]],
    axis: Axis = "sparsity",
    tasks: list[str] | None = None,
    lengths: list[int] | None = None,
    phase: str = "prefill",
    batch: int | None = None,
    environment: str | None = None,
    seed: int = 0,
) -> list[Pareto]:
    """Frontiers of accuracy against a cost, one a length.

    Args:
        rows: stored rows of any kind.
        axis: `sparsity` (kept tokens), `latency`, `memory` (kernel rows at that sparsity and length) or
            `flops` (by formula, routing included).
        tasks, lengths: restrict to these.
        phase, batch: which kernel rows give latency and memory.
        environment: key of the environment, where rows come from several.
        seed: of the resampling.

    Raises:
        AnalysisError: no accuracy rows, rows of several environments, or no kernel rows where they matter.
    """
    rows = list(rows)
    samples = accuracy_rows(rows)
    found = scores(one_environment(samples, environment) if samples else samples, tasks, lengths)
    kernels = None
    if axis in ("latency", "memory"):
        timed = finished(rows)
        if not timed:
            raise AnalysisError(
                f"no kernel rows here: accuracy against {axis} needs both kinds in the stores"
            )
        quantity = "latency_ms" if axis == "latency" else "peak_bytes"
        kernels = KernelCosts(one_environment(timed, environment), phase, batch, quantity)
    out = [_one_length(axis, table, kernels, seed) for table in found]
    if not any(p.points for p in out):
        c, why = next(iter(out[0].left_out.items()))
        raise AnalysisError(f"no configuration has a {axis}: {c.label}: {why}")
    return out
