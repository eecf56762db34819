"""What `dashbench run` prints of a latency suite: one line a model, prompt length, batch and launch."""

from __future__ import annotations

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
    measured = [r for r in rows if r["status"] == "ok"]
    if measured:
        console.print(times_table(measured))
    for line in trouble_lines(rows):
        console.print(line, markup=False)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.counts.items())) or "nothing new"
    before = f", {summary.already} were finished before" if summary.already else ""
    console.print(f"rows: {summary.store} ({counts}{before})", markup=False)
    if summary.interrupted or summary.left:
        why = "interrupted" if summary.interrupted else "time is up"
        console.print(f"{why}: {summary.left} points left; the same command goes on with them")
    return FAILED if any(r["status"] not in DONE for r in rows) else FINE


def times_table(rows: list[dict[str, Any]]) -> Table:
    """First token, between tokens, and the share of attention that the kernel rows predict."""
    table = Table(header_style="bold", pad_edge=False)
    columns = ("model", "prompt", "batch", "launch", "S_flop", "first token ms", "attention predicted ms",
               "ms a token", "p99", "attention predicted ms", "tokens/s", "GiB")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "launch") else "right", no_wrap=True)

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    order = lambda r: (r["context"], r["batch"], r["launch"], r["label"])  # noqa: E731
    for r in sorted(rows, key=order):
        memory = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**30:.1f}"
        table.add_row(
            r["label"], str(r["context"]), str(r["batch"]), r["launch"], f"{r['s_flop']:.3f}",
            shown(r["ttft_ms"]), shown(r["predicted_ttft_ms"]), shown(r["itl_ms"]), shown(r["itl_p99_ms"]),
            shown(r["predicted_itl_ms"]), shown(r["tokens_per_s"]), memory,
        )  # fmt: skip
    return table
