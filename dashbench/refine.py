"""More lengths where a crossover is: a suite like another, with contexts inside the intervals found."""

from __future__ import annotations

import math
from pathlib import Path

import yaml

from dashbench.analysis.speedup import Crossover, crossovers, speedups
from dashbench.readouts import load
from dashbench.store import StoreError

STEP = 128  # tokens; every block size in use divides it
LENGTHS_EACH = 3


def lengths_near(found: Crossover, measured: list[int]) -> list[int]:
    """Lengths to measure next for one crossover: inside its interval, or around the two measured lengths that
    enclose it where the interval is open.

    Args:
        found: a crossover.
        measured: lengths of its line.

    Returns:
        Multiples of 128 that were not measured yet; none if the crossover is no length.
    """
    if found.verdict != "at":
        return []
    below = max((n for n in measured if n <= found.length), default=measured[0])
    above = min((n for n in measured if n >= found.length), default=measured[-1])
    low = max(below, found.low or below)
    high = min(above, found.high or above)
    if high - low < 2 * STEP:
        low, high = found.length - STEP, found.length + STEP
    picked = [
        STEP * round(math.exp(math.log(low) + share * math.log(high / low)) / STEP)
        for share in (i / (LENGTHS_EACH - 1) for i in range(LENGTHS_EACH))
    ]
    return sorted({n for n in picked if n > 0 and n not in measured})


def refine_suite(stores: list[Path], suite: Path, out: Path | None) -> Path:
    """Runs a suite at further lengths near its crossovers.

    Args:
        stores: rows so far.
        suite: of kind `kernels`; its `context` is replaced.
        out: folder of the new suite file and its rows; None: `out/NAME-refined`.

    Returns:
        The file of the new rows.

    Raises:
        StoreError: there is no crossover to refine, or the suite is of another kind.
        SuiteError: the suite is not valid.
    """
    from dashbench.progress import Progress
    from dashbench.runner import WorkerFailed, run_suite
    from dashbench.suite import load_suite

    loaded = load_suite(suite)
    if loaded.spec.kind != "kernels":
        raise StoreError(f"{suite}: a crossover is of kernels, and this suite is of kind {loaded.spec.kind}")
    rows = load(stores)
    points = speedups(rows)
    methods = {p.method for p in loaded.points()}
    wanted = sorted(
        {
            n
            for found in crossovers(rows)
            if found.line.method in methods
            for n in lengths_near(found, [p.row["context"] for p in points[found.line]])
        }
    )
    if not wanted:
        raise StoreError(
            "no crossover of the suite's methods lies between measured lengths: nothing to refine"
        )
    name = f"{loaded.spec.name}-refined"
    folder = out or Path("out") / name
    folder.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_load(suite.read_text(encoding="utf-8"))
    content |= {"name": name, "context": wanted}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    further = load_suite(path)
    with Progress(further.id) as progress:
        try:
            return run_suite(further, folder, on_event=progress.event).store
        except WorkerFailed as problem:
            progress.stop()
            raise StoreError(str(problem)) from None
