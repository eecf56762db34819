"""Figures drawn from stored rows alone: no torch, no GPU; same rows in, same bytes out.

Rows are plain dicts as stored (see results/README.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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

# The most telling way of timing that a store has, first found wins: graph replay hides the launch cost, cold
# caches are what a model sees.
TIMING_PREFERENCE = (("cold", "graph"), ("cold", "eager"), ("warm", "graph"), ("warm", "eager"))


def family(method: str) -> str:
    """Family of a method's name: `dash@reference` -> `dash`."""
    return method.split("@")[0]


def tokens(count: int) -> str:
    """`16384` -> `16k`."""
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def series_label(method: str, target: float | None) -> str:
    """Direct label of one line."""
    return method if target is None else f"{method} {100 * target:g} %"


def latency_panels(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Groups finished rows into panels of latency against context.

    Args:
        rows: stored rows of any status.

    Returns:
        `{(phase, batch): {"cache", "launch", "series": {(method, sparsity_target): [(context, ms, low,
        high), …]}}}`, contexts ascending,
        with one way of timing a panel (`TIMING_PREFERENCE`). Panels without a finished row are left out.
    """
    ok = [r for r in rows if r["status"] == "ok"]
    panels: dict[tuple[str, int], dict[str, Any]] = {}
    for phase, batch in sorted({(r["phase"], r["batch"]) for r in ok}, key=lambda p: (p[0] != "prefill", p)):
        mine = [r for r in ok if (r["phase"], r["batch"]) == (phase, batch)]
        cache, launch = next(
            c for c in TIMING_PREFERENCE if any((r["cache"], r["launch"]) == c for r in mine)
        )
        series: dict[tuple[str, float | None], list[tuple[int, float, float, float]]] = defaultdict(list)
        for r in mine:
            if (r["cache"], r["launch"]) == (cache, launch):
                low, high = r["latency_ci_ms"] or (r["latency_ms"], r["latency_ms"])
                series[r["method"], r["sparsity_target"]].append((r["context"], r["latency_ms"], low, high))
        panels[phase, batch] = {
            "cache": cache,
            "launch": launch,
            "series": {
                k: sorted(v) for k, v in sorted(series.items(), key=lambda kv: (kv[0][0], kv[0][1] or 0))
            },
        }
    return panels


def _spread(values: Sequence[float], gap: float) -> list[float]:
    """Moves label positions apart so that neighbours are at least `gap` from each other, keeping their order
    and their middle."""
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
    out = [0.0] * len(values)
    for position, index in zip(placed, order, strict=True):
        out[index] = position
    return out


def draw_latency(rows: Iterable[dict[str, Any]], path: Path, title: str = "") -> bool:
    """Latency against context, a panel for each phase and batch, log axes, 95 % intervals, lines labelled
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

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    with plt.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "dashbench"}
    ):
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure, axes = plt.subplots(lines, columns, figsize=(5.6 * columns, 3.6 * lines), squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        seen: dict[str, list[tuple[str, float | None]]] = defaultdict(list)
        for panel in panels.values():
            for key in panel["series"]:
                if key not in seen[family(key[0])]:
                    seen[family(key[0])].append(key)
        others = [f for f in seen if f not in FAMILY_COLOURS]
        for axis, ((phase, batch), panel) in zip(axes.flat, panels.items(), strict=False):
            ends = []
            for key, points in panel["series"].items():
                fam = family(key[0])
                colour = FAMILY_COLOURS.get(fam) or OTHER_COLOURS[others.index(fam) % len(OTHER_COLOURS)]
                x, y, low, high = (np.array(column, dtype=float) for column in zip(*points, strict=True))
                style = DASHES[seen[fam].index(key) % len(DASHES)]
                axis.errorbar(
                    x,
                    y,
                    yerr=[y - low, high - y],
                    color=colour,
                    linestyle=style,
                    marker="o",
                    markersize=3,
                    linewidth=1.4,
                    elinewidth=0.8,
                )
                ends.append((x[-1], y[-1], series_label(*key), colour))
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            contexts = sorted({p[0] for points in panel["series"].values() for p in points})
            axis.xaxis.set_major_locator(FixedLocator(contexts))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: tokens(int(v))))
            # A panel may span less than a decade: tick 1, 2, 5 so that it still has labels.
            low_end, high_end = axis.get_ylim()
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high_end < 100 * low_end else (1,)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.set_xlabel("context (tokens)")
            axis.set_ylabel("latency (ms, median and 95 % interval)")
            way = "CUDA-graph replay" if panel["launch"] == "graph" else "launched eagerly"
            axis.set_title(f"{phase}, batch {batch} ({panel['cache']} cache, {way})", fontsize=9, loc="left")
            bottom, top = np.log(axis.get_ylim())
            height = (top - bottom) or 1.0
            where = _spread([(np.log(y) - bottom) / height for _, y, _, _ in ends], 0.055)
            for (_, _, label, colour), level in zip(ends, where, strict=True):
                axis.annotate(
                    label,
                    (1.01, level),
                    xycoords="axes fraction",
                    color=colour,
                    va="center",
                    fontsize=8,
                    annotation_clip=False,
                )
        if title:
            figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        # No dates or versions in the file: the same rows give the same bytes.
        metadata = (
            {"Software": None}
            if path.suffix == ".png"
            else {"Date": None}
            if path.suffix == ".svg"
            else {"CreationDate": None}
        )
        figure.savefig(path, dpi=160, metadata=metadata, bbox_inches="tight")
        plt.close(figure)
    return True
