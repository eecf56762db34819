"""InfLLMv2 on our kernels: every phase passes the harness's gate, prompts and steps agree with one long
prompt, and backends agree with each other."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dashbench.baselines.infllmv2 import infllmv2_attention, prepare
from dashbench.baselines.selected_blocks import CompressedCache
from dashbench.check import gate
from dashbench.inputs import make_problem
from dashbench.kernels.decode_blocks import _stages
from dashbench.rows import Point
from dashbench.sparsity import measure

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {"name": "t", "query_heads": 2, "kv_heads": 1, "head_dim": 64}
TWO_HEADS = {"name": "t", "query_heads": 4, "kv_heads": 2, "head_dim": 64}
SMALL = {"top_k": 3, "local_blocks": 1}
COARSE = {**SMALL, "lse_mode": "coarse"}


def problem(phase, context, batch=1, shape=SHAPE, dtype="float32", block=16):
    point = Point(
        method="infllmv2", phase=phase, context=context, batch=batch, shape=shape, dtype=dtype,
        routing="topics", cache="warm", launch="eager", block_size=block,
    )  # fmt: skip
    return make_problem(point, DEVICE)[0]


@pytest.mark.parametrize("settings", [SMALL, COARSE], ids=["exact", "coarse"])
@pytest.mark.parametrize(
    "phase,context",
    [("prefill", 1), ("prefill", 7), ("prefill", 66), ("train", 50)]
    + [("decode", n) for n in (1, 8, 16, 17, 32, 75, 96)],
)
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


def test_short_contexts_are_dense_where_asked_for():
    for phase in ("prefill", "decode", "train"):
        given = problem(phase, 60)
        operator = prepare(given, dense_len=61, **SMALL)
        assert gate(operator, given).passed
        assert operator.notes["fallback"] == "dense below 61"
        assert measure(operator, given)["s_flop"] == 0
        assert "fallback" not in prepare(given, dense_len=60, **SMALL).notes


def test_the_gate_catches_a_wrong_block_and_a_wrong_value():
    given = problem("prefill", 75)
    operator = prepare(given, **SMALL)

    def shifted(rows):
        return operator.selected(rows).roll(1, -1)

    assert not gate(replace(operator, selected=shifted), given).passed
    assert not gate(replace(operator, run=lambda: operator.run() * 1.03), given).passed


@pytest.mark.parametrize("settings", [SMALL, COARSE], ids=["exact", "coarse"])
def test_a_prompt_and_steps_equal_one_long_prompt(settings):
    """Steps of 1, 3 and 16 tokens: windows are completed one at a time, several at once, and not at all."""
    given, cache = problem("prefill", 90), CompressedCache()
    options = {"block_size": 16, "backend": "kernels", **settings}
    query, key, value = given.query, given.key, given.value
    whole, active = infllmv2_attention(query, key, value, return_active_blocks=True, **options)
    seen, step = 0, {0: 62, 62: 63, 63: 64, 64: 67, 67: 83, 83: 84, 84: 90}
    while seen < 90:
        stop = step[seen]
        part, blocks = infllmv2_attention(
            query[:, :, seen:stop], key[:, :, :stop], value[:, :, :stop], cache=cache,
            return_active_blocks=True, **options,
        )  # fmt: skip
        torch.testing.assert_close(part, whole[:, :, seen:stop], rtol=1e-4, atol=1e-5)
        assert torch.equal(blocks, active[:, :, seen:stop])
        seen = stop
    with pytest.raises(ValueError, match="has seen 90 tokens"):
        infllmv2_attention(query[:, :, :1], key[:, :, :50], value[:, :, :50], cache=cache, **options)
    again = infllmv2_attention(query, key, value, cache=cache, **options)
    assert torch.equal(again, whole), "a prompt clears the cache"


def test_backends_layouts_and_gradients_agree():
    given = problem("train", 45, shape=TWO_HEADS)
    results = []
    for backend, layout in (("kernels", "bhnd"), ("reference", "bhnd"), ("kernels", "bnhd")):
        leaves = [x.clone() for x in (given.query, given.key, given.value)]
        if layout == "bnhd":
            leaves = [x.transpose(1, 2).contiguous() for x in leaves]
        leaves = [x.requires_grad_() for x in leaves]
        options = {"block_size": 16, "backend": backend, "layout": layout, **SMALL}
        out, active = infllmv2_attention(*leaves, return_active_blocks=True, **options)
        grad = given.grad_output if layout == "bhnd" else given.grad_output.transpose(1, 2)
        found = [out, *torch.autograd.grad(out, leaves, grad)]
        found = [x.transpose(1, 2) if layout == "bnhd" else x for x in found]
        results.append([*found, active.to(torch.int64)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_done_is_refused():
    given = problem("prefill", 20)
    tensors = (given.query, given.key, given.value)
    with pytest.raises(ValueError, match="backend"):
        infllmv2_attention(*tensors, backend="cuda")
    with pytest.raises(ValueError, match="head dims"):
        infllmv2_attention(*(x[..., :16] for x in tensors), backend="kernels", block_size=16)
    with pytest.raises(ValueError, match="layout"):
        infllmv2_attention(*tensors, layout="nbhd")
    with pytest.raises(ValueError, match="no gradients"):
        infllmv2_attention(
            tensors[0][:, :, -1:].requires_grad_(), *tensors[1:], backend="kernels", block_size=16
        )


REAL = {"name": "minicpm4-8b", "query_heads": 32, "kv_heads": 2, "head_dim": 128}
PHASES = [("prefill", 8192), ("prefill", 4097), ("decode", 8192), ("train", 1500)]


@pytest.mark.parametrize(
    ("kib", "block", "stages"),
    [(227, 64, 7), (227, 128, 3), (163, 64, 5), (99, 64, 3), (48, 64, 3)],
    ids=["H100", "H100, large blocks", "A100", "sm_86", "least"],
)
def test_blocks_in_flight_leave_room_for_a_second_program(monkeypatch, kib, block, stages):
    known = SimpleNamespace(shared_memory_per_block_optin=1024 * kib)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: known)
    assert _stages(4 * block * 128, torch.device("cuda")) == stages
    assert _stages(4 * block * 128, torch.device("cpu")) == 3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [{"top_k": 24}, {"top_k": 24, "lse_mode": "coarse"}, {"preset": "paper"}]
)
@pytest.mark.parametrize("phase,context", PHASES)
def test_real_shape_on_a_gpu(phase, context, settings):
    given = problem(phase, context, shape=REAL, dtype="bfloat16", block=64)
    check = gate(prepare(given, **settings), given)
    assert check.passed, check.detail
