"""DashAttention's reference as a method: the slices, phases and counts around the specification, which has
tests of its own.
"""

import dataclasses
import math

import pytest
import torch
from baseline_problems import attend_tokens, make_problem, relative_error

from dashbench.baselines import dash_reference
from dashbench.baselines.api import Problem, Unsupported
from dashbench.kernels.reference import PRESETS, DashOptions, dash_attention

BLOCK = 8


def loop_routes(problem, gamma):
    """Chunks of each (batch, kv head, row) by bisection on entmax-1.5's threshold, head by head; q̄ = 0 means
    mean pooling.
    """
    batch, heads, rows, _ = problem.query.shape
    kv_heads, length = problem.key.shape[1:3]
    group, routes = heads // kv_heads, {}
    for b in range(batch):
        for r in range(kv_heads):
            key = problem.key[b, r].double()
            means = [key[c : c + BLOCK].mean(0) for c in range(0, length - BLOCK + 1, BLOCK)]
            for n in range(rows):
                own = (length - rows + n) // BLOCK
                routes[b, r, n] = {own}
                for h in range(r * group, (r + 1) * group):
                    q = problem.query[b, h, n].double()
                    x = [gamma * problem.scale * float(q @ means[c]) / 2 for c in range(own)]
                    low, high = (max(x) - 1, max(x)) if x else (0, 0)
                    for _ in range(80):
                        tau = (low + high) / 2
                        if sum(max(0, v - tau) ** 2 for v in x) > 1:
                            low = tau
                        else:
                            high = tau
                    routes[b, r, n] |= {c for c, v in enumerate(x) if v > high + 1e-12}
    return routes


