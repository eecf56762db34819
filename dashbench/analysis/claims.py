"""Published claims against stored rows: REPRODUCED, CONTRADICTED or UNTESTED, with the rows that say so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dashbench.analysis.accuracy import accuracy_rows, around, difference_draws, scores, task_mean
from dashbench.analysis.joining import SPARSITY_SLACK
from dashbench.analysis.pareto import pareto
from dashbench.analysis.points import (
    TIMING_PREFERENCE,
    AnalysisError,
    finished,
    one_environment,
    routing_name,
    setting,
    suite_name,
)
from dashbench.analysis.statistics import Interval, ratio_of_rows

Verdict = Literal["REPRODUCED", "CONTRADICTED", "UNTESTED"]
PACKAGED = "claims.yaml"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SpeedupCheck(_Strict):
    """Time of the fastest of `over` by time of `method` is at least `value`, each batch apart; with `knob`
    only rows that ran with those parameters count."""

    kind: Literal["speedup"]
    method: str
    over: list[str] = Field(min_length=1)
    phase: Literal["prefill", "decode", "train"]
    context: int = Field(gt=0)
    sparsity: float | None = Field(default=None, ge=0, lt=1)
    knob: dict[str, Any] = Field(default_factory=dict)
    value: float = Field(gt=0)


class RateCheck(_Strict):
    """TFLOP/s of a method are at least `value` at its best context."""

    kind: Literal["rate"]
    method: str
    phase: Literal["prefill", "decode", "train"]
    value: float = Field(gt=0)


class AccuracyCheck(_Strict):
    """Accuracy less that of `than` on the same documents is at least `value`, at a sparsity asked for."""

    kind: Literal["accuracy"]
    method: str
    than: str
    sparsity: float = Field(ge=0, lt=1)
    value: float = 0.0


class FrontierCheck(_Strict):
    """The hypervolume of accuracy against kept tokens is larger than that of `than`."""

    kind: Literal["frontier"]
    method: str
    than: str


class Claim(_Strict):
    """One published claim."""

    id: str
    statement: str
    source: str
    check: Annotated[SpeedupCheck | RateCheck | AccuracyCheck | FrontierCheck, Field(discriminator="kind")]
    tolerance: float = Field(default=0.0, ge=0, lt=1, description="relative, of speedups and rates")
    points: float = Field(default=0.0, ge=0, lt=1, description="absolute, of accuracies")


class ClaimFile(_Strict):
    """A file of claims."""

    version: Literal[1]
    implementations: dict[str, dict[str, list[str]]]
    others_checkpoints: list[str] = Field(description="parts of the names of other people's checkpoints")
    claims: list[Claim]


def load_claims(path: Path | None = None) -> ClaimFile:
    """Reads a file of claims; None: the one that comes with dashbench.

    Raises:
        AnalysisError: the file cannot be read or is not one of claims.
    """
    name = str(path or PACKAGED)
    try:
        text = (
            path.read_text(encoding="utf-8")
            if path
            else files("dashbench").joinpath(PACKAGED).read_text("utf-8")
        )
        return ClaimFile.model_validate(yaml.safe_load(text))
    except OSError as problem:
        raise AnalysisError(f"{name}: cannot be read: {problem.strerror}") from None
    except yaml.YAMLError as problem:
        raise AnalysisError(f"{name}: not YAML: {getattr(problem, 'problem', problem)}") from None
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise AnalysisError(f"{name}: {where or 'the file'}: {first['msg'].lower()}") from None


@dataclass(frozen=True)
class Finding:
    """What the rows say about one claim for one implementation.

    Attributes:
        claim: which.
        implementation: whose kernels or checkpoints.
        setting: batch, routing or length of the rows, in words; empty if there are none.
        required: the value less its tolerance.
        measured: with its 95 % interval; None if untested.
        verdict, reason: what it amounts to and why.
        rows: keys of the rows.
    """

    claim: Claim
    implementation: str
    setting: str
    required: float | None
    measured: Interval | None
    verdict: Verdict
    reason: str
    rows: tuple[str, ...] = ()


def _judge(measured: Interval, required: float) -> tuple[Verdict, str]:
    if measured.low >= required:
        return "REPRODUCED", ""
    if measured.high < required:
        return "CONTRADICTED", ""
    return "UNTESTED", "the interval reaches both sides of what is required: measure longer"


def _matches(method: str, names: list[str]) -> bool:
    return any(method == name or (name == "dense" and method.startswith("dense@")) for name in names)


def _way(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows timed in the most telling way that there is."""
    ways = {(r["cache"], r["launch"]) for r in rows}
    best = next((w for w in TIMING_PREFERENCE if w in ways), None)
    return [r for r in rows if (r["cache"], r["launch"]) == best]


