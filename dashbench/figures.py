"""Figures drawn from stored rows alone: no torch, no GPU; same rows in, same bytes out.

Rows are plain dicts as stored (see results/README.md).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dashbench.analysis.points import TIMING_PREFERENCE, finished, routing_name

# One colour a family everywhere (Okabe-Ito, colour-blind safe); line style tells members of a family apart.
FAMILY_COLOURS = {
    "dense": "#666666",
    "fa3": "#000000",
    "dash": "#D55E00",
    "nsa": "#0072B2",
    "infllmv2": "#009E73",
}
OTHER_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
DASHES = ("-", "--", ":", "-.")


def family(method: str) -> str:
    """Family of a method's name: `dash@reference` -> `dash`."""
    return method.split("@")[0]


def tokens(count: int) -> str:
    """`16384` -> `16k`."""
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def series_label(method: str, target: float | None) -> str:
    """Direct label of one line."""
    return method if target is None else f"{method} {100 * target:g} %"


Panel = tuple[str, int, str]  # phase, batch, routing


def _panel_order(panel: Panel) -> tuple[bool, Panel]:
    return (panel[0] != "prefill", panel)


def latency_panels(rows: Iterable[dict[str, Any]]) -> dict[Panel, dict[str, Any]]:
    """Groups finished rows into panels of latency against context.

    Args:
        rows: stored rows of any status.

    Returns:
        `{(phase, batch, routing): {"cache", "launch", "series": {(method, sparsity_target): [(context, ms,
            low, high), …]}}}`, contexts ascending, with one way of timing a panel (`TIMING_PREFERENCE`).
            Panels without a finished row are left out.
    """
    ok = finished(rows)
    panels: dict[Panel, dict[str, Any]] = {}
    for panel in sorted({(r["phase"], r["batch"], routing_name(r)) for r in ok}, key=_panel_order):
        mine = [r for r in ok if (r["phase"], r["batch"], routing_name(r)) == panel]
        cache, launch = next(
            c for c in TIMING_PREFERENCE if any((r["cache"], r["launch"]) == c for r in mine)
        )
        series: dict[tuple[str, float | None], list[tuple[int, float, float, float]]] = defaultdict(list)
        for r in mine:
            if (r["cache"], r["launch"]) == (cache, launch):
                low, high = r["latency_ci_ms"] or (r["latency_ms"], r["latency_ms"])
                series[r["method"], r["sparsity_target"]].append((r["context"], r["latency_ms"], low, high))
        panels[panel] = {
            "cache": cache,
            "launch": launch,
            "series": {
                k: sorted(v) for k, v in sorted(series.items(), key=lambda kv: (kv[0][0], kv[0][1] or 0))
            },
        }
    return panels


def _panel_title(panel: Panel, cache: str, launch: str, routings: int, target: float | None = None) -> str:
    phase, batch, routing = panel
    way = "CUDA-graph replay" if launch == "graph" else "launched eagerly"
    what = f"{phase}, batch {batch}" + (f", routing {routing}" if routings > 1 else "")
    what += f", S {100 * target:g} %" if target is not None else ""
    return f"{what} ({cache} cache, {way})"


