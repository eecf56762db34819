"""Accuracy suites: RULER's own scores, prompts frozen, every answer stored at once and none asked twice."""

import json
import multiprocessing
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from pydantic import ValidationError
from transformers import AutoTokenizer
from typer.testing import CliRunner

from dashbench.analysis.accuracy import accuracy_rows
from dashbench.cli import app
from dashbench.evaluate import run_suite
from dashbench.models.checkpoint import make_checkpoint
from dashbench.models.random_tokenizer import write_tokenizer
from dashbench.models.sizes import SIZES
from dashbench.rows_accuracy import AccuracyPoint, AccuracyRow
from dashbench.store import newest, read_rows
from dashbench.suite import SuiteError, load_suite
from dashbench.tasks.documents import TaskSkipped, documents
from dashbench.tasks.ruler import PREFIX, TASKS, cleaned, match_all, match_part, read_prompts

RELEASED = Path(__file__).parent.parent.parent / "shared" / "data" / "ruler16k"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    make_checkpoint(root / "dense", "dense")
    make_checkpoint(root / "dash", "dash", chunk_size=16, scaling_factor=2.0)
    return root


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """All 13 tasks, six short records each."""
    folder = tmp_path_factory.mktemp("prompts")
    for number, task in enumerate(TASKS):
        records = [
            {"input": f"{task} " + "noise " * (20 + i) + f"value {100 * number + i}?",
             "outputs": [f"Value {100 * number + i}", "other"][: 1 + (i % 2)]}
            for i in range(6)
        ]  # fmt: skip
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


def suite(folder, checkpoints, prompts, tasks="[niah_single_1, qa_1]", extra="", more=""):
    path = folder / "s.yaml"
    path.write_text(
        f"version: 1\nkind: accuracy\nname: s\ncheckpoints:\n"
        f"  - {{name: full, path: {checkpoints / 'dense'}}}\n"
        f"  - name: dash\n    path: {checkpoints / 'dash'}\n"
        f"    knobs: [{{scaling_factor: 2.0}}, {{scaling_factor: 8.0}}]\n"
        f"{more}tasks:\n  - {{tasks: {tasks}, folder: {prompts}, samples: 2}}\n{extra}"
    )
    return path


def rulers_own(task, answer, references):
    """RULER's scoring rule once more: strip, control characters to line breaks, then substrings."""
    import re

    answer = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()
    hits = [1.0 if r.lower() in answer.lower() else 0.0 for r in references]
    return max(hits) if task.startswith("qa") else sum(hits) / len(hits)


@pytest.mark.parametrize("task", TASKS)
def test_scores_equal_rulers_own_rule_on_canned_answers(task, prompts):
    asked = documents(PREFIX + task, 0, 6, prompts, prompts)
    assert [d.doc_id for d in asked] == list(range(6)) and asked[0].new_tokens == TASKS[task]
    records = read_prompts(prompts, task)
    answers = ["", "  value 3 and OTHER\x07 things", "OTHER", *(r["outputs"][0].upper() for r in records)]
    for document, record in zip(asked, records, strict=True):
        assert document.prompt == record["input"]
        for answer in answers:
            assert document.score(answer) == rulers_own(task, answer, record["outputs"])
    assert {d.score(r["outputs"][-1]) for d, r in zip(asked, records, strict=True)} <= {0.5, 1.0}


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released RULER prompts are not beside the checkout")
@pytest.mark.parametrize("task", TASKS)
def test_released_prompts_are_read_whole(task):
    records = read_prompts(RELEASED, task)
    assert len(records) == 50 and all(len(r["input"]) > 5000 and r["outputs"] for r in records)
    scorer = match_part if task.startswith("qa") else match_all
    for record in records:
        assert scorer(record, [" ".join(record["outputs"])])["string_match"] == 1
        assert scorer(record, ["zzqq"])["string_match"] == 0