def as_sets(selected):
    """`[B, Hkv, R, M]` bool to a dict of sets."""
    return {
        (b, r, n): set(selected[b, r, n].nonzero().flatten().tolist())
        for b in range(selected.shape[0])
        for r in range(selected.shape[1])
        for n in range(selected.shape[2])
    }


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("length,group", [(5, 1), (53, 4), (64, 1)])
def test_selection_counts_and_output_equal_the_loops(phase, length, group):
    problem = make_problem(phase, length, group=group, head_dim=8, block_size=BLOCK)
    operator = dash_reference.prepare(problem, scaling_factor=2.0, bias_mode="none")
    routes = loop_routes(problem, 2.0)
    rows = torch.arange(problem.query.shape[2])
    selected, kept, output = operator.selected(rows), operator.kept(), operator.run()
    assert as_sets(selected) == routes
    if length > 50 and phase == "prefill":
        assert (kept < rows + 1).any(), "something is left out"
    for (b, r, n), chunks in routes.items():
        i = length - problem.query.shape[2] + n
        tokens = [t for t in range(i + 1) if t // BLOCK in chunks]
        assert kept[b, r, n] == len(tokens)
        for h in range(r * group, (r + 1) * group):
            torch.testing.assert_close(output[b, h, n], attend_tokens(problem, b, h, n, tokens))
    expected = operator.reference(rows, selected)
    torch.testing.assert_close(expected.output, output, rtol=1e-9, atol=1e-10)
    assert torch.equal(expected.selected, selected) and not expected.undecided.any()


@pytest.mark.parametrize("bias_mode", ["centered", "raw"])
def test_slices_equal_the_specification_with_its_bias(bias_mode, monkeypatch):
    problem = make_problem("train", 45, block_size=BLOCK)
    problem = dataclasses.replace(problem, summary_query=torch.randn_like(problem.summary_query))
    settings = {"scaling_factor": 1.5, "sigma": 2.0, "bias_mode": bias_mode}
    monkeypatch.setattr(dash_reference, "SLICE_ROWS", 7)
    operator = dash_reference.prepare(problem, **settings)
    output = operator.run()
    names = ("query", "key", "value", "summary_query")
    leaves = [getattr(problem, n).clone().requires_grad_() for n in names]
    exact, _ = dash_attention(*leaves, DashOptions(chunk_size=BLOCK, **settings))
    torch.testing.assert_close(output, exact.detach(), rtol=1e-10, atol=1e-11)
    grads = torch.autograd.grad(exact, leaves, problem.grad_output)
    reference = operator.reference_gradients()
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(operator.gradients()[name], grad, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(reference[name], grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("length", [8, 9, 50, 56])
def test_decode_equals_the_last_row_of_prefill(length):
    prefill = make_problem("prefill", length, block_size=BLOCK)
    last = prefill.query[:, :, -1:]
    decode = Problem("decode", last, prefill.key, prefill.value, prefill.summary_query, block_size=BLOCK)
    whole, step = (dash_reference.prepare(p, scaling_factor=2.0) for p in (prefill, decode))
    torch.testing.assert_close(step.run()[:, :, 0], whole.run()[:, :, -1], rtol=1e-10, atol=1e-12)
    assert torch.equal(step.kept()[..., 0], whole.kept()[..., -1])


def test_a_chunk_on_its_threshold_is_undecided():
    problem = make_problem("prefill", 32, kv_heads=1, group=1, head_dim=4, block_size=BLOCK)
    problem.key.zero_()
    problem.key[:, :, :8, 0] = 1.0
    gamma = (
        2 / problem.scale
    )  # x = q k̄ for the entries 1 and 0 of two chunks: tau = 0 puts chunk 1 on the threshold
    problem.query.zero_()
    problem.query[:, :, 16:, 0] = 1.0
    operator = dash_reference.prepare(problem, scaling_factor=gamma)
    expected = operator.reference(torch.tensor([16]), None)
    assert as_sets(expected.undecided)[0, 0, 0] == {1}
    assert {0, 2} <= as_sets(expected.selected)[0, 0, 0]


def test_larger_scaling_factors_are_sparser_and_presets_are_the_specifications():
    problem = make_problem("prefill", 200, block_size=BLOCK)
    kept = [dash_reference.prepare(problem, scaling_factor=g).kept().sum() for g in (0.1, 1.0, 10.0)]
    assert kept[0] > kept[1] > kept[2]
    options = dash_reference.options_for(problem, "paper")
    assert options == dataclasses.replace(PRESETS["paper"], chunk_size=BLOCK)
    assert math.isclose(options.scaling_factor, 0.2308, rel_tol=1e-3)
    with pytest.raises(Unsupported, match="unknown preset"):
        dash_reference.prepare(problem, preset="other")
    with pytest.raises(Unsupported, match="scaling_factor must be a positive number"):
        dash_reference.prepare(problem, scaling_factor=0.0)


def test_low_precision_routes_as_fp64_does_outside_ties():
    problem = make_problem("prefill", 300, group=4, head_dim=32, block_size=16, dtype=torch.bfloat16)
    operator = dash_reference.prepare(problem, scaling_factor=2.0)
    rows = torch.arange(0, 300, 7)
    selected = operator.selected(rows)
    expected = operator.reference(rows, selected)
    assert not ((selected != expected.selected) & ~expected.undecided).any()
    assert relative_error(operator.run()[:, :, rows], expected.output) < 0.06


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("phase", ["prefill", "decode", "train"])
def test_on_a_gpu(phase):
    problem = make_problem(
        phase, 2100, group=16, head_dim=128, block_size=64, dtype=torch.bfloat16, device="cuda"
    )
    operator = dash_reference.prepare(problem, scaling_factor=2.0)
    rows = torch.arange(0, problem.query.shape[2], 37)
    selected = operator.selected(rows)
    expected = operator.reference(rows, selected)
    assert not ((selected != expected.selected) & ~expected.undecided).any()
    assert relative_error(operator.run()[:, :, rows.cuda()], expected.output) < 0.06
    if phase == "train":
        exact = operator.reference_gradients()
        for name, grad in operator.gradients().items():
            limit = 0.02 if name != "summary_query" else 0.2  # sigma keeps it tiny and hard to tell in bf16
            assert (grad.double() - exact[name]).norm() / exact[name].norm() < limit, name
