"""Accuracy rows, one a sample, as a table of configurations by documents, and what its draws say.

Configurations are compared on identical documents only. A configuration is a method on one checkpoint at one
sparsity asked for (or, where none was asked for, with one set of knobs).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest, norm

from dashbench.analysis.points import AnalysisError
from dashbench.analysis.statistics import RESAMPLES, Interval, holm, percentile_interval
from dashbench.models.sizes import random_size

POWER = 0.8
SIGNIFICANCE = 0.05
FINISHED = 0.9
"""Share of the most documents that any configuration answered, from which on one is compared."""


class Configuration(NamedTuple):
    """What is compared on accuracy.

    `name` is what a table calls the method: the model's name in its suite where a table has several
    checkpoints of the method, else the method's.
    """

    method: str
    checkpoint: str
    sparsity_target: float | None
    knob: str
    name: str = ""

    @property
    def asked(self) -> str:
        """The sparsity asked for, or the knobs, as a reader would write them."""
        if self.sparsity_target is not None:
            return f"{100 * self.sparsity_target:g} %"
        return ", ".join(f"{k} {v}" for k, v in sorted(json.loads(self.knob).items()))

    @property
    def label(self) -> str:
        """`dash 75 %`."""
        return f"{self.name or self.method} {self.asked}".strip()

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts methods by name, their checkpoints too, the one of the method's own name first, and each by
        sparsity."""
        other = self.name not in ("", self.method)
        return (self.method, other, self.name, self.checkpoint, self.sparsity_target or 0.0, self.knob)


@dataclass(frozen=True)
class Scores:
    """Scores of several configurations on identical documents of one length.

    Attributes:
        length: tokens asked for.
        configurations: `[C]`, in a stable order.
        tasks: `[D]`, the task of each document.
        documents: `[D]`, (task, document, hash of the prompt).
        score: `[C, D]`, 0 to 1.
        sparsity: `[C, D]`, measured `s_flop`.
        left_out: why a configuration is not here.
    """

    length: int
    configurations: list[Configuration]
    tasks: list[str]
    documents: list[tuple[str, str, str]]
    score: np.ndarray
    sparsity: np.ndarray
    left_out: dict[Configuration, str] = field(default_factory=dict)


