"""Where the time goes at short context: parts of a method's latency, stacked, beside best dense."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dashbench.analysis.overhead import PART_ORDER, Overhead
from dashbench.analysis.points import routing_name
from dashbench.figures import tokens
from dashbench.report.style import COLUMN_INCHES, PART_COLOURS, column, save_all


def _group(o: Overhead) -> tuple[str, ...]:
    row = o.row
    asked = "" if row["sparsity_target"] is None else f"{100 * row['sparsity_target']:g}"
    plain = "".join(c if c.isalnum() else "-" for c in routing_name(row)).strip("-")
    parts = (row["method"].replace("@", "-"), asked, row["phase"], f"b{row['batch']}", row["launch"])
    way = (row["cache"],) if row["cache"] != "cold" else ()
    return (*(p for p in parts if p), *way, *((plain,) if routing_name(row) != "topics" else ()))


def draw_overheads(found: Sequence[Overhead], folder: Path) -> list[Path]:
    """A figure for each method, sparsity, phase, batch and way of timing; returns the files."""
    groups: dict[tuple[str, ...], list[Overhead]] = defaultdict(list)
    for o in found:
        groups[_group(o)].append(o)
    out = []
    for key, members in sorted(groups.items()):
        out += save_all(lambda m=members: _figure(m), folder, "overhead-" + "-".join(key))
    return out


def _figure(members: list[Overhead]) -> Any:
    members = sorted(members, key=lambda o: o.row["context"])
    parts = [p for p in PART_ORDER if any(p in o.parts for o in members)]
    with column() as plt:
        figure, axis = plt.subplots(figsize=(COLUMN_INCHES, 2.5))
        # Relative to dense: lengths differ by orders of magnitude, and what matters is the distance to one.
        bottoms = [0.0] * len(members)
        tops = [o.row["latency_ms"] / o.dense["latency_ms"] for o in members]
        where = range(len(members))
        for part in parts:
            heights = [o.parts.get(part, 0.0) / o.dense["latency_ms"] for o in members]
            axis.bar(
                where, heights, bottom=bottoms, width=0.62, color=PART_COLOURS[part], edgecolor="white",
                linewidth=0.4, label=part,
            )  # fmt: skip
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        axis.errorbar(
            where, [o.ratio.value for o in members],
            yerr=[[max(0.0, o.ratio.value - o.ratio.low) for o in members],
                  [max(0.0, o.ratio.high - o.ratio.value) for o in members]],
            fmt="none", ecolor="black", elinewidth=0.8, capsize=2,
        )  # fmt: skip
        ceiling = max([*tops, *(o.ratio.high for o in members), 1.0]) * 1.22
        for i, o in enumerate(members):
            axis.annotate(
                f"{milliseconds_plain(o.row['latency_ms'])}", (i, max(o.ratio.high, tops[i])), ha="center",
                va="bottom", fontsize=6.5, xytext=(0, 2.5), textcoords="offset points",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}, zorder=4,
            )  # fmt: skip
        axis.set_ylim(0, ceiling)
        axis.axhline(1.0, color="black", linewidth=0.9, linestyle="--")
        axis.annotate(
            "best\ndense", (1.01, 1.0), xycoords=("axes fraction", "data"), va="center", fontsize=6.5,
            annotation_clip=False,
        )  # fmt: skip
        axis.set_xticks(list(where), [tokens(o.row["context"]) for o in members])
        axis.set_xlim(-0.6, len(members) - 0.4)
        axis.set_xlabel("context (tokens)")
        axis.set_ylabel("time, best dense = 1")
        first = members[0].row
        asked = "" if first["sparsity_target"] is None else f" {100 * first['sparsity_target']:g} %"
        timed = "graph replay" if first["launch"] == "graph" else "eager"
        extra = "" if routing_name(first) == "topics" else f", {routing_name(first)}"
        axis.set_title(
            f"{first['method']}{asked}, {first['phase']}, batch {first['batch']} "
            f"({first['cache']}, {timed}){extra}; ms above",
            loc="left",
        )
        handles, labels = axis.get_legend_handles_labels()
        order = [labels.index(p) for p in parts]
        axis.legend(
            [handles[i] for i in order], parts, loc="upper center", bbox_to_anchor=(0.5, -0.27), ncols=3,
            frameon=False, fontsize=6.8, handlelength=1.0, columnspacing=1.0,
        )  # fmt: skip
        return figure


def milliseconds_plain(ms: float) -> str:
    """Two or three figures: `0.015`, `0.29`, `1.8`."""
    return f"{ms:.3f}" if ms < 0.1 else f"{ms:.2f}" if ms < 1 else f"{ms:.1f}"
