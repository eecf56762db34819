"""Figures and tables come from stored rows alone and are the same bytes each time."""

import io
from itertools import pairwise

import pytest
from rich.console import Console

from dashbench.figures import _spread, draw_latency, draw_speedup, latency_panels
from dashbench.tables import results_table, trouble_lines


def row(method="fa3", phase="prefill", context=1024, batch=1, ms=1.0, **more):
    base = {
        "status": "ok",
        "reason": None,
        "method": method,
        "phase": phase,
        "context": context,
        "batch": batch,
        "cache": "cold",
        "launch": "graph",
        "sparsity_target": None,
        "s_flop": 0.0,
        "key": f"{method}/{phase}/{context}/{batch}",
        "environment_key": "e",
        "suite": "made-up@0",
        "timestamp": "2026-11-24T12:00:00+00:00",
        "shape": {"name": "s"},
        "dtype": "bfloat16",
        "routing": "topics",
        "samples": [0.95 * ms, ms, 1.05 * ms],
        "latency_ms": ms,
        "latency_ci_ms": (0.9 * ms, 1.1 * ms),
        "checked": {"passed": True, "rows": 64},
    }
    return {**base, **more}


ROWS = [
    *(row(context=n, ms=n / 1000) for n in (1024, 4096, 16384)),
    *(row("dash", context=n, ms=n / 3000, sparsity_target=0.75, s_flop=0.751) for n in (1024, 4096, 16384)),
    row(phase="decode", batch=8, ms=0.02),
    row(cache="warm", ms=0.5),
    row("nsa", status="skipped", reason="needs a GPU", latency_ms=None, latency_ci_ms=None),
]


def test_panels_group_by_phase_and_batch_and_use_one_way_of_timing():
    panels = latency_panels(ROWS)
    assert list(panels) == [("prefill", 1, "topics"), ("decode", 8, "topics")]
    prefill = panels["prefill", 1, "topics"]
    assert (prefill["cache"], prefill["launch"]) == ("cold", "graph")
    assert [p[1] for p in prefill["series"]["fa3", None]] == [1.024, 4.096, 16.384], (
        "the warm row must not join the cold line"
    )


def test_same_rows_same_bytes_and_order_of_rows_does_not_matter(tmp_path):
    for ending in ("png", "svg", "pdf"):
        first, second = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
        assert draw_latency(ROWS, first, "t") and draw_latency(ROWS[::-1], second, "t")
        assert first.read_bytes() == second.read_bytes(), ending


def test_speedup_figure_needs_a_dense_row_beside_a_sparse_one(tmp_path):
    assert draw_speedup(ROWS, tmp_path / "a.svg") and draw_speedup(ROWS[::-1], tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert not draw_speedup([r for r in ROWS if r["method"] != "fa3"], tmp_path / "c.svg")


def test_nothing_is_drawn_without_a_latency(tmp_path):
    assert not draw_latency([ROWS[-1]], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_labels_are_moved_apart_in_order():
    placed = _spread([0.5, 0.5, 0.9, 0.51], 0.05)
    ranked = sorted(placed)
    assert all(b - a >= 0.05 - 1e-6 for a, b in pairwise(ranked))
    assert placed[2] == max(placed) and placed[3] > placed[0]


def test_labels_stay_below_the_title():
    placed = _spread([1.0, 0.97, 0.2, 0.99], 0.1, 0.98)
    assert placed == pytest.approx([0.98, 0.78, 0.2, 0.88])


@pytest.mark.parametrize("width", [80, 160])
def test_table_shows_measured_sparsity_and_leaves_failures_to_the_trouble_lines(width):
    out = io.StringIO()
    Console(file=out, width=width).print(results_table(ROWS))
    if width == 160:
        assert "75.1 %" in out.getvalue() and "nsa" not in out.getvalue()
    assert trouble_lines(ROWS) == ["1 skipped: nsa: needs a GPU"]
    told = [
        {"status": "skipped", "method": "nsa@fla", "reason": f"at most 32 blocks, not {n}"}
        for n in (66, 66, 150)
    ]
    assert trouble_lines(told) == ["3 skipped: nsa@fla: at most 32 blocks, not 66 (and 1 with other numbers)"]
    assert (
        trouble_lines([*told, {"status": "oom", "method": "dash", "reason": None}])[1] == "1 oom: dash: None"
    )
