"""Speedup over the best dense attention by context, a figure a phase and routing, panels by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dashbench.analysis.points import TIMING_PREFERENCE, Line
from dashbench.analysis.speedup import Speedup
from dashbench.figures import Palette, context_axis, crowded, label_ends, log_values
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
    chosen = {}
    for batch, ways in sorted(batches.items()):
        way = next(w for w in TIMING_PREFERENCE if w in ways)
        order = sorted(ways[way].items(), key=lambda x: (x[0].method, x[0].sparsity_target or 0))
        chosen[batch] = way, dict(order)
    if any(crowded((m.method, m.sparsity_target) for m in members) for _, members in chosen.values()):
        return _grid(chosen, phase, routing)
    with column() as plt:
        figure, axes = plt.subplots(
            len(chosen), 1, figsize=(COLUMN_INCHES, 2.25 * len(chosen)), squeeze=False, sharex=False
        )
        for axis, (batch, (way, members)) in zip(axes.flat, chosen.items(), strict=True):
            _panel(axis, members, Palette((m.method, m.sparsity_target) for m in members))
            axis.set_ylabel("speedup over best dense")
            axis.set_title(_title(f"{phase}, batch {batch}", routing, way), loc="left")
        return figure


def _title(what: str, routing: str, way: tuple[str, str]) -> str:
    timed = "CUDA-graph replay" if way[1] == "graph" else "launched eagerly"
    extra = "" if routing == "topics" else f", {routing}"
    return f"{what}{extra} ({way[0]} cache, {timed})"


def _grid(chosen: dict[int, tuple], phase: str, routing: str) -> Any:
    """A row a batch, a column a sparsity, a line a method."""
    lines = [line for _, members in chosen.values() for line in members]
    targets = sorted({line.sparsity_target for line in lines if line.sparsity_target is not None})
    with column() as plt:
        size = (1.75 * len(targets) + 1.0, 2.2 * len(chosen) + 0.2)
        figure, axes = plt.subplots(
            len(chosen),
            len(targets),
            figsize=size,
            squeeze=False,
            sharex=True,
            sharey=True,
            layout="constrained",
        )
        palette = Palette((line.method, None) for line in lines)
        for number, (batch, (_, members)) in enumerate(chosen.items()):
            row = axes[number]
            for axis, target in zip(row, targets, strict=True):
                here = {line: found for line, found in members.items() if line.sparsity_target == target}
                if here:
                    _panel(axis, here, palette, names=False)
                axis.set_title(f"batch {batch}, S {100 * target:g} %", loc="left")
                axis.set_xlabel("context (tokens)" if number == len(axes) - 1 else "")
                axis.tick_params(axis="x", labelrotation=0)
            row[0].set_ylabel("speedup over best dense")
        way = next(iter(chosen.values()))[0]
        low, high = _limits(line for _, members in chosen.values() for line in members.items())
        contexts = [p.row["context"] for _, members in chosen.values() for m in members.values() for p in m]
        for axis in axes.flat:
            axis.set_ylim(low, high)
            axis.set_yticks([n for n in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if low <= n <= high])
            axis.set_xlim(min(contexts) / 1.3, max(contexts) * 1.3)
            # Every other length: the panels are narrow.
            axis.set_xticks(sorted({n for n in contexts if n & (n - 1) == 0 and n.bit_length() % 2}))
        methods = sorted({line.method for line in lines})
        handles = [
            plt.Line2D([], [], color=palette.style((m, None))[0], linestyle=palette.style((m, None))[1],
                       marker="o", markersize=2.5, label=m)
            for m in methods
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside upper right", ncols=len(methods), frameon=False)
        figure.suptitle(_title(phase, routing, way), x=0.01, ha="left")
        return figure


def _limits(lines: Iterable[tuple[Line, list[Speedup]]]) -> tuple[float, float]:
    """Range of a speedup axis: all intervals, and one."""
    points = [p for _, members in lines for p in members]
    return min(min(p.ratio.low for p in points) / 1.2, 0.85), max(
        max(p.ratio.high for p in points) * 1.2, 1.2
    )


def _panel(axis: Any, lines: dict[Line, list[Speedup]], palette: Palette, names: bool = True) -> None:
    """Lines with intervals; `names`: written at their ends, and dashes tell sparsities apart."""
    ends = []
    for line, members in lines.items():
        shade, dashes = palette.style((line.method, line.sparsity_target if names else None))
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
    axis.set_yscale("log")
    axis.set_ylim(*_limits(lines.items()))
    log_values(axis)
    axis.axhline(1.0, color="#999999", linewidth=0.8, zorder=0)
    if names:
        label_ends(axis, ends)