def _spread(values: Sequence[float], gap: float, most: float = math.inf) -> list[float]:
    """Moves label positions apart so that neighbours are at least `gap` from each other and none is above
    `most`, keeping their order and, where `most` allows, their middle."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed = [values[i] for i in order]
    for _ in range(200):
        moved = False
        for a in range(len(placed) - 1):
            lack = gap - (placed[a + 1] - placed[a])
            if lack > 1e-9:
                placed[a] -= lack / 2
                placed[a + 1] += lack / 2
                moved = True
        if not moved:
            break
    placed = [
        min(at, most - gap * above) for above, at in zip(range(len(placed) - 1, -1, -1), placed, strict=True)
    ]
    out = [0.0] * len(values)
    for position, index in zip(placed, order, strict=True):
        out[index] = position
    return out


Series = dict[tuple[str, float | None], list[tuple[float, ...]]]
CROWD = 6
"""More lines than this of several sparse methods are drawn in a panel a sparsity."""


def crowded(keys: Iterable[tuple[str, float | None]]) -> bool:
    """Whether lines (method, sparsity) are too many for one panel, and several methods at several
    sparsities."""
    keys = list(keys)
    sparse = [key for key in keys if key[1] is not None]
    methods, targets = ({key[i] for key in sparse} for i in (0, 1))
    return len(keys) > CROWD and len(methods) > 1 and len(targets) > 1


def facets(series: Series) -> list[tuple[float | None, Series]]:
    """One panel, or one a sparsity, the dense lines in each, where lines would cover each other.

    Returns:
        (sparsity or None, its lines), in order.
    """
    if not crowded(series):
        return [(None, series)]
    return [
        (target, {(m, None): points for (m, at), points in series.items() if at in (None, target)})
        for target in sorted({at for _, at in series if at is not None})
    ]


def _panel_axes(count: int):
    """A figure with `count` axes in two columns; the matplotlib modules are imported here so that reading
    rows stays fast."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, 3.6 * rows), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def context_axis(axis: Any, contexts: Iterable[int]) -> None:
    """A log axis of context lengths with ticks such as 4k at the lengths there are."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    lengths = sorted(set(contexts))
    # Powers of two are named first, others only where there is room beside them.
    named: list[int] = []
    for length in sorted(lengths, key=lambda n: (n & (n - 1) != 0, n)):
        if all(abs(math.log2(length / other)) > 0.7 for other in named):
            named.append(length)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(sorted(named)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: tokens(int(v))))
    axis.tick_params(axis="x", labelrotation=45 if len(named) > 8 else 0)
    axis.set_xlabel("context (tokens)")
    axis.grid(alpha=0.25, linewidth=0.5)


def log_values(axis: Any) -> None:
    """Plain numbers on a log axis; 1, 2, 5 where it spans less than two decades, so that there always are
    labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _label_right(axis: Any, levels: Sequence[float], ends: Sequence[tuple[float, str, str]]) -> None:
    # As far apart as a line of text is high, whatever the size of the axes.
    height = axis.get_window_extent().height / axis.figure.dpi * 72
    size = min(8.0, axis.xaxis.label.get_size())
    # None beside the title.
    for (_, label, colour), level in zip(ends, _spread(levels, 1.45 * size / height, 0.98), strict=True):
        axis.annotate(
            label,
            (1.01, level),
            xycoords="axes fraction",
            color=colour,
            va="center",
            fontsize=size,
            annotation_clip=False,
        )


