"""A training suite runs stage by stage and goes on where it stopped; its rows and checkpoints speak true."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from dashbench.cli import app
from dashbench.miniature.checkpoints import load_checkpoint
from dashbench.rows_train import REPORTS, TrainRow
from dashbench.store import read_rows
from dashbench.suite import load_suite

ROOT = Path(__file__).parent.parent
SUITE = """
version: 1
kind: train
name: tiny
model: {hidden_size: 32, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 4,
        num_key_value_heads: 2, head_dim: 16}
pieces: 1024
base:
  steps: 40
  rate: 5.0e-3
  warmup: 2
  tokens_per_step: 1024
  levels:
    - lengths: [96]
      mix: {multiquery: 0, multivalue: 0, track: 0, short_form: 1, short_key: 1, needles_only: 1}
continuation:
  methods: [dense, dash]
  steps: 10
  tokens_per_step: 768
  lengths: [192]
  rate: 1.0e-3
  rates: {dash: 2.0e-3}
  settings:
    dash: {chunk_size: 16, scaling_factor: 8.0}
evaluation: {lengths: [192], tokens: 768, sweep: {dash: [1.0, 30.0]}}
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    (folder / "tiny.yaml").write_text(SUITE)
    arguments = ["run", str(folder / "tiny.yaml"), "--out", str(folder / "out")]
    first = CliRunner().invoke(app, [*arguments, "--only", "dense", "--time-budget", "0.1s"])
    second = CliRunner().invoke(app, arguments)
    third = CliRunner().invoke(app, arguments)
    return folder, first, second, third


def test_it_stops_when_time_is_up_and_goes_on(ran):
    _, first, second, third = ran
    assert first.exit_code == 0 and "time is up" in first.output
    assert second.exit_code == 0 and "30 points to measure" in second.output
    assert "30 ok" in second.output
    assert third.exit_code == 0 and "0 points to measure" in third.output


def test_every_tenth_is_a_row_and_the_loss_falls(ran):
    folder = ran[0]
    suite = load_suite(folder / "tiny.yaml")
    rows = {r["key"]: r for r in read_rows(folder / "out" / "tiny.jsonl")}
    assert set(rows) == {p.key() for p in suite.points()} and len(rows) == 3 * REPORTS
    assert all(TrainRow.model_validate(r).status == "ok" for r in rows.values())
    base = sorted((r for r in rows.values() if r["stage"] == "base"), key=lambda r: r["report"])
    assert [r["step"] for r in base] == list(range(4, 41, 4))
    assert base[-1]["loss"] < base[0]["loss"] - 1.5
    dash = sorted((r for r in rows.values() if r["method"] == "dash"), key=lambda r: r["report"])
    dense = sorted(
        (r for r in rows.values() if r["method"] == "dense" and r["stage"] == "continuation"),
        key=lambda r: r["report"],
    )
    assert dash[0]["alpha"] == 1.25 and dash[-1]["alpha"] == 1.5
    assert all(r["summary_query_grad_norm"] > 0 for r in dash)
    assert dash[-1]["s_by_layer"][0] > 0.01 and dense[-1]["s_flop"] == 0
    denser, sparser = dash[-1]["notes"]["sweep"]
    assert denser["s_by_layer"]["192"][0] < dash[-1]["s_by_layer"][0] < sparser["s_by_layer"]["192"][0]
    assert dash[0]["learning_rate"] == pytest.approx(2 * dense[0]["learning_rate"])
    # The same batches: the first step's losses differ by the routing alone.
    assert dash[0]["loss"] == pytest.approx(dense[0]["loss"], abs=0.2)
    assert [r["tokens"] for r in dash] == [r["tokens"] for r in dense]


