"""Statistics, speedups, crossovers and comparisons, against brute force, planted truth and simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_rows import noisy, row

from dashbench.analysis.compare import compare
from dashbench.analysis.speedup import Crossover, crossovers, speedups
from dashbench.analysis.statistics import (
    cliffs_delta,
    holm,
    percentile_interval,
    ratio_of_rows,
    resampled_medians,
)
from dashbench.report.sheets import crossover_sentence


def test_interval_of_a_ratio_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = ratio_of_rows(
            {"samples": rng.lognormal(0.7, 0.1, 40)}, {"samples": rng.lognormal(0.0, 0.1, 40)}, seed=trial
        )
        hits += interval.low <= np.exp(0.7) <= interval.high
    assert 0.90 <= hits / 200 <= 0.99


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12)
)
def test_cliffs_delta_is_the_count_of_pairs(a, b):
    brute = sum((x > y) - (x < y) for x, y in itertools.product(a, b)) / (len(a) * len(b))
    assert cliffs_delta(a, b) == pytest.approx(brute)


def test_holm_against_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_resampling_is_seeded():
    samples = [1.0, 2.0, 4.0, 8.0]
    assert (resampled_medians(samples, 3) == resampled_medians(samples, 3)).all()
    assert (resampled_medians(samples, 3) != resampled_medians(samples, 4)).any()
    assert percentile_interval(np.arange(1001.0), 500).low == pytest.approx(25)


def test_speedup_is_against_the_fastest_dense_method_of_the_same_setting():
    rng = np.random.default_rng(1)
    rows = [
        row("fa3", 1024, noisy(rng, 2.0)),
        row("dense@cudnn", 1024, noisy(rng, 1.5)),
        row("fa3@fp8", 1024, noisy(rng, 0.7)),
        row("dense@cudnn", 1024, noisy(rng, 0.1), environment_key="another machine"),
        row("dense@cudnn", 1024, noisy(rng, 0.1), cache="warm"),
        row("dash", 1024, noisy(rng, 0.5)),
        row("dash", 2048, noisy(rng, 0.5)),
    ]
    by_method = {line.method: points for line, points in speedups(rows).items()}
    assert set(by_method) == {"dash", "fa3@fp8"}, (
        "another precision is measured against dense, but is no baseline"
    )
    points = by_method["dash"]
    assert len(points) == 1, "no dense row at 2048: no speedup there"
    assert points[0].dense["method"] == "dense@cudnn"
    assert points[0].ratio.low < 3.0 < points[0].ratio.high and points[0].ratio.value == pytest.approx(
        3.0, rel=0.02
    )


def planted(exponent, cross, contexts=(1024, 2048, 4096, 8192, 16384)):
    """Dense time N^2; the method's time makes the speedup exactly one at `cross`."""
    rng = np.random.default_rng(2)
    rows = []
    for n in contexts:
        rows += [
            row("fa3", n, noisy(rng, n * n / 1e6)),
            row("dash", n, noisy(rng, n * n / 1e6 * (n / cross) ** -exponent)),
        ]
    return rows


def test_crossover_finds_a_planted_length_with_an_interval_around_it():
    (found,) = crossovers(planted(0.5, 5000))
    assert found.verdict == "at" and found.low < 5000 < found.high and found.high / found.low < 1.2
    assert found.chance_never == 0


@pytest.mark.parametrize(("cross", "verdict"), [(100, "always"), (1_000_000, "never")])
def test_crossover_outside_the_range_is_said_so(cross, verdict):
    (found,) = crossovers(planted(0.5, cross))
    assert found.verdict == verdict and found.length is None
    assert (found.shortest, found.longest) == (1024, 16384)


