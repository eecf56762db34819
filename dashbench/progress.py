"""What a run shows while it works: a live bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from dashbench.runner import Event

COLOURS = {"ok": "green", "skipped": "yellow"}


def _row_text(row: dict[str, Any]) -> str:
    target = "" if row["sparsity_target"] is None else f" S {100 * row['sparsity_target']:g} %"
    timed = f"{row['cache']} {row['launch']}"
    where = f"{row['method']} {row['phase']} {row['context']} x{row['batch']} {timed}{target}"
    if row["status"] == "ok":
        low, high = row["latency_ci_ms"]
        return f"ok       {where}: {row['latency_ms']:.4g} ms [{low:.4g}, {high:.4g}]"
    return f"{row['status']:8} {where}: {row['reason']}"


class Progress:
    """Shows runner events; use as a context manager.

    Args:
        name: of the suite.
        console: to print on (default: standard output).
    """

    def __init__(self, name: str, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.name = name
        self.began = time.monotonic()
        self.finished = self.total = 0
        self.bar: Bar | None = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Takes the live display away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _left(self) -> str:
        if not self.finished:
            return ""
        seconds = (time.monotonic() - self.began) / self.finished * (self.total - self.finished)
        return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"

    def event(self, event: Event) -> None:
        """Shows one event."""
        if event.kind == "notice":
            self.console.print(f"note: {event.text}", markup=False)
        elif event.kind == "start":
            self.total, self.began = event.total, time.monotonic()
            self.console.print(f"{self.name}: {event.total} points to measure on {event.text}", markup=False)
            if self.console.is_terminal and event.total:
                self.bar = Bar(
                    BarColumn(30),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[left]}"),
                    TextColumn("{task.description}"),
                    console=self.console,
                    transient=True,
                )
                self.task = self.bar.add_task("", total=event.total, left="")
                self.bar.start()
        elif event.kind == "point" and self.bar is not None:
            self.bar.update(self.task, description=event.text)
        elif event.kind == "row" and event.row is not None:
            self.finished += 1
            colour = COLOURS.get(event.row["status"], "red")
            prefix = "" if self.bar is not None else f"[{self.finished}/{self.total}] "
            self.console.print(
                prefix + (event.text or _row_text(event.row)),
                style=colour if self.bar else None,
                markup=False,
            )
            if self.bar is not None:
                self.bar.update(self.task, advance=1, left=self._left())