def test_every_checkpoint_has_a_card_of_its_rows(ran):
    folder = ran[0] / "out"
    rows = {(r["stage"], r["method"], r["report"]): r for r in read_rows(folder / "tiny.jsonl")}
    for name, stage in (("base", "base"), ("dense", "continuation"), ("dash", "continuation")):
        text = (folder / "checkpoints" / name / "README.md").read_text()
        last = rows[stage, "dense" if name == "base" else name, REPORTS]
        assert last["checkpoint"] in text and f"{last['exact_match']['single/needles@192']:.1%}" in text
        assert text.count("\n| ") > REPORTS and "alpha 1.5" in text if name == "dash" else "γ" not in text


def test_checkpoints_load_here_and_in_transformers(ran):
    folder = ran[0] / "out" / "checkpoints"
    model, kind, settings = load_checkpoint(folder / "dash", torch.float32, "cpu")
    assert kind == "dash" and settings["scaling_factor"] == 8.0 and settings["alpha"] == 1.5
    assert model.model.layers[0].self_attn.indexer_q.shape == (32,)
    base, _, _ = load_checkpoint(folder / "base", torch.float32, "cpu")
    stock = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokens = torch.arange(300, 340)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.logits(base(tokens)), stock(tokens).logits, atol=2e-5, rtol=1e-4)


def test_a_failed_stage_is_a_row_with_a_reason(tmp_path):
    text = SUITE.replace("chunk_size: 16, scaling_factor: 8.0", "chunk_length: 16").replace("dense, ", "")
    text = text.replace("steps: 40", "steps: 10")
    (tmp_path / "tiny.yaml").write_text(text)
    ended = CliRunner().invoke(app, ["run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path)])
    rows = [r for r in read_rows(tmp_path / "tiny.jsonl") if r["method"] == "dash"]
    assert ended.exit_code == 1 and len(rows) == REPORTS
    assert {r["status"] for r in rows} == {"error"} and "chunk_length" in rows[0]["reason"]


def test_a_rate_of_ones_own_is_that_rate(tmp_path):
    """A stage is known by the rate it is trained at, wherever the suite says so."""
    texts = SUITE, SUITE.replace("  rates: {dash: 2.0e-3}\n", "").replace("rate: 1.0e-3", "rate: 2.0e-3")
    own, everyone = [], []
    for number, (text, keys) in enumerate(zip(texts, (own, everyone), strict=True)):
        (tmp_path / f"{number}.yaml").write_text(text)
        for method in ("dash", "dense"):
            points = load_suite(tmp_path / f"{number}.yaml").points()
            keys.append({p.key() for p in points if (p.stage, p.method) == ("continuation", method)})
    assert own[0] == everyone[0] and len(own[0]) == REPORTS
    assert not own[1] & everyone[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 40", "steps: 4", "base.steps: expected at least 10 steps"),
        ("warmup: 2", "warmups: 2", "did you mean 'warmup'"),
        ("[dense, dash]", "[dense, dasch]", "did you mean 'dash'"),
        ("hidden_size: 32", "hidden: 32", "did you mean 'hidden_size'"),
    ],
)
def test_mistakes_are_explained(tmp_path, old, new, message):
    (tmp_path / "tiny.yaml").write_text(SUITE.replace(old, new))
    said = CliRunner().invoke(app, ["validate", str(tmp_path / "tiny.yaml")])
    assert said.exit_code == 2 and message in said.output


def test_every_field_of_a_row_is_documented():
    text = (ROOT / "results" / "README.md").read_text()
    section = text[text.index("## Rows of training") :].split("\n## The row")[0]
    documented = set()
    for line in section.splitlines():
        if line.startswith("| `"):
            documented |= set(re.findall(r"`(\w+)`", line.split("|")[1]))
    assert set(TrainRow.model_fields) - set(
        re.findall(r"`(\w+)`", text[: text.index("## Rows of training")])
    ) <= (documented)
    assert documented <= set(TrainRow.model_fields)


def test_a_row_without_a_loss_is_not_ok():
    told = {"key": "0" * 16, "method": "dash", "suite": "s@0", "timestamp": "2026-01-01T00:00:00+00:00"}
    with pytest.raises(ValidationError, match="needs a loss"):
        TrainRow(**told, stage="base", report=1, base_seed=0, length=128, status="ok")
