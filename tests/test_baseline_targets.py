"""Every built-in method's import string takes a problem; the references obey their knobs."""

import inspect
from importlib import import_module

import pytest
import torch
from baseline_problems import make_problem

from dashbench.baselines.api import Operator
from dashbench.methods import BUILT_IN


@pytest.mark.parametrize("method", BUILT_IN, ids=lambda m: m.name)
def test_target_exists_and_takes_a_problem(method):
    module, function = method.target.split(":")
    first, *_ = inspect.signature(getattr(import_module(module), function)).parameters.values()
    assert first.name == "problem"


@pytest.mark.parametrize(
    "method", [m for m in BUILT_IN if m.name.endswith("@reference")], ids=lambda m: m.name
)
@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_a_reference_offers_all_that_the_harness_asks_for_and_obeys_its_knob(method, phase):
    module, function = method.target.split(":")
    prepare = getattr(import_module(module), function)
    problem = make_problem(phase, 400, block_size=8, group=4, dtype=torch.float32)
    dense, sparse = {"top_k": (50, 20), "scaling_factor": (0.01, 8.0)}[method.knob]
    kept = []
    for value in (dense, sparse):
        operator = prepare(problem, **{method.knob: value})
        assert isinstance(operator, Operator)
        assert operator.run().isfinite().all()
        kept.append(float(operator.kept().double().mean()))
        if phase == "train":
            assert set(operator.gradients()) >= {"query", "key", "value"}
            assert set(operator.reference_gradients()) == set(operator.gradients())
        for stage in operator.stages.values():
            stage()
    everything = float((problem.start + torch.arange(problem.query.shape[2]) + 1).double().mean())
    assert kept[0] > 0.9 * everything and kept[1] < 0.8 * everything
