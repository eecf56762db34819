"""Runs survive what methods, machines and people do to them."""

import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from dashbench.methods import registry
from dashbench.runner import Runner, run_suite
from dashbench.store import newest, read_rows
from dashbench.suite import load_suite

HERE = Path(__file__).parent
DASHBENCH = [sys.executable, "-P", "-c", "from dashbench.cli import main; main()"]
FAKE = HERE / "fake_python.py"
TINY = "{query_heads: 2, kv_heads: 1, head_dim: 64}"


def suite_file(folder, methods, context="[128]", extra="", timeout=60):
    path = folder / "s.yaml"
    path.write_text(
        f"version: 1\nkind: kernels\nname: s\nmethods: {methods}\nphase: prefill\ncontext: {context}\n"
        f"shape: {TINY}\ndtype: float32\ncache: warm\nblock_size: 16\n{extra}\n"
        f"timing: {{warmup_seconds: 0, min_samples: 3, max_samples: 6, max_seconds: 0.05, rounds: 2, "
        f"timeout_seconds: {timeout}}}\n"
    )
    return path


def fake_suite(folder, points):
    names = ["dense@math", "dense@flash"]
    methods = "[" + ", ".join(f"{{name: {n}, python: {FAKE}}}" for n in names) + "]"
    return suite_file(folder, methods, context=str([128 + i for i in range(points // 2)]))


@pytest.fixture
def entry_points(tmp_path, monkeypatch):
    """Makes packages under tests/ known as if they were installed: a dist-info folder with their entry
    points on the path."""

    def install(name, entries, module_folder):
        info = tmp_path / "site" / f"{name}-0.1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        lines = "\n".join(f"{k} = {v}" for k, v in entries.items())
        (info / "entry_points.txt").write_text(f"[dashbench.methods]\n{lines}\n")
        paths = [str(tmp_path / "site"), str(module_folder)]
        for path in paths:
            monkeypatch.syspath_prepend(path)
        before = os.environ.get("PYTHONPATH")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*paths, *([before] if before else [])]))
        registry.cache_clear()

    yield install
    registry.cache_clear()


def rows_in(store):
    return store.read_bytes().count(b"\n") if store.exists() else 0


def test_killed_twenty_times_a_run_ends_with_the_same_points(tmp_path):
    suite = fake_suite(tmp_path, 200)
    wanted = {p.key() for p in load_suite(suite).points()}
    rng = random.Random(0)
    store = tmp_path / "out" / "s.jsonl"
    sizes = []
    for _ in range(20):
        process = subprocess.Popen(
            [*DASHBENCH, "run", str(suite), "--out", str(tmp_path / "out")],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        # Random instants, counted from a random row on: how long a start takes is the machine's affair.
        goal = rows_in(store) + rng.randint(0, 4)
        while process.poll() is None and rows_in(store) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.1))
        assert process.poll() is None, "killed while it runs"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        sizes.append(len(read_rows(store)) if store.exists() else 0)
    assert sizes == sorted(sizes), "rows only ever grow"
    assert any(0 < n < len(wanted) for n in sizes), "some kill must have hit a run in the middle"
    summary = run_suite(load_suite(suite), tmp_path / "out")
    rows = read_rows(store)
    assert {r["key"] for r in rows} == wanted and len(rows) == len(wanted), "every point once"
    assert all(r["status"] == "ok" for r in rows) and summary.left == 0


def test_time_budget_ends_cleanly_and_resumes(tmp_path):
    suite = load_suite(fake_suite(tmp_path, 400))
    first = run_suite(suite, tmp_path / "out", time_budget_s=2.0)
    assert 0 < sum(first.counts.values()) < 400 and first.left == 400 - sum(first.counts.values())
    second = run_suite(suite, tmp_path / "out")
    assert second.left == 0 and second.already == sum(first.counts.values())


def test_real_workers_measure_and_resume(tmp_path):
    suite = load_suite(
        suite_file(tmp_path, "[dense@math, dash@reference]", extra="sparsity: {S_flop: 0.3, tolerance: 0.1}")
    )
    events = []
    run_suite(suite, tmp_path / "out", on_event=events.append)
    rows = {r["method"]: r for r in read_rows(tmp_path / "out" / "s.jsonl")}
    assert {r["status"] for r in rows.values()} == {"ok"}
    dash = rows["dash@reference"]
    assert (
        dash["recheck"]["passed"] and abs(dash["s_flop"] - 0.3) <= 0.1 and dash["knob"]["scaling_factor"] > 0
    )
    assert dash["timing"]["interleaved"] and dash["environment"]["ceilings"]["matmul_tflops"] > 0
    assert [e.kind for e in events].count("row") == 2
    again = run_suite(suite, tmp_path / "out")
    assert again.already == 2 and not again.counts


