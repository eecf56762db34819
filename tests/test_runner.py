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

from dashbench.cost import problem_bytes
from dashbench.methods import registry
from dashbench.runner import GROUP_SHARE, Runner, run_suite
from dashbench.store import Store, newest, read_rows
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
    suite = load_suite(suite_file(tmp_path, f"[{', '.join([*bad[:3], 'dense@math', *bad[3:]])}]", timeout=12))
    summary = run_suite(suite, tmp_path / "out")
    rows = {r["method"]: r for r in read_rows(tmp_path / "out" / "s.jsonl")}
    found = {name: (row["status"], row["reason"]) for name, row in rows.items()}
    assert found["dense@math"] == ("ok", None)
    assert found["bad@segfault"] == ("crashed", "the worker died of Segmentation fault")
    assert "about to read address zero" in rows["bad@segfault"]["log_tail"]
    assert found["bad@wrong"][0] == "incorrect" and "off by" in found["bad@wrong"][1]
    assert found["bad@hog"] == ("oom", "out of memory: took more than 2.5 GiB of host memory")
    assert found["bad@hang"] == ("timeout", "no answer to prepare within 12 s")
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


def crowded_suite(folder):
    targets = ", ".join(f"{{S_flop: {s}}}" for s in (0.3, 0.5, 0.7))
    return suite_file(folder, "[dense@math, dash@reference]", extra=f"sparsity: [{targets}]")


class CrowdedGpu:
    """Workers that share a GPU with room for a few points: one that runs out of memory drops all it held, one
    that dies is gone, and both answer `KeyError` for a point they do not hold, as real ones do."""

    def __init__(self, monkeypatch, fails, memory_bytes=8e10):
        self.held = {}  # keys by method
        self.fails = fails  # (method, step, points that all workers hold) -> status, or None
        self.prepared = []
        environment = {"kind": "cuda", "device": "fake", "capability": [9, 0], "memory_bytes": memory_bytes}
        monkeypatch.setattr(Runner, "_ask", self.ask)
        monkeypatch.setattr(Runner, "_environment", lambda *_: (environment, "fake0000"))
        monkeypatch.setattr(Runner, "close", lambda _: None)
        monkeypatch.setattr("dashbench.runner.skip_reason", lambda *_: None)

    def ask(self, method, command):
        step, key = command["do"], command.get("key")
        mine = self.held.setdefault(method, set())
        self.runner.workers[method] = self
        if step == "release":
            mine.clear()
        elif step == "prepare":
            mine.add(key)
            self.prepared.append(method)
        elif step in ("sample", "finish") and key not in mine:
            return {"status": "error", "reason": f"KeyError: {key}"}
        if status := self.fails(method, step, sum(map(len, self.held.values()))):
            mine.clear()
            if status == "crashed":
                del self.runner.workers[method]
            return {"status": status, "reason": f"{status} in {step}"}
        if step == "finish":
            mine.remove(key)
            fields = {"latency_ms": 1.0, "latency_ci_ms": [1.0, 1.0], "samples": [1.0], "timing": {}}
            check = {"passed": True, "rows": 1}
            return {"status": "ok", "fields": {**fields, "checked": check, "recheck": check}}
        return {"status": "ready" if step == "prepare" else "ok", "done": "precise"}

    def run(self, folder):
        suite = load_suite(crowded_suite(folder))
        with Store(folder / "s.jsonl") as store:
            self.runner = Runner(suite, store, lambda event: None, None)
            self.runner.run(suite.points(), retry_failed=False, again=False)
        rows = read_rows(folder / "s.jsonl")
        assert len(rows) == 4 and len({r["key"] for r in rows}) == 4, "every point once"
        return {(r["method"], r["sparsity_target"]): r for r in rows}


@pytest.mark.parametrize("step", ["prepare", "sample", "finish"])
def test_what_runs_out_of_memory_beside_others_is_measured_alone(step, tmp_path, monkeypatch):
    def fails(method, at, points):
        return "oom" if method == "dash@reference" and at == step and points > 2 else None

    gpu = CrowdedGpu(monkeypatch, fails)
    rows = gpu.run(tmp_path)
    assert {r["status"] for r in rows.values()} == {"ok"}
    assert rows["dense@math", None]["timing"]["interleaved"] and gpu.prepared.count("dense@math") == 1
    assert not rows["dash@reference", 0.3]["timing"]["interleaved"], "held when its worker ran out"


@pytest.mark.parametrize("step", ["prepare", "sample", "finish"])
def test_out_of_memory_when_alone_is_the_row(step, tmp_path, monkeypatch):
    def fails(method, at, points):
        return "oom" if method == "dash@reference" and at == step else None

    rows = CrowdedGpu(monkeypatch, fails).run(tmp_path)
    assert rows["dense@math", None]["status"] == "ok"
    sparse = [r for (method, _), r in rows.items() if method == "dash@reference"]
    assert [(r["status"], r["reason"]) for r in sparse] == 3 * [("oom", f"oom in {step}")]


def test_a_worker_that_dies_loses_no_point_but_its_own(tmp_path, monkeypatch):
    deaths = iter(["crashed"])

    def fails(method, at, points):
        return next(deaths, None) if (method, at) == ("dash@reference", "sample") else None

    rows = CrowdedGpu(monkeypatch, fails).run(tmp_path)
    assert sorted(r["status"] for r in rows.values()) == ["crashed", "ok", "ok", "ok"]


@pytest.mark.parametrize("sizes, together", [(6.9, 1), (7.1, 4)])
def test_a_group_that_does_not_fit_is_never_loaded_together(sizes, together, tmp_path, monkeypatch):
    """Every point counts, not every method: four hold what their calls allocate, two workers their inputs."""
    size = problem_bytes(load_suite(crowded_suite(tmp_path)).points()[0])
    most = []
    gpu = CrowdedGpu(monkeypatch, lambda method, at, points: most.append(points), sizes * size / GROUP_SHARE)
    rows = gpu.run(tmp_path)
    assert {r["status"] for r in rows.values()} == {"ok"}
    assert max(most) == together
