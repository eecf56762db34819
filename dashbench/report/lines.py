"""Speedup over the best dense attention by context, a figure a phase and routing, panels by batch."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from dashbench.analysis.points import TIMING_PREFERENCE, Line
from dashbench.analysis.speedup import Speedup
from dashbench.figures import Palette, context_axis, label_ends, log_values
from dashbench.report.style import COLUMN_INCHES, column, save_all


def figure_name(phase: str, routing: str) -> str:
    """`speedup-prefill`, with the routing where it is not the usual one."""
    plain = "".join(c if c.isalnum() else "-" for c in routing).strip("-")
    return f"speedup-{phase}" + ("" if routing == "topics" else f"-{plain}")


def _label(line: Line) -> str:
    return line.method if line.sparsity_target is None else f"{line.method} {100 * line.sparsity_target:g} %"


def draw_speedups(points: dict[Line, list[Speedup]], folder: Path) -> dict[str, list[Path]]:
    """Draws all speedups.

    Args:
        points: as `dashbench.analysis.speedup.speedups` gives them.
        folder: where the files go.

    Returns:
        Files by the name of the figure.
    """
    groups: dict[tuple[str, str], dict[int, dict[tuple[str, str], dict[Line, list[Speedup]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for line, members in points.items():
        groups[line.phase, line.routing][line.batch][line.cache, line.launch][line] = members
    return {
        figure_name(*key): save_all(lambda b=batches, k=key: _figure(b, *k), folder, figure_name(*key))
        for key, batches in sorted(groups.items(), key=lambda g: (g[0][0] != "prefill", g[0]))
    }


def _figure(batches: dict[int, dict], phase: str, routing: str) -> Any:
    with column() as plt:
        figure, axes = plt.subplots(
            len(batches), 1, figsize=(COLUMN_INCHES, 2.25 * len(batches)), squeeze=False, sharex=False
        )
        for axis, (batch, ways) in zip(axes.flat, sorted(batches.items()), strict=True):
            way = next(w for w in TIMING_PREFERENCE if w in ways)
            lines = dict(sorted(ways[way].items(), key=lambda x: (x[0].method, x[0].sparsity_target or 0)))
            _panel(axis, lines)
            timed = "CUDA-graph replay" if way[1] == "graph" else "launched eagerly"
            extra = "" if routing == "topics" else f", {routing}"
            axis.set_title(f"{phase}, batch {batch}{extra} ({way[0]} cache, {timed})", loc="left")
        return figure


def _panel(axis: Any, lines: dict[Line, list[Speedup]]) -> None:
    palette = Palette((line.method, line.sparsity_target) for line in lines)
    ends = []
    for line, members in lines.items():
        shade, dashes = palette.style((line.method, line.sparsity_target))
        x = [p.row["context"] for p in members]
        y = [p.ratio.value for p in members]
        error = [
            [max(0.0, p.ratio.value - p.ratio.low) for p in members],
            [max(0.0, p.ratio.high - p.ratio.value) for p in members],
        ]
        axis.errorbar(
            x, y, yerr=error, color=shade, linestyle=dashes, marker="o", markersize=2.5, linewidth=1.1,
            elinewidth=0.7, capsize=1.5, capthick=0.6,
        )  # fmt: skip
        ends.append((y[-1], _label(line), shade))
    context_axis(axis, (p.row["context"] for members in lines.values() for p in members))
    axis.set_ylabel("speedup over best dense")
    log_values(axis)
    low = min(p.ratio.low for members in lines.values() for p in members)
    high = max(p.ratio.high for members in lines.values() for p in members)
    axis.set_ylim(min(low / 1.2, 0.85), max(high * 1.2, 1.2))
    log_values(axis)
    axis.axhline(1.0, color="#999999", linewidth=0.8, zorder=0)
    label_ends(axis, ends)
