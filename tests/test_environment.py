"""What is recorded of a machine, and what keeps rows apart."""

import json

import pytest
import torch

from dashbench import environment


def test_facts_are_json_and_complete_on_a_cpu():
    facts = environment.describe("cpu")
    assert json.loads(json.dumps(facts)) == facts
    assert set(environment.KEY_FIELDS) <= set(facts)
    assert facts["kind"] == "cpu" and facts["cuda"] is None and facts["l2_bytes"] == 0
    assert facts["torch"] == torch.__version__ == facts["packages"]["torch"]
    assert facts["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("name", environment.KEY_FIELDS)
def test_other_hardware_or_software_is_another_environment(name):
    facts = environment.describe("cpu")
    assert environment.key(facts) == environment.key(dict(reversed(facts.items())))
    assert environment.key({**facts, name: "something else"}) != environment.key(facts)


@pytest.mark.parametrize("name", ["host", "git", "cpu_count", "gpu_id", "memory_bytes", "platform"])
def test_host_commit_and_board_do_not_keep_rows_apart(name):
    facts = environment.describe("cpu")
    assert environment.key({**facts, name: "something else"}) == environment.key(facts)


def test_the_commit_is_that_of_the_source_tree(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "dashbench" / "environment.py"))
    monkeypatch.setenv("DASHBENCH_COMMIT", "abc")
    assert environment.describe("cpu")["git"] == {"commit": "abc", "dirty": None}


def test_ceilings_are_the_best_of_repeated_calls(monkeypatch):
    """On a clock where a call takes 4, 2, 4, 2 … ms whatever it does, the ceiling is that of 2 ms."""
    now, calls = [0.0], [0]

    def clock():
        calls[0] += 1
        # A measured call reads the clock three times: before it, after it, and what was spent in all.
        now[0] += (2e-3, 4e-3)[calls[0] % 2]
        return now[0]

    monkeypatch.setattr(environment.time, "perf_counter", clock)
    monkeypatch.setattr(torch, "matmul", lambda a, b, out: None)
    found = environment.ceilings("cpu", seconds=0.01)
    assert found["matmul_tflops"] == pytest.approx(2 * 1024**3 / 2e-3 / 1e12, rel=0.01)
    assert found["copy_tb_per_s"] == pytest.approx(2 * 2**26 / 2e-3 / 1e12, rel=0.01)


def test_ceilings_do_not_wait_for_six_slow_calls(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(environment.time, "perf_counter", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 0.5

    assert environment._best_s(call, "cpu", 0.1) == 0.5 and len(calls) == 1


@pytest.mark.gpu
def test_facts_and_ceilings_of_a_gpu():
    facts = environment.describe("cuda")
    assert facts["l2_bytes"] > 0 and facts["driver"] and len(facts["gpu_id"]) == 8
    assert str(torch.cuda.get_device_properties(0).uuid) not in json.dumps(facts)
    found = environment.ceilings("cuda", 0.1)
    assert found["matmul_tflops"] > 50 and found["copy_tb_per_s"] > 0.3
