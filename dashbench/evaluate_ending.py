"""What `dashbench run` prints of an accuracy suite: a score with its standard error for every task,
checkpoint and sparsity."""

from __future__ import annotations

import statistics
from typing import Any

from rich.table import Table

from dashbench.runner import DONE, Summary
from dashbench.store import newest, read_rows
from dashbench.suite import Suite
from dashbench.tables import trouble_lines, wide_console

FAILED, FINE = 1, 0


def print_ending(suite: Suite, summary: Summary) -> int:
    """Table and one line on how the run ended; returns the exit code."""
    console = wide_console()
    mine = {p.key() for p in suite.points()}
    rows = [r for r in newest(read_rows(summary.store)) if r["key"] in mine]
    answered = [r for r in rows if r["status"] == "ok"]
    if answered:
        console.print(scores_table(answered))
    for line in trouble_lines(rows):
        console.print(line, markup=False)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.counts.items())) or "nothing new"
    before = f", {summary.already} were answered before" if summary.already else ""
    console.print(f"rows: {summary.store} ({counts}{before})", markup=False)
    if summary.interrupted or summary.left:
        why = "interrupted" if summary.interrupted else "time is up"
        console.print(f"{why}: {summary.left} questions left; the same command goes on with them")
    return FAILED if any(r["status"] not in DONE for r in rows) else FINE


def groups(rows: list[dict[str, Any]]) -> dict[tuple, list[dict[str, Any]]]:
    """Answered rows by (task, length, label, knob)."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        knob = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row["knob"].items()
        )
        found.setdefault((row["task"], row["length"], row["label"], knob), []).append(row)
    return found


def standard_error(scores: list[float]) -> float | None:
    """Of the mean; None below two samples."""
    return statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None


def scores_table(rows: list[dict[str, Any]]) -> Table:
    """One line a task, length, checkpoint and setting."""
    table = Table(header_style="bold", pad_edge=False)
    for column in ("task", "length", "checkpoint", "knob", "S_flop", "score", "samples"):
        left = column in ("task", "checkpoint", "knob")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for (task, length, label, knob), members in sorted(groups(rows).items()):
        scores = [r["score"] for r in members]
        error = standard_error(scores)
        shown = f"{100 * statistics.fmean(scores):.1f}" + (
            f" ± {100 * error:.1f}" if error is not None else ""
        )
        sparsity = statistics.fmean(r["s_flop"] for r in members)
        where = str(length) if length else ""
        table.add_row(task, where, label, knob, f"{sparsity:.3f}", shown, str(len(scores)))
    return table
