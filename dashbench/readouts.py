"""What the analysis verbs print, from stores to tables and one-line verdicts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dashbench.analysis.claims import check_claims, load_claims
from dashbench.analysis.compare import compare
from dashbench.analysis.decide import decide, load_workload
from dashbench.analysis.overhead import overheads
from dashbench.analysis.pareto import pareto
from dashbench.analysis.points import AnalysisError, finished, is_dense
from dashbench.analysis.speedup import crossovers, speedups
from dashbench.figures import draw_latency, draw_speedup
from dashbench.report import sheets
from dashbench.report.sheet import print_sheet
from dashbench.store import StoreError, newest, read_rows, store_files, stored_rows
from dashbench.tables import wide_console


def load(stores: list[Path]) -> list[dict[str, Any]]:
    """The newest rows of each file that the paths mean; a point may be in several, each with its own run's
    dense rows beside it.

    Raises:
        StoreError: there are none.
    """
    rows = [row for store in stores for row in stored_rows(store)]
    if not rows:
        raise StoreError(f"{', '.join(map(str, stores))}: no rows yet")
    return rows


def _no_pairs(rows: list[dict[str, Any]]) -> StoreError:
    """Why no sparse row has a dense one beside it."""
    ok = finished(rows)
    methods = sorted({r["method"] for r in ok})
    if not ok:
        return StoreError("no kernel row is finished here")
    if len(methods) == 1:
        return StoreError(f"only {methods[0]} was measured here: it has nothing to be compared with")
    if not any(is_dense(r) for r in ok):
        return StoreError(f"no dense row here: measured were {', '.join(methods)}")
    return StoreError("no sparse method has a dense row beside it: both are needed in one environment")


def _chosen(rows: list[dict[str, Any]], only: list[str] | None) -> set[str]:
    """The methods asked for, all of the rows' by default.

    Raises:
        StoreError: a method has no rows.
    """
    have = {r["method"] for r in rows}
    for name in only or ():
        if name not in have:
            raise StoreError(f"--only: no rows of {name!r}; there are {', '.join(sorted(have))}")
    return set(only) if only else have


def print_crossovers(stores: list[Path], only: list[str] | None = None) -> None:
    """From which context each sparse method, or each of `only`, beats the best dense one.

    Raises:
        StoreError: no rows, or no sparse row with a dense row beside it.
    """
    rows = load(stores)
    chosen = _chosen(rows, only)
    found = [c for c in crossovers(rows) if c.line.method in chosen]
    if not found:
        raise _no_pairs(rows)
    print_sheet(sheets.crossover_sheet(found, speedups(rows)), titled=False)


def print_overheads(
    stores: list[Path], longest: int, out: Path | None, only: list[str] | None = None
) -> None:
    """Where the time goes at short context, of all methods or of `only`.

    Raises:
        StoreError: no rows, or none with stages and a dense row beside it.
    """
    rows = load(stores)
    chosen = _chosen(rows, only)
    found = [o for o in overheads(rows, longest) if o.row["method"] in chosen]
    if not found:
        if speedups(rows):
            raise StoreError(
                f"no sparse row up to {longest} tokens has both its stages and a dense row beside it"
            )
        raise _no_pairs(rows)
    print_sheet(sheets.overhead_sheet(found), titled=False)
    if out:
        from dashbench.report.stack import draw_overheads

        _announce(draw_overheads(found, out))


def _announce(files: list[Path]) -> None:
    console = wide_console()
    for path in files:
        console.print(f"figure: {path}", markup=False)


def print_pareto(stores: list[Path], out: Path | None, **options: Any) -> None:
    """Frontiers, what is read off them, and paired tests, a length at a time.

    Raises:
        StoreError: no rows.
        AnalysisError: rows that do not answer the question.
    """
    found = pareto(load(stores), **options)
    for result in found:
        print_sheet(sheets.pareto_sheet(result))
        print_sheet(sheets.volume_sheet(result))
        if result.readouts:
            print_sheet(sheets.readout_sheet(result))
        if result.tests:
            print_sheet(sheets.paired_sheet(result))
        elif len({c.method for c in result.table.configurations}) == 1:
            only = result.table.configurations[0].method
            wide_console().print(f"only {only} has accuracy rows: there is nothing to test it against")
    if out:
        from dashbench.report.frontiers import draw_frontiers

        _announce(draw_frontiers(found, out))


def print_claims(stores: list[Path], path: Path | None, environment: str | None) -> Counter:
    """Every published claim and its verdict; returns how often each verdict was given.

    Raises:
        StoreError: no rows.
        AnalysisError: rows of several environments, or a bad file of claims.
    """
    claims = load_claims(path)
    found = check_claims(load(stores), claims, environment)
    sheet = sheets.claims_sheet(found)
    keep = [i for i, c in enumerate(sheet.columns) if c not in ("source", "rows")]
    short = sheets.Sheet(
        sheet.name,
        sheet.title,
        tuple(sheet.columns[i] for i in keep),
        [tuple(row[i] for i in keep) for row in sheet.rows],
        sheet.note,
    )
    print_sheet(short, titled=False)
    counts = Counter(f.verdict for f in found)
    wide_console().print(", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    return counts


def print_decision(workload: Path, stores: list[Path], environment: str | None) -> None:
    """The recommended method for a workload, the runner-up, and where that changes.

    Raises:
        StoreError: no rows.
        AnalysisError: a bad workload, or rows that do not answer the question.
    """
    asked = load_workload(workload)
    found = decide(load(stores), asked, environment)
    first = found.candidates[0]
    console = wide_console()
    console.print(
        f"{asked.name}: {first.label}, {first.ms.value:.1f} ms of attention a request "
        f"(the fastest in {100 * found.certainty:.0f} % of draws)",
        markup=False,
    )
    print_sheet(sheets.decision_sheet(found), titled=False)
    for flip in found.flips:
        console.print(flip, markup=False)


def _of_commit(rows: list[dict[str, Any]], commit: str) -> list[dict[str, Any]]:
    """The newest rows that a commit (or the beginning of its hash) measured."""

    def made(row: dict[str, Any]) -> str:
        return str((row["environment"].get("git") or {}).get("commit") or "")

    found = newest([r for r in rows if made(r).startswith(commit)])
    if not found:
        have = ", ".join(sorted({made(r) or "unknown" for r in rows}))
        raise StoreError(f"no rows of commit {commit}; there are {have}")
    return found


def print_comparison(
    before: Path,
    after: Path | None = None,
    commits: tuple[str, str] | None = None,
    threshold: float = 0.02,
    only: list[str] | None = None,
) -> Counter:
    """Point by point, which of two stores, or of two commits in one store, is faster, of all methods or of
    `only`; returns how often each verdict was given.

    Raises:
        StoreError: no rows, or no point finished in both.
    """
    if commits:
        stores = [before] if after is None else [before, after]
        rows = [row for store in stores for file in store_files(store) for row in read_rows(file)]
        first, second = (_of_commit(rows, c) for c in commits)
        names = [f"commit {c}" for c in commits]
    else:
        first, second = load([before]), load([after])
        names = [str(before), str(after)]
    chosen = _chosen(first, only)
    found = compare([r for r in first if r["method"] in chosen], second, threshold)
    if not found:
        raise StoreError(f"no point is finished in both {names[0]} and {names[1]}")
    print_sheet(sheets.comparison_sheet(found), titled=False)
    console = wide_console()
    counts = Counter(c.verdict for c in found)
    console.print(", ".join(f"{n} {verdict}" for verdict, n in counts.most_common()))
    across = sum(c.before["environment_key"] != c.after["environment_key"] for c in found)
    if across:
        console.print(f"{across} of these points were measured in different environments")
    return counts


def write_figures(stores: list[Path], folder: Path) -> list[Path]:
    """Draws latency and speedup of the rows of some stores; returns the files.

    Raises:
        StoreError: no rows, rows of several environments, or nothing finished.
    """
    rows = load(stores)
    environments = {r["environment_key"] for r in finished(rows)}
    if len(environments) > 1:
        raise StoreError(f"rows of {len(environments)} environments are not drawn into one figure")
    written = []
    name = stores[0].name.split(".jsonl")[0]
    for draw, kind in ((draw_latency, "latency"), (draw_speedup, "speedup")):
        path = folder / f"{name}-{kind}.png"
        if draw(rows, path):
            written.append(path)
    if not written:
        raise StoreError("nothing to draw: no row is finished")
    return written


__all__ = [
    "AnalysisError",
    "load",
    "print_claims",
    "print_comparison",
    "print_crossovers",
    "print_decision",
    "print_overheads",
    "print_pareto",
    "write_figures",
]