def _speedup(claim: Claim, who: str, names: list[str], rows: list[dict[str, Any]]) -> list[Finding]:
    check, required = claim.check, claim.check.value * (1 - claim.tolerance)
    here = [r for r in rows if r["phase"] == check.phase and r["context"] == check.context]
    mine = [
        r
        for r in here
        if _matches(r["method"], names)
        and (check.sparsity is None or abs((r["s_flop"] or 0.0) - check.sparsity) <= SPARSITY_SLACK)
        and check.knob.items() <= (r.get("knob") or {}).items()
    ]
    found = []
    for row in _way(mine):
        rivals = [r for r in here if _matches(r["method"], check.over) and setting(r) == setting(row)]
        if rivals:
            same_run = [r for r in rivals if suite_name(r) == suite_name(row)]
            other = min(same_run or rivals, key=lambda r: (r["latency_ms"], r["key"]))
            ratio = ratio_of_rows(other, row)
            verdict, why = _judge(ratio, required)
            where = f"batch {row['batch']}, {routing_name(row)}, S {100 * row['s_flop']:.1f} %"
            found.append(
                Finding(claim, who, where, required, ratio, verdict, why, (row["key"], other["key"]))
            )
    return found


def _rate(claim: Claim, who: str, names: list[str], rows: list[dict[str, Any]]) -> list[Finding]:
    check, required = claim.check, claim.check.value * (1 - claim.tolerance)
    mine = [r for r in rows if r["phase"] == check.phase and _matches(r["method"], names) and r.get("tflops")]
    if not mine:
        return []

    def rate_of(row: dict[str, Any]) -> Interval:
        low, high = row["latency_ci_ms"] or (row["latency_ms"],) * 2
        scale = row["tflops"] * row["latency_ms"]
        return Interval(row["tflops"], scale / high, scale / low)

    # The surest one: the highest median of many is that of a noisy row.
    best = max(mine, key=lambda r: (rate_of(r).low, r["key"]))
    rate = rate_of(best)
    verdict, why = _judge(rate, required)
    where = f"{best['context'] // 1024}k tokens, batch {best['batch']}, head dim {best['shape']['head_dim']}"
    return [Finding(claim, who, where, required, rate, verdict, why, (best["key"],))]


def _accuracy(claim: Claim, who: str, names: list[str], rows: list[dict[str, Any]]) -> list[Finding]:
    check, required = claim.check, claim.check.value - claim.points
    found: list[Finding] = []
    mine = [r for r in rows if r["method"] in (check.method, check.than)]
    if {r["method"] for r in mine} != {check.method, check.than}:
        return []
    for table in scores(mine):
        ours = [
            i
            for i, c in enumerate(table.configurations)
            if c.method == check.method
            and (
                c.sparsity_target == check.sparsity
                or abs(table.sparsity[i].mean() - check.sparsity) <= SPARSITY_SLACK
            )
        ]
        theirs = [i for i, c in enumerate(table.configurations) if c.method == check.than]
        for a in ours:
            for b in theirs:
                gap = float(task_mean(table, table.score[a] - table.score[b]))
                measured = around(difference_draws(table, a, b, 7), gap)
                verdict, why = _judge(measured, required)
                where = f"{table.length} tokens, {len(table.documents)} documents"
                if (name := table.configurations[a].name) != check.method:
                    where = f"{name}, {where}"
                found.append(Finding(claim, who, where, required, measured, verdict, why))
    return found


def _frontier(claim: Claim, who: str, names: list[str], rows: list[dict[str, Any]]) -> list[Finding]:
    check = claim.check
    mine = [r for r in rows if r["method"] in (check.method, check.than)]
    if {r["method"] for r in mine} != {check.method, check.than}:
        return []
    found = []
    for result in pareto(mine):
        for first, _, gap in result.differences:
            if first != check.method:
                gap = Interval(-gap.value, -gap.high, -gap.low)
            verdict, why = _judge(gap, 0.0)
            where = f"{result.table.length} tokens, {len(result.table.documents)} documents, hypervolume"
            found.append(Finding(claim, who, where, 0.0, gap, verdict, why))
    return found


def _is_own(row: dict[str, Any], claims: ClaimFile) -> bool:
    return not any(part in str(row.get("checkpoint")) for part in claims.others_checkpoints)


def check_claims(
    rows: Iterable[dict[str, Any]], claims: ClaimFile, environment: str | None = None
) -> list[Finding]:
    """Every claim for every implementation, in the order of the file.

    Raises:
        AnalysisError: rows of several environments.
    """
    rows = list(rows)
    timed, samples = finished(rows), accuracy_rows(rows)
    timed = one_environment(timed, environment) if timed else []
    samples = one_environment(samples, environment) if samples else []
    out: list[Finding] = []
    for claim in claims.claims:
        for who, members in claims.implementations.items():
            names = members.get(claim.check.method, [])
            if claim.check.kind in ("accuracy", "frontier"):
                usable = [r for r in samples if _is_own(r, claims) == (who == "ours")]
                check = _accuracy if claim.check.kind == "accuracy" else _frontier
                missing = "no accuracy rows of these checkpoints here"
            else:
                if who != "ours" and names == claims.implementations.get("ours", {}).get(claim.check.method):
                    continue  # the same kernels
                usable = timed
                check = _speedup if claim.check.kind == "speedup" else _rate
                missing = f"no rows of {' or '.join(names) or claim.check.method} at this setting here"
            found = check(claim, who, names, usable)
            out += found or [Finding(claim, who, "", None, None, "UNTESTED", missing)]
    return out