def accuracy_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of kind `accuracy` that have a score, but those of random weights: equally wrong answers would
    pass for equal accuracy."""
    scored = [r for r in rows if r.get("kind") == "accuracy" and r["status"] == "ok"]
    return [r for r in scored if random_size(str(r.get("checkpoint") or "")) is None]


def configuration(row: dict[str, Any]) -> Configuration:
    """The configuration of an accuracy row."""
    target = row.get("sparsity_target")
    knob = {} if target is not None else row.get("knob") or {}
    if target is None and not knob and row.get("preset") and row["method"] != "dense":
        knob = {"preset": row["preset"]}
    return Configuration(
        row["method"], str(row.get("checkpoint") or ""), target, json.dumps(knob, sort_keys=True)
    )


def _names(labels: dict[Configuration, str]) -> dict[Configuration, str]:
    """What to call each configuration, see `Configuration.name`, by what suites called its model; where they
    gave two checkpoints of a method one name, the end of its path tells them apart."""
    called: dict[str, dict[str, str]] = defaultdict(dict)  # of a method: checkpoint, its model's name
    for c, label in labels.items():
        called[c.method].setdefault(c.checkpoint, label)
    out = {}
    for c in labels:
        own = called[c.method]
        name = own[c.checkpoint]
        if list(own.values()).count(name) > 1:
            name = f"{name} ({c.checkpoint.rsplit('/', 1)[-1]})"
        out[c] = name if len(own) > 1 else c.method
    return out


def _common(held: dict[Configuration, dict], left_out: dict[Configuration, str]) -> list:
    """Documents that every configuration has. Configurations that are not finished, or that would leave none,
    are taken out of `held`: one that answered little would cut the comparison of all others down to that."""
    most = max(map(len, held.values()))
    for unfinished in [c for c in held if len(held[c]) < FINISHED * most]:
        left_out[unfinished] = f"answered {len(held.pop(unfinished))} of {most} documents so far"
    while True:
        shared = set.intersection(*(set(documents) for documents in held.values()))
        tasks = set.intersection(*({d[0] for d in documents} for documents in held.values()))
        if (shared and tasks == {d[0] for d in shared}) or len(held) == 1:
            return sorted(shared)
        least = min(held, key=lambda c: (len(held[c]), [-ord(x) for x in c.label]))
        left_out[least] = "no documents in common with the others for every task"
        del held[least]


def scores(
    rows: Iterable[dict[str, Any]], tasks: Sequence[str] | None = None, lengths: Sequence[int] | None = None
) -> list[Scores]:
    """Tables of scores, one a length, ascending.

    Args:
        rows: stored rows of any kind.
        tasks, lengths: restrict to these.

    Raises:
        AnalysisError: no accuracy rows, or none of these tasks and lengths.
    """
    found = accuracy_rows(rows)
    if not found:
        raise AnalysisError("no accuracy rows here: run a suite of kind accuracy first")
    have = sorted({r["task"] for r in found}), sorted({r["length"] for r in found})
    found = [
        r for r in found if (not tasks or r["task"] in tasks) and (not lengths or r["length"] in lengths)
    ]
    if not found:
        names, sizes = ", ".join(have[0]), ", ".join(map(str, have[1]))
        raise AnalysisError(f"no accuracy rows of that task and length; there are {names} at {sizes} tokens")
    by_length: dict[int, dict[Configuration, dict]] = defaultdict(lambda: defaultdict(dict))
    labels: dict[Configuration, str] = {}
    for r in sorted(found, key=lambda r: (str(r.get("timestamp", "")), r["key"])):
        document, c = (r["task"], str(r["doc_id"]), str(r.get("prompt_hash") or "")), configuration(r)
        by_length[r["length"]][c][document] = r
        labels.setdefault(c, str(r.get("label") or c.method))
    names = _names(labels)
    out = []
    for length in sorted(by_length):
        ordered = sorted(by_length[length], key=lambda c: c._replace(name=names[c]).order)
        held = {c: by_length[length][c] for c in ordered}
        left_out: dict[Configuration, str] = {}
        documents = _common(held, left_out)
        cells = [[held[c][d] for d in documents] for c in held]
        left_out = {c._replace(name=names[c]): why for c, why in left_out.items()}
        out.append(
            Scores(
                length,
                [c._replace(name=names[c]) for c in held],
                [d[0] for d in documents],
                documents,
                np.array([[r["score"] for r in line] for line in cells], dtype=float),
                np.array([[r.get("s_flop") or 0.0 for r in line] for line in cells], dtype=float),
                left_out,
            )
        )
    return out


def _by_task(table: Scores) -> list[np.ndarray]:
    names = np.array(table.tasks)
    return [np.flatnonzero(names == task) for task in sorted(set(table.tasks))]


def task_mean(table: Scores, values: np.ndarray) -> np.ndarray:
    """Mean over documents within a task, then over tasks: `[..., D] -> [...]`."""
    return np.mean([values[..., members].mean(-1) for members in _by_task(table)], axis=0)


def draws(table: Scores, seed: int = 0, resamples: int = RESAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap over documents, the same documents for all configurations of a draw.

    Two documents that everybody answers and two that nobody does, split over the tasks, join the pool (after
    Agresti and Coull 1998): without them a configuration that answered everything would have an interval of
    no width.

    Returns:
        (accuracy, sparsity), each `[S, C]`.
    """
    random = np.random.default_rng(seed)
    accuracy, sparsity = [], []
    groups = _by_task(table)
    for members in groups:
        n, extra = members.size, 2.0 / len(groups)
        pool = np.append(np.ones(n), [extra, extra]) / (n + 2 * extra)
        weights = random.multinomial(n, pool, size=resamples).astype(float)
        ends = np.tile([1.0, 0.0], (len(table.configurations), 1))
        accuracy.append(weights @ np.hstack([table.score[:, members], ends]).T / n)
        real = weights[:, :n]
        real[real.sum(1) == 0] = 1.0
        sparsity.append(real @ table.sparsity[:, members].T / real.sum(1, keepdims=True))
    return np.mean(accuracy, axis=0), np.mean(sparsity, axis=0)


def around(values: np.ndarray, value: float) -> Interval:
    """Percentile interval that always holds its own value."""
    found = percentile_interval(values, value)
    return Interval(found.value, min(found.low, found.value), max(found.high, found.value))


