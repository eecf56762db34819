"""Runs a suite of kind `train`: stage by stage, each resumable by its checkpoint, a row after every tenth.

A stage whose ten rows and whose checkpoint are there is finished; one that was interrupted starts again from
the checkpoint before it, because optimizer states are not kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dashbench.plan import Planned
from dashbench.rows_train import REPORTS, TrainPoint, TrainRow, mean_by_length
from dashbench.runner import DONE, Event, Summary
from dashbench.store import Store
from dashbench.suite import Suite

GPU_TOKENS_PER_S = 1.5e6
"""What the plan assumes; a CPU has a five-hundredth of it."""


@dataclass
class Report:
    """What a stage hands over after each tenth; the fields are `rows_train.TrainRow`'s."""

    report: int
    fields: dict[str, Any]


def stage_of(point: TrainPoint) -> tuple[str, str, int]:
    """What a checkpoint belongs to: (stage, method, seed)."""
    return point.stage, point.method, point.seed


def folder_of(out: Path, stage: tuple[str, str, int], first_seed: int) -> Path:
    """Checkpoint folder of a stage: `base`, or the method's name, with the seed where it is not the first."""
    name = "base" if stage[0] == "base" else stage[1]
    return out / "checkpoints" / (name if stage[2] == first_seed else f"{name}-seed{stage[2]}")


def row_line(row: TrainRow) -> str:
    """One line for a progress display."""
    where = f"{row.stage} {row.method} seed {row.seed}, {row.report}/{REPORTS}"
    if row.status != "ok":
        return f"{row.status:8} {where}: {row.reason}"
    scores = list(mean_by_length(row.exact_match).items())
    mean = f", held-out exact match {scores[-1][1]:.1%} at {scores[-1][0]}" if scores else ""
    speed = f"{row.tokens / 1e6:.1f} M tokens, {row.tokens_per_s / 1e6:.2f} M/s"
    return f"ok       {where}: loss {row.loss:.3f}{mean}, S_flop {row.s_flop:.2f}, {speed}"


def plan_suite(suite: Suite, points: list[TrainPoint], device: dict[str, Any]) -> list[Planned]:
    """Every report with its share of the stage's estimated time."""
    spec = suite.spec
    rate = GPU_TOKENS_PER_S / (1 if device.get("kind") == "cuda" else 500)
    planned = []
    for point in points:
        section = spec.base if point.stage == "base" else spec.continuation
        tokens = section.steps * section.tokens_per_step * (2 if point.stage == "base" else 1)
        planned.append(Planned(point, None, tokens / rate / REPORTS))
    return planned


def run_suite(
    suite: Suite,
    out: Path,
    only: list[str] | None = None,
    time_budget_s: float | None = None,
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Summary:
    """Trains every stage that is not finished; arguments as `runner.run_suite`.

    The base is always in, because every continuation starts from it. A stage that raises is a failed row and
    the next stage goes on; the time budget is looked at after each tenth.
    """
    import torch

    from dashbench import environment as machine

    spec = suite.spec
    stages: dict[tuple[str, str, int], list[TrainPoint]] = {}
    for point in suite.points():
        if only is None or point.method in only or point.stage == "base":
            stages.setdefault(stage_of(point), []).append(point)
    until = None if time_budget_s is None else time.monotonic() + time_budget_s
    environment = machine.describe("cuda" if torch.cuda.is_available() else "cpu")
    key = machine.key(environment)
    with Store(out / f"{spec.name}.jsonl") as store:
        summary = Summary(store.path)
        for notice in store.notices:
            on_event(Event("notice", text=notice))
        todo = {}
        for stage, points in stages.items():
            rows = [store.find(p.key(), key) for p in points]
            kept = (folder_of(out, stage, points[0].base_seed) / "model.safetensors").exists()
            finished = kept and all(row is not None and row["status"] in DONE for row in rows)
            failed = any(row is not None and row["status"] not in DONE for row in rows)
            if finished or (failed and not retry_failed):
                summary.already += len(points)
            else:
                todo[stage] = points
        on_event(Event("start", total=sum(map(len, todo.values())), text=environment["device"]))
        try:
            for stage, points in todo.items():
                if until is not None and time.monotonic() >= until:
                    break
                _stage(suite, out, stage, points, store, summary, (environment, key), until, on_event)
        except KeyboardInterrupt:
            summary.interrupted = True
        summary.left = sum(map(len, todo.values())) - sum(summary.counts.values())
        return summary


def _stage(suite, out, stage, points, store, summary, environment, until, on_event) -> None:
    from dashbench.miniature.cards import write_card
    from dashbench.miniature.stages import train_base, train_continuation

    spec, first_seed = suite.spec, points[0].base_seed
    folder = folder_of(out, stage, first_seed)
    longest = max(spec.base.levels[-1].lengths if stage[0] == "base" else spec.continuation.lengths)
    began = time.monotonic()
    reported = 0

    def write(number: int, status: str, fields: dict[str, Any]) -> None:
        point = points[number - 1]
        row = TrainRow(
            key=point.key(),
            **point.model_dump(exclude={"recipe"}),
            length=longest,
            suite=suite.id,
            status=status,
            environment=environment[0],
            environment_key=environment[1],
            timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_s=round(time.monotonic() - began, 3),
            **fields,
        )
        store.append(row)
        summary.counts[status] = summary.counts.get(status, 0) + 1
        on_event(Event("row", row_line(row), row=row.model_dump(mode="json"), seconds=row.wall_s or 0.0))

    def report(found: Report) -> bool:
        nonlocal reported
        reported = found.report
        write(found.report, "ok", found.fields)
        return until is None or time.monotonic() < until

    on_event(Event("point", text=f"{stage[0]} {stage[1]}, seed {stage[2]}"))
    try:
        if stage[0] == "base":
            train_base(spec, stage[2], folder, report)
        else:
            train_continuation(
                spec,
                stage[1],
                stage[2],
                folder_of(out, ("base", "dense", first_seed), first_seed),
                folder,
                report,
            )
    except Exception as problem:
        status = "oom" if "out of memory" in str(problem) else "error"
        reason = f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
        for number in range(reported + 1, REPORTS + 1):
            write(number, status, {"reason": reason})
    if reported == REPORTS:
        write_card(folder, spec, [store.find(point.key(), environment[1]) for point in points])
