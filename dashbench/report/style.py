"""One look for every figure of a report: as wide as a column of print, the colours of dashbench.figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dashbench.figures import FAMILY_COLOURS, OTHER_COLOURS, STYLE, family, save

COLUMN_INCHES = 3.45
FORMATS = ("png", "svg", "pdf")
# Parts of a latency; light to dark, and none of a method's colours at full strength.
PART_COLOURS = {
    "append": "#BBBBBB",
    "summarize": "#CC79A7",
    "route": "#56B4E9",
    "attend": "#E69F00",
    "combine": "#F0E442",
    "other stages": "#117733",
    "between stages": "#882255",
    "host launch": "#444444",
}


@contextmanager
def column() -> Iterator[Any]:
    """The style and pyplot, for as long as a figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(
        {
            **STYLE,
            "font.size": 7.5,
            "axes.titlesize": 7.5,
            "axes.labelsize": 7.5,
            "xtick.labelsize": 7,
            "ytick.labelsize": 7,
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
        }
    ):
        yield plt


def colour(method: str) -> str:
    """The one colour of a method's family."""
    name = family(method)
    return FAMILY_COLOURS.get(name) or OTHER_COLOURS[sum(map(ord, name)) % len(OTHER_COLOURS)]


def save_all(draw: Any, folder: Path, name: str) -> list[Path]:
    """Writes a figure in every format. `draw()` makes it anew each time, because writing closes it."""
    out = []
    for ending in FORMATS:
        path = folder / f"{name}.{ending}"
        save(draw(), path, "")
        out.append(path)
    return out
