"""What a suite will do, before it does it: how many points, how long, and what cannot run here and why. No
torch here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dashbench.cost import estimate_ms
from dashbench.methods import Method, registry
from dashbench.rows import Point
from dashbench.suite import Suite
from dashbench.timing_options import TimingOptions

# A method that materialises its scores may take this share of a GPU's memory for them.
SCORES_SHARE = 0.6
SCORES_METHODS = ("dense@math",)
OVERHEAD_S = 0.6  # inputs, gates and process traffic of a point


def missing_requirement(method: Method) -> str | None:
    """The pip requirement that would provide what a method needs, or None. `a|b` means either module will
    do."""
    for modules, requirement in method.requires.items():
        if not any(importlib.util.find_spec(name) for name in modules.split("|")):
            return requirement
    return None


def reachable_sparsity(point: Point) -> float:
    """The largest s_flop a method that always keeps the own block can have: nothing else is kept."""
    block, length = point.block_size, point.context
    if point.phase == "decode":
        return 1 - ((length - 1) % block + 1) / length
    whole, rest = divmod(length, block)
    kept = whole * block * (block + 1) // 2 + rest * (rest + 1) // 2
    return 1 - kept / (length * (length + 1) / 2)


def skip_reason(point: Point, device: dict[str, Any] | None, own_interpreter: bool = False) -> str | None:
    """Why a point cannot run, as far as that is known without running it.

    Args:
        point: to judge.
        device: facts of a worker's environment (`kind`, `capability`, `memory_bytes`), or None when unknown.
        own_interpreter: the method runs in another Python, whose packages cannot be seen from here.

    Returns:
        One clause for a row's `reason`, or None.
    """
    method = registry()[point.method]
    phase = point.of_attention().phase
    if phase not in method.phases:
        return f"{method.name} has no {phase}"
    if point.phase == "layer" and point.launch == "graph":
        return "a layer's training step is launched from Python: autograd is not captured"
    if point.dtype not in method.dtypes:
        return f"{method.name} does not take {point.dtype}"
    if (
        point.sparsity_target is not None
        and point.sparsity_target - point.sparsity_tolerance > reachable_sparsity(point)
    ):
        most = reachable_sparsity(point)
        return (
            f"s_flop {point.sparsity_target:g} is out of reach: "
            f"keeping only the own block of {point.block_size} gives {most:.3f}"
        )
    if device is not None:
        if device["kind"] not in method.devices:
            return f"needs a {'GPU' if device['kind'] == 'cpu' else 'CPU'}"
        if point.launch == "graph" and device["kind"] == "cpu":
            return "CUDA graphs need a GPU"
        if (
            method.min_capability
            and device["capability"]
            and tuple(device["capability"]) < method.min_capability
        ):
            needed = ".".join(map(str, method.min_capability))
            return (
                f"needs compute capability {needed}, this GPU has {'.'.join(map(str, device['capability']))}"
            )
        if method.name in SCORES_METHODS and device.get("memory_bytes"):
            queries = 1 if point.phase == "decode" else point.context
            # scores, their mask and the probabilities
            scores = 3 * point.batch * point.shape.query_heads * queries * point.context * 4
            if scores > SCORES_SHARE * device["memory_bytes"]:
                return f"its scores would take {scores / 2**30:.0f} GiB"
    if not own_interpreter and (requirement := missing_requirement(method)):
        return f"not installed; pip install '{requirement}' enables it"
    return None


@dataclass(frozen=True)
class Planned:
    """A point with its fate: `skip` says why it will not run; `seconds` is a guess."""

    point: Point
    skip: str | None
    seconds: float


def plan_suite(suite: Suite, points: list[Point], device: dict[str, Any] | None) -> list[Planned]:
    """Judges points of a suite of kind `kernels`; see `plan`."""
    return plan(points, suite.spec.timing, device, suite.interpreters())


def plan(
    points: Iterable[Point],
    options: TimingOptions,
    device: dict[str, Any] | None,
    interpreters: dict[str, str],
) -> list[Planned]:
    """Judges every point of a suite.

    Args:
        points: of a suite.
        options: its timing options.
        device: facts of the device, or None.
        interpreters: methods that run in a Python of their own.
    """
    out = []
    for point in points:
        reason = skip_reason(point, device, point.method in interpreters)
        call = estimate_ms(point, device) / 1e3
        eager_reference = point.method.endswith("@reference")
        call *= 10 if eager_reference else 1
        # Calls so long that the fewest samples are too many: see `timing.stop_reason`.
        fewest = min(options.min_samples * call, max(3 * call, 4 * options.max_seconds))
        seconds = max(options.max_seconds, fewest) + 6 * call
        if call > options.timeout_seconds:
            seconds = options.timeout_seconds  # its first step is given up on
        out.append(Planned(point, reason, 0.0 if reason else OVERHEAD_S + seconds))
    return out
