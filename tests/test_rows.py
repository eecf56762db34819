"""The row schema is written down for users, and it refuses dishonest rows."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from dashbench.rows import BaseRow, Check, Point, Row, Shape
from dashbench.rows_accuracy import AccuracyRow
from dashbench.rows_latency import LatencyRow

ROOT = Path(__file__).parent.parent
SHAPE = {"name": "tiny", "query_heads": 4, "kv_heads": 1, "head_dim": 64}
ASKED = {
    "key": "0" * 16,
    "method": "m",
    "phase": "prefill",
    "context": 128,
    "batch": 1,
    "shape": SHAPE,
    "dtype": "float32",
    "routing": "topics",
    "cache": "warm",
    "launch": "eager",
    "suite": "s@0",
    "timestamp": "2026-01-01T00:00:00+00:00",
}
GREEN = Check(passed=True, rows=64)
RED = Check(passed=False, rows=64)


def test_every_field_is_documented_and_every_documented_field_exists():
    text = (ROOT / "results" / "README.md").read_text()
    documented = set()
    for line in text[text.index("## The row") :].split("\n## Rows")[0].splitlines():
        if line.startswith("| `"):
            documented |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    assert documented == set(Row.model_fields)


def test_an_honest_row_is_accepted():
    row = Row(**ASKED, status="ok", latency_ms=1.0, checked=GREEN, recheck=GREEN)
    assert Row.model_validate_json(row.model_dump_json()) == row


@pytest.mark.parametrize(
    "found",
    [
        {"status": "ok", "latency_ms": 1.0},
        {"status": "ok", "latency_ms": 1.0, "checked": RED},
        {"status": "ok", "latency_ms": 1.0, "checked": GREEN, "recheck": RED},
        {"status": "incorrect", "reason": "x", "latency_ms": 1.0, "checked": RED},
        {"status": "ok", "checked": GREEN},
        {"status": "skipped"},
        {"status": "fine", "reason": "x"},
    ],
)
def test_dishonest_rows_are_refused(found):
    with pytest.raises(ValidationError):
        Row(**ASKED, **found)


def test_a_point_is_named_by_its_content_alone():
    asked = {
        k: ASKED[k] for k in ("method", "phase", "context", "batch", "dtype", "routing", "cache", "launch")
    }
    a = Point(**asked, shape=SHAPE, knobs={"a": 1, "b": 2})
    b = Point(**dict(reversed(asked.items())), shape=dict(reversed(SHAPE.items())), knobs={"b": 2, "a": 1})
    assert a.key() == b.key()
    assert a.key() != a.model_copy(update={"context": 129}).key()


def test_query_heads_must_be_a_multiple_of_kv_heads():
    with pytest.raises(ValidationError, match="not a multiple"):
        Shape(name="odd", query_heads=5, kv_heads=2, head_dim=64)


@pytest.mark.parametrize(
    ("head", "row"), [("| field of an answer", AccuracyRow), ("| field of a latency", LatencyRow)]
)
def test_the_fields_of_other_rows_are_documented(head, row):
    text = (ROOT / "results" / "README.md").read_text()
    table = text[text.index(head) :].split("\n\n")[0]
    documented = set()
    for line in table.splitlines():
        if line.startswith("| `"):
            documented |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    assert documented == set(row.model_fields) - set(BaseRow.model_fields) - {"kind"}
