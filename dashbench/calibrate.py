"""From a sparsity asked for to a knob, on the actual inputs.

Methods with a budget get it by arithmetic and then one measured step to either side; methods whose sparsity
is an outcome (DashAttention's scaling factor) by bisection on the logarithm of the knob. Either way the
sparsity that counts is the one measured by `Operator.kept`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.methods import Method
from dashbench.rows import Point
from dashbench.sparsity import definitions

MAX_STEPS = 24
# The knob of a bisected method may lie anywhere in here; DashAttention's scaling factor is near 1.
KNOB_RANGE = (1e-3, 1e3)


def measured(operator: Operator, problem: Problem) -> float:
    """s_flop of a prepared operator; 0 if it turned out dense."""
    if operator.kept is None:
        return 0.0
    return definitions(operator.kept(), problem.start, problem.key.shape[2], problem.block_size)["s_flop"]


def budget_sparsity(blocks: int, start: int, rows: int, block: int) -> float:
    """s_flop of a method that keeps `blocks` blocks (own block included) for every query that has so many.

    Query i keeps min(⌊i/C⌋, blocks − 1) whole blocks and the i mod C + 1 tokens of its own, of i + 1.
    """
    position = np.arange(start, start + rows, dtype=np.int64)
    kept = np.minimum(position // block, blocks - 1) * block + position % block + 1
    return 1 - int(kept.sum()) / int((position + 1).sum())


def budget_for(target: float, start: int, rows: int, block: int) -> int:
    """Number of blocks whose s_flop is nearest to the target (s_flop falls as blocks are added)."""
    low, high = 1, -(-(start + rows) // block)
    while low < high:
        middle = (low + high) // 2
        if budget_sparsity(middle, start, rows, block) <= target:
            high = middle
        else:
            low = middle + 1
    candidates = [n for n in (low - 1, low) if n >= 1]
    return min(candidates, key=lambda n: abs(budget_sparsity(n, start, rows, block) - target))


class KnobCache:
    """Knobs already found, in a JSON file; a broken or missing file is an empty cache."""

    def __init__(self, path: Path | None):
        self.path = path
        try:
            self.known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path else {}
        except (OSError, ValueError):
            self.known = {}

    def get(self, key: str) -> dict[str, Any] | None:
        """The knobs stored under a key."""
        return self.known.get(key)

    def put(self, key: str, knobs: dict[str, Any]) -> None:
        """Stores and writes at once; a cache that cannot be written is only slower."""
        self.known[key] = knobs
        if self.path:
            try:
                temporary = self.path.with_suffix(".tmp")
                temporary.write_text(json.dumps(self.known, indent=1, sort_keys=True))
                temporary.replace(self.path)
            except OSError:
                pass


def find_knobs(
    method: Method,
    point: Point,
    problem: Problem,
    prepare: Callable[..., Operator],
    cache: KnobCache | None = None,
) -> tuple[dict[str, Any], Operator]:
    """Finds the knob at which the method's s_flop on these inputs is the point's target, and prepares it.

    Args:
        method: its row in the table.
        point: with `sparsity_target` and `sparsity_tolerance`; without a target its `knobs` are used as they
            are.
        problem: the actual inputs.
        prepare: the method's `prepare`.
        cache: of knobs found before. A cached knob is measured again before it is believed, so a method that
            has changed since, or other inputs under the same name, cost a new search and nothing else.

    Returns:
        (knobs, prepared operator).

    Raises:
        Unsupported: the target is out of reach on these inputs; says what is reachable.
    """
    fixed = {**method.defaults, **point.knobs}
    if point.sparsity_target is None or method.knob is None or method.knob in point.knobs:
        return fixed, prepare(problem, **fixed)
    target, tolerance = point.sparsity_target, point.sparsity_tolerance
    # How it is timed does not change sparsity: one entry serves all of them.
    key = point.model_copy(update={"cache": "cold", "launch": "eager"}).key()
    known = cache.get(key) if cache else None
    if known is not None:
        operator = prepare(problem, **known)
        if abs(measured(operator, problem) - target) <= tolerance:
            return known, operator
        del operator

    tried: dict[float, float] = {}

    def sparsity(value: float) -> float:
        if value not in tried:
            tried[value] = measured(prepare(problem, **{**fixed, method.knob: value}), problem)
        return tried[value]

    if method.knob_kind == "arithmetic":
        found = _by_budget(sparsity, target, tolerance, problem)
    else:
        found = _by_bisection(sparsity, target, tolerance)
    if abs(tried[found] - target) > tolerance:
        low, high = min(tried), max(tried)
        raise Unsupported(
            f"cannot reach s_flop {target:g} ± {tolerance:g} on these inputs: "
            f"{method.knob} from {low:.4g} to {high:.4g} gives {tried[low]:.4f} to {tried[high]:.4f}, "
            f"nearest is {tried[found]:.4f} at {found:.6g}"
        )
    knobs = {**fixed, method.knob: found}
    if cache:
        cache.put(key, knobs)
    return knobs, prepare(problem, **knobs)


def _by_budget(sparsity: Callable[[int], float], target: float, tolerance: float, problem: Problem) -> int:
    """Budget nearest to the target: arithmetic, then steps of one while they come nearer.

    Forced blocks that overlap, or a window beside the selection, put the arithmetic a little off.
    """
    blocks = -(-problem.key.shape[2] // problem.block_size)
    guess = budget_for(target, problem.start, problem.query.shape[2], problem.block_size)
    for _ in range(MAX_STEPS):
        miss = sparsity(guess) - target
        if abs(miss) <= tolerance / 10:
            break
        step = guess + (1 if miss > 0 else -1)
        if not 1 <= step <= blocks or abs(sparsity(step) - target) >= abs(miss):
            break
        guess = step
    return guess


def _by_bisection(sparsity: Callable[[float], float], target: float, tolerance: float) -> float:
    """Knob nearest to the target; s_flop grows with it. Starts at one and widens by factors of four."""
    low = high = 1.0
    tried = {1.0: sparsity(1.0)}
    while tried[high] < target and high < KNOB_RANGE[1]:
        low, high = high, min(4 * high, KNOB_RANGE[1])
        tried[high] = sparsity(high)
    while tried[low] > target and low > KNOB_RANGE[0]:
        low, high = max(low / 4, KNOB_RANGE[0]), low
        tried[low] = sparsity(low)

    def nearest() -> float:
        return min(tried, key=lambda value: abs(tried[value] - target))

    for _ in range(MAX_STEPS):
        # A bracket this narrow holds a jump: nothing between its two sparsities can be had.
        if abs(tried[nearest()] - target) <= tolerance / 4 or high / low < 1 + 1e-5:
            break
        middle = math.sqrt(low * high)
        tried[middle] = sparsity(middle)
        if tried[middle] < target:
            low = middle
        else:
            high = middle
    return nearest()
