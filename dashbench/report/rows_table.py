"""All rows as one compact table for the page: columns by name, repeated text stored once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dashbench.analysis.points import routing_name
from dashbench.report.charts import rounded

COLUMNS = (
    "kind", "method", "phase", "task", "context", "batch", "cache", "launch", "routing", "S asked",
    "S measured", "ms", "ms low", "ms high", "score", "TFLOP/s", "% of ceiling", "MiB", "status", "reason",
    "suite", "environment",
)  # fmt: skip
NUMBERS = frozenset(
    (
        "context",
        "batch",
        "S asked",
        "S measured",
        "ms",
        "ms low",
        "ms high",
        "score",
        "TFLOP/s",
        "% of ceiling",
        "MiB",
    )
)


def _cells(row: dict[str, Any]) -> tuple[Any, ...]:
    low, high = row.get("latency_ci_ms") or (None, None)
    peak = row.get("peak_bytes")
    return (
        row.get("kind", "kernel"), row["method"], row.get("phase"), row.get("task"),
        row.get("context") or row.get("length"), row.get("batch"), row.get("cache"), row.get("launch"),
        routing_name(row) if row.get("routing") else None, row.get("sparsity_target"), row.get("s_flop"),
        row.get("latency_ms"), low, high, row.get("score"), row.get("tflops"), row.get("percent_of_ceiling"),
        None if peak is None else peak / 2**20, row["status"], row.get("reason"), row.get("suite"),
        row["environment_key"],
    )  # fmt: skip


def rows_table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`{"columns", "numbers", "words", "layouts", "rows"}`.

    A row is the number of its layout, then its cells; a layout says which columns they are in, the others are
    empty (answers fill ten of the columns, and there are many). A text cell is an index into `words`.
    """
    words: dict[str, int] = {}
    layouts: dict[tuple[int, ...], int] = {}
    out = []
    ordered = sorted(rows, key=lambda r: (*("" if c is None else str(c) for c in _cells(r)), r["key"]))
    for row in ordered:
        cells = _cells(row)
        filled = tuple(i for i, cell in enumerate(cells) if cell is not None)
        line = [layouts.setdefault(filled, len(layouts))]
        for i in filled:
            name, cell = COLUMNS[i], cells[i]
            if name in NUMBERS:
                line.append(rounded(float(cell)))
            else:
                line.append(words.setdefault(str(cell), len(words)))
        out.append(line)
    return {
        "columns": list(COLUMNS),
        "numbers": [name in NUMBERS for name in COLUMNS],
        "words": list(words),
        "layouts": list(layouts),
        "rows": out,
    }
