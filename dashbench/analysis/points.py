"""Which rows may be compared with each other.

Two rows are comparable when they were measured in one environment and ask for the same operator on the same
shape, timed the same way. Sparsity and method are what is compared, so they are not part of that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from dashbench.store import newest

DENSE_FAMILIES = ("dense", "fa3")

# Methods that are dense but not the same computation (another precision) never serve as the dense baseline.
NOT_A_BASELINE = ("fa3@fp8",)

# The most telling way of timing that a store has, first found wins: graph replay hides the launch cost, cold
# caches are what a model sees.
TIMING_PREFERENCE = (("cold", "graph"), ("cold", "eager"), ("warm", "graph"), ("warm", "eager"))


class AnalysisError(Exception):
    """Rows that do not answer the question; the message is one sentence."""


class Setting(NamedTuple):
    """All that two comparable rows share."""

    environment: str
    phase: str
    shape: str
    dtype: str
    batch: int
    cache: str
    launch: str
    context: int


class Line(NamedTuple):
    """One line in a figure: a method at one sparsity over context lengths."""

    environment: str
    phase: str
    shape: str
    dtype: str
    batch: int
    cache: str
    launch: str
    method: str
    sparsity_target: float | None
    routing: str


def partly_warm(row: dict[str, Any]) -> bool:
    """Whether a row that says `cold` rotated through so few copies that its calls touched no more than 1.5
    times the L2 cache, so that they found much of what they read there.

    Rows have been measured so until copies were counted by what a call touches: a sparse decode step touches
    little of what its inputs hold.
    """
    l2, copies = (row.get("environment") or {}).get("l2_bytes"), (row.get("timing") or {}).get("copies")
    if row.get("cache") != "cold" or not (l2 and copies and row.get("tb_per_s") and row.get("latency_ms")):
        return False
    return copies * row["tb_per_s"] * 1e9 * row["latency_ms"] < 1.5 * l2


def setting(row: dict[str, Any]) -> Setting:
    """The setting of a row."""
    return Setting(
        row["environment_key"],
        row["phase"],
        row["shape"]["name"],
        row["dtype"],
        row["batch"],
        row["cache"],
        row["launch"],
        row["context"],
    )


def routing_name(row: dict[str, Any]) -> str:
    """Routing with the options that differ from its defaults: `topics (segment 16)`."""
    options = ", ".join(f"{k} {v}" for k, v in sorted(row.get("routing_options", {}).items()))
    return f"{row['routing']} ({options})" if options else row["routing"]


def line(row: dict[str, Any]) -> Line:
    """The line that a row is a point of."""
    return Line(*setting(row)[:-1], row["method"], row["sparsity_target"], routing_name(row))


def suite_name(row: dict[str, Any]) -> str:
    """Name of the suite that a row was measured by."""
    return row["suite"].partition("@")[0]


def is_dense(row: dict[str, Any]) -> bool:
    """Whether a row can be the dense baseline of others."""
    return row["method"].split("@")[0] in DENSE_FAMILIES and row["method"] not in NOT_A_BASELINE


def kernel_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of single attention operators; models, training and accuracy have kinds of their own."""
    return [r for r in rows if r.get("kind", "kernel") == "kernel"]


def one_environment(rows: Iterable[dict[str, Any]], wanted: str | None = None) -> list[dict[str, Any]]:
    """The rows of one environment.

    Args:
        rows: finished rows that are to be compared with each other.
        wanted: its key, or the beginning of it; None: whichever it is.

    Raises:
        AnalysisError: rows of several environments, or none of that name.
    """
    rows = list(rows)
    counts = Counter(r["environment_key"] for r in rows)
    if wanted is not None:
        counts = Counter({k: n for k, n in counts.items() if k.startswith(wanted)})
        if not counts:
            raise AnalysisError(f"no rows of environment {wanted}")
    if len(counts) > 1:
        names = ", ".join(f"{k} ({n} rows)" for k, n in sorted(counts.items()))
        raise AnalysisError(
            f"rows of {len(counts)} environments are not compared with each other: {names}; "
            "choose with --environment"
        )
    return [r for r in rows if r["environment_key"] in counts]


def finished(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that have a latency, in a stable order: the newest of a point, of dense points one a suite."""
    ok = [r for r in kernel_rows(rows) if r["status"] == "ok"]
    kept = newest(r for r in ok if not is_dense(r)) + [r for r in ok if is_dense(r)]
    return sorted(
        kept, key=lambda r: (setting(r), r["method"], r["sparsity_target"] or 0.0, r["key"], r["suite"])
    )


class DenseRows:
    """The fastest dense rows: what speedups are over.

    Dense kernels do the same work whatever the inputs, so rows of any routing count. Runs of different days
    differ by more than their intervals say (clocks, power), so of each dense method the row of the sparse
    row's own suite counts where there is one; a method that this suite left out counts by the others' rows.

    Args:
        rows: stored rows of any kind.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]):
        self._methods: dict[Setting, dict[str, dict[str, Any]]] = defaultdict(dict)
        self._of_suite: dict[tuple[Setting, str], dict[str, dict[str, Any]]] = defaultdict(dict)
        for row in finished(rows):
            if is_dense(row):
                place, method = setting(row), row["method"]
                for held in (self._methods[place], self._of_suite[place, suite_name(row)]):
                    if method not in held or row["latency_ms"] < held[method]["latency_ms"]:
                        held[method] = row

    def at(self, place: Setting, suite: str | None = None) -> dict[str, Any] | None:
        """The fastest dense row of a setting, of a suite's own where it has some, or None."""
        found = {**self._methods.get(place, {}), **self._of_suite.get((place, suite), {})}
        return min(found.values(), key=lambda r: (r["latency_ms"], r["key"]), default=None)

    def beside(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """The dense row that a row is held against, or None."""
        return self.at(setting(row), suite_name(row))

    def settings(self) -> list[Setting]:
        """Where there are dense rows."""
        return list(self._methods)


def lines(rows: Iterable[dict[str, Any]]) -> dict[Line, list[dict[str, Any]]]:
    """Finished rows of each line by ascending context."""
    grouped: dict[Line, list[dict[str, Any]]] = defaultdict(list)
    for row in finished(rows):
        grouped[line(row)].append(row)
    return {k: sorted(v, key=lambda r: r["context"]) for k, v in grouped.items()}
