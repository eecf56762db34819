"""Accuracy suites: RULER's own scores, prompts frozen, every answer stored at once and none asked twice."""

import json
import multiprocessing
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from pydantic import ValidationError
from typer.testing import CliRunner

from dashbench.cli import app
from dashbench.evaluate import run_suite
from dashbench.models.checkpoint import make_checkpoint
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
        ("tasks: [{tasks: [vt], folder: x, samples: 1, sample: 1}]", "unknown key; did you mean 'samples'"),
    ],
)  # fmt: skip
def test_mistakes_in_a_suite_name_the_key(tmp_path, text, message):
    path = tmp_path / "s.yaml"
    path.write_text(f"version: 1\nkind: accuracy\nname: s\ncheckpoints: [{{name: a, path: b}}]\n{text}\n")
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
