"""The analysis verbs on the committed H200 rows and on stores that have nothing to say."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dashbench.cli import app
from dashbench.store import read_rows

H200 = Path(__file__).parent.parent / "results" / "nvidia-h200"


def dashbench(*words):
    return CliRunner().invoke(app, [str(w) for w in words])


@pytest.fixture
def changed(tmp_path):
    """The committed prefill rows twice: as they are, and with `dash` half as fast and cuDNN twice as fast."""
    rows = read_rows(H200 / "prefill.jsonl.gz")
    for name, factors in (("before", {}), ("after", {"dash": 2.0, "dense@cudnn": 0.5})):
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            for row in rows:
                factor = factors.get(row["method"], 1.0)
                times = {"samples": [factor * s for s in row["samples"]]}
                if row["latency_ms"]:
                    times["latency_ms"] = factor * row["latency_ms"]
                file.write(json.dumps(row | times) + "\n")
    return tmp_path / "before.jsonl", tmp_path / "after.jsonl"


def test_crossover_reads_the_committed_rows():
    done = dashbench("crossover", H200 / "prefill.jsonl.gz")
    assert done.exit_code == 0
    lines = [line for line in done.stdout.splitlines() if "dash" in line]
    assert len(lines) == 9
    assert any("75 %" in line and "ahead from" in line and "x [" in line for line in lines)
    assert any("uniform" in line and "never within range" in line for line in lines)


def test_compare_finds_what_changed_and_can_fail(changed):
    before, after = changed
    done = dashbench("compare", before, after, "--fail-on", "slower")
    assert done.exit_code == 1
    verdicts = {
        tuple(line.strip("│ ").replace("│", " ").split()[:2])
        for line in done.stdout.splitlines()
        if "prefill" in line
    }
    assert ("SLOWER", "dash") in verdicts and ("FASTER", "dense@cudnn") in verdicts
    assert (
        not {("FASTER", "dash"), ("SLOWER", "dense@cudnn"), ("SLOWER", "fa3"), ("FASTER", "fa3")} & verdicts
    )
    lines = [line for line in done.stdout.splitlines() if "prefill" in line]
    points = {tuple(cell.strip() for cell in line.split("│")[2:9]) for line in lines}
    assert len(points) == len(lines), "what tells two points apart is in their lines"
    same = dashbench("compare", before, before, "--fail-on", "slower")
    assert same.exit_code == 0 and "SLOWER" not in same.stdout


@pytest.mark.parametrize("verb", ["crossover", "overhead", "compare"])
def test_methods_can_be_chosen(verb, changed):
    stores = changed if verb == "compare" else [H200.parent / "nvidia-h100" / "sparsity.jsonl.gz"]
    methods = {"compare": ("fa3", "dash")}.get(verb, ("infllmv2", "dash"))
    whole, some = dashbench(verb, *stores), dashbench(verb, *stores, "--only", methods[0])
    assert some.exit_code == 0 and methods[0] in some.stdout and f"{methods[1]} " not in some.stdout
    assert f"{methods[1]} " in whole.stdout
    missing = dashbench(verb, *stores, "--only", "dahs")
    assert missing.exit_code == 2 and "--only: no rows of 'dahs'; there are " in missing.output


def test_figures_are_drawn_again_byte_for_byte(tmp_path):
    for folder in ("a", "b"):
        assert dashbench("figures", H200 / "prefill.jsonl.gz", "--out", tmp_path / folder).exit_code == 0
    for name in ("prefill-latency.png", "prefill-speedup.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["crossover", "nowhere"], "nowhere: no rows here"),
        (["crossover", H200 / "context.jsonl.gz"], "no sparse method has a dense row beside it"),
        (["compare", H200 / "context.jsonl.gz", H200 / "prefill.jsonl.gz"], ""),
        (["compare", "nowhere", "nowhere"], "nowhere: no rows here"),
        (["compare", "a", "b", "--fail-on", "faster"], "--fail-on: expected slower, got 'faster'"),
        (["figures", "nowhere"], "nowhere: no rows here"),
    ],
)
def test_nothing_to_say_is_one_sentence(words, sentence):
    done = dashbench(*words)
    if sentence:
        assert done.exit_code == 2 and sentence in done.output and len(done.output.splitlines()) == 1
    else:
        assert done.exit_code == 0, "suites share points: the same baseline asked for twice is one point"


def test_environments_are_not_drawn_together(tmp_path, changed):
    before, after = changed
    after.write_text(after.read_text().replace('"environment_key": "', '"environment_key": "x'))
    done = dashbench("figures", before, after, "--out", tmp_path)
    assert done.exit_code == 2 and "rows of 2 environments" in done.output