def test_answers_are_cleaned_as_ruler_does():
    assert cleaned(" A\x00b \n") == "a\nb"


def test_lm_evals_own_ruler_makes_few_documents_of_the_length_asked_for(checkpoints):
    first, second = (documents("niah_single_1", 700, 3, checkpoints / "dense") for _ in range(2))
    assert len(first) == 3 and [d.prompt_hash for d in first] == [d.prompt_hash for d in second]
    assert all(300 < len(d.prompt) < 700 for d in first), "the tokenizer's tokens are bytes"
    number = eval(first[0].target)[0]
    assert first[0].score(f"it is {number}.") == 1 and first[0].score("it is 1") == 0


def test_tasks_that_cannot_run_say_why(checkpoints, prompts):
    with pytest.raises(TaskSkipped, match="needs `folder`"):
        documents(PREFIX + "vt", 0, 1, checkpoints / "dense")
    with pytest.raises(TaskSkipped, match=r"no vt\.jsonl"):
        documents(PREFIX + "vt", 0, 1, checkpoints / "dense", checkpoints)


def test_a_suite_is_answered_once_and_goes_on_where_it_stopped(tmp_path, checkpoints, prompts):
    loaded = load_suite(suite(tmp_path, checkpoints, prompts))
    assert len(loaded.points()) == 3 * 2 * 2
    first = run_suite(loaded, tmp_path / "out")
    assert first.counts == {"ok": 12} and first.left == 0
    rows = read_rows(first.store)
    assert {(r["label"], r["method"]) for r in rows} == {("full", "dense"), ("dash", "dash")}
    by_gamma = {g: [r["s_flop"] for r in rows if r["knob"] == {"scaling_factor": g}] for g in (2.0, 8.0)}
    assert max(by_gamma[2.0]) < min(by_gamma[8.0])
    hashes = {
        label: sorted(r["prompt_hash"] for r in rows if r["label"] == label) for label in ("full", "dash")
    }
    assert set(hashes["full"]) == set(hashes["dash"]), "all checkpoints see identical prompts"
    assert run_suite(loaded, tmp_path / "out").already == 12
    lines = first.store.read_text().splitlines(keepends=True)
    first.store.write_text("".join(lines[:5]) + lines[5][:40])  # killed while it wrote the sixth row
    second = run_suite(loaded, tmp_path / "out")
    assert (second.already, second.counts) == (5, {"ok": 7})
    again = {r["key"]: (r["answer"], r["score"]) for r in newest(read_rows(first.store))}
    assert again == {r["key"]: (r["answer"], r["score"]) for r in rows}


def test_two_processes_answer_as_one_does_and_one_that_dies_is_a_row(tmp_path, checkpoints, prompts):
    loaded = load_suite(suite(tmp_path, checkpoints, prompts, "[niah_single_1]"))
    alone = run_suite(loaded, tmp_path / "alone")
    killed = []

    def kill_one(event):
        """After the first answer."""
        if event.kind == "row" and not killed:
            child = multiprocessing.active_children()[0]
            killed.append(child.pid)
            child.kill()
            child.join()

    both = run_suite(loaded, tmp_path / "both", jobs=2, on_event=kill_one)
    assert killed and both.counts["ok"] + both.counts.get("crashed", 0) == 6
    rows = newest(read_rows(both.store))
    crashed = [r for r in rows if r["status"] == "crashed"]
    assert len(crashed) <= 1 and all("died (exit code -9)" in r["reason"] for r in crashed)
    again = run_suite(loaded, tmp_path / "both", retry_failed=True)
    assert again.counts.get("ok", 0) == len(crashed)
    answers = [
        {r["key"]: (r["answer"], r["score"], r["s_flop"]) for r in newest(read_rows(s))}
        for s in (alone.store, both.store)
    ]
    assert answers[0] == answers[1] and not multiprocessing.active_children()


