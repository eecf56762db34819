"""Frontiers, their uncertainty and paired tests: against brute force, a library, and simulation."""

import itertools
import json

import moocore
import numpy as np
import pytest
from accuracy_rows import accuracy_row, study
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kernel_rows import row as kernel_row
from typer.testing import CliRunner

from dashbench.analysis.accuracy import paired_tests, samples_needed, scores
from dashbench.analysis.frontier import attainment, hypervolume, nondominated
from dashbench.analysis.joining import KernelCosts
from dashbench.analysis.pareto import pareto
from dashbench.analysis.points import AnalysisError
from dashbench.analysis.statistics import holm
from dashbench.cli import app

POINTS = arrays(
    float, st.tuples(st.integers(1, 9), st.just(2)), elements=st.integers(0, 6).map(lambda i: i / 6)
)


def brute_force(points):
    """A point is on the frontier unless another is no worse in both and better in one."""
    return [
        not any((o[0] <= p[0] and o[1] >= p[1]) and (o[0] < p[0] or o[1] > p[1]) for o in points)
        for p in points
    ]


@given(POINTS)
def test_the_frontier_equals_brute_force(points):
    assert nondominated(points[:, 0], points[:, 1]).tolist() == brute_force(points.tolist())


@given(POINTS, st.randoms(use_true_random=False))
def test_the_frontier_does_not_depend_on_the_order(points, random):
    order = list(range(len(points)))
    random.shuffle(order)
    shuffled = points[order]
    whole = nondominated(points[:, 0], points[:, 1])
    assert nondominated(shuffled[:, 0], shuffled[:, 1]).tolist() == whole[order].tolist()
    area = hypervolume(points[:, 0], points[:, 1], (1.2, -0.2))
    assert hypervolume(shuffled[:, 0], shuffled[:, 1], (1.2, -0.2)) == pytest.approx(area, abs=1e-12)


