"""What the page's charts draw: numbers with intervals, grouped into panels, ready for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dashbench.analysis.overhead import PART_ORDER, Overhead
from dashbench.analysis.pareto import AXES, Pareto
from dashbench.analysis.points import Line, finished, line, routing_name
from dashbench.analysis.speedup import Speedup
from dashbench.figures import series_label, tokens
from dashbench.report.style import PART_COLOURS, colour

Chart = dict[str, Any]


def rounded(value: float) -> float:
    """Five figures: what a picture can show."""
    return float(f"{value:.5g}")


def _panel(where: Line, several: bool) -> str:
    name = f"{where.phase}, batch {where.batch}, {where.cache} cache, {where.launch}, {where.routing}"
    return f"{name}, {where.shape}, environment {where.environment}" if several else name


def _panel_order(where: Line) -> tuple[Any, ...]:
    return (
        where.environment, where.phase != "prefill", where.phase, where.cache != "cold",
        where.launch != "graph", where.routing != "topics", where.routing, where.batch,
    )  # fmt: skip


def _series(where: Line, points: list[list[float]]) -> dict[str, Any]:
    return {
        "method": where.method,
        "label": series_label(where.method, where.sparsity_target),
        "colour": colour(where.method),
        "points": points,
    }


def _line_chart(name: str, title: str, y: str, series: dict[Line, list[list[float]]]) -> Chart:
    several = len({(w.environment, w.shape) for w in series}) > 1
    panels: dict[str, list[dict[str, Any]]] = {}
    for where in sorted(series, key=lambda w: (_panel_order(w), w.method, w.sparsity_target or 0.0)):
        panels.setdefault(_panel(where, several), []).append(_series(where, series[where]))
    return {
        "id": name,
        "kind": "lines",
        "title": title,
        "x": "context (tokens)",
        "y": y,
        "line": 1 if name == "speedup" else None,
        "panels": [{"name": k, "series": v} for k, v in panels.items()],
    }


def speedup_chart(points: dict[Line, list[Speedup]]) -> Chart:
    """Speedup over best dense by context."""
    series = {
        where: [
            [p.row["context"], *map(rounded, (p.ratio.value, p.ratio.low, p.ratio.high))] for p in members
        ]
        for where, members in points.items()
    }
    return _line_chart("speedup", "Speedup over the best dense attention", "speedup", series)


def latency_chart(rows: Sequence[dict[str, Any]]) -> Chart:
    """Latency by context."""
    series: dict[Line, list[list[float]]] = {}
    for row in finished(rows):
        low, high = row.get("latency_ci_ms") or (row["latency_ms"],) * 2
        series.setdefault(line(row), []).append(
            [row["context"], *map(rounded, (row["latency_ms"], low, high))]
        )
    return _line_chart(
        "latency", "Latency", "ms (median)", {where: sorted(points) for where, points in series.items()}
    )


def overhead_chart(found: Sequence[Overhead]) -> Chart:
    """Stacked parts by context, best dense being 1."""
    panels: dict[str, list[Overhead]] = {}
    several = len({o.row["environment_key"] for o in found}) > 1
    for o in found:
        row = o.row
        name = (
            f"{series_label(row['method'], row['sparsity_target'])}, {row['phase']}, batch {row['batch']}, "
            f"{row['cache']} cache, {row['launch']}, {routing_name(row)}"
        )
        panels.setdefault(f"{name}, environment {row['environment_key']}" if several else name, []).append(o)
    return {
        "id": "overhead",
        "kind": "stack",
        "title": "Where the time goes at short context",
        "x": "context (tokens)",
        "y": "time, best dense = 1",
        "line": 1,
        "panels": [
            {
                "name": name,
                "bars": [
                    {
                        "x": tokens(o.row["context"]),
                        "ms": rounded(o.row["latency_ms"]),
                        "dense": rounded(o.dense["latency_ms"]),
                        "parts": [
                            [p, PART_COLOURS[p], rounded(o.parts[p] / o.dense["latency_ms"])]
                            for p in PART_ORDER
                            if p in o.parts
                        ],
                    }
                    for o in sorted(members, key=lambda o: o.row["context"])
                ],
            }
            for name, members in panels.items()
        ],
    }


def pareto_chart(found: Sequence[Pareto]) -> Chart:
    """Accuracy against each cost, a panel for each cost and length."""
    panels = []
    for result in found:
        series = []
        for (method, name), mine in result.lines().items():
            series.append(
                {
                    "method": method,
                    "label": name,
                    "colour": colour(method),
                    "names": [f"{p.configuration.label} ({p.mark}, {p.probability:.2f})" for p in mine],
                    "marks": [p.mark for p in mine],
                    "points": [
                        [
                            *map(rounded, (p.cost.value, p.accuracy.value, p.accuracy.low, p.accuracy.high)),
                            rounded(p.cost.low),
                            rounded(p.cost.high),
                        ]
                        for p in mine
                    ],
                }
            )
        if series:
            where = "measured sparsity" if result.axis == "sparsity" else AXES[result.axis]
            panels.append(
                {
                    "name": f"{result.axis}, {tokens(result.table.length)} tokens",
                    "x": where,
                    "sparsity": result.axis == "sparsity",
                    "series": series,
                }
            )
    return {
        "id": "pareto", "kind": "pareto", "title": "Accuracy against what it costs", "y": "accuracy",
        "panels": panels,
    }  # fmt: skip
