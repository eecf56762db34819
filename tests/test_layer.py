"""A decoder layer's training step around an attention: all of its work, and rows like any other's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from dashbench import cost
from dashbench.cli import app
from dashbench.inputs import make_problem
from dashbench.layer import LayerStep, TrainedLayer, around
from dashbench.methods import registry
from dashbench.plan import skip_reason
from dashbench.rows import Point, Shape
from dashbench.store import read_rows
from dashbench.worker import import_prepare

SHAPE = Shape(name="small", query_heads=4, kv_heads=2, head_dim=16)
SUITE = """
version: 1
kind: kernels
name: layers
methods: [dense@math, dash@reference, nsa@reference]
phase: layer
context: 256
shape: {query_heads: 4, kv_heads: 2, head_dim: 16}
dtype: float32
sparsity: [{S_flop: 0.5, tolerance: 0.1}]
block_size: 16
launch: [eager, graph]
timing: {warmup_seconds: 0.0, min_samples: 3, max_samples: 3, rounds: 1}
"""


def point(**changes):
    asked = dict(
        method="dense@math", phase="layer", context=128, batch=2, shape=SHAPE, dtype="float32",
        routing="topics", cache="cold", launch="eager", block_size=16,
    )  # fmt: skip
    return Point(**{**asked, **changes})


def made(**changes):
    asked = point(**changes)
    problem, _ = make_problem(asked.of_attention(), "cpu")
    operator = import_prepare(registry()[asked.method].target)(problem)
    return asked, problem, operator


def test_a_step_reaches_every_parameter_and_returns_what_attention_did():
    asked, problem, operator = made()
    trained = TrainedLayer(asked.shape, "cpu")
    before = [p.detach().clone() for p in trained.layer.parameters()]
    step = LayerStep(trained, operator, problem)
    output = step.run()
    torch.testing.assert_close(output.detach(), operator.run().detach())
    for old, (name, new) in zip(before, trained.layer.named_parameters(), strict=True):
        assert not torch.equal(old, new), name
        assert new.grad is None, name
    assert step.hidden.grad is None


def test_gradients_are_those_of_the_layer_around_a_fixed_attention():
    """Plain autograd through the layer gives the same gradients of all that is behind attention."""
    asked, problem, operator = made()
    trained = TrainedLayer(asked.shape, "cpu")
    step = LayerStep(trained, operator, problem)
    found = {}
    trained.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in trained.layer.named_parameters()})
    )
    step.run()
    layer = TrainedLayer(asked.shape, "cpu").layer
    layer.self_attn.core = lambda query, key, value: operator.run().detach()
    out = layer(step.hidden.detach(), step.cos, step.sin, torch.float32)
    out.backward(step.gradient)
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    for name in ("self_attn.o_proj", "post_attention_layernorm", *mlp):
        want = layer.get_parameter(f"{name}.weight").grad
        torch.testing.assert_close(found[f"{name}.weight"], want, atol=1e-4, rtol=1e-4)
    assert all(found[f"self_attn.{n}_proj.weight"].abs().sum() > 0 for n in "qkv")


def test_work_is_what_torch_counts():
    asked, problem, operator = made()
    trained = TrainedLayer(asked.shape, "cpu")
    matrices = sum(p.numel() for p in trained.layer.parameters() if p.dim() == 2)
    assert cost.layer_parameters(asked.shape) == matrices
    step = LayerStep(trained, operator, problem)
    with FlopCounterMode(display=False) as counter:
        step.rest()
    assert counter.get_total_flops() == 6 * matrices * asked.batch * asked.context
    alone = cost.work(asked.of_attention(), "dense", 0.0)
    assert cost.work(asked, "dense", 0.0).flops == alone.flops + counter.get_total_flops()
    assert cost.problem_bytes(asked) > cost.problem_bytes(asked.of_attention()) + 16 * matrices
    parts = around(trained, operator, problem).stages
    assert list(parts) == ["attention", "rest"]


def test_what_cannot_be_is_said_beforehand():
    assert "autograd is not captured" in skip_reason(point(launch="graph"), None)
    assert skip_reason(point(method="fa3"), None) == "fa3 has no train"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    (folder / "layers.yaml").write_text(SUITE)
    done = CliRunner().invoke(app, ["run", str(folder / "layers.yaml"), "--out", str(folder)])
    assert done.exit_code == 0, done.output
    return read_rows(folder / "layers.jsonl")


def test_rows_are_gated_calibrated_and_taken_apart(rows):
    timed = {r["method"]: r for r in rows if r["status"] == "ok"}
    assert set(timed) == {"dense@math", "dash@reference", "nsa@reference"}
    skipped = [r["reason"] for r in rows if r["status"] == "skipped"]
    assert len(skipped) == 3 and all("autograd is not captured" in reason for reason in skipped)
    for name, row in timed.items():
        assert row["phase"] == "layer" and row["checked"]["passed"] and row["recheck"]["passed"]
        assert set(row["stages_ms"]) == {"attention", "rest"} and "MLP 256" in row["notes"]["layer"]
        assert row["latency_ms"] > 0.5 * row["stages_ms"]["rest"]
        if name != "dense@math":
            assert row["s_flop"] == pytest.approx(0.5, abs=0.1)
