"""What `dashbench run` prints of a training suite: a table of stages, and the curves of loss and score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from dashbench.rows_train import mean_by_length
from dashbench.runner import DONE, Summary
from dashbench.store import newest, read_rows
from dashbench.suite import Suite
from dashbench.tables import wide_console

FAILED, FINE = 1, 0


def print_ending(suite: Suite, summary: Summary) -> int:
    """Table, figure and one line on how the run ended; returns the exit code."""
    console = wide_console()
    mine = {p.key() for p in suite.points()}
    rows = [r for r in newest(read_rows(summary.store)) if r["key"] in mine]
    shown = [r for r in rows if r["status"] == "ok"]
    if shown:
        console.print(stages_table(shown))
        figure = summary.store.with_name(f"{summary.store.stem}-curves.png")
        draw_curves(shown, figure)
        console.print(f"figure: {figure}", markup=False)
    for row in rows:
        if row["status"] not in DONE and row["report"] == 10:
            console.print(f"{row['status']}: {row['stage']} {row['method']}: {row['reason']}", markup=False)
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary.counts.items())) or "nothing new"
    before = f", {summary.already} were finished before" if summary.already else ""
    console.print(f"rows: {summary.store} ({counts}{before})", markup=False)
    if summary.interrupted or summary.left:
        why = "interrupted" if summary.interrupted else "time is up"
        console.print(f"{why}: {summary.left} reports left; the same command goes on with them")
    return FAILED if any(r["status"] not in DONE for r in rows) else FINE


def stages(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Rows by (stage, method, seed), in the order of their reports."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r["report"]):
        found.setdefault((row["stage"], row["method"], row["seed"]), []).append(row)
    return found


def stages_table(rows: list[dict[str, Any]]) -> Table:
    """One line a stage: its last report."""
    table = Table(header_style="bold", pad_edge=False)
    for column in ("stage", "method", "seed", "tokens", "loss", "exact match", "at", "S_flop", "s/M tokens"):
        table.add_column(column, justify="left" if column in ("stage", "method") else "right", no_wrap=True)
    for (stage, method, seed), reports in stages(rows).items():
        last = reports[-1]
        for length, score in mean_by_length(last["exact_match"]).items():
            cost = last["gpu_s"] / last["tokens"] * 1e6
            table.add_row(
                stage, method, str(seed), f"{last['tokens'] / 1e6:.1f} M", f"{last['loss']:.3f}",
                f"{score:.1%}", str(length), f"{last['s_flop']:.2f}", f"{cost:.2f}",
            )  # fmt: skip
    return table


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss, mean exact match at the longest length, and sparsity, against tokens, a line a stage."""
    from matplotlib.figure import Figure

    from dashbench.figures import FAMILY_COLOURS

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    for (stage, method, seed), reports in stages(rows).items():
        tokens = [r["tokens"] / 1e6 for r in reports]
        score = [list(mean_by_length(r["exact_match"]).values())[-1] for r in reports]
        base = stage == "base"
        name = ("base" if base else method) + (f", seed {seed}" if seed else "")
        look = {"color": FAMILY_COLOURS[method], "linestyle": ":" if base else "-"}
        for axis, values in zip(
            axes, ([r["loss"] for r in reports], score, [r["s_flop"] for r in reports]), strict=True
        ):
            axis.plot(tokens, values, marker=".", label=name, **look)
    for axis, title in zip(axes, ("loss of answers", "exact match, longest", "S_flop"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
