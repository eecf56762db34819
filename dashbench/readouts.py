"""What the analysis verbs print: crossovers and comparisons of stores, as tables and one-line verdicts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.table import Table

from dashbench.analysis.compare import compare
from dashbench.analysis.speedup import Crossover, crossovers, speedups
from dashbench.figures import draw_latency, draw_speedup, tokens
from dashbench.store import StoreError, newest, read_rows, store_files
from dashbench.tables import wide_console


def load(stores: list[Path]) -> list[dict]:
    """The newest rows of all files that the paths mean.

    Raises:
        StoreError: there are none.
    """
    return newest([row for store in stores for file in store_files(store) for row in read_rows(file)])


def _length(value: float) -> str:
    return f"{value / 1024:.1f}k" if value >= 1024 else f"{value:.0f}"


def crossover_sentence(found: Crossover) -> str:
    """`ahead from 6.9k [6.5k, 7.2k] on`, or why there is no such length."""
    span = f"{tokens(found.shortest)} to {tokens(found.longest)}"
    if found.verdict == "always":
        return f"ahead at every length measured ({span})"
    if found.verdict == "never":
        return f"never within range ({span})"
    low = "?" if found.low is None else _length(found.low)
    high = "?" if found.high is None else _length(found.high)
    return f"ahead from {_length(found.length)} [{low}, {high}] on"


def print_crossovers(stores: list[Path]) -> None:
    """From which context each sparse method beats the best dense one.

    Raises:
        StoreError: no rows, or no sparse row with a dense row beside it.
    """
    rows = load(stores)
    found = crossovers(rows)
    if not found:
        raise StoreError(
            "no sparse method has a dense row beside it: a crossover needs both in one environment"
        )
    best = {line: max(points, key=lambda p: p.ratio.value) for line, points in speedups(rows).items()}
    table = Table(header_style="bold", pad_edge=False)
    for column in (
        "method",
        "S asked",
        "phase",
        "batch",
        "timed",
        "routing",
        "against best dense",
        "best speedup",
    ):
        table.add_column(column, no_wrap=True)
    for item in sorted(found, key=lambda c: (c.line[:-2], c.line.routing, c.line.sparsity_target or 0.0)):
        line, top = item.line, best[item.line]
        where = tokens(top.row["context"])
        ratio = f"{top.ratio.value:.2f}x [{top.ratio.low:.2f}, {top.ratio.high:.2f}] at {where}"
        asked = "" if line.sparsity_target is None else f"{100 * line.sparsity_target:g} %"
        timed = f"{line.cache}, {line.launch}"
        table.add_row(
            line.method,
            asked,
            line.phase,
            str(line.batch),
            timed,
            line.routing,
            crossover_sentence(item),
            ratio,
        )
    wide_console().print(table)


def print_comparison(before: Path, after: Path) -> Counter:
    """Point by point, which of two stores is faster; returns how often each verdict was given.

    Raises:
        StoreError: no rows, or no point finished in both.
    """
    found = compare(load([before]), load([after]))
    if not found:
        raise StoreError(f"no point is finished in both {before} and {after}")
    table = Table(header_style="bold", pad_edge=False)
    for column in ("verdict", "method", "phase", "context", "batch", "before ms", "after ms", "why"):
        table.add_column(column, no_wrap=True)
    for c in found:
        b = c.before
        times = (f"{r['latency_ms']:.4g}" for r in (b, c.after))
        table.add_row(
            c.verdict, b["method"], b["phase"], tokens(b["context"]), str(b["batch"]), *times, c.reason
        )
    console = wide_console()
    console.print(table)
    counts = Counter(c.verdict for c in found)
    console.print(", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    return counts


def write_figures(stores: list[Path], folder: Path) -> list[Path]:
    """Draws latency and speedup of the rows of some stores; returns the files.

    Raises:
        StoreError: no rows, rows of several environments, or nothing finished.
    """
    rows = load(stores)
    environments = {r["environment_key"] for r in rows if r["status"] == "ok"}
    if len(environments) > 1:
        raise StoreError(f"rows of {len(environments)} environments are not drawn into one figure")
    written = []
    for draw, kind in ((draw_latency, "latency"), (draw_speedup, "speedup")):
        path = folder / f"{stores[0].stem}-{kind}.png"
        if draw(rows, path):
            written.append(path)
    if not written:
        raise StoreError("nothing to draw: no row is finished")
    return written
