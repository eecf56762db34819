"""Where the time goes at short context, and what a method would have to lose to break even with dense.

A row has its whole latency and its stages, each timed alone. What the stages do not explain is the time
between them and in the wrapper; what launching from Python adds on top of the time on the GPU is the host's
share (rows launched eagerly have both). Stages alone can sum to more than the whole, because inside it they
overlap or find warm caches; then they are scaled to fit, and the factor is reported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dashbench.analysis.points import DenseRows, finished, is_dense, routing_name
from dashbench.analysis.statistics import Interval, ratio_of_rows

LONGEST = 16384

# Stages by what they are for, in the order in which they run.
PARTS = (
    ("append", ("append",)),
    ("summarize", ("summarize", "compress", "summaries", "pool")),
    ("route", ("scores", "route", "select", "topk")),
    ("attend", ("attend", "window", "compressed_attend")),
    ("combine", ("combine", "merge", "gate")),
)
WRAPPER, LAUNCH = "between stages", "host launch"
PART_ORDER = (*(name for name, _ in PARTS), "other stages", WRAPPER, LAUNCH)


def part_of(stage: str) -> str:
    """The part that a stage belongs to: `compress` -> `summarize`."""
    return next((name for name, stages in PARTS if stage in stages), "other stages")


@dataclass(frozen=True)
class Overhead:
    """One method at one setting against the best dense method there.

    Attributes:
        row, dense: the two rows.
        ratio: the method's median over dense's, 95 % interval; above 1 is overhead.
        parts: ms by part (`PART_ORDER`), adding up to the method's latency.
        scaled: factor by which the stages were scaled to fit into the whole; 1 if they fit.
        lose: share of the whole latency that must go to break even, 0 if ahead.
        lose_of: the same as a share of each part; above 1: even without that part it would be behind.
        fusing: share of the latency that one fused kernel could save at most: what is between the stages
            and the launches. The work of the stages stays.
        ceiling: share of the latency above what the machine's measured ceiling allows for the work kept,
            which no kernel can save more than; None where it is not known.
    """

    row: dict[str, Any]
    dense: dict[str, Any]
    ratio: Interval
    parts: dict[str, float]
    scaled: float
    lose: float
    lose_of: dict[str, float]
    fusing: float
    ceiling: float | None


def _parts(row: dict[str, Any]) -> tuple[dict[str, float], float]:
    whole = row["latency_ms"]
    busy = whole
    if row["launch"] == "eager" and row.get("gpu_ms"):
        busy = min(whole, row["gpu_ms"])
    stages: dict[str, float] = {}
    for name, ms in row["stages_ms"].items():
        stages[part_of(name)] = stages.get(part_of(name), 0.0) + ms
    total = sum(stages.values())
    scaled = min(1.0, busy / total) if total else 1.0
    parts = {name: ms * scaled for name, ms in stages.items()}
    parts[WRAPPER] = max(0.0, busy - total * scaled)
    parts[LAUNCH] = whole - busy
    return {name: parts[name] for name in PART_ORDER if parts.get(name, 0.0) > 1e-4 * whole}, scaled


def overheads(rows: Iterable[dict[str, Any]], longest: int = LONGEST) -> list[Overhead]:
    """Overheads of every sparse row with stages and a dense row beside it, up to a context.

    Not of whole layers (phase `layer`): what is not attention there is no overhead.

    Args:
        rows: stored rows of any kind.
        longest: tokens.
    """
    rows = list(rows)
    dense = DenseRows(rows)
    out = []
    for i, row in enumerate(finished(rows)):
        base = dense.beside(row)
        apart = row["phase"] != "layer" and row.get("stages_ms")
        if not apart or is_dense(row) or row["context"] > longest or base is None:
            continue
        parts, scaled = _parts(row)
        whole = row["latency_ms"]
        lose_ms = max(0.0, whole - base["latency_ms"])
        bound = row.get("percent_of_ceiling")
        out.append(
            Overhead(
                row,
                base,
                ratio_of_rows(row, base, seed=i),
                parts,
                scaled,
                lose_ms / whole,
                {name: lose_ms / ms for name, ms in parts.items()},
                (parts.get(WRAPPER, 0.0) + parts.get(LAUNCH, 0.0)) / whole,
                None if bound is None else max(0.0, 1 - bound / 100),
            )
        )
    return sorted(
        out,
        key=lambda o: (
            o.row["phase"] != "prefill",
            o.row["batch"],
            o.row["launch"],
            o.row["cache"],
            routing_name(o.row),
            o.row["method"],
            o.row["sparsity_target"] or 0.0,
            o.row["context"],
        ),
    )