@given(POINTS, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_the_hypervolume_equals_moocores_and_only_grows(points, more):
    area = float(hypervolume(points[:, 0], points[:, 1], (1.1, -0.1)))
    library = moocore.hypervolume(np.column_stack([points[:, 0], -points[:, 1]]), ref=[1.1, 0.1])
    assert area == pytest.approx(float(library), abs=1e-9)
    larger = np.vstack([points, more])
    assert hypervolume(larger[:, 0], larger[:, 1], (1.1, -0.1)) >= area - 1e-12


def test_the_median_attainment_is_what_half_of_the_draws_reach():
    cost = np.array([[1.0, 2.0], [1.0, 2.0], [1.5, 2.0], [3.0, 3.0]])
    quality = np.array([[0.5, 0.9], [0.6, 0.7], [0.8, 0.8], [1.0, 1.0]])
    reached = attainment(cost, quality, [0.5, 1.0, 2.0, 3.0], [0.5, 1.0])
    assert reached[0].tolist() == [-np.inf, 0.5, 0.8, 0.9]
    assert reached[1].tolist() == [-np.inf, -np.inf, -np.inf, 0.7]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(values):
    adjusted = holm(values)
    assert all(a >= v - 1e-15 and a <= 1 for a, v in zip(adjusted, values, strict=True))
    for (v1, a1), (v2, a2) in itertools.combinations(zip(values, adjusted, strict=True), 2):
        assert v1 == v2 or (a1 - a2) * (v1 - v2) >= 0


def test_intervals_of_accuracy_cover_the_truth_about_nineteen_times_in_twenty():
    """Simulated studies of 60 documents a task: intervals of the mean against the chance behind the draws."""
    chance, hits, studies = 0.7, 0, 150
    for seed in range(studies):
        plan = {"dash": [(0.75, 0.75, chance)], "dense": [(None, 0.0, 0.9)]}
        found = pareto(study(60, seed=seed, plan=plan))[0]
        point = next(p for p in found.points if p.configuration.method == "dash")
        hits += point.accuracy.low <= chance <= point.accuracy.high
    assert 0.90 <= hits / studies <= 0.99


def test_who_is_on_the_frontier_and_how_sure_that_is():
    found = pareto(study(300))[0]
    by = {(p.configuration.method, p.configuration.asked): p for p in found.points}
    marks = {key: p.mark for key, p in by.items()}
    assert all(mark == "off" for (method, _), mark in marks.items() if method == "nsa")
    assert sum(mark != "off" for (method, _), mark in marks.items() if method == "dash") >= 3
    for point in found.points:
        expected = "on" if point.probability >= 0.95 else "off" if point.probability <= 0.05 else "tie"
        assert point.mark == expected
        assert point.accuracy.low <= point.accuracy.value <= point.accuracy.high
    volumes = {m.method: m.hypervolume.value for m in found.methods}
    assert volumes["dash"] > volumes["infllmv2"] > volumes["nsa"]
    again = pareto(list(reversed(study(300))))[0]
    assert {p.configuration: p.mark for p in again.points} == {p.configuration: p.mark for p in found.points}


def test_an_unfinished_configuration_is_left_out_and_named():
    rows = study(documents=40)
    kept = [
        r for r in rows if not (r["method"] == "nsa" and r["sparsity_target"] == 0.75 and r["doc_id"] > 20)
    ]
    found = scores(kept)[0]
    assert len(found.documents) == 80, "the others keep all of theirs"
    assert {c.label: why for c, why in found.left_out.items()} == {
        "nsa 75 %": "answered 42 of 80 documents so far"
    }


def test_frontiers_are_compared_where_both_were_measured():
    rows = study(documents=200)
    (whole,) = pareto(rows)
    (short,) = pareto([r for r in rows if r["method"] != "dash" or (r["sparsity_target"] or 0) <= 0.5])
    gaps = [{(a, b): gap for a, b, gap in p.differences} for p in (whole, short)]
    assert gaps[0]["dash", "nsa"].low > 0
    assert gaps[1]["dash", "nsa"].low > 0, "not run beyond 50 %, so not beaten there"
    assert gaps[1]["infllmv2", "nsa"] == gaps[0]["infllmv2", "nsa"]


def test_paired_tests_use_the_same_documents():
    """Two methods that differ on few documents are told apart although their own intervals overlap widely."""
    rows = []
    for document in range(200):
        hard = document % 2
        rows.append(accuracy_row("dash", 0.75, 0.75, not hard or document < 16, document, task="t"))
        rows.append(accuracy_row("nsa", 0.75, 0.75, not hard, document, task="t"))
    table = scores(rows)[0]
    test = paired_tests(table, [(0, 1)])[0]
    assert (test.only_first, test.only_second) in ((8, 0), (0, 8)) and test.documents == 200
    assert test.mcnemar == pytest.approx(2 * 0.5**8)
    assert test.settled and test.needed is None
    alike = paired_tests(scores(study(20, tasks=("t",)))[0], [(0, 1)])[0]
    assert not alike.settled


@settings(deadline=None)
@given(st.floats(0.02, 0.5), st.integers(40, 200))
def test_half_the_difference_takes_four_times_the_documents(share, count):
    ones = max(1, round(share * count))
    values = np.r_[np.ones(ones), np.zeros(count - ones)]
    whole, half = samples_needed(values), samples_needed(values - values.mean() / 2)
    assert half == pytest.approx(4 * whole, rel=0.05, abs=4)


def test_stores_with_nothing_to_compare_say_so(tmp_path):
    def says(rows, *words):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        done = CliRunner().invoke(app, ["pareto", str(path), *words])
        return done.exit_code, done.output

    code, text = says(study(10))
    assert code == 0 and "dash" in text
    kernel = {
        "row_version": 1,
        "key": "0" * 16,
        "environment_key": "e",
        "kind": "kernel",
        "status": "skipped",
    }
    code, text = says([kernel])
    assert code == 2 and "no accuracy rows here" in text
    code, text = says(study(10), "--x", "latency")
    assert code == 2 and "needs both kinds" in text
    two = study(5) + [{**r, "environment_key": "other", "key": r["key"][::-1]} for r in study(5)]
    with pytest.raises(AnalysisError, match="environment"):
        pareto(two)


def test_one_implementation_of_a_method_is_one_line():
    """Others' kernels are a method's cost only where ours was not measured, however fast they are."""

    def timed(method, context, ms, s_flop):
        return kernel_row(method, context, [ms] * 9, s_flop=s_flop)

    both = [
        timed("nsa", 4096, 2.0, 0.75),
        timed("nsa@fla", 4096, 1.0, 0.75),
        timed("nsa@fla", 8192, 1.0, 0.75),
    ]
    costs = KernelCosts(both, "prefill", 1, "latency_ms")
    assert costs.lengths("nsa") == [4096] and costs.cost("nsa", 0.75, 4096).value == pytest.approx(2.0)
    theirs = KernelCosts(both[1:], "prefill", 1, "latency_ms")
    assert theirs.lengths("nsa") == [4096, 8192] and theirs.cost("nsa", 0.75, 4096).value == pytest.approx(
        1.0
    )


def test_what_is_read_off_lies_on_one_checkpoints_curve():
    """A better checkpoint with points on either side of another's: nothing between the two is reached."""
    plan = {"dense": [(None, 0.0, 1.0)], "dash": [(0.7, 0.7, 0.5), (0.8, 0.8, 0.3)]}
    better = [
        {**r, "key": "b" + r["key"][1:], "checkpoint": "here/better", "label": "better"}
        for r in study(200, seed=1, plan={"dash": [(0.65, 0.65, 1.0), (0.85, 0.85, 0.8)]})
    ]

    def read(rows):
        (result,) = pareto(rows)
        return {r.at: r.value for r in result.readouts}

    both, alone = (
        read(study(200, plan=plan) + better),
        read(study(200, plan={"dense": plan["dense"]}) + better),
    )
    assert both["75 % sparsity"].value == pytest.approx(0.9, abs=0.03)
    assert both == alone, "a worse checkpoint changes nothing"


def test_checkpoints_of_one_method_are_told_apart_and_share_a_frontier():
    rows = study(40)
    sparser = [
        {**r, "key": "s" + r["key"][1:], "checkpoint": "here/sparser", "label": "dash-sparser"}
        for r in study(40, seed=1, plan={"dash": [(0.75, 0.76, 0.95)]})
    ]
    (table,) = scores(rows + sparser)
    labels = [c.label for c in table.configurations if c.method == "dash"]
    assert "dash-sparser 75 %" in labels and labels.count("dash 75 %") == 1
    (result,) = pareto(rows + sparser)
    assert {m for m, *_ in result.differences} <= {"dash", "infllmv2", "nsa"}
    same_name = [{**r, "label": "dash"} for r in sparser]
    (table,) = scores(rows + same_name)
    labels = [c.label for c in table.configurations if c.method == "dash"]
    assert {"dash (sparser) 75 %", "dash (miniature-dash@1234) 75 %"} <= set(labels)
