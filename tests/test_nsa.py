"""NSA on our kernels: every phase passes the harness's gate, prompts and steps agree with one long prompt,
and backends agree with each other, gates and compressor weights included."""

from dataclasses import replace

import pytest
import torch

from dashbench.baselines.api import Unsupported
from dashbench.baselines.block_selection import Windows
from dashbench.baselines.nsa import nsa_attention, prepare
from dashbench.baselines.nsa_reference import Compressor
from dashbench.baselines.selected_blocks import CompressedCache
from dashbench.check import gate
from dashbench.inputs import make_problem
from dashbench.rows import Point
from dashbench.sparsity import measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"name": "t", "query_heads": 2, "kv_heads": 1, "head_dim": 64}
TWO_HEADS = {"name": "t", "query_heads": 4, "kv_heads": 2, "head_dim": 64}
SETTINGS = {
    "window": {"top_k": 3, "local_blocks": 1, "window": 20},
    "paper": {"preset": "nsa_paper", "top_k": 3, "local_blocks": 1},
    "linear": {"top_k": 3, "local_blocks": 1, "window": 0, "compression": "linear"},
}


def problem(phase, context, batch=1, shape=SHAPE, dtype="float32", block=16):
    point = Point(
        method="nsa", phase=phase, context=context, batch=batch, shape=shape, dtype=dtype, routing="topics",
        cache="warm", launch="eager", block_size=block,
    )  # fmt: skip
    return make_problem(point, DEVICE)[0]


CASES = [("prefill", 7), ("prefill", 66), ("train", 40), ("decode", 1), ("decode", 75), ("decode", 76)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("phase,context", CASES)
def test_every_phase_passes_the_gate(phase, context, settings):
    given = problem(phase, context, batch=2 if phase == "decode" else 1)
    operator = prepare(given, **settings)
    check = gate(operator, given)
    assert check.passed, check.detail
    assert check.selection_errors == 0
    if context > 64:
        assert 0.1 < measure(operator, given)["s_flop"] < 0.95, "the case must be sparse"
    for stage in operator.stages.values():
        stage()
    assert gate(operator, given).passed, "stages leave the operator as it was"


def test_the_gate_catches_a_wrong_block_and_a_missing_branch():
    given = problem("prefill", 75)
    operator = prepare(given, **SETTINGS["window"])

    def shifted(rows):
        return operator.selected(rows).roll(1, -1)

    assert not gate(replace(operator, selected=shifted), given).passed
    without = prepare(given, **{**SETTINGS["window"], "window": 0})
    assert not gate(replace(operator, run=without.run), given).passed


def own_tensors(given, settings, branches):
    draw = torch.Generator().manual_seed(5)
    gates = torch.rand(*given.query.shape[:3], branches, generator=draw).to(given.query)
    kind = "mlp" if settings.get("preset") == "nsa_paper" else settings.get("compression", "avgpool")
    weights = Compressor(kind, Windows(8, 4), given).weights
    if kind == "mlp":
        weights = {**weights, "second_bias": torch.tensor([0.3, -0.2]).to(given.query)}
    return gates, weights


@pytest.mark.parametrize("name,branches", [("window", 3), ("paper", 2), ("linear", 2)])
def test_backends_agree_with_gradients_of_everything(name, branches):
    given, settings = problem("train", 40, shape=TWO_HEADS), SETTINGS[name]
    gates, weights = own_tensors(given, settings, branches)
    results = []
    for backend in ("kernels", "reference"):
        tensors = (given.query, given.key, given.value, gates, *weights.values())
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        live = dict(zip(weights, leaves[4:], strict=True))
        out, active = nsa_attention(
            *leaves[:4], block_size=16, backend=backend, compression_weights=live, return_active_blocks=True,
            **settings,
        )  # fmt: skip
        results.append([out, active.to(torch.int64), *torch.autograd.grad(out, leaves, given.grad_output)])
    names = ["output", "active", "query", "key", "value", "gates", *weights]
    for name, a, b in zip(names, *results, strict=True):
        # The last bias's gradient sums over everything and cancels to 1e-5: it is rounded as its terms are.
        loose = 2 if name == "second_bias" else 1
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * loose)


def test_gradients_of_long_contexts_are_judged_without_the_gates(monkeypatch):
    """Gates are made of queries: their gradient has no place in an identity between queries and keys."""
    monkeypatch.setattr("dashbench.baselines.nsa.small_enough_for_gradients", lambda problem: False)
    given = problem("train", 40, shape=TWO_HEADS)
    operator = prepare(given, **SETTINGS["window"])
    check = gate(operator, given)
    assert check.passed and check.detail.endswith("Euler's identities only"), check.detail

    assert "query and key misses" in gate(replace(operator, score_gradient=None), given).detail
    with pytest.raises(Unsupported, match="'mlp' cannot be checked at 40 tokens"):
        prepare(given, **SETTINGS["paper"])


@pytest.mark.parametrize("name,branches", [("window", 3), ("paper", 2)])
def test_a_prompt_and_steps_equal_one_long_prompt(name, branches):
    given, cache, settings = problem("prefill", 84), CompressedCache(), SETTINGS[name]
    gates, weights = own_tensors(given, settings, branches)
    options = {"block_size": 16, "backend": "kernels", "compression_weights": weights, **settings}
    query, key, value = given.query, given.key, given.value
    whole = nsa_attention(query, key, value, gates, **options)
    seen, step = 0, {0: 62, 62: 63, 63: 64, 64: 67, 67: 83, 83: 84}
    while seen < 84:
        stop = step[seen]
        part = nsa_attention(
            query[:, :, seen:stop], key[:, :, :stop], value[:, :, :stop], gates[:, :, seen:stop], cache=cache,
            **options,
        )  # fmt: skip
        torch.testing.assert_close(part, whole[:, :, seen:stop], rtol=1e-4, atol=1e-5)
        seen = stop


def test_what_does_not_fit_is_named():
    given = problem("prefill", 20)
    tensors = (given.query, given.key, given.value)
    gates = torch.ones(*given.query.shape[:3], 2, device=DEVICE)
    with pytest.raises(ValueError, match="gates must be"):
        nsa_attention(*tensors, gates, block_size=16)
    with pytest.raises(ValueError, match="needs weights"):
        nsa_attention(*tensors, gates, preset="nsa_paper", block_size=16)


REAL = {"name": "minicpm4-8b", "query_heads": 32, "kv_heads": 2, "head_dim": 128}
PHASES = [("prefill", 8192), ("prefill", 4097), ("decode", 8192), ("train", 1500)]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"top_k": 24}, {"preset": "nsa_paper", "top_k": 24}])
@pytest.mark.parametrize("phase,context", PHASES)
def test_real_shape_on_a_gpu(phase, context, settings):
    given = problem(phase, context, shape=REAL, dtype="bfloat16", block=64)
    check = gate(prepare(given, **settings), given)
    assert check.passed, check.detail
