"""The small checkpoints in this repository answer as the committed rows say they do."""

from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from dashbench.evaluate import run_suite
from dashbench.store import newest, read_rows
from dashbench.suite import load_suite

ROOT = Path(__file__).parent.parent
CHECKPOINTS = ROOT / "results" / "nvidia-h100" / "checkpoints"
TASK, DOCUMENTS, SPARSITY = "niah_multikey_2", 2, 0.3


def test_a_fixed_subset_is_answered_as_committed(tmp_path):
    """Of each checkpoint the first documents of a task at one sparsity, by the knob that was found then."""
    committed = defaultdict(dict)
    for row in newest(read_rows(ROOT / "results" / "cpu" / "miniature-accuracy.jsonl.gz")):
        if row["task"] == TASK and row["doc_id"] < DOCUMENTS and row["sparsity_target"] in (None, SPARSITY):
            committed[row["label"]][row["doc_id"]] = row
    assert set(committed) == {"dense", "dash", "nsa", "infllmv2"}
    text = "version: 1\nkind: accuracy\nname: subset\ncheckpoints:\n"
    for label, rows in committed.items():
        text += f"  - {{name: {label}, path: {CHECKPOINTS / label}, knobs: [{rows[0]['knob']}]}}\n"
    text += f"tasks: [{{tasks: [{TASK}], length: [1k], samples: {DOCUMENTS}}}]\ncalibration_prompts: 1\n"
    (tmp_path / "subset.yaml").write_text(text)
    summary = run_suite(load_suite(tmp_path / "subset.yaml"), tmp_path)
    assert summary.counts == {"ok": 4 * DOCUMENTS}
    for row in read_rows(summary.store):
        before = committed[row["label"]][row["doc_id"]]
        for same in ("weights", "prompt_hash", "answer", "score", "settings"):
            assert row[same] == before[same], (row["label"], row["doc_id"], same)
        assert row["s_flop"] == pytest.approx(before["s_flop"], abs=2e-3)


def test_every_checkpoint_has_its_card_and_adds_up_to_less_than_16_mib():
    folders = sorted(path.name for path in CHECKPOINTS.iterdir())
    assert folders == ["base", "dash", "dense", "infllmv2", "nsa"]
    rows = newest(read_rows(CHECKPOINTS.parent / "miniature.jsonl.gz"))
    for folder in folders:
        stage = ("base", "dense") if folder == "base" else ("continuation", folder)
        (last,) = (r for r in rows if (r["stage"], r["method"]) == stage and r["report"] == 10)
        assert f"`{last['checkpoint']}`" in (CHECKPOINTS / folder / "README.md").read_text()
    assert sum(f.stat().st_size for f in CHECKPOINTS.rglob("*") if f.is_file()) < 16 * 2**20