def test_targets_are_calibrated_on_other_prompts(tmp_path, checkpoints, prompts):
    more = (
        f"  - name: half\n    path: {checkpoints / 'dash'}\n"
        "    sparsity: [{S_flop: 0.3, tolerance: 0.05}, {S_flop: 0.99}]\n"
    )
    loaded = load_suite(suite(tmp_path, checkpoints, prompts, "[niah_single_1]", more=more))
    summary = run_suite(loaded, tmp_path / "out", only=["half"])
    assert summary.counts == {"ok": 2, "skipped": 2}
    rows = read_rows(summary.store)
    for row in rows[:2]:
        assert abs(row["s_flop"] - 0.3) < 0.08 and row["sparsity_target"] == 0.3
        assert row["settings"]["scaling_factor"] == row["knob"]["scaling_factor"]
    assert "cannot reach s_flop 0.99" in rows[2]["reason"]


def random_suite(folder, prompts):
    path = folder / "s.yaml"
    path.write_text(
        "version: 1\nkind: accuracy\nname: s\nseed: 3\ncheckpoints:\n"
        "  - {name: full, path: 'random:tiny', attention: dense}\n"
        "  - {name: dash, path: 'random:tiny', attention: dash, sparsity: [{S_flop: 0.3, tolerance: 0.1}]}\n"
        "  - {name: nsa, path: 'random:tiny', attention: nsa, knobs: [{top_k: 2, local_blocks: 1}]}\n"
        f"tasks: [{{tasks: [qa_1], folder: {prompts}, samples: 1}}]\ncalibration_prompts: 1\n"
    )
    return load_suite(path)