@pytest.mark.parametrize(
    ("verdict", "low", "high", "longest", "sentence"),
    [
        ("at", 1500.0, 2048.0, 4096, "ahead from 2.0k [1.5k, 2.0k] on"),
        ("at", None, None, 4096, "ahead from 2.0k [below 1k, above 4k] on"),
        ("always", None, None, 4096, "ahead at every length measured (1k to 4k)"),
        ("always", None, None, 1024, "ahead at 1k, the only length measured"),
        ("never", None, None, 1024, "behind at 1k, the only length measured"),
    ],
)
def test_a_crossover_in_words(verdict, low, high, longest, sentence):
    length = 2048.0 if verdict == "at" else None
    found = Crossover(None, verdict, length, low, high, 1024, longest, 0.0)
    assert crossover_sentence(found) == sentence


def test_a_line_that_falls_behind_again_counts_from_its_last_return():
    rng = np.random.default_rng(3)
    rows = []
    for n, ratio in ((1024, 2.0), (2048, 0.5), (4096, 0.5), (8192, 2.0)):
        rows += [row("fa3", n, noisy(rng, 1.0)), row("dash", n, noisy(rng, 1 / ratio))]
    (found,) = crossovers(rows)
    assert found.length == pytest.approx(np.sqrt(4096 * 8192), rel=0.02)


def test_compare_gives_each_of_its_four_verdicts():
    rng = np.random.default_rng(4)
    before = [row("m", n, noisy(rng, 1.0, 50)) for n in (1, 2, 3, 4, 5)]
    after = [
        row("m", 1, noisy(rng, 0.8, 50)),
        row("m", 2, noisy(rng, 1.3, 50)),
        row("m", 3, noisy(rng, 1.0, 50)),
        row("m", 4, noisy(rng, 1.05, 50, spread=0.5)),
        row("m", 5, noisy(rng, 0.5, 3)),
        row("m", 6, noisy(rng, 0.5)),
    ]
    found = compare(before, after)
    assert [c.verdict for c in found] == ["FASTER", "SLOWER", "SAME", "AMBIGUOUS", "AMBIGUOUS"]
    assert "samples" in found[4].reason


def test_the_same_distribution_is_hardly_ever_called_different():
    rng = np.random.default_rng(5)
    before = [row("m", n, noisy(rng, 1.0, 30, 0.03)) for n in range(100)]
    after = [row("m", n, noisy(rng, 1.0, 30, 0.03)) for n in range(100)]
    assert sum(c.verdict in ("FASTER", "SLOWER") for c in compare(before, after)) == 0


def test_a_row_is_held_against_the_dense_rows_of_its_own_suite():
    def at(method, ms, suite, time="2026-11-24T00:00:00+00:00"):
        return {**row(method, 4096, [ms, ms * 1.01, ms * 0.99]), "suite": f"{suite}@0", "timestamp": time}

    rows = [
        at("fa3", 2.0, "first"), at("dash", 1.0, "first"),
        at("fa3", 1.0, "second", "2026-11-25T00:00:00+00:00"), at("nsa", 1.0, "second"),
        at("infllmv2", 1.0, "third"),
    ]  # fmt: skip
    found = {line.method: points[0].ratio.value for line, points in speedups(rows).items()}
    assert found["dash"] == pytest.approx(2, rel=0.02), "not against the other day's"
    assert found["nsa"] == pytest.approx(1, rel=0.02)
    assert found["infllmv2"] == pytest.approx(1, rel=0.02), "the fastest there is, without any of its own"


def test_a_dense_method_that_a_suite_left_out_counts_by_the_others():
    """Two suites measured FlashAttention-3 at one setting, one of them cuDNN."""

    def dense(suite, **times):
        return [row(m.replace("_", "@"), 4096, [t] * 9, suite=f"{suite}@0") for m, t in times.items()]

    other = dense("other", fa3=0.7, dense_cudnn=0.5)
    mine = row("dash", 4096, [0.25] * 9, suite="own@0")
    for own, best in (({"fa3": 1.0}, 0.5), ({"fa3": 1.0, "dense_cudnn": 0.6}, 0.6), ({"fa3": 0.4}, 0.4)):
        ((point,),) = speedups([*other, *dense("own", **own), mine]).values()
        assert point.ratio.value == pytest.approx(best / 0.25)
