"""The command line: exit codes, sentences, speed, and that nothing but a worker loads torch."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAKE = Path(__file__).parent / "fake_python.py"
RUN = "from dashbench.cli import main; main()"


def dashbench(*words, code=RUN):
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A finished run of a suite whose workers are pretended."""
    folder = tmp_path_factory.mktemp("cli")
    suite = folder / "s.yaml"
    suite.write_text(
        f"version: 1\nkind: kernels\nname: s\nmethods: [{{name: dense@math, python: {FAKE}}}, fa3]\n"
        "phase: prefill\ncontext: [128, 256]\nshape: tiny\ndtype: bfloat16\ncache: warm\n"
    )
    done = dashbench("run", suite, "--out", folder / "out")
    return suite, folder / "out", done


def test_help_is_quick():
    best = min(_timed("--help") for _ in range(3))
    assert best < 0.5


def _timed(*words):
    """CPU seconds of a command, which is one thread's work: a busy machine does not lengthen them."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert dashbench(*words).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_run_prints_rows_skips_a_figure_and_how_it_ended(store):
    _, out, done = store
    assert done.returncode == 0, done.stderr
    assert "[1/4]" in done.stdout and "2 skipped: fa3: needs a GPU" in done.stdout
    assert f"figure: {out}/s-latency.png" in done.stdout and (out / "s-latency.png").stat().st_size > 1000
    assert f"rows: {out}/s.jsonl (2 ok, 2 skipped)" in done.stdout


def test_running_again_does_nothing_new(store):
    suite, out, _ = store
    again = dashbench("run", suite, "--out", out)
    assert again.returncode == 0 and "(nothing new, 4 were finished before)" in again.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["list", "methods"], ["list", "suites"], ["list", "shapes"], ["list", "routings"],
        ["doctor"], ["schema"],
        ["validate", "suites/quickstart.yaml"], ["plan", "suites/quickstart.yaml"],
        ["run", "suites/quickstart.yaml", "--dry-run"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_verbs_answer_without_torch(words):
    after = "import atexit, sys; atexit.register(lambda: print('TORCH', 'torch' in sys.modules))"
    code = f"{after}; {RUN}"
    done = dashbench(*words, code=code)
    assert (done.returncode == 0 and len(done.stdout) > 80) or words[0] == "validate", done.stderr
    assert done.stdout.rstrip().endswith("TORCH False")


def test_status_and_export(store, tmp_path):
    import pandas

    _, out, _ = store
    status = dashbench("status", out)
    assert status.returncode == 0 and "4 rows" in status.stdout and "fa3: needs a GPU" in status.stdout
    for kind, read in (("csv", pandas.read_csv), ("parquet", pandas.read_parquet)):
        done = dashbench("export", out, f"--{kind}", tmp_path / f"t.{kind}")
        assert done.returncode == 0 and "4 rows" in done.stdout, done.stderr
        table = read(tmp_path / f"t.{kind}")
        assert len(table) == 4 and "samples" not in table
        assert table[table.status == "ok"]["latency_ci_ms.low"].tolist() == [1.4, 1.4]
        assert set(table["shape.head_dim"]) == {64}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "suites/nothing.yaml"], "suites/nothing.yaml: no such suite"),
        (["run", "suites/quickstart.yaml", "--only", "fa4"], "--only: the suite has no method 'fa4'; it has"),
        (
            ["run", "suites/quickstart.yaml", "--time-budget", "soon"],
            "--time-budget: expected a duration such as 90s",
        ),
        (
            ["run", "suites/quickstart.yaml", "--only", ","],
            "--only: expected methods of the suite: dash@reference,",
        ),
        (["run", "suites/quickstart.yaml", "--dry-run", "--time-budget", "soon"], "--time-budget: expected"),
        (["validate", "suites"], "suites: cannot be read: Is a directory"),
        (["list", "people"], "list: expected one of methods, suites, shapes, routings, got 'people'"),
        (["status", "nowhere"], "nowhere: no rows here"),
        (["export", "nowhere"], "export: give exactly one of --csv FILE and --parquet FILE"),
        (["export", "nowhere", "--csv", "x.csv"], "nowhere: no rows here"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_two(words, sentence):
    done = dashbench(*words)
    assert done.returncode == 2
    assert sentence in done.stderr and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["run", "plan"])
def test_a_missing_interpreter_is_bad_input(tmp_path, verb):
    suite = tmp_path / "s.yaml"
    suite.write_text(
        "version: 1\nkind: kernels\nname: s\nmethods: [{name: dense@math, python: /no/python}]\n"
        "phase: prefill\ncontext: 128\nshape: tiny\n"
    )
    done = dashbench(verb, suite)
    assert done.returncode == 2 and not (ROOT / "out" / "s").exists()
    assert done.stderr == f"dashbench: {suite}: dense@math: no Python interpreter at '/no/python'\n"


def test_a_failed_point_makes_exit_code_one(store, tmp_path):
    suite, out, _ = store
    row = json.loads((out / "s.jsonl").read_text().splitlines()[-1])
    row |= {"status": "crashed", "reason": "it fell over", "latency_ms": None}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n")
    done = dashbench("run", suite, "--out", tmp_path)
    assert done.returncode == 1 and "it fell over" in done.stdout


def test_the_unforeseen_is_a_sentence_with_the_place_of_its_traceback(tmp_path):
    code = "import dashbench.cli as c, sys\ndef boom(*a): raise KeyError('x')\nc.app = boom\nc.main()"
    done = dashbench(code=code)
    assert done.returncode == 1 and "unexpected KeyError: 'x'; the traceback is in" in done.stderr
    assert "Traceback" in Path(done.stderr.strip().rsplit(" ", 1)[1]).read_text()
