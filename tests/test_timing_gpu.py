"""The timer on a GPU: it agrees with Triton's, and with itself."""

import pytest
import torch

from dashbench.baselines.api import Operator
from dashbench.timing import Timer
from dashbench.timing_options import TimingOptions

pytestmark = pytest.mark.gpu
OPTIONS = TimingOptions(max_seconds=0.3, min_samples=20, target_half_width=0.001, rounds=3)


def product(size):
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return Operator(run=lambda: a @ b, reference=lambda rows, selected: None)


def timed(launch, *operators):
    """Interleaved slices, as the runner takes them; the results of each."""
    timers = [Timer([operator], OPTIONS, launch, "cuda") for operator in operators]
    for timer in timers:
        timer.warm_up()
    for _ in range(OPTIONS.rounds):
        for timer in timers:
            timer.sample(OPTIONS.max_seconds / OPTIONS.rounds)
    return [timer.result() for timer in timers]


def test_agrees_with_triton_on_a_matmul():
    from triton.testing import do_bench

    operator = product(8192)
    (ours,) = timed("eager", operator)
    theirs = do_bench(operator.run, warmup=100, rep=300, return_mode="median")
    (again,) = timed("eager", operator)
    assert min(abs(r["latency_ms"] / theirs - 1) for r in (ours, again)) < 0.03


@pytest.mark.parametrize("launch", ["eager", "graph"])
def test_the_same_kernel_as_two_methods_differs_less_than_its_interval(launch):
    agree = 0
    for _ in range(20):
        operator = product(4096)
        a, b = timed(launch, operator, operator)
        low, high = (
            max(a["latency_ci_ms"][0], b["latency_ci_ms"][0]),
            min(a["latency_ci_ms"][1], b["latency_ci_ms"][1]),
        )
        agree += low <= high
    assert agree >= 19


def test_graph_replay_hides_the_launch_and_eager_shows_it():
    operator = product(64)
    (eager,), (graph,) = timed("eager", operator), timed("graph", operator)
    assert graph["latency_ms"] < eager["latency_ms"]
    assert graph["timing"]["calls_a_sample"] > 10
    assert eager["host_ms"] > 0 and eager["gpu_ms"] <= eager["latency_ms"] * 1.05
