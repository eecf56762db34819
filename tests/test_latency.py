"""Latency suites: what is measured, how sparsity is set, and what the rows must hold."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from pydantic import ValidationError

from dashbench.latency import layer_sparsity, run_suite
from dashbench.models.checkpoint import random_model
from dashbench.rows_latency import LatencyPoint, LatencyRow
from dashbench.store import newest, read_rows
from dashbench.suite import SuiteError, load_suite


def suite(folder, extra="", models=None):
    models = models or (
        "  - {name: full, attention: dense, random: tiny}\n"
        "  - {name: dash, attention: dash, random: tiny, knobs: {chunk_size: 16, bias_mode: none},\n"
        "     sparsity: {S_flop: 0.5, tolerance: 0.05}}\n"
        "  - {name: nsa, attention: nsa, random: tiny, knobs: {local_blocks: 1},\n"
        "     sparsity: {S_flop: 0.4, tolerance: 0.1}}\n"
    )
    path = folder / "s.yaml"
    path.write_text(
        f"version: 1\nkind: latency\nname: s\nmodels:\n{models}"
        f"context: [300]\nnew_tokens: 5\nrepeats: 2\n{extra}"
    )
    return path


def test_models_are_measured_at_the_sparsity_asked_for(tmp_path):
    loaded = load_suite(suite(tmp_path, "launch: [eager, graph]\nbatch: [1, 2]\n"))
    summary = run_suite(loaded, tmp_path / "out")
    expected = {"ok": 6} | ({"skipped": 6} if not torch.cuda.is_available() else {"ok": 12})
    assert summary.counts == expected
    rows = newest(read_rows(summary.store))
    for row in rows:
        if row["status"] == "skipped":
            assert row["reason"] == "CUDA graphs need a GPU"
            continue
        assert row["ttft_ms"] > 0 and 2 <= len(row["ttft_samples"]) <= 10
        assert row["itl_ms"] <= row["itl_p99_ms"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["itl_ms"])
        target = {"full": 0.0, "dash": 0.5, "nsa": 0.4}[row["label"]]
        assert abs(row["s_flop"] - target) <= 0.1
    assert {r["notes"].get("dense_backend") is not None for r in rows if r["label"] == "full"} == {True}
    again = run_suite(loaded, tmp_path / "out")
    assert again.already == 12 and again.counts == {}


def test_planted_routing_replaces_what_attention_sees_and_nothing_else(tmp_path):
    from dashbench.latency import planted_states
    from dashbench.models.generate import new_sequences, read

    model = random_model("dash", "tiny", chunk_size=16)
    fields = {
        "label": "l",
        "checkpoint": "random:tiny",
        "attention": "dash",
        "launch": "eager",
        "new_tokens": 4,
    }
    point = LatencyPoint(**fields, context=200, batch=1, repeats=1)
    tokens = torch.randint(3, 250, (1, 200), generator=torch.Generator().manual_seed(0))
    own = read(model, tokens, new_sequences(model, 1, 210))
    model.dashbench.planted = planted_states(model, point)
    first = new_sequences(model, 1, 210)
    planted = read(model, tokens, first)
    assert not torch.allclose(own, planted)
    read(model, tokens[:, :1], first)
    assert first.length == 201, "tokens after the prompt see planted states, too"
    sparsity = []
    for gamma in (0.5, 8.0):
        model.dashbench.settings["scaling_factor"] = gamma
        sparsity.append(layer_sparsity(model, 200))
    assert sparsity[0] < sparsity[1]


def test_predictions_come_from_kernel_rows_of_the_same_machine(tmp_path):
    loaded = load_suite(suite(tmp_path))
    summary = run_suite(loaded, tmp_path / "out", only=["full"])
    environment = read_rows(summary.store)[0]["environment_key"]
    kernel = {
        "row_version": 1, "key": "0" * 16, "kind": "kernel", "method": "fa3", "context": 300, "batch": 1,
        "launch": "graph", "routing": "topics", "routing_options": {}, "status": "ok", "s_flop": 0.0,
    }  # fmt: skip
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = [
        kernel | {"phase": "prefill", "latency_ms": 0.5, "environment_key": environment},
        kernel | {"phase": "prefill", "latency_ms": 0.1, "environment_key": "another", "key": "1" * 16},
    ]
    (rows / "k.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loaded = load_suite(suite(tmp_path, f"kernel_rows: {rows}\n"))
    row = read_rows(run_suite(loaded, tmp_path / "out2", only=["full"]).store)[0]
    assert row["predicted_ttft_ms"] == 2 * 0.5 and row["predicted_itl_ms"] is None
    assert row["unexplained_ttft_ms"] == pytest.approx(row["ttft_ms"] - 1.0)


@pytest.mark.parametrize(("short_ms", "readings"), [(0.0, 2), (1e9, 10)])
def test_short_prompts_are_read_until_their_time_is_known(tmp_path, monkeypatch, short_ms, readings):
    monkeypatch.setattr("dashbench.latency.SHORT_MS", short_ms)
    summary = run_suite(load_suite(suite(tmp_path)), tmp_path / "out", only=["full"])
    assert len(read_rows(summary.store)[0]["ttft_samples"]) == readings


def test_prompts_that_take_long_are_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr("dashbench.latency.ENOUGH_MS", 0.0)
    summary = run_suite(load_suite(suite(tmp_path, "batch: [2]\n")), tmp_path / "out", only=["full"])
    row = read_rows(summary.store)[0]
    assert len(row["ttft_samples"]) == 1 and row["rows_at_once"] == 2


def test_sparsities_out_of_reach_are_skipped(tmp_path):
    models = (
        "  - {name: dash, attention: dash, random: tiny, knobs: {chunk_size: 16},\n"
        "     sparsity: {S_flop: 0.999}}\n"
    )
    summary = run_suite(load_suite(suite(tmp_path, models=models)), tmp_path / "out")
    assert summary.counts == {"skipped": 1}
    assert "cannot reach s_flop 0.999" in read_rows(summary.store)[0]["reason"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: a, attention: dense}", "exactly one of `path` and `random`"),
        ("{name: a, attention: dense, random: tiny, sparsity: {S_flop: 0.5}}", "dense attention has no"),
        ("{name: a, attention: dens, random: tiny}", "did you mean 'dense'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_suite_name_the_key(tmp_path, entry, message):
    with pytest.raises(SuiteError, match=r"models\.0") as found:
        load_suite(suite(tmp_path, models=f"  - {entry}\n"))
    assert message in str(found.value)


def test_a_row_without_its_times_is_refused():
    fields = {
        "key": "0" * 16, "method": "dash", "label": "l", "checkpoint": "c", "attention": "dash",
        "routing": "planted", "context": 1, "batch": 1, "launch": "eager", "suite": "s@0", "timestamp": "t",
    }  # fmt: skip
    LatencyRow(**fields, status="ok", ttft_ms=1.0, itl_ms=1.0)
    with pytest.raises(ValidationError):
        LatencyRow(**fields, status="ok", ttft_ms=1.0)
