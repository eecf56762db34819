"""`dashbench list`: methods, suites, shapes and routings as tables."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from dashbench.methods import registry
from dashbench.routings import ROUTINGS
from dashbench.shapes import SHAPES
from dashbench.tables import wide_console


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0)
    return table


def _print(table: Table) -> None:
    wide_console().print(table)


def list_methods() -> None:
    """What can be measured."""
    table = _table("method", "what it is", "phases", "on", "dtypes", "knob", "tested with")
    for m in registry().values():
        knob = "dense" if m.knob is None else m.knob
        table.add_row(
            m.name, m.summary, " ".join(m.phases), " ".join(m.devices), " ".join(m.dtypes), knob, m.tested
        )
    _print(table)


def list_suites() -> None:
    """Suite files in ./suites."""
    from dashbench.suite import SuiteError, load_suite

    table = _table("suite", "points", "what it is")
    files = sorted(Path("suites").glob("*.yaml"))
    for file in files:
        try:
            suite = load_suite(file)
            table.add_row(str(file), str(len(suite.points())), suite.spec.description)
        except SuiteError as problem:
            table.add_row(str(file), "", str(problem))
    if files:
        _print(table)
    else:
        wide_console().print("no suites: ./suites holds no .yaml file; run this where dashbench was cloned")


def list_shapes() -> None:
    """Shape presets."""
    table = _table("shape", "query heads", "KV heads", "head dim", "what it is")
    for shape, note in SHAPES.values():
        table.add_row(shape.name, str(shape.query_heads), str(shape.kv_heads), str(shape.head_dim), note)
    _print(table)


def list_routings() -> None:
    """Input generators."""
    table = _table("routing", "what it is", "options")
    for name, (what, options) in ROUTINGS.items():
        table.add_row(name, what, ", ".join(f"{k} = {v}" for k, v in options.items()))
    _print(table)


LISTS = {"methods": list_methods, "suites": list_suites, "shapes": list_shapes, "routings": list_routings}
