"""A report of stores: one page that needs no network, figures, and tables, all in one folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dashbench import __version__
from dashbench.analysis.accuracy import accuracy_rows
from dashbench.analysis.claims import Finding, check_claims, load_claims
from dashbench.analysis.decide import decide, load_workload
from dashbench.analysis.overhead import Overhead, overheads
from dashbench.analysis.pareto import AXES, Pareto, pareto
from dashbench.analysis.points import AnalysisError, finished, partly_warm, routing_name
from dashbench.analysis.speedup import Crossover, Speedup, crossovers, speedups
from dashbench.readouts import load
from dashbench.report import charts, sheets
from dashbench.report.frontiers import draw_frontiers
from dashbench.report.lines import draw_speedups
from dashbench.report.rows_table import rows_table
from dashbench.report.sheet import Sheet, to_csv, to_latex, to_markdown
from dashbench.report.stack import draw_overheads

VERDICTS = frozenset(("REPRODUCED", "CONTRADICTED", "UNTESTED", "on", "tie", "off", "recommended"))


def _environment(rows: list[dict[str, Any]], wanted: str | None) -> str | None:
    """The environment with the most kernel rows, among those whose key begins as wanted."""
    counts = Counter(r["environment_key"] for r in finished(rows) or rows)
    known = {k: n for k, n in counts.items() if wanted is None or k.startswith(wanted)}
    if not known:
        raise AnalysisError(f"no rows of environment {wanted}")
    return min(known, key=lambda k: (-known[k], k))


def _environment_sheet(rows: list[dict[str, Any]]) -> Sheet:
    """What each environment was, and how many rows came from it."""
    out = []
    for key in sorted({r["environment_key"] for r in rows}):
        mine = [r for r in rows if r["environment_key"] == key]
        e = min((r["environment"] for r in mine), key=lambda e: json.dumps(e, sort_keys=True))
        ceilings = e.get("ceilings") or {}
        packages = ", ".join(f"{n} {v}" for n, v in sorted((e.get("packages") or {}).items()))
        commits = sorted({str((r["environment"].get("git") or {}).get("commit") or "") for r in mine} - {""})
        out.append(
            (
                key, str(e.get("device") or ""), str(e.get("driver") or ""), str(e.get("cuda") or ""),
                str(e.get("torch") or ""), str(e.get("triton") or ""), packages,
                ", ".join(f"{k} {v:.4g}" for k, v in sorted(ceilings.items())), ", ".join(commits),
                str(len(mine)),
            )
        )  # fmt: skip
    columns = (
        "key",
        "device",
        "driver",
        "CUDA",
        "torch",
        "triton",
        "packages",
        "measured ceilings",
        "commits",
        "rows*",
    )
    return Sheet("environments", "Where the rows were measured", columns, out)


def _frontiers(rows: list[dict[str, Any]], environment: str | None) -> tuple[list[Pareto], list[str]]:
    """Frontiers against every cost that the rows have, and why the others are missing."""
    samples = accuracy_rows(rows)
    if not samples:
        return [], ["no accuracy rows: frontiers, equal-accuracy speedups and paired tests are left out"]
    found, missing = [], []
    # Accuracy rows may be of another environment than the kernel rows: a score is no time.
    place = _environment(samples, None)
    mine = [r for r in rows if r.get("kind") != "accuracy" or r["environment_key"] == place]
    mine = [r for r in mine if r.get("kind") == "accuracy" or r["environment_key"] == environment]
    for axis in AXES:
        try:
            found += pareto(mine, axis)
        except AnalysisError as problem:
            missing.append(f"accuracy against {axis}: {problem}")
    return found, missing


def _in_short(
    crossing: list[Crossover],
    points: dict[Any, list[Speedup]],
    slow: list[Overhead],
    fronts: list[Pareto],
    claims: list[Finding],
) -> list[str]:
    """One sentence for each thing most people ask first."""
    out = []
    usual = [k for k in points if k.cache == "cold" and k.routing == "topics"]
    found = {c.line: c for c in crossing}
    for phase in ("prefill", "decode", "train", "layer"):
        here = [k for k in usual if k.phase == phase] or [k for k in points if k.phase == phase]
        # Training cannot be replayed from a graph; where replays were timed they are what counts.
        replayed = [k for k in here if k.launch == "graph"] or here
        mine = sorted(replayed, key=lambda k: max(p.ratio.value for p in points[k]))
        if mine:
            k = mine[-1]
            top = max(points[k], key=lambda p: p.ratio.value)
            out.append(
                f"{phase}: {k.method} at {sheets.percent(k.sparsity_target)} sparsity is "
                f"{top.ratio.value:.2f} times ["
                f"{top.ratio.low:.2f}, {top.ratio.high:.2f}] as fast as the best dense attention at "
                f"{sheets.tokens(top.row['context'])} tokens, batch {k.batch}; "
                f"{sheets.crossover_sentence(found[k])}."
            )
    worst = max((o for o in slow if o.row["launch"] == "graph"), key=lambda o: o.ratio.value, default=None)
    if worst:
        part = max(worst.parts, key=lambda p: worst.parts[p])
        out.append(
            f"Short contexts: at worst {worst.ratio.value:.1f} times the time of dense "
            f"({worst.row['method']} "
            f"{sheets.percent(worst.row['sparsity_target'])}, {worst.row['phase']}, routing "
            f"{routing_name(worst.row)}, {sheets.tokens(worst.row['context'])} tokens), most of it {part}."
        )
    for p in (p for p in fronts if p.axis == "sparsity"):
        on = ", ".join(x.configuration.label for x in p.points if x.mark == "on")
        ties = ", ".join(x.configuration.label for x in p.points if x.mark == "tie")
        out.append(
            f"Accuracy against sparsity at {sheets.tokens(p.table.length)} tokens: on the frontier "
            f"{on or 'nobody for sure'}" + (f"; tied with it {ties}." if ties else ".")
        )
    counts = Counter(f.verdict for f in claims)
    out.append(
        "Published claims: "
        + ", ".join(f"{counts[v]} {v}" for v in ("REPRODUCED", "CONTRADICTED", "UNTESTED"))
        + "."
    )
    return out


def _write_tables(found: list[Sheet], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for sheet in found:
        for ending, form in (("csv", to_csv), ("md", to_markdown), ("tex", to_latex)):
            (folder / f"{sheet.name}.{ending}").write_text(form(sheet), encoding="utf-8")


def _listed(out: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """Files beside the page by name, with their endings."""
    names: dict[str, list[tuple[str, str]]] = {}
    for path in sorted([*(out / "figures").glob("*.*"), *(out / "tables").glob("*.*")]):
        where = path.relative_to(out)
        names.setdefault(str(where.with_suffix("")), []).append((path.suffix[1:], where.as_posix()))
    return list(names.items())


def _drawn_sparsities(found: Sequence[Overhead]) -> set[float]:
    """Sparsities whose overheads are drawn as files; the page switches between all of them.

    The least and the most sparse of one method; of several methods the one nearest to 75 %, because figures
    multiply.
    """
    asked = {o.row["sparsity_target"] or 0.0 for o in found}
    if not asked:
        return set()
    if len({o.row["method"] for o in found}) > 1:
        return {min(asked, key=lambda s: abs(s - 0.75))}
    return {min(asked), max(asked)}


def _clear(folder: Path) -> None:
    """Removes what an earlier report left in a folder that is only ours."""
    for ending in ("png", "svg", "pdf", "csv", "md", "tex"):
        for path in folder.glob(f"*.{ending}"):
            path.unlink()


def build(
    stores: list[Path], out: Path, workloads: list[Path], claims: Path | None, environment: str | None
) -> list[str]:
    """Writes `out/index.html`, `out/figures/` and `out/tables/`.

    Args:
        stores: files or folders of rows.
        out: folder; its `figures` and `tables` are replaced.
        workloads: files for `decide`.
        claims: a file of claims; None: the published ones.
        environment: key of the environment that claims, decisions and costs are taken from; None: the one
            with the most kernel rows. Speedups are always within one environment, whichever.

    Returns:
        What was written and what was left out, a sentence a line.

    Raises:
        StoreError: no rows.
        AnalysisError: a bad file, or no such environment.
    """
    rows = load(stores)
    place = _environment(rows, environment)
    here = [r for r in rows if r["environment_key"] == place]
    points, slow = speedups(rows), overheads(rows)
    fronts, missing = _frontiers(rows, place)
    samples = accuracy_rows(rows)
    scored = _environment(samples, None) if samples else None
    for_claims = [r for r in here if r.get("kind") != "accuracy"]
    for_claims += [r for r in samples if r["environment_key"] == scored]
    checked = check_claims([r | {"environment_key": place} for r in for_claims], load_claims(claims))
    crossing = crossovers(rows)
    if not points:
        missing.append("no sparse row has a dense row beside it: speedups and crossovers are left out")
    if not slow:
        missing.append(
            "no sparse row up to 16k tokens has stages and a dense row: the short-context stack is left out"
        )

    warm = sum(partly_warm(r) for r in finished(rows))
    if warm:
        missing.append(
            f"{warm} rows called cold touch less than 1.5 times the L2 cache: "
            "their times lie between warm and cold"
        )

    graphs = out / "figures"
    for folder in (graphs, out / "tables"):
        _clear(folder)
    draw_speedups({k: v for k, v in points.items() if k.environment == place}, graphs)
    ends = _drawn_sparsities(slow)
    usual = [
        o
        for o in slow
        if o.row["routing"] == "topics"
        and not o.row.get("routing_options")
        and (o.row["sparsity_target"] or 0.0) in ends
        and o.row["environment_key"] == place
    ]
    draw_overheads(usual, graphs)
    draw_frontiers(fronts, graphs)

    sections: list[dict[str, Any]] = []
    if points:
        sections.append(
            {
                "chart": charts.speedup_chart(points),
                "note": "Against the fastest dense kernel, of the same suite if it is there; "
                "bars are 95 % intervals.",
                "sheets": [sheets.crossover_sheet(crossing, points), sheets.speedup_sheet(points)],
            }
        )
    if finished(rows):
        sections.append(
            {"chart": charts.latency_chart(rows), "note": "Medians with 95 % intervals.", "sheets": []}
        )
    if slow:
        sections.append(
            {
                "chart": charts.overhead_chart(slow),
                "note": "Each bar is a method's time in units of the best dense attention's at that length.",
                "sheets": [sheets.overhead_sheet(slow)],
            }
        )
    if any(p.points for p in fronts):
        found = []
        for p in fronts:
            found += [sheets.pareto_sheet(p), sheets.volume_sheet(p)]
            found += [sheets.readout_sheet(p)] if p.readouts else []
            found += [sheets.paired_sheet(p)] if p.tests and p.axis == "sparsity" else []
        sections.append(
            {
                "chart": charts.pareto_chart(fronts),
                "note": "Filled points are on the frontier in 95 % of bootstrap draws; of open ones the "
                "table says which are off it in as many, and which the data do not tell apart (tie).",
                "sheets": found,
            }
        )
    groups = [
        {"id": "claims", "title": "Published claims", "note": "", "sheets": [sheets.claims_sheet(checked)]}
    ]
    for path in workloads:
        try:
            decision = decide([r | {"environment_key": place} for r in for_claims], load_workload(path))
        except AnalysisError as problem:
            missing.append(f"{path.name}: {problem}")
            continue
        sheet = sheets.decision_sheet(decision)
        groups.append(
            {
                "id": sheet.name, "title": f"What to run: {decision.workload.name}",
                "note": f"{' '.join(f'{x[0].upper()}{x[1:]}.' for x in decision.flips)}", "sheets": [sheet],
            }
        )  # fmt: skip
    groups += [
        {
            "id": "skipped",
            "title": "Skipped or failed, and left out",
            "note": " ".join(f"{m[0].upper()}{m[1:]}." for m in missing),
            "sheets": [sheets.trouble_sheet(rows)],
        },
        {
            "id": "environments",
            "title": "Environments",
            "note": f"Claims, decisions and costs are of environment {place}.",
            "sheets": [_environment_sheet(rows)],
        },
    ]  # fmt: skip
    _write_tables([s for part in (*sections, *groups) for s in part["sheets"]], out / "tables")

    device = sorted({str(r["environment"].get("device") or "?") for r in here})
    statuses = Counter(r["status"] for r in rows)
    counts = f"{len(rows)} rows (" + ", ".join(f"{n} {s}" for s, n in sorted(statuses.items())) + ") from "
    page = _page(
        f"dashbench on {', '.join(device)}",
        counts + ", ".join(s.name for s in stores),
        _in_short(
            crossing, {k: v for k, v in points.items() if k.environment == place}, slow, fronts, checked
        ),
        sections,
        groups,
        _listed(out),
        rows,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(page, encoding="utf-8")
    done = f"{out / 'index.html'}: {len(rows)} rows, {len(page.encode()) / 2**20:.2f} MiB"
    return [done, *(f"left out: {m}" for m in missing)]


def _page(
    title: str,
    counts: str,
    findings: list[str],
    sections: list[dict[str, Any]],
    groups: list[dict[str, Any]],
    listed: list[tuple[str, list[tuple[str, str]]]],
    rows: list[dict[str, Any]],
) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def text(name: str) -> str:
        return files("dashbench.report").joinpath(name).read_text("utf-8")

    jinja = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    table = jinja.from_string(text("table.html"))
    data = {"charts": [s["chart"] for s in sections], "rows": rows_table(rows)}
    # Inside a script element only "</" could end it early.
    packed = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/")
    links = [("findings", "In short"), *((s["chart"]["id"], s["chart"]["title"]) for s in sections)]
    links += [(g["id"], g["title"]) for g in groups] + [("rows", "All rows"), ("files", "Files")]
    return jinja.from_string(text("page.html")).render(
        title=title,
        counts=counts,
        findings=findings,
        sections=links,
        charts=[{**s["chart"], "note": s["note"], "sheets": s["sheets"]} for s in sections],
        groups=groups,
        files=listed,
        table=lambda sheet: Markup(table.render(sheet=sheet, verdicts=VERDICTS)),
        version=__version__,
        data=Markup(packed),
        css=Markup(text("page.css")),
        js=Markup(text("page.js")),
    )
