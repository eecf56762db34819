"""What verbs print of plans, runs and stores."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.table import Table

from dashbench.figures import draw_latency, draw_speedup
from dashbench.plan import Planned
from dashbench.runner import DONE, Summary
from dashbench.store import newest, read_rows, store_files
from dashbench.suite import Suite
from dashbench.tables import results_table, trouble_lines, wide_console

FAILED, FINE = 1, 0


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def print_plan(suite: Suite, planned: list[Planned], device: dict) -> None:
    """The grid by method and phase, the estimated time, and the reasons of skips."""
    console = wide_console()
    table = Table(header_style="bold", pad_edge=False)
    for column in ("method", "phase", "points", "to run", "skipped", "time"):
        table.add_column(column, justify="left" if column in ("method", "phase") else "right", no_wrap=True)
    groups: dict[tuple[str, str], list[Planned]] = {}
    for item in planned:
        phase = getattr(item.point, "phase", suite.spec.kind)
        groups.setdefault((item.point.method, phase), []).append(item)
    for (method, phase), items in groups.items():
        skipped = sum(i.skip is not None for i in items)
        seconds = sum(i.seconds for i in items)
        run = len(items) - skipped
        table.add_row(
            method, phase, str(len(items)), str(run), str(skipped or ""), _duration(seconds) if run else ""
        )
    console.print(f"{suite.id} on {device['device']}")
    console.print(table)
    for (method, reason), count in Counter((i.point.method, i.skip) for i in planned if i.skip).most_common():
        console.print(f"{count} skipped: {method}: {reason}", markup=False)
    run = [i for i in planned if i.skip is None]
    total = _duration(sum(i.seconds for i in run))
    console.print(f"{len(planned)} points, {len(run)} to run, roughly {total}")


def print_ending(suite: Suite, summary: Summary) -> int:
    """Table, figures and one line on how the run ended; returns the exit code."""
    console = wide_console()
    rows = newest(read_rows(summary.store))
    mine = {p.key() for p in suite.points()}
    shown = [r for r in rows if r["key"] in mine]
    if shown:
        console.print(results_table(shown))
        for line in trouble_lines(shown):
            console.print(line, markup=False)
    environments = {r["environment_key"] for r in shown if r["status"] == "ok"}
    if len(environments) == 1:
        for draw, kind in ((draw_latency, "latency"), (draw_speedup, "speedup")):
            path = summary.store.with_name(f"{summary.store.stem}-{kind}.png")
            device = next(r["environment"]["device"] for r in shown if r["status"] == "ok")
            if draw(shown, path, f"{suite.spec.name}, {device}"):
                console.print(f"figure: {path}", markup=False)
    elif len(environments) > 1:
        console.print(
            f"no figures: the store holds rows of {len(environments)} environments, which are not mixed"
        )
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.counts.items())) or "nothing new"
    before = f", {summary.already} were finished before" if summary.already else ""
    console.print(f"rows: {summary.store} ({counts}{before})", markup=False)
    if summary.interrupted or summary.left:
        why = "interrupted" if summary.interrupted else "time is up"
        console.print(f"{why}: {summary.left} points left; the same command goes on with them")
    failed = [r for r in shown if r["status"] not in DONE]
    return FAILED if failed else FINE


def print_status(store: Path) -> None:
    """Counts by method and status for every file and environment of a store."""
    console = wide_console()
    for file in store_files(store):
        rows = newest(read_rows(file))
        console.print(f"{file}: {len(rows)} rows", markup=False)
        for key in sorted({r["environment_key"] for r in rows}):
            mine = [r for r in rows if r["environment_key"] == key]
            e = mine[0]["environment"]
            versions = f"torch {e['torch']}, triton {e['triton']}, driver {e['driver']}"
            console.print(f"environment {key}: {e['device']}, {versions}", markup=False)
            statuses = sorted({r["status"] for r in mine}, key=lambda s: (s not in DONE, s))
            table = Table(header_style="bold", pad_edge=False)
            table.add_column("method")
            for status in statuses:
                table.add_column(status, justify="right")
            for method in sorted({r["method"] for r in mine}):
                counts = Counter(r["status"] for r in mine if r["method"] == method)
                table.add_row(method, *(str(counts[s] or "") for s in statuses))
            console.print(table)
            for line in trouble_lines(mine):
                console.print(line, markup=False)
