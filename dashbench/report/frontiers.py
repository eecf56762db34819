"""Accuracy against a cost: points with intervals, joined checkpoint by checkpoint, and each method's
frontier with its attainment band."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dashbench.analysis.pareto import AXES, MethodFrontier, Pareto
from dashbench.figures import label_ends_linear, tokens
from dashbench.report.style import COLUMN_INCHES, colour, column, save_all

STYLES = {"-": "", "--": " - -", ":": " ···", "-.": " -·-"}
"""Line styles of a method's checkpoints, and what stands for them behind the name."""


def draw_frontiers(found: Sequence[Pareto], folder: Path) -> list[Path]:
    """A figure a length; returns the files."""
    out = []
    for result in found:
        if result.points:
            name = f"pareto-{result.axis}-{tokens(result.table.length)}"
            out += save_all(lambda r=result: _figure(r), folder, name)
    return out


def _band(axis: Any, frontier: MethodFrontier) -> None:
    axis.fill_between(
        frontier.grid,
        np.where(np.isfinite(frontier.low), frontier.low, np.nan),
        np.where(np.isfinite(frontier.high), frontier.high, np.nan),
        where=np.isfinite(frontier.low),
        color=colour(frontier.method),
        alpha=0.16,
        step="post",
        linewidth=0,
    )


def _figure(found: Pareto) -> Any:
    with column() as plt:
        figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 2.6))
        axis.set_xscale("log")
        for frontier in found.methods:
            if frontier.method != "dense":
                _band(axis, frontier)
        ends = []
        drawn = Counter()  # lines of each method: the first is solid, further checkpoints dashed and dotted
        for (method, name), mine in found.lines().items():
            style, shade = list(STYLES)[drawn[method] % len(STYLES)], colour(method)
            drawn[method] += 1
            x = np.array([p.cost.value for p in mine])
            y = np.array([p.accuracy.value for p in mine])
            sides = [
                [p.cost.value - p.cost.low for p in mine],
                [p.cost.high - p.cost.value for p in mine],
            ]
            axis.errorbar(
                x, y, xerr=sides,
                yerr=[[p.accuracy.value - p.accuracy.low for p in mine],
                      [p.accuracy.high - p.accuracy.value for p in mine]],
                color=shade, linewidth=1.1, elinewidth=0.6, linestyle=style if len(mine) > 1 else "none",
            )  # fmt: skip
            for px, py, p in zip(x, y, mine, strict=True):
                face = shade if p.mark == "on" else "white"
                axis.plot(
                    px, py, marker="o" if p.mark != "off" else "x", markersize=4, color=shade,
                    markerfacecolor=face, markeredgewidth=0.9, zorder=3,
                )  # fmt: skip
            # Sparsity grows to the right, so its cost, the tokens kept, grows to the left.
            last = int(x.argmin() if found.axis == "sparsity" else x.argmax())
            ends.append((float(y[last]), name + STYLES[style], shade))
        axis.grid(alpha=0.25, linewidth=0.5)
        axis.set_ylabel("accuracy")
        axis.set_xlabel("measured sparsity" if found.axis == "sparsity" else AXES[found.axis])
        (_sparsities if found.axis == "sparsity" else _plain_log)(axis)
        label_ends_linear(axis, ends)
        axis.set_title(
            f"{tokens(found.table.length)} tokens, {len(found.table.documents)} documents; filled: on the "
            "frontier,\nopen: a tie with it, cross: off it; bands: 95 % attainment",
            loc="left", fontsize=6.8,
        )  # fmt: skip
        return figure


def _sparsities(axis: Any) -> None:
    """Each halving of what is kept takes the same room; the ticks say what is left out."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, _ = axis.get_xlim()
    halvings = [2.0**-i for i in range(10) if 2.0**-i >= 0.8 * low]
    fine = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]  # where little is left out, halvings alone would be one tick
    axis.xaxis.set_major_locator(FixedLocator(halvings if low < 0.3 else [n for n in fine if n >= 0.8 * low]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * (1 - v):.4g} %"))
    axis.invert_xaxis()


def _plain_log(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_xlim()
    fine = (1, 2, 3, 5, 7) if high < 12 * low else (1, 2, 5)
    axis.xaxis.set_major_locator(LogLocator(subs=fine) if high > 4 * low else MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