def label_ends(axis: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each line's name at the right edge, at the height `y` where it ends on a log axis, moved apart
    where they would overlap."""
    import numpy as np

    bottom, top = np.log(axis.get_ylim())
    _label_right(axis, [(np.log(y) - bottom) / ((top - bottom) or 1.0) for y, _, _ in ends], ends)


def label_ends_linear(axis: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """The same on a linear axis."""
    bottom, top = axis.get_ylim()
    _label_right(axis, [(y - bottom) / ((top - bottom) or 1.0) for y, _, _ in ends], ends)


class Palette:
    """Colour by family, dashes by member, the same in every panel of a figure."""

    def __init__(self, keys: Iterable[tuple[str, float | None]]):
        self.members: dict[str, list[tuple[str, float | None]]] = defaultdict(list)
        for key in keys:
            if key not in self.members[family(key[0])]:
                self.members[family(key[0])].append(key)
        self.others = [f for f in self.members if f not in FAMILY_COLOURS]

    def style(self, key: tuple[str, float | None]) -> tuple[str, str]:
        """(colour, dashes) of one line."""
        name = family(key[0])
        colour = FAMILY_COLOURS.get(name) or OTHER_COLOURS[self.others.index(name) % len(OTHER_COLOURS)]
        return colour, DASHES[self.members[name].index(key) % len(DASHES)]


def save(figure: Any, path: Path, title: str) -> None:
    """Writes a figure without dates or versions in it, so that the same rows give the same bytes, and closes
    it."""
    import matplotlib.pyplot as plt

    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # No dates or versions in the file: the same rows give the same bytes.
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}}.get(path.suffix, {"CreationDate": None})
    with plt.rc_context(WRITING):
        figure.savefig(path, dpi=160, metadata=metadata, bbox_inches="tight")
    plt.close(figure)


STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
# Read when a figure is written, not when it is drawn: ids that do not change, fonts as print needs them.
WRITING = {"svg.hashsalt": "dashbench", "svg.fonttype": "path", "pdf.fonttype": 42}


def draw_lines(
    axis: Any, palette: Palette, series: dict[tuple[str, float | None], list[tuple[float, ...]]]
) -> None:
    """Lines with interval bars, `series` as in `latency_panels`, on log-log axes, named at their right
    ends."""
    import numpy as np

    ends = []
    for key, points in series.items():
        colour, dashes = palette.style(key)
        x, y, low, high = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        axis.errorbar(
            x,
            y,
            yerr=[y - low, high - y],
            color=colour,
            linestyle=dashes,
            marker="o",
            markersize=3,
            linewidth=1.4,
            elinewidth=0.8,
        )
        ends.append((y[-1], series_label(*key), colour))
    context_axis(axis, (int(p[0]) for points in series.values() for p in points))
    log_values(axis)
    label_ends(axis, ends)


def draw_latency(rows: Iterable[dict[str, Any]], path: Path, title: str = "") -> bool:
    """Latency against context, a panel for each phase and batch, log axes, 95 % intervals, lines named
    directly.

    Args:
        rows: stored rows.
        path: where the figure goes; the ending (.png, .svg, .pdf) decides the format.
        title: printed above the panels.

    Returns:
        False, and nothing is written, when no row has a latency.
    """
    panels = latency_panels(rows)
    if not panels:
        return False
    import matplotlib

    drawn = [
        (where, panel["cache"], panel["launch"], target, series)
        for where, panel in panels.items()
        for target, series in facets(panel["series"])
    ]
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel_axes(len(drawn))
        palette = Palette(key for *_, series in drawn for key in series)
        routings = len({panel[2] for panel in panels})
        for axis, (where, cache, launch, target, series) in zip(axes, drawn, strict=True):
            draw_lines(axis, palette, series)
            axis.set_ylabel("latency (ms, median and 95 % interval)")
            axis.set_title(_panel_title(where, cache, launch, routings, target), fontsize=9, loc="left")
        save(figure, path, title)
    return True


def draw_speedup(rows: Iterable[dict[str, Any]], path: Path, title: str = "") -> bool:
    """Speedup over the best dense method against context, a panel for each phase and batch, one way of
    timing a panel.

    Args:
        rows: stored rows with sparse and dense methods.
        path: where the figure goes; the ending decides the format.
        title: printed above the panels.

    Returns:
        False, and nothing is written, when no sparse row has a dense row beside it.
    """
    from dashbench.analysis.speedup import speedups

    panels: dict[Panel, dict[tuple[str, str], dict]] = defaultdict(lambda: defaultdict(dict))
    for line, points in speedups(rows).items():
        values = [(p.row["context"], p.ratio.value, p.ratio.low, p.ratio.high) for p in points]
        where = (line.phase, line.batch, line.routing)
        panels[where][line.cache, line.launch][line.method, line.sparsity_target] = values
    if not panels:
        return False
    import matplotlib

    drawn = []
    for where in sorted(panels, key=_panel_order):
        way = next(way for way in TIMING_PREFERENCE if way in panels[where])
        series = dict(sorted(panels[where][way].items(), key=str))
        drawn += [(where, *way, target, lines) for target, lines in facets(series)]
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel_axes(len(drawn))
        palette = Palette(key for *_, lines in drawn for key in lines)
        routings = len({panel[2] for panel in panels})
        for axis, (where, cache, launch, target, lines) in zip(axes, drawn, strict=True):
            axis.axhline(1.0, color="#999999", linewidth=1)
            draw_lines(axis, palette, lines)
            axis.set_ylabel("speedup over best dense")
            axis.set_title(_panel_title(where, cache, launch, routings, target), fontsize=9, loc="left")
        save(figure, path, title)
    return True
