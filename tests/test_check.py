"""The gate lets rounding through and nothing else: every planted fault must fail it, for the right reason."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dashbench.baselines import dense
from dashbench.baselines.api import Expected, Operator
from dashbench.check import TOLERANCE, checked_rows, gate, relative_l2
from dashbench.inputs import make_problem
from dashbench.rows import Point, Shape

SHAPE = Shape(name="tiny", query_heads=4, kv_heads=2, head_dim=32)


def problem(phase="prefill", context=200, dtype="bfloat16"):
    asked = Point(
        method="m",
        phase=phase,
        context=context,
        batch=2,
        shape=SHAPE,
        dtype=dtype,
        routing="topics",
        cache="warm",
        launch="eager",
        block_size=16,
    )
    return make_problem(asked, "cpu")[0]


def exact(problem):
    """fp64 dense attention `[B, Hq, N, D]` of every query."""
    group = problem.query.shape[1] // problem.key.shape[1]
    key, value = (x.double().repeat_interleave(group, 1) for x in (problem.key, problem.value))
    scores = problem.query.double() @ key.mT * problem.scale
    position = torch.arange(problem.start, problem.key.shape[2])
    scores = scores.masked_fill(torch.arange(problem.key.shape[2]) > position[:, None], float("-inf"))
    return scores.softmax(-1) @ value


def operator(problem, spoil=lambda output: output, **more):
    """Exact attention rounded to the working dtype, and whatever is done to it before it is handed over."""
    truth = exact(problem)
    return Operator(
        run=lambda: spoil(truth.clone().to(problem.query.dtype)),
        reference=lambda rows, selected: Expected(truth[:, :, rows]),
        **more,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_rounding_of_the_output_passes(phase, dtype):
    inputs = problem(phase, dtype=dtype)
    check = gate(operator(inputs), inputs)
    assert check.passed and check.detail == "" and check.selection_errors is None
    assert check.rows == (64 if phase == "prefill" else 1)
    limit = TOLERANCE[inputs.query.dtype]
    assert check.max_abs < limit.element and check.relative_l2 < limit.relative_l2


def put(value, *where):
    def spoil(output):
        output[where] = value
        return output

    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_single_nan_anywhere_fails(value):
    """Also in a row that is not among those compared."""
    inputs = problem()
    row = next(r for r in range(200) if r not in checked_rows(200, 16, 64, 0).tolist())
    check = gate(operator(inputs, put(value, 1, 3, row, 7)), inputs)
    assert not check.passed and check.detail == "output is not finite everywhere"
    assert check.max_abs is None and check.relative_l2 is None


def test_an_output_that_nobody_wrote_fails():
    inputs = problem()
    check = gate(operator(inputs, lambda output: torch.empty_like(output)), inputs)
    assert not check.passed


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda o: o * 1.02, "relative L2 is"),
        (put(0.1, 0, 0, 0, slice(0, 1)), "an element is off"),
        (lambda o: o.roll(1, 2), "relative L2 is"),
        (lambda o: o.flip(1), "relative L2 is"),
        (lambda o: o[:, :, :-1], "output has shape"),
    ],
)
def test_wrong_outputs_fail(spoil, words):
    inputs = problem()
    check = gate(operator(inputs, spoil), inputs)
    assert not check.passed and words in check.detail


def test_one_wrong_late_row_fails_although_it_is_small():
    """Flat attention over many keys gives tiny values: wrong ones hide in the norm of all rows."""
    inputs = problem(context=1500)
    flat = replace(inputs, query=inputs.query * 0)
    right = operator(flat)
    assert gate(right, flat).passed

    def spoil(output):
        output[0, 1, 1499] *= 0.8
        return output

    wrong = gate(replace(right, run=lambda: spoil(right.run())), flat)
    assert not wrong.passed and wrong.detail == "relative L2 of one row is 0.2 (limit 0.04)"
    assert wrong.relative_l2 < TOLERANCE[torch.bfloat16].relative_l2


def test_the_limit_of_an_element_grows_with_its_value_only():
    inputs = problem()
    large = replace(inputs, value=inputs.value * 0 + 40.0)
    assert gate(operator(large, lambda o: o + 0.1), large).passed
    assert not gate(operator(large, lambda o: o + 1.0), large).passed


def selecting(problem, chosen, true, undecided):
    return replace(
        operator(problem),
        selected=lambda rows: chosen[:, :, rows],
        reference=lambda rows, selected: Expected(
            exact(problem)[:, :, rows], true[:, :, rows], None if undecided is None else undecided[:, :, rows]
        ),
    )


def test_a_wrong_selection_fails_unless_it_is_a_tie():
    inputs = problem()
    true = torch.rand(2, 2, 200, 13) < 0.3
    chosen = true.clone()
    assert gate(selecting(inputs, chosen, true, None), inputs).selection_errors == 0
    chosen[1, 0, 199, 4] ^= True
    found = gate(selecting(inputs, chosen, true, None), inputs)
    assert not found.passed and found.selection_errors == 1
    assert found.detail == "1 blocks on the wrong side of the selection"
    undecided = torch.zeros_like(true)
    undecided[1, 0, 199, 4] = True
    tied = gate(selecting(inputs, chosen, true, undecided), inputs)
    assert tied.passed and tied.selection_errors == 0 and "1 blocks undecided" in tied.detail


@pytest.fixture(params=["float32", "bfloat16"])
def trained(request):
    inputs = problem("train", dtype=request.param)
    return inputs, dense.prepare_flash(inputs)


def with_gradients(operator, change, compared):
    return replace(
        operator,
        gradients=lambda: change({name: g.clone() for name, g in operator.gradients().items()}),
        reference_gradients=operator.reference_gradients if compared else None,
    )


@pytest.mark.parametrize("compared", [True, False])
def test_right_gradients_pass(trained, compared):
    inputs, operator = trained
    check = gate(with_gradients(operator, lambda g: g, compared), inputs)
    assert check.passed, check.detail
    assert check.detail.startswith("gradients compared" if compared else "gradients judged by Euler")


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_slightly_wrong_gradients_fail_a_comparison(trained, name):
    inputs, operator = trained
    check = gate(with_gradients(operator, lambda g: {**g, name: g[name] * 1.02}, True), inputs)
    assert not check.passed and f"gradient of {name}" in check.detail


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("value", lambda g: g * 2),
        ("key", lambda g: g * 0.5),
        ("query", lambda g: g * 0),
        ("value", lambda g: torch.cat([g[:, :, :100], 0 * g[:, :, 100:]], 2)),
        ("query", lambda g: torch.cat([g[:, :1], 0 * g[:, 1:]], 1)),
    ],
)
def test_grossly_wrong_gradients_fail_the_identities(trained, name, change):
    inputs, operator = trained
    spoiled = with_gradients(operator, lambda g: {**g, name: change(g[name])}, False)
    check = gate(spoiled, inputs)
    assert not check.passed and "misses Euler's identity" in check.detail


def test_missing_or_infinite_gradients_fail(trained):
    inputs, operator = trained
    assert "must report" in gate(replace(operator, gradients=None), inputs).detail
    less = with_gradients(operator, lambda g: {"query": g["query"], "value": g["value"]}, True)
    assert gate(less, inputs).detail == "no gradient of key"
    infinite = with_gradients(operator, lambda g: {**g, "key": g["key"] * torch.inf}, False)
    assert "gradient of key is not finite" in gate(infinite, inputs).detail


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([1, 16, 64]), st.integers(1, 80), st.integers(0, 5))
def test_rows_hold_the_ends_and_the_borders(count, block, wanted, seed):
    rows = checked_rows(count, block, wanted, seed).tolist()
    assert rows == sorted(set(rows)) and set(rows) <= set(range(count))
    assert rows == checked_rows(count, block, wanted, seed).tolist()
    assert len(rows) <= max(wanted, 12)
    assert len(rows) == count or len(rows) >= wanted
    last = (count - 1) // block * block
    assert {0, count - 1} <= set(rows)
    if len(rows) < count:
        assert {r for r in (block - 1, block, last - 1, last) if 0 <= r < count} <= set(rows)


def test_relative_l2():
    assert relative_l2(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_l2(torch.tensor([0.5]), torch.tensor([0.0])) == pytest.approx(0.5)
    assert relative_l2(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
