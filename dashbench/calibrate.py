"""From a sparsity asked for to a knob: arithmetic for methods with a budget, bisection for methods whose
sparsity is an outcome."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.methods import Method
from dashbench.rows import Point
from dashbench.sparsity import definitions

MAX_STEPS = 24
# The knob of a bisected method may lie anywhere in here; DashAttention's scaling factor is near 1.
KNOB_RANGE = (1e-3, 1e3)


def measured(operator: Operator, problem: Problem) -> float:
    """s_flop of a prepared operator."""
    return definitions(operator.kept(), problem.start, problem.key.shape[2], problem.block_size)["s_flop"]


def budget_sparsity(blocks: int, start: int, rows: int, block: int) -> float:
    """s_flop of a method that keeps `blocks` blocks (own block included) for every query that has so many."""
    kept = visible = 0
    # Whole blocks of queries at a time: query i keeps min(own blocks before it, blocks - 1) full blocks and
    # its own part.
    for first in range(start - start % block, start + rows, block):
        low, high = max(first, start), min(first + block, start + rows)
        count = high - low
        own = sum(range(low % block + 1, low % block + 1 + count))
        kept += count * min(first // block, blocks - 1) * block + own
        visible += sum(range(low + 1, high + 1))
    return 1 - kept / visible


def budget_for(target: float, start: int, rows: int, block: int) -> int:
    """Number of blocks whose s_flop is nearest to the target (s_flop falls as blocks are added)."""
    low, high = 1, (start + rows + block - 1) // block
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
    """Finds the knob at which the method's s_flop on these inputs is the point's target, and prepares the
    method with it.

    Args:
        method: its row in the table.
        point: with `sparsity_target` and `sparsity_tolerance`; without a target its `knobs` are used as they
            are.
        problem: the actual inputs.
        prepare: the method's `prepare`.
        cache: of knobs found before.

    Returns:
        (knobs, prepared operator).

    Raises:
        Unsupported: the target is out of reach on these inputs; says what is reachable.
    """
    fixed = {**method.defaults, **point.knobs}
    if point.sparsity_target is None or method.knob is None or method.knob in point.knobs:
        return fixed, prepare(problem, **fixed)
    target, tolerance = point.sparsity_target, point.sparsity_tolerance
    # Timing way does not change sparsity: one entry serves all of them.
    key = point.model_copy(update={"cache": "cold", "launch": "eager"}).key()
    known = cache.get(key) if cache else None
    if known is not None:
        operator = prepare(problem, **known)
        if abs(measured(operator, problem) - target) <= tolerance:
            return known, operator

    def attempt(value: float | int) -> tuple[float, dict[str, Any], Operator]:
        knobs = {**fixed, method.knob: value}
        operator = prepare(problem, **knobs)
        return measured(operator, problem), knobs, operator

    search = _by_budget if method.knob_kind == "arithmetic" else _by_bisection
    sparsity, knobs, operator = search(attempt, target, tolerance, problem)
    if abs(sparsity - target) > tolerance:
        raise Unsupported(
            f"cannot reach s_flop {target:g} ± {tolerance:g} here: nearest is {sparsity:.4f} "
            f"at {method.knob} = {knobs[method.knob]:g}"
        )
    if cache:
        cache.put(key, knobs)
    return knobs, operator


def _by_budget(attempt, target: float, tolerance: float, problem: Problem):
    rows, block = problem.query.shape[2], problem.block_size
    guess = budget_for(target, problem.start, rows, block)
    best = attempt(guess)
    # Forced blocks that overlap or fall outside make the count a little off: walk to the best neighbour.
    step = 1 if best[0] > target else -1
    for _ in range(MAX_STEPS):
        if abs(best[0] - target) <= tolerance / 10 or guess + step < 1:
            break
        other = attempt(guess + step)
        if abs(other[0] - target) >= abs(best[0] - target):
            break
        best, guess = other, guess + step
    return best


def _by_bisection(attempt, target: float, tolerance: float, problem: Problem):
    """Bisection on the logarithm of the knob; s_flop grows with it. Starts at one and widens by factors of
    four."""
    low = high = 1.0
    best = attempt(1.0)
    while best[0] < target and high < KNOB_RANGE[1]:
        low, high = high, high * 4
        best = attempt(high)
    if high == 1.0:
        while best[0] > target and low > KNOB_RANGE[0]:
            low, high = low / 4, low
            best = attempt(low)
    found = best
    for _ in range(MAX_STEPS):
        if abs(found[0] - target) <= tolerance / 4:
            break
        middle = math.sqrt(low * high)
        trial = attempt(middle)
        if trial[0] < target:
            low = middle
        else:
            high = middle
        if abs(trial[0] - target) < abs(found[0] - target):
            found = trial
    return found
