"""The plan: what is skipped and why, without running it."""

import pytest

from dashbench import doctor
from dashbench.cost import estimate_ms
from dashbench.plan import OVERHEAD_S, plan, reachable_sparsity, skip_reason
from dashbench.rows import Point
from dashbench.shapes import SHAPES
from dashbench.timing_options import TimingOptions

CPU = {"kind": "cpu", "device": "cpu", "capability": None, "memory_bytes": None}
HOPPER = {"kind": "cuda", "device": "H200", "capability": [9, 0], "memory_bytes": 140 * 2**30}
AMPERE = {**HOPPER, "capability": [8, 0]}


def point(**changes):
    fields = {
        "method": "dense@math", "phase": "prefill", "context": 1024, "batch": 1, "dtype": "bfloat16",
        "shape": SHAPES["minicpm4-8b"][0], "routing": "topics", "cache": "cold", "launch": "eager",
    }  # fmt: skip
    return Point(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, HOPPER, None),
        ({}, None, None),
        ({"method": "fa3", "phase": "train"}, HOPPER, "fa3 has no train"),
        ({"method": "fa3", "dtype": "float32"}, HOPPER, "fa3 does not take float32"),
        ({"method": "dense@cudnn"}, CPU, "needs a GPU"),
        ({"launch": "graph"}, CPU, "CUDA graphs need a GPU"),
        ({"method": "fa3"}, AMPERE, "needs compute capability 9.0, this GPU has 8.0"),
        # 32 heads x 65536^2 scores of 4 bytes, three times over
        ({"context": 65536}, HOPPER, "its scores would take 1536 GiB"),
        ({"context": 65536, "phase": "decode"}, HOPPER, None),
        (
            {"method": "dash@reference", "context": 256, "sparsity_target": 0.9},
            HOPPER,
            "s_flop 0.9 is out of reach: keeping only the own block of 64 gives 0.747",
        ),
        ({"method": "dash@reference", "context": 256, "sparsity_target": 0.75}, HOPPER, None),
    ],
)
def test_reasons(changes, device, reason):
    assert skip_reason(point(**changes), device, own_interpreter=True) == reason


def test_a_missing_package_names_its_command_unless_another_python_has_it(monkeypatch):
    monkeypatch.setattr("dashbench.plan.importlib.util.find_spec", lambda name: None)
    reason = skip_reason(point(method="fa3"), HOPPER)
    assert reason == "not installed; pip install 'fa3-fwd==0.0.3' enables it"
    assert skip_reason(point(method="fa3"), HOPPER, own_interpreter=True) is None


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize(("context", "block"), [(1, 16), (15, 16), (16, 16), (17, 16), (100, 16), (256, 64)])
def test_reachable_sparsity_is_the_count_of_own_blocks(phase, context, block):
    queries = [context - 1] if phase == "decode" else range(context)
    kept, causal = sum(i % block + 1 for i in queries), sum(i + 1 for i in queries)
    found = reachable_sparsity(point(context=context, block_size=block, phase=phase))
    assert found == pytest.approx(1 - kept / causal, abs=1e-12)


def test_skipped_points_cost_nothing_and_longer_calls_cost_more():
    grid = [point(launch="graph"), point(), point(context=16384)]
    skipped, short, long = plan(grid, TimingOptions(), CPU, {})
    assert skipped.seconds == 0 and skipped.skip
    assert 0 < short.seconds < long.seconds


def test_calls_too_long_for_the_fewest_samples_are_planned_with_three():
    options = TimingOptions(min_samples=50, max_seconds=0.25)
    (long,) = plan([point(context=262144, method="fa3")], options, HOPPER, {"fa3": "python"})
    call = estimate_ms(long.point, HOPPER) / 1e3
    assert call > 1 and long.seconds == pytest.approx(OVERHEAD_S + (3 + 6) * call)
    impatient = options.model_copy(update={"timeout_seconds": 1})
    (given_up,) = plan([long.point], impatient, HOPPER, {"fa3": "python"})
    assert given_up.seconds == OVERHEAD_S + 1


@pytest.mark.parametrize(
    "variables", [{"DASHBENCH_DEVICE": "cpu"}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}]
)
def test_the_plan_judges_by_the_device_that_workers_take(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr("pynvml.nvmlInit", lambda: asked.append(1))
    doctor.device_facts.cache_clear()
    try:
        assert doctor.device_facts()["kind"] == "cpu" and not asked
    finally:
        doctor.device_facts.cache_clear()


def test_the_gpu_that_is_visible_is_the_one_described(monkeypatch):
    chosen = []
    for name, value in {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: chosen.append(index),
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        "nvmlSystemGetDriverVersion": lambda: "1",
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
        "nvmlDeviceGetMemoryInfo": lambda handle: type("M", (), {"total": 1})(),
        "nvmlDeviceGetCount": lambda: 8,
    }.items():
        monkeypatch.setattr(f"pynvml.{name}", value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    monkeypatch.delenv("DASHBENCH_DEVICE", raising=False)
    doctor.device_facts.cache_clear()
    try:
        assert doctor.device_facts()["capability"] == [9, 0] and chosen == [3]
    finally:
        doctor.device_facts.cache_clear()
