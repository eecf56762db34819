"""Tables of stored rows for a terminal: no torch, no GPU."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from dashbench.figures import tokens


def wide_console() -> Console:
    """Standard output at the terminal's width; wide enough for whole tables where it is not a terminal."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 400
    return console


def _time(ms: float) -> str:
    return f"{ms:.4f}" if ms < 1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def results_table(rows: Iterable[dict[str, Any]]) -> Table:
    """Every finished row: what ran, its sparsity as measured, its median latency with the interval, and the
    gate."""
    table = Table(title=None, header_style="bold", pad_edge=False)
    for name, justify in (
        ("phase", "left"), ("context", "right"), ("batch", "right"), ("method", "left"), ("timed", "left"),
        ("S asked", "right"), ("S measured", "right"), ("median ms", "right"), ("95 % interval", "right"),
        ("check", "left"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, no_wrap=True)
    shown = [r for r in rows if r["status"] == "ok"]
    order = ("phase", "batch", "context", "cache", "launch", "method")
    shown.sort(
        key=lambda r: (r["phase"] != "prefill", *(r[name] for name in order), r["sparsity_target"] or 0)
    )
    for r in shown:
        low, high = r["latency_ci_ms"] or (r["latency_ms"], r["latency_ms"])
        asked = "" if r["sparsity_target"] is None else f"{100 * r['sparsity_target']:g} %"
        measured = "" if not r["s_flop"] else f"{100 * r['s_flop']:.1f} %"
        table.add_row(
            r["phase"], tokens(r["context"]), str(r["batch"]), r["method"], f"{r['cache']}, {r['launch']}",
            asked, measured,
            _time(r["latency_ms"]), f"{_time(low)} to {_time(high)}", f"{r['checked']['rows']} rows",
        )  # fmt: skip
    return table


def trouble_lines(rows: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each reason why points have no time, most frequent first: `3 skipped: fa3: needs a GPU`.

    Reasons that differ in numbers alone are one line, with the first of them: `14 skipped: nsa@fla: … not 66
    (and 13 with other numbers)`.
    """
    alike: dict[tuple[str, str, str], list[str]] = {}
    for r in rows:
        if r["status"] != "ok":
            plain = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", r["reason"] or "")
            alike.setdefault((r["status"], r["method"], plain), []).append(r["reason"])
    lines = []
    for (status, method, _), reasons in sorted(alike.items(), key=lambda item: -len(item[1])):
        others = sum(reason != reasons[0] for reason in reasons)
        more = f" (and {others} with other numbers)" if others else ""
        lines.append(f"{len(reasons)} {status}: {method}: {reasons[0]}{more}")
    return lines
