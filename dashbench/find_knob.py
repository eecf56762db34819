"""The knob of a model's attention at which it has the sparsity asked for: one search for all models."""

from __future__ import annotations

import math
from collections.abc import Callable

from dashbench.tasks.documents import TaskSkipped

STEPS = 14
"""Of the search of a scaling factor: halving five decades so often leaves less than a thousandth."""


def find_knob(
    measure: Callable[[float], float], knob: str, most_blocks: int, target: float, tolerance: float
) -> float:
    """The value of a knob, found by halving.

    Args:
        measure: value -> S_flop; falls with `top_k`, rises with any other knob. Each value is measured once.
        knob: `top_k` is searched among 1 … `most_blocks`, any other between 0.01 and 1000, by factors.
        most_blocks: blocks of the longest sequence.
        target: S_flop.
        tolerance: of it.

    Raises:
        TaskSkipped: no value comes as near as `tolerance`; the message says how near one does.
    """
    tried: dict[float, float] = {}

    def measured(value: float) -> float:
        if value not in tried:
            tried[value] = measure(value)
        return tried[value]

    if knob == "top_k":
        low, high = 1, most_blocks
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if measured(middle) > target else (low, middle)
        for value in (low, max(1, low - 1)):  # the target lies between the two
            measured(value)
    else:
        low, high = 1e-2, 1e3
        for _ in range(STEPS):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if measured(middle) < target else (low, middle)
            if abs(tried[middle] - target) <= tolerance / 2:
                break
    best = min(tried, key=lambda value: abs(tried[value] - target))
    if abs(tried[best] - target) > tolerance:
        raise TaskSkipped(
            f"cannot reach s_flop {target:g} ± {tolerance:g}: nearest is {tried[best]:.4f} at {knob} {best:g}"
        )
    return best