@dataclass(frozen=True)
class PairedTest:
    """Two configurations on identical documents.

    Attributes:
        first, second: the configurations.
        difference: mean score of the first minus that of the second, 95 % paired bootstrap interval.
        only_first, only_second: documents that one answers (score of at least a half) and the other does not.
        mcnemar: exact p-value on those, Holm-adjusted over all pairs tested together.
        bootstrap: two-sided p-value of the difference by the bootstrap's standard error, Holm-adjusted
            likewise.
        documents: how many there are.
        needed: documents with which a difference of this size would be settled (80 % power, 5 % level,
            corrected for the number of pairs);
            None if the difference is settled already, or is exactly zero.
    """

    first: Configuration
    second: Configuration
    difference: Interval
    only_first: int
    only_second: int
    mcnemar: float
    bootstrap: float
    documents: int
    needed: int | None

    @property
    def settled(self) -> bool:
        """Whether the data separate the two after correction for multiplicity."""
        return self.bootstrap < SIGNIFICANCE


def difference_draws(table: Scores, first: int, second: int, seed: int) -> np.ndarray:
    """Draws of the difference of mean scores, `[RESAMPLES]`; half a document in favour of each side, split
    over the tasks, joins the pool (after Agresti and Min 2005), so that agreement everywhere leaves some
    doubt."""
    random = np.random.default_rng(seed)
    parts = []
    groups = _by_task(table)
    for members in groups:
        n, extra = members.size, 0.5 / len(groups)
        # Documents that differ equally are one entry of the pool: a few values in place of hundreds.
        differences = table.score[first, members] - table.score[second, members]
        values, counts = np.unique(differences, return_counts=True)
        values = np.append(values, [1.0, -1.0])
        pool = np.append(counts, [extra, extra]) / (n + 2 * extra)
        parts.append(random.multinomial(n, pool, size=RESAMPLES) @ values / n)
    return np.mean(parts, axis=0)


def samples_needed(differences: np.ndarray, pairs: int = 1) -> int | None:
    """Documents for 80 % power at the 5 % level shared by so many pairs (Bonferroni), by the normal
    approximation; None for a zero mean."""
    mean, spread = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if mean == 0.0 or differences.size < 2:
        return None
    sides = float(norm.ppf(1 - SIGNIFICANCE / 2 / pairs) + norm.ppf(POWER))
    return int(np.ceil((sides * spread / mean) ** 2))


def paired_tests(table: Scores, pairs: Sequence[tuple[int, int]], seed: int = 0) -> list[PairedTest]:
    """Tests pairs of configurations, corrected for their number.

    Args:
        table: scores.
        pairs: indices into `table.configurations`.
        seed: of the resampling.
    """
    raw = []
    for i, (a, b) in enumerate(pairs):
        values = difference_draws(table, a, b, seed * 7919 + i)
        mean = float(task_mean(table, table.score[a] - table.score[b]))
        # Counting draws beyond zero bottoms out at 1/RESAMPLES, which many pairs corrected together exceed.
        p = float(2 * norm.sf(abs(mean) / values.std()))
        right = table.score[[a, b]] >= 0.5
        one, other = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        exact = binomtest(one, one + other).pvalue if one + other else 1.0
        raw.append((values, p, one, other, float(exact)))
    adjusted = holm([r[1] for r in raw]) if raw else []
    exacts = holm([r[4] for r in raw]) if raw else []
    out = []
    for (a, b), (values, _, one, other, _), p, exact in zip(pairs, raw, adjusted, exacts, strict=True):
        each = table.score[a] - table.score[b]
        mean = float(task_mean(table, each))
        needed = samples_needed(each, len(pairs)) if p >= SIGNIFICANCE else None
        first, second = table.configurations[a], table.configurations[b]
        out.append(PairedTest(first, second, around(values, mean), one, other, exact, p, each.size, needed))
    return out


def natural_pairs(table: Scores) -> list[tuple[int, int]]:
    """The comparisons a reader asks for: every sparse configuration with dense, and methods with each other
    at the same sparsity asked for."""
    found = []
    names = table.configurations
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            same = a.sparsity_target is not None and a.sparsity_target == b.sparsity_target
            if (b.method == "dense" and a.method != "dense") or (same and a.method < b.method):
                found.append((i, j))
    return found
