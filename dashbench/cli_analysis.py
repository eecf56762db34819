"""The verbs that read stores: no torch, no GPU. Imports are inside them, as in dashbench.cli."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dashbench.cli_common import listed, stop

analysis = typer.Typer()
Stores = Annotated[list[Path], typer.Argument(help="results files or folders", metavar="STORE...")]
Environment = Annotated[
    str | None, typer.Option(help="key of the environment, where stores hold several", metavar="KEY")
]
Only = Annotated[str | None, typer.Option(help="show these methods only, comma-separated", metavar="M1,M2")]
Figures = Annotated[Path | None, typer.Option(help="also draw figures into this folder", metavar="DIR")]


class Axis(StrEnum):
    """What accuracy is drawn against."""

    sparsity = "sparsity"
    latency = "latency"
    memory = "memory"
    flops = "flops"


class Phase(StrEnum):
    """Which kernel rows give a cost."""

    prefill = "prefill"
    decode = "decode"


@contextmanager
def _sentences() -> Iterator[None]:
    """Turns what rows cannot answer into one sentence and exit code 2."""
    from dashbench.analysis.points import AnalysisError
    from dashbench.store import StoreError
    from dashbench.yaml_lines import SuiteError

    try:
        yield
    except (AnalysisError, StoreError, SuiteError) as problem:
        stop(str(problem))


def _tokens(option: str, text: str) -> int:
    """`16k` -> 16384."""
    match = re.fullmatch(r"(\d+)(k?)", text.strip().lower())
    if not match:
        stop(f"{option}: expected tokens such as 4096 or 4k, got {text!r}")
    return int(match[1]) * (1024 if match[2] else 1)


@analysis.command()
def figures(
    stores: Stores, out: Annotated[Path, typer.Option(help="folder for them", metavar="DIR")] = Path(".")
) -> None:
    """Draw STORE again: latency, and speedup over the best dense method, against context."""
    from dashbench.readouts import write_figures

    with _sentences():
        for path in write_figures(stores, out):
            typer.echo(path)


@analysis.command()
def pareto(
    stores: Stores,
    x: Annotated[Axis, typer.Option("--x", help="what accuracy is set against")] = Axis.sparsity,
    task: Annotated[list[str] | None, typer.Option(help="only this task (repeatable)")] = None,
    length: Annotated[
        list[str] | None, typer.Option(help="only this length, e.g. 4k (repeatable)", metavar="TOKENS")
    ] = None,
    phase: Annotated[Phase, typer.Option(help="kernel rows that give latency and memory")] = Phase.prefill,
    batch: Annotated[int | None, typer.Option(help="of those rows (default: the smallest)")] = None,
    environment: Environment = None,
    out: Figures = None,
) -> None:
    """Show accuracy against sparsity, latency, memory or FLOPs: who is on the frontier, how sure that is."""
    from dashbench.readouts import print_pareto

    lengths = [_tokens("--length", text) for text in length] if length else None
    with _sentences():
        print_pareto(
            stores,
            out,
            axis=x.value,
            tasks=task or None,
            lengths=lengths,
            phase=phase.value,
            batch=batch,
            environment=environment,
        )


@analysis.command()
def overhead(
    stores: Stores,
    longest: Annotated[str, typer.Option(help="up to this context", metavar="TOKENS")] = "16k",
    only: Only = None,
    out: Figures = None,
) -> None:
    """Show where the time goes at short context, and what would have to go to break even with dense."""
    from dashbench.readouts import print_overheads

    with _sentences():
        print_overheads(stores, _tokens("--longest", longest), out, listed(only))


@analysis.command()
def crossover(
    stores: Stores,
    only: Only = None,
    refine: Annotated[
        Path | None,
        typer.Option(help="measure more lengths of this suite near the crossovers", metavar="SUITE"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the new rows (default: out/SUITE_NAME)", metavar="DIR")
    ] = None,
) -> None:
    """Show from which context length on each sparse method beats the best dense one, with an interval."""
    from dashbench.readouts import print_crossovers

    with _sentences():
        if refine:
            from dashbench.refine import refine_suite

            stores = [*stores, refine_suite(stores, refine, out)]
        print_crossovers(stores, listed(only))


@analysis.command()
def compare(
    before: Annotated[Path, typer.Argument(help="a results file or folder", metavar="A")],
    after: Annotated[Path | None, typer.Argument(help="another", metavar="B")] = None,
    commits: Annotated[
        str | None,
        typer.Option(help="compare the rows of two commits in A instead of two stores", metavar="OLD..NEW"),
    ] = None,
    threshold: Annotated[float, typer.Option(help="relative difference that nobody cares about")] = 0.02,
    only: Only = None,
    fail_on: Annotated[
        str | None, typer.Option(help="`slower`: exit code 1 if any point is", metavar="slower")
    ] = None,
) -> None:
    """Compare two stores, or two commits in one, by point: FASTER, SLOWER, SAME or AMBIGUOUS, and why."""
    from dashbench.readouts import print_comparison

    if fail_on not in (None, "slower"):
        stop(f"--fail-on: expected slower, got {fail_on!r}")
    pair = tuple(commits.split("..")) if commits else None
    if pair and (len(pair) != 2 or not all(pair)):
        stop(f"--commits: expected two commits such as ab12..cd34, got {commits!r}")
    if after is None and pair is None:
        stop("compare: give a second store, or --commits OLD..NEW")
    with _sentences():
        counts = print_comparison(before, after, pair, threshold, listed(only))
    if fail_on and counts["SLOWER"]:
        raise typer.Exit(1)


@analysis.command()
def claims(
    stores: Stores,
    claims: Annotated[
        Path | None, typer.Option(help="a file of claims (default: the published ones)", metavar="FILE")
    ] = None,
    environment: Environment = None,
) -> None:
    """Hold published claims against STORE: REPRODUCED, CONTRADICTED or UNTESTED."""
    from dashbench.readouts import print_claims

    with _sentences():
        print_claims(stores, claims, environment)


@analysis.command()
def decide(
    workload: Annotated[Path, typer.Argument(help="such as suites/workloads/chat.yaml", metavar="WORKLOAD")],
    stores: Stores,
    environment: Environment = None,
) -> None:
    """Recommend a method and a sparsity for WORKLOAD, name the runner-up, and say where that changes."""
    from dashbench.readouts import print_decision

    with _sentences():
        print_decision(workload, stores, environment)


@analysis.command()
def report(
    stores: Stores,
    out: Annotated[Path, typer.Option(help="folder for the page, figures and tables", metavar="DIR")],
    workload: Annotated[
        list[Path] | None, typer.Option(help="also decide for this workload (repeatable)", metavar="FILE")
    ] = None,
    claims: Annotated[
        Path | None, typer.Option(help="a file of claims (default: the published ones)", metavar="FILE")
    ] = None,
    environment: Environment = None,
) -> None:
    """Write one page with everything STORE says, its figures as PNG, SVG and PDF, its tables as CSV,
    Markdown and LaTeX."""
    from dashbench.report.build import build

    with _sentences():
        for line in build(stores, out, workload or [], claims, environment):
            typer.echo(line)