def test_random_weights_answer_and_their_rows_say_so(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    records = [{"input": f"{i} " + "some noise, " * 20, "outputs": ["x"]} for i in range(2)]
    (prompts / "qa_1.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    summary = run_suite(random_suite(tmp_path, prompts), tmp_path / "out")
    rows = {r["label"]: r for r in newest(read_rows(summary.store))}
    assert summary.counts == {"ok": 3} and set(rows) == {"full", "dash", "nsa"}
    for row in rows.values():
        assert row["weights"] == "random:tiny seed 3" and row["checkpoint"] == "random:tiny"
        assert "the score means nothing" in row["notes"]["random_weights"]
        assert row["prompt_tokens"] == len(records[0]["input"]), "the tiny shape reads bytes"
    assert {r["attention"] for r in rows.values()} == {"dense", "dash", "nsa"}
    assert rows["full"]["s_flop"] == 0 and rows["nsa"]["s_flop"] > 0.3
    assert abs(rows["dash"]["s_flop"] - 0.3) < 0.15 and rows["dash"]["knob"].keys() == {"scaling_factor"}
    assert not list((tmp_path / "temporary").glob("dashbench-tokenizer-*")), "removed when the run ends"
    again = run_suite(random_suite(tmp_path, prompts), tmp_path / "again", only=["nsa"])
    assert read_rows(again.store)[0]["answer"] == rows["nsa"]["answer"]
    assert accuracy_rows(read_rows(summary.store)) == [], "no report compares what means nothing"


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released RULER prompts are not beside the checkout")
def test_the_8b_shape_reads_released_prompts_as_about_16k_tokens(tmp_path):
    write_tokenizer(tmp_path, SIZES["8b"]["vocab_size"], SIZES["8b"]["max_position_embeddings"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) <= SIZES["8b"]["vocab_size"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2), "as in random_model's config"
    lengths = []
    for task in TASKS:
        text = read_prompts(RELEASED, task)[0]["input"]
        tokens = tokenizer(text)["input_ids"]
        assert tokens[0] == 1 and tokenizer.decode(tokens, skip_special_tokens=True) == text
        lengths.append(len(tokens))
    assert min(lengths) > 10_000 and max(lengths) < 23_000
    assert sum(14_000 < n < 20_000 for n in lengths) >= 9, lengths
    assert tokenizer.decode([SIZES["8b"]["vocab_size"] - 1]) == "", "a token that no text becomes"


def test_what_goes_wrong_is_a_row(tmp_path, checkpoints, prompts):
    more = f"  - {{name: lost, path: {tmp_path / 'nowhere'}}}\n"
    long = tmp_path / "long"
    long.mkdir()
    (long / "vt.jsonl").write_text(json.dumps({"input": "x" * 5000, "outputs": ["x"]}) + "\n")
    extra = (
        f"  - {{tasks: [vt], folder: {long}, samples: 1}}\n  - {{tasks: [cwe], folder: {long}, samples: 1}}\n"
    )
    loaded = load_suite(suite(tmp_path, checkpoints, prompts, "[vt]", extra, more))
    rows = newest(read_rows(run_suite(loaded, tmp_path / "out", only=["full", "lost"]).store))
    reasons = {(r["label"], r["task"], r["status"]): r["reason"] for r in rows}
    assert "do not fit a model of 4096" in reasons["full", PREFIX + "vt", "error"]
    assert "no cwe.jsonl" in reasons["full", PREFIX + "cwe", "skipped"]
    assert "no such folder" in reasons["lost", PREFIX + "vt", "error"]


def test_the_command_line_runs_and_shows_scores(tmp_path, checkpoints, prompts):
    path = suite(tmp_path, checkpoints, prompts, "[fwe]")
    found = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "out"), "--only", "full"])
    assert found.exit_code == 0, found.output
    assert "ruler_prompts_fwe" in found.output and "2 ok" in found.output
    made = CliRunner().invoke(app, ["make-checkpoint", str(tmp_path / "made"), "--kind", "nsa"])
    assert made.exit_code == 0 and (tmp_path / "made" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [{tasks: [vtt], folder: x, samples: 1}]", "unknown RULER task 'vtt'; did you mean 'vt'"),
        ("tasks: [{tasks: [niah_single_1], samples: 1}]", "missing key: lm-eval's RULER generates"),
        ("tasks: [{tasks: [vt], folder: x, samples: 0}]", "samples"),
        ("checkpoints: [{name: a, path: 'random:tiny'}]", ":4: checkpoints.0.attention: random weights do"),
        ("checkpoints: [{name: a, path: 'random:8B', attention: dash}]", ":4: checkpoints.0.path: unknown"),
        ("checkpoints: [{name: a, path: 'random:8B', attention: dash}]", "did you mean 'random:8b'?"),
        ("tasks: [{tasks: [vt], folder: x, samples: 1, sample: 1}]", "unknown key; did you mean 'samples'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_suite_name_the_key(tmp_path, text, message):
    path = tmp_path / "s.yaml"
    other = "checkpoints: [{name: a, path: b}]"
    if text.startswith("checkpoints"):
        other = "tasks: [{tasks: [vt], folder: x, samples: 1}]"
    path.write_text(f"version: 1\nkind: accuracy\nname: s\n{text}\n{other}\n")
    with pytest.raises(SuiteError) as found:
        load_suite(path)
    assert message in str(found.value)


def test_an_answer_without_a_score_is_refused():
    point = AccuracyPoint(checkpoint="c", label="l", task="t", length=0, document=0)
    fields = {
        "key": point.key(), "method": "dense", "label": "l", "checkpoint": "c", "attention": "dense",
        "preset": "package", "task": "t", "length": 0, "doc_id": 0, "suite": "s@0", "timestamp": "2026-01-01",
    }  # fmt: skip
    AccuracyRow(**fields, status="ok", answer="a", score=1.0)
    for wrong in (
        {"status": "ok", "answer": "a"},
        {"status": "error"},
        {"status": "ok", "answer": "a", "score": 2},
    ):
        with pytest.raises(ValidationError):
            AccuracyRow(**fields, **wrong)
