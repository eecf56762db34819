"""The command line. Imports are inside the verbs, so that `--help` answers at once and no verb but a worker
loads torch."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from dashbench.cli_analysis import analysis
from dashbench.cli_common import listed, stop

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure trainable sparse attentions side by side: checked before timed, stored at once, resumable.",
)

SuitePath = Annotated[
    Path, typer.Argument(help="a suite file, such as suites/quickstart.yaml", metavar="SUITE")
]
Out = Annotated[
    Path | None, typer.Option(help="folder for the results (default: out/SUITE_NAME)", metavar="DIR")
]
Only = Annotated[str | None, typer.Option(help="restrict to these methods, comma-separated", metavar="M1,M2")]


def _load(path: Path):
    from dashbench.suite import SuiteError, load_suite

    try:
        return load_suite(path)
    except SuiteError as problem:
        stop(str(problem))


def _only(suite, only: str | None) -> list[str] | None:
    if only is None:
        return None
    names = listed(only)
    known = {point.method for point in suite.points()}
    if not names:
        stop(f"--only: expected methods of the suite: {', '.join(sorted(known))}")
    for name in names:
        if name not in known:
            stop(f"--only: the suite has no method {name!r}; it has {', '.join(sorted(known))}")
    return names


def _need_interpreters(suite, names: list[str] | None) -> None:
    import shutil

    for method, python in suite.interpreters().items():
        if (names is None or method in names) and shutil.which(python) is None:
            stop(f"{suite.path}: {method}: no Python interpreter at {python!r}")


def _seconds(text: str | None) -> float | None:
    """`90`, `90s`, `8m`, `1h` -> seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if not match:
        stop(f"--time-budget: expected a duration such as 90s, 8m or 1h, got {text!r}")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


@app.command()
def run(
    suite: SuitePath,
    out: Out = None,
    only: Only = None,
    time_budget: Annotated[
        str | None, typer.Option(help="stop cleanly after this long, e.g. 8m", metavar="TIME")
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="measure failed points again")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="measure finished points once more; the newest row counts")
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="processes that answer beside each other (accuracy suites)", metavar="N"),
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and stop")] = False,
) -> None:
    """Measure every point of SUITE that is not finished yet. Run it again to go on where it stopped."""
    _seconds(time_budget)
    if dry_run:
        plan(suite, only)
        return
    if again and _load(suite).spec.kind == "train":
        stop("--again: a training suite is trained again by giving another --out")
    if jobs > 1 and _load(suite).spec.kind != "accuracy":
        stop("--jobs: only questions of accuracy suites can be answered beside each other")
    from dashbench.progress import Progress
    from dashbench.runner import WorkerFailed
    from dashbench.store import StoreError
    from dashbench.suite import imported

    loaded = _load(suite)
    folder = out or Path("out") / loaded.spec.name
    names, budget = _only(loaded, only), _seconds(time_budget)
    _need_interpreters(loaded, names)
    with Progress(loaded.id) as progress:
        try:
            run_kind = imported(loaded.spec.RUN)
            more = {"again": True} if again else {}
            more |= {"jobs": jobs} if jobs > 1 else {}
            summary = run_kind(loaded, folder, names, budget, retry_failed, progress.event, **more)
        except (StoreError, WorkerFailed) as problem:
            progress.stop()
            stop(str(problem))
    raise typer.Exit(imported(loaded.spec.ENDING)(loaded, summary))


@app.command()
def plan(suite: SuitePath, only: Only = None) -> None:
    """Show the whole grid of SUITE: how many points, how long they may take, what will be skipped and why."""
    from dashbench.doctor import device_facts
    from dashbench.ending import print_plan
    from dashbench.suite import imported

    loaded = _load(suite)
    names = _only(loaded, only)
    _need_interpreters(loaded, names)
    points = [p for p in loaded.points() if names is None or p.method in names]
    device = device_facts()
    print_plan(loaded, imported(loaded.spec.PLAN)(loaded, points, device), device)


@app.command("make-checkpoint")
def make_checkpoint(
    folder: Annotated[Path, typer.Argument(help="folder to write", metavar="DIR")],
    kind: Annotated[str, typer.Option(help="dense, infllmv2, nsa or dash")] = "dash",
    size: Annotated[str, typer.Option(help="tiny, or 8b (16 GB)")] = "tiny",
    seed: Annotated[int, typer.Option(help="of the weights")] = 0,
) -> None:
    """Write a checkpoint with random weights, in Hugging Face format with the parameter names of the released
    ones: to try the path, not to score."""
    from dashbench.models.kinds import KINDS, CheckpointError

    if kind not in KINDS:
        stop(f"--kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    try:
        from dashbench.models.checkpoint import make_checkpoint as write

        digest = write(folder, kind, size, seed)
    except CheckpointError as problem:
        stop(str(problem))
    except ImportError:
        stop("transformers is not installed; pip install 'dashbench[accuracy]' enables it")
    typer.echo(f"{folder}: {kind}, {size}, weights {digest}")


@app.command()
def validate(suite: SuitePath) -> None:
    """Check SUITE and say how many points it has."""
    loaded = _load(suite)
    typer.echo(f"{suite}: valid, {len(loaded.points())} points, {loaded.id}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of suite files, for editors."""
    import json

    from dashbench.suite import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def status(store: Annotated[Path, typer.Argument(help="a results file or folder", metavar="STORE")]) -> None:
    """Show what STORE holds: rows by method and status, environments, and what went wrong."""
    from dashbench.ending import print_status
    from dashbench.store import StoreError

    try:
        print_status(store)
    except StoreError as problem:
        stop(str(problem))


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="methods, suites, shapes or routings", metavar="WHAT")],
) -> None:
    """List methods, suites, shapes or routings."""
    from dashbench.listing import LISTS

    if what not in LISTS:
        stop(f"list: expected one of {', '.join(LISTS)}, got {what!r}")
    try:
        LISTS[what]()
    except ValueError as problem:
        stop(str(problem))


@app.command()
def doctor() -> None:
    """Show GPU, driver and versions, which methods can run here, and the command that would enable each of
    the others."""
    from dashbench.doctor import print_doctor

    print_doctor()


@app.command()
def export(
    store: Annotated[Path, typer.Argument(help="a results file or folder", metavar="STORE")],
    csv: Annotated[Path | None, typer.Option(help="write a CSV file", metavar="FILE")] = None,
    parquet: Annotated[Path | None, typer.Option(help="write a Parquet file", metavar="FILE")] = None,
) -> None:
    """Write STORE as one flat table: nested fields become columns with dots, raw samples are left out."""
    from dashbench.export import ExportError, export_rows
    from dashbench.store import StoreError

    if (csv is None) == (parquet is None):
        stop("export: give exactly one of --csv FILE and --parquet FILE")
    try:
        count = export_rows(store, csv or parquet, "csv" if csv else "parquet")
    except (StoreError, ExportError) as problem:
        stop(str(problem))
    typer.echo(f"{csv or parquet}: {count} rows")


app.add_typer(analysis)


def main() -> None:
    """Entry point of the `dashbench` command: an unforeseen failure is one sentence, and the traceback goes
    to a file."""
    try:
        app()
    except Exception as problem:
        import tempfile
        import traceback

        with tempfile.NamedTemporaryFile("w", prefix="dashbench-", suffix=".log", delete=False) as log:
            traceback.print_exc(file=log)
        message = f"unexpected {type(problem).__name__}: {problem}; the traceback is in {log.name}"
        print(f"dashbench: {message}", file=sys.stderr)
        sys.exit(1)
