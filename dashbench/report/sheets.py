"""The tables of every analysis, in words and rounded numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dashbench.analysis.claims import Finding
from dashbench.analysis.compare import Comparison
from dashbench.analysis.decide import Decision
from dashbench.analysis.overhead import PART_ORDER, Overhead
from dashbench.analysis.pareto import AXES, Pareto
from dashbench.analysis.points import routing_name
from dashbench.analysis.speedup import Crossover, Speedup
from dashbench.analysis.statistics import Interval
from dashbench.figures import tokens
from dashbench.report.sheet import Sheet


def percent(share: float | None) -> str:
    """`0.9375` -> `93.75 %`; nothing for None."""
    return "" if share is None else f"{100 * share:.4g} %"


def _between(x: Interval, form: str = ".2f", unit: str = "") -> str:
    return f"{x.value:{form}}{unit} [{x.low:{form}}, {x.high:{form}}]"


def milliseconds(ms: float) -> str:
    """Three figures or so: `0.0123`, `1.234`, `56.7`."""
    return f"{ms:.4f}" if ms < 1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _length(value: float) -> str:
    return f"{value / 1024:.1f}k" if value >= 1024 else f"{value:.0f}"


def crossover_sentence(found: Crossover) -> str:
    """`ahead from 6.9k [6.5k, 7.2k] on`, or why there is no such length; an end of the interval that lies
    outside what was measured says so."""
    if found.shortest == found.longest:
        where = "ahead" if found.verdict == "always" else "behind"
        return f"{where} at {tokens(found.shortest)}, the only length measured"
    span = f"{tokens(found.shortest)} to {tokens(found.longest)}"
    if found.verdict == "always":
        return f"ahead at every length measured ({span})"
    if found.verdict == "never":
        return f"never within range ({span})"
    low = f"below {tokens(found.shortest)}" if found.low is None else _length(found.low)
    high = f"above {tokens(found.longest)}" if found.high is None else _length(found.high)
    return f"ahead from {_length(found.length)} [{low}, {high}] on"


def crossover_sheet(found: Sequence[Crossover], points: dict[Any, list[Speedup]]) -> Sheet:
    """From which length each method is ahead."""
    rows = []
    for item in sorted(found, key=lambda c: (c.line[:-2], c.line.routing, c.line.sparsity_target or 0.0)):
        line = item.line
        top = max(points[line], key=lambda p: p.ratio.value)
        rows.append(
            (
                line.method,
                percent(line.sparsity_target),
                line.phase,
                str(line.batch),
                f"{line.cache}, {line.launch}",
                line.routing,
                crossover_sentence(item),
                f"{_between(top.ratio).replace(' ', 'x ', 1)} at {tokens(top.row['context'])}",
            )
        )
    return Sheet(
        "crossover",
        "From which context each method beats the best dense attention",
        ("method", "S asked", "phase", "batch*", "timed", "routing", "against best dense", "best speedup"),
        rows,
    )


def speedup_sheet(points: dict[Any, list[Speedup]]) -> Sheet:
    """Speedup over the best dense method, every length."""
    rows = [
        (
            line.method, percent(line.sparsity_target), percent(p.row["s_flop"]), line.phase, str(line.batch),
            f"{line.cache}, {line.launch}", line.routing, tokens(p.row["context"]),
            milliseconds(p.row["latency_ms"]), p.dense["method"], milliseconds(p.dense["latency_ms"]),
            _between(p.ratio),
        )
        for line, members in points.items()
        for p in members
    ]  # fmt: skip
    columns = (
        "method", "S asked", "S measured*", "phase", "batch*", "timed", "routing", "context*", "ms*",
        "best dense", "its ms*", "speedup*",
    )  # fmt: skip
    return Sheet("speedup", "Speedup over the best dense attention", columns, rows)


def overhead_sheet(found: Sequence[Overhead]) -> Sheet:
    """Where the time goes at short context."""
    parts = [p for p in PART_ORDER if any(p in o.parts for o in found)]
    rows = []
    for o in found:
        shares = [percent(round(o.parts[p] / o.row["latency_ms"], 3)) if p in o.parts else "" for p in parts]
        lose = "ahead" if o.lose == 0 else f"{100 * o.lose:.0f} %"
        enough = [name for name, share in o.lose_of.items() if share <= 1]
        if o.lose == 0:
            how = ""
        elif enough:
            how = ", ".join(f"{100 * o.lose_of[p]:.0f} % of {p}" for p in PART_ORDER if p in enough)
        else:
            how = "no single part is enough"
        rows.append(
            (
                o.row["method"], percent(o.row["sparsity_target"]), o.row["phase"], str(o.row["batch"]),
                f"{o.row['cache']}, {o.row['launch']}", routing_name(o.row), tokens(o.row["context"]),
                milliseconds(o.row["latency_ms"]), f"{_between(o.ratio)}", *shares, lose, how,
                f"{100 * o.fusing:.0f} %", "" if o.ceiling is None else f"{100 * o.ceiling:.0f} %",
            )
        )  # fmt: skip
    scaled = sum(o.scaled < 0.95 for o in found)
    note = "Fusing saves at most what is between stages and the launches; no kernel saves more than that."
    if scaled:
        note += f" In {scaled} rows the stages alone took over 5 % more than the whole and are scaled to fit."
    columns = (
        "method", "S asked", "phase", "batch*", "timed", "routing", "context*", "ms*", "of dense*",
        *(f"{p}*" for p in parts), "must lose*", "which is", "fusing saves*", "above ceiling*",
    )  # fmt: skip
    return Sheet("overhead", "Where the time goes at short context", columns, rows, note)


OF_DOCUMENTS = (
    "intervals are over documents: how far another training of a checkpoint would be is not in them"
)


def pareto_sheet(found: Pareto) -> Sheet:
    """The configurations in the plane, by method."""
    unit = "" if found.axis in ("sparsity", "flops") else "ms" if found.axis == "latency" else "MiB"
    rows = [
        (
            p.configuration.label, percent(round(p.sparsity, 4)), _between(p.cost, ".3g"),
            _between(p.accuracy, ".3f"), f"{p.probability:.2f}", p.mark,
        )
        for p in found.points
    ]  # fmt: skip
    documents = f"{len(found.table.documents)} documents of {', '.join(sorted(set(found.table.tasks)))}"
    note = "; ".join(
        f"{why}: {', '.join(c.label for c, reason in found.left_out.items() if reason == why)}"
        for why in sorted(set(found.left_out.values()))
    )
    where = AXES[found.axis].replace(f" ({unit})", "") if unit else AXES[found.axis]
    name = f"{where}{', ' + unit if unit else ''}*"
    return Sheet(
        f"pareto-{found.axis}-{tokens(found.table.length)}",
        f"Accuracy against {where} at {tokens(found.table.length)} tokens: {documents}",
        ("configuration", "S measured*", name, "accuracy*", "on the frontier*", "mark"),
        rows,
        "; ".join(x for x in (found.note, OF_DOCUMENTS, note) if x),
    )


def volume_sheet(found: Pareto) -> Sheet:
    """Hypervolumes and their differences."""
    rows = [(m.method, _between(m.hypervolume, ".3f")) for m in found.methods if m.method != "dense"]
    rows += [(f"{a} less {b}", _between(gap, "+.3f")) for a, b, gap in found.differences]
    where = tokens(found.table.length)
    return Sheet(
        f"hypervolume-{found.axis}-{where}",
        f"Share of the plane of accuracy and {found.axis} that each method dominates at {where} tokens",
        ("method", "hypervolume*"),
        rows,
        "one less another: over the costs that both were measured down to" if found.differences else "",
    )


def readout_sheet(found: Pareto) -> Sheet:
    """What is read off the frontiers."""
    rows = []
    for r in found.readouts:
        times = "saved" in r.question or "speedup" in r.question
        if r.value is None:
            value = f"not reachable ({100 * r.reached:.0f} % of draws)"
        else:
            value = _between(r.value, ".2f", "x") if times else _between(r.value, ".3f")
        rows.append((r.question, r.at, r.method, value))
    where = tokens(found.table.length)
    return Sheet(
        f"readouts-{found.axis}-{where}",
        f"Read off the frontiers of accuracy against {found.axis} at {where} tokens",
        ("question", "at", "method", "answer"),
        rows,
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def paired_sheet(found: Pareto) -> Sheet:
    """Paired tests on identical documents."""
    rows = []
    for t in found.tests:
        verdict = "settled" if t.settled else "open" if t.needed is None else f"open: {t.needed} documents"
        rows.append(
            (
                t.first.label, t.second.label, _between(t.difference, "+.3f"), str(t.only_first),
                str(t.only_second), _p(t.mcnemar), _p(t.bootstrap), verdict,
            )
        )  # fmt: skip
    where = tokens(found.table.length)
    return Sheet(
        f"paired-{where}",
        f"Pairs on identical documents at {where} tokens ({len(found.table.documents)} of them)",
        (
            "first",
            "second",
            "difference*",
            "only first*",
            "only second*",
            "McNemar p*",
            "bootstrap p*",
            "verdict",
        ),
        rows,
        "p-values are Holm-adjusted; an open pair would be settled by about so many documents, if the "
        "difference is real.",
    )


def claims_sheet(found: Sequence[Finding]) -> Sheet:
    """Claims and what the rows say."""
    rows = []
    for f in found:
        check = f.claim.check
        form, unit = (
            (".0f", " TFLOP/s")
            if check.kind == "rate"
            else (".2f", "x")
            if check.kind == "speedup"
            else ("+.3f", "")
        )
        published = "" if check.kind == "frontier" else f"{check.value:g}{unit}"
        measured = "" if f.measured is None else _between(f.measured, form, unit)
        why = "; ".join(x for x in (f.setting, f.reason) if x)
        rows.append(
            (
                f.verdict,
                f.claim.statement,
                f.implementation,
                published,
                measured,
                why,
                f.claim.source,
                " ".join(f.rows),
            )
        )
    return Sheet(
        "claims",
        "Published claims against the rows here",
        ("verdict", "claim", "whose", "published*", "here*", "at", "source", "rows"),
        rows,
        "REPRODUCED and CONTRADICTED need the whole 95 % interval on one side of the published value less "
        "its tolerance.",
    )


def comparison_sheet(found: Sequence[Comparison]) -> Sheet:
    """Two stores, point by point."""
    rows = []
    for c in found:
        b = c.before
        asked = b.get("sparsity_target")
        times = (f"{r['latency_ms']:.4g}" for r in (b, c.after))
        rows.append(
            (
                c.verdict, b["method"], percent(asked) if asked else _knobs(b), b["phase"], str(b["batch"]),
                f"{b['cache']}, {b['launch']}", routing_name(b), tokens(b["context"]), *times, c.reason,
            )
        )  # fmt: skip
    columns = (
        "verdict", "method", "asked", "phase", "batch*", "timed", "routing", "context*", "before ms*",
        "after ms*", "why",
    )  # fmt: skip
    return Sheet("comparison", "Point by point", columns, rows)


def _knobs(row: dict[str, Any]) -> str:
    """`top_k 16, window 512`; nothing for a method without."""
    return ", ".join(f"{name} {value}" for name, value in sorted((row.get("knob") or {}).items()))


def decision_sheet(found: Decision) -> Sheet:
    """Candidates for a workload."""
    rows = []
    for rank, c in enumerate(found.candidates):
        place = "" if c.obstacle else "recommended" if rank == 0 else "runner-up" if rank == 1 else "possible"
        rows.append(
            (
                place or "no", c.label, "" if c.ms is None else _between(c.ms, ".1f"),
                *([f"{ms:.1f}" for ms in c.by_request] or [""] * len(found.workload.requests)),
                "" if c.accuracy is None else f"{c.accuracy:.3f}",
                "" if c.memory_gib is None else f"{c.memory_gib:.1f}", c.obstacle,
            )
        )  # fmt: skip
    columns = (
        "", "method", "attention ms a request*", *(f"{r.label}*" for r in found.workload.requests),
        "accuracy*", "GiB*", "why not",
    )  # fmt: skip
    return Sheet(
        f"decision-{found.workload.name}", f"Workload {found.workload.name}", columns, rows, found.note
    )


def trouble_sheet(rows: Sequence[dict[str, Any]]) -> Sheet:
    """What has no time or score, and why."""
    counts = Counter(
        (r["status"], r["method"], r.get("phase") or r.get("kind", ""), r["reason"] or "")
        for r in rows
        if r["status"] != "ok"
    )
    return Sheet(
        "skipped",
        "Skipped or failed",
        ("status", "method", "phase", "why", "points*"),
        [(*key, str(n)) for key, n in sorted(counts.items())],
    )
