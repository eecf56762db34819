"""The method `dash` as a worker uses it: every phase passes the harness's own gate, and a wrong answer does
not."""

from dataclasses import replace

import pytest
import torch

from dashbench.baselines.dash import prepare
from dashbench.check import gate
from dashbench.inputs import make_problem
from dashbench.rows import Point
from dashbench.sparsity import measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"name": "t", "query_heads": 4, "kv_heads": 1, "head_dim": 64}


def problem(phase, context, dtype="float32", batch=2):
    asked = {
        "method": "dash",
        "phase": phase,
        "context": context,
        "batch": batch,
        "shape": SHAPE,
        "dtype": dtype,
    }
    point = Point(**asked, routing="topics", cache="warm", launch="eager", block_size=16)
    return make_problem(point, DEVICE)[0]


@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
@pytest.mark.parametrize("context", [1, 16, 17, 75])
def test_every_phase_passes_the_gate(phase, context):
    given = problem(phase, context)
    operator = prepare(given, scaling_factor=2.0)
    check = gate(operator, given)
    assert check.passed, check.detail
    assert check.selection_errors == 0
    if context == 75:
        assert 0.2 < measure(operator, given)["s_flop"] < 0.95, "the case must be sparse"
    for stage in operator.stages.values():
        stage()
    assert gate(operator, given).passed, "stages leave the operator as it was"


@pytest.mark.parametrize(
    "settings", [{"preset": "package"}, {"sigma": 1.0}, {"forced": "own_and_previous"}, {"balanced": True}]
)
def test_settings_pass_the_gate_in_prefill_and_decode(settings):
    for phase in ("prefill", "decode"):
        given = problem(phase, 75)
        check = gate(prepare(given, **settings), given)
        assert check.passed, (phase, check.detail)


@pytest.mark.parametrize("phase", ["prefill", "train"])
def test_below_a_crossover_it_is_dense_and_says_so(phase):
    given = problem(phase, 75)
    operator = prepare(given, scaling_factor=2.0, dense_below=76)
    assert operator.notes["path"] == "dense" and operator.notes["dense_below"] == 76
    assert operator.notes["backend"].startswith("torch") or DEVICE == "cuda"
    check = gate(operator, given)
    assert check.passed, check.detail
    assert operator.kept is None and measure(operator, given)["s_flop"] in (None, 0.0)
    assert prepare(given, scaling_factor=2.0, dense_below=75).notes["path"] == "sparse"


def test_the_gate_catches_a_dropped_chunk_and_a_wrong_value():
    given = problem("prefill", 75)
    operator = prepare(given, scaling_factor=2.0)
    full = operator.selected

    def without_first(rows):
        chosen = full(rows).clone()
        chosen[..., 0] &= rows[:, None].lt(16).any(-1)
        return chosen

    assert not gate(replace(operator, selected=without_first), given).passed
    assert not gate(replace(operator, run=lambda: operator.run() * 1.03), given).passed


@pytest.mark.gpu
@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("context", [4096, 32768])
def test_real_shape_on_a_gpu(phase, context):
    shape = {"name": "minicpm4-8b", "query_heads": 32, "kv_heads": 2, "head_dim": 128}
    point = Point(
        method="dash", phase=phase, context=context, batch=1, shape=shape, dtype="bfloat16", routing="topics",
        cache="warm", launch="eager",
    )  # fmt: skip
    given, _ = make_problem(point, "cuda")
    for factor in (0.5, 1.0, 4.0):
        check = gate(prepare(given, scaling_factor=factor), given)
        assert check.passed, (factor, check.detail)
