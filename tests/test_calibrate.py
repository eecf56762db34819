"""Finding knobs, on methods whose sparsity is known, with a cache that is not believed blindly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashbench.baselines.api import Operator, Problem, Unsupported
from dashbench.calibrate import KnobCache, budget_for, budget_sparsity, find_knobs, measured
from dashbench.methods import Method
from dashbench.rows import Point, Shape

SHAPE = Shape(name="tiny", query_heads=2, kv_heads=1, head_dim=4)
BISECT = Method("soft", "m:f", "", knob="scaling_factor", knob_kind="bisect")
BUDGET = Method("budget", "m:f", "", knob="top_k", knob_kind="arithmetic")


def point(target, length=1024, phase="prefill", **more):
    return Point(
        method="m",
        phase=phase,
        context=length,
        batch=1,
        shape=SHAPE,
        dtype="float32",
        routing="topics",
        cache="warm",
        launch="eager",
        sparsity_target=target,
        **more,
    )


def problem(length=1024, rows=None):
    key = torch.zeros(1, 1, length, 4)
    query = torch.zeros(1, 2, rows or length, 4)
    return Problem("prefill" if rows is None else "decode", query, key, key, torch.zeros(1, 4))


def operator(kept):
    return Operator(run=lambda: None, reference=lambda rows, chosen: None, kept=lambda: kept[None, None])


class Soft:
    """Keeps a share of the visible tokens that falls smoothly from `most` to `least` as the knob grows."""

    def __init__(self, middle=1.0, least=0.02, most=1.0):
        self.middle, self.least, self.most, self.calls = middle, least, most, 0

    def __call__(self, problem, scaling_factor):
        self.calls += 1
        share = self.least + (self.most - self.least) / (1 + scaling_factor / self.middle)
        visible = torch.arange(problem.start + 1, problem.key.shape[2] + 1)
        return operator((visible * share).long().clamp(min=1))


def budget(problem, top_k, window=0):
    """Keeps `top_k` blocks and, beside what the arithmetic knows, a window of tokens."""
    position = torch.arange(problem.start, problem.key.shape[2])
    kept = torch.minimum(position // 64, torch.tensor(top_k - 1)) * 64 + position % 64 + 1
    return operator(torch.minimum(kept + window, position + 1))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 0.95), st.floats(0.02, 30))
def test_bisection_reaches_any_target_inside_the_range(target, middle):
    """With a middle of 30 the largest knob there is, 1000, leaves 4.9 % of the tokens."""
    soft = Soft(middle)
    knobs, found = find_knobs(BISECT, point(target), problem(), soft)
    assert abs(measured(found, problem()) - target) <= 0.0026
    assert soft.calls < 32
    assert 1e-3 <= knobs["scaling_factor"] <= 1e3


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.9), st.floats(0.05, 0.9))
def test_a_higher_target_gives_a_larger_scaling_factor(a, b):
    low, high = sorted((a, b))
    if high - low < 0.01:
        return
    first, _ = find_knobs(BISECT, point(low), problem(), Soft())
    second, _ = find_knobs(BISECT, point(high), problem(), Soft())
    assert first["scaling_factor"] < second["scaling_factor"]


@pytest.mark.parametrize(
    ("soft", "target", "reach"),
    [(Soft(least=0.5), 0.75, "0.5"), (Soft(most=0.4), 0.1, "0.6")],
)
def test_out_of_reach_says_what_can_be_reached(soft, target, reach):
    with pytest.raises(Unsupported, match=rf"cannot reach s_flop {target}.*{reach}"):
        find_knobs(BISECT, point(target), problem(), soft)


def test_a_jump_over_the_target_is_out_of_reach_and_found_out_quickly():
    calls = []

    def jump(problem, scaling_factor):
        calls.append(scaling_factor)
        visible = torch.arange(1, problem.key.shape[2] + 1)
        return operator((visible * (0.9 if scaling_factor < 3 else 0.1)).long().clamp(min=1))

    with pytest.raises(Unsupported, match="cannot reach"):
        find_knobs(BISECT, point(0.5), problem(), jump)
    assert len(calls) < 32


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 500), st.integers(1, 300), st.sampled_from([1, 16, 64]))
def test_budget_arithmetic_agrees_with_a_loop(blocks, start, rows, block):
    used = could = 0
    for i in range(start, start + rows):
        own = set(range(i // block * block, i + 1))
        others = min(i // block, blocks - 1)
        used, could = used + len(own) + others * block, could + i + 1
    assert budget_sparsity(blocks, start, rows, block) == 1 - used / could


@pytest.mark.parametrize("target", [0.1, 0.5, 0.75, 0.9375])
@pytest.mark.parametrize(("start", "rows"), [(0, 8192), (65535, 1)])
def test_the_budget_is_the_nearest_of_all(target, start, rows):
    found = budget_for(target, start, rows, 64)
    every = range(1, (start + rows) // 64 + 1)
    misses = {n: abs(budget_sparsity(n, start, rows, 64) - target) for n in every}
    assert misses[found] == min(misses.values())


def test_decode_budget_is_the_papers():
    """96k tokens at 75, 87.5 and 93.75 %: 384, 192 and 96 blocks."""
    for target, blocks in ((0.75, 384), (0.875, 192), (0.9375, 96)):
        assert budget_for(target, 96 * 1024 - 1, 1, 64) == blocks


@pytest.mark.parametrize("window", [0, 200])
def test_a_budget_is_refined_by_measuring(window):
    def prepare(problem, top_k):
        return budget(problem, top_k, window)

    inputs = problem(4096)
    _, found = find_knobs(BUDGET, point(0.5, 4096), inputs, prepare)
    best = min(range(1, 65), key=lambda k: abs(measured(prepare(inputs, k), inputs) - 0.5))
    assert abs(measured(found, inputs) - 0.5) <= abs(measured(prepare(inputs, best), inputs) - 0.5) + 1e-3


def test_without_a_target_or_with_the_knob_given_nothing_is_searched():
    method = Method("m", "m:f", "", knob="top_k", knob_kind="arithmetic", defaults={"top_k": 5})
    assert find_knobs(method, point(None), problem(), budget)[0] == {"top_k": 5}
    asked = point(0.5, knobs={"top_k": 9})
    assert find_knobs(method, asked, problem(), budget)[0] == {"top_k": 9}


def test_a_method_that_turned_out_dense_cannot_reach_a_target():
    dense = Operator(run=lambda: None, reference=lambda rows, chosen: None)
    with pytest.raises(Unsupported, match=r"gives 0\.0000 to 0\.0000"):
        find_knobs(BISECT, point(0.5), problem(), lambda problem, scaling_factor: dense)


def test_the_cache_saves_the_search_but_is_checked(tmp_path):
    path = tmp_path / "knobs.json"
    first = Soft()
    knobs, _ = find_knobs(BISECT, point(0.7), problem(), first, KnobCache(path))
    again = Soft()
    cold = point(0.7).model_copy(update={"cache": "cold", "launch": "graph"})
    assert find_knobs(BISECT, cold, problem(), again, KnobCache(path))[0] == knobs
    assert again.calls == 1 < first.calls
    # The method has changed: what the file says no longer gives 0.7.
    changed = Soft(middle=30.0)
    new, found = find_knobs(BISECT, point(0.7), problem(), changed, KnobCache(path))
    assert abs(measured(found, problem()) - 0.7) <= 0.01
    assert not math.isclose(new["scaling_factor"], knobs["scaling_factor"], rel_tol=0.5)
    assert list(KnobCache(path).known.values()) == [new]


def test_a_broken_cache_is_an_empty_one(tmp_path):
    path = tmp_path / "knobs.json"
    path.write_text('{"half a li')
    assert KnobCache(path).get("x") is None
    KnobCache(tmp_path / "missing" / "knobs.json").put("x", {"a": 1})