def test_each_misbehaving_method_gives_its_row_and_costs_the_others_nothing(
    tmp_path, entry_points, monkeypatch
):
    names = ("SEGFAULT", "WRONG", "HOG", "HANG", "RAISES", "LATE")
    entry_points("misbehaving", {n.lower(): f"misbehaving:{n}" for n in names}, HERE)
    monkeypatch.setenv("DASHBENCH_HOST_MEMORY_GIB", "2.5")
    bad = [f"bad@{n.lower()}" for n in names]
    suite = load_suite(suite_file(tmp_path, f"[{', '.join([*bad[:3], 'dense@math', *bad[3:]])}]", timeout=20))
    summary = run_suite(suite, tmp_path / "out")
    rows = {r["method"]: r for r in read_rows(tmp_path / "out" / "s.jsonl")}
    found = {name: (row["status"], row["reason"]) for name, row in rows.items()}
    assert found["dense@math"] == ("ok", None)
    assert found["bad@segfault"] == ("crashed", "the worker died of Segmentation fault")
    assert "about to read address zero" in rows["bad@segfault"]["log_tail"]
    assert found["bad@wrong"][0] == "incorrect" and "off by" in found["bad@wrong"][1]
    assert found["bad@hog"] == ("oom", "out of memory: took more than 2.5 GiB of host memory")
    assert found["bad@hang"] == ("timeout", "no answer to prepare within 20 s")
    assert found["bad@raises"] == ("error", "RuntimeError: this method")
    assert found["bad@late"][0] == "incorrect" and "after timing" in found["bad@late"][1]
    assert all(r["latency_ms"] is None for name, r in rows.items() if name.startswith("bad"))
    assert summary.failed == 6
    # Failed points are done until they are asked for again.
    assert run_suite(suite, tmp_path / "out", only=["bad@raises"]).already == 1
    assert run_suite(suite, tmp_path / "out", only=["bad@raises"], retry_failed=True).counts == {"error": 1}
    assert len(newest(read_rows(tmp_path / "out" / "s.jsonl"))) == 7


def test_a_method_from_outside_the_tree(tmp_path, entry_points):
    folder = HERE / "plugin_example"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    entry_points(project["name"], project["entry-points"]["dashbench.methods"], folder)
    assert len((folder / "dashbench_plugin_example.py").read_text().splitlines()) <= 40
    assert registry()["example@sdpa"].summary.startswith("softmax attention")
    suite = load_suite(suite_file(tmp_path, "[example@sdpa]"))
    assert run_suite(suite, tmp_path / "out").counts == {"ok": 1}


def test_finished_points_are_measured_again_on_request_only(tmp_path):
    suite = load_suite(fake_suite(tmp_path, 4))
    first = run_suite(suite, tmp_path / "out")
    assert run_suite(suite, tmp_path / "out").counts == {}
    again = run_suite(suite, tmp_path / "out", only=["dense@math"], again=True)
    assert again.counts == {"ok": 2} and first.counts == {"ok": 4}
    rows = read_rows(first.store)
    assert len(rows) == 6 and len(newest(rows)) == 4


def test_what_runs_out_of_memory_beside_others_is_measured_alone(tmp_path, monkeypatch):
    """The check after timing of one runs out of memory while the other workers hold theirs."""
    path = suite_file(tmp_path, "[dense@math, dense@flash, dense@efficient]")
    loaded = load_suite(path)
    asked, loaded_now = [], set()
    environment = {"kind": "cuda", "device": "fake", "capability": [9, 0], "memory_bytes": 8e10}

    def ask(self, method, command):
        self.workers[method] = object()
        asked.append((method, command["do"]))
        if command["do"] == "release":
            loaded_now.discard(method)
        elif command["do"] == "prepare":
            loaded_now.add(method)
            return {"status": "ready"}
        elif command["do"] == "finish":
            if method == "dense@flash" and len(loaded_now) > 1:
                return {"status": "oom", "reason": "out of memory"}
            loaded_now.discard(method)
            fields = {"latency_ms": 1.0, "latency_ci_ms": [1.0, 1.0], "samples": [1.0], "timing": {}}
            check = {"passed": True, "rows": 1}
            return {"status": "ok", "fields": {**fields, "checked": check, "recheck": check}}
        return {"status": "ok", "ceilings": {}, "samples": 3, "done": "precise"}

    monkeypatch.setattr(Runner, "_ask", ask)
    monkeypatch.setattr(Runner, "_environment", lambda self, method: (environment, "fake0000"))
    monkeypatch.setattr(Runner, "close", lambda self: None)
    monkeypatch.setattr("dashbench.runner.skip_reason", lambda *_: None)
    summary = run_suite(loaded, tmp_path / "out")
    assert summary.counts == {"ok": 3}
    rows = {r["method"]: r for r in newest(read_rows(summary.store))}
    assert rows["dense@math"]["timing"]["interleaved"] and not rows["dense@flash"]["timing"]["interleaved"]
    assert asked.count(("dense@flash", "prepare")) == 2 and asked.count(("dense@math", "prepare")) == 1
