"""The timer on a GPU: it agrees with Triton's, and with itself."""

import pytest
import torch

from dashbench.baselines.api import Operator
from dashbench.timing import MAX_CALLS_IN_GRAPH, Timer, rotation
from dashbench.timing_options import TimingOptions

pytestmark = pytest.mark.gpu
OPTIONS = TimingOptions(max_seconds=0.3, min_samples=20, target_half_width=0.001, rounds=3)


def product(size, make=torch.randn):
    a, b = (make(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
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
    """Zeros keep the chip below its power cap. With random data the clock follows the load, and Triton's
    load, a flush of the cache between calls, is lighter than ours: the chips would differ, not the timers.
    """
    from triton.testing import do_bench

    operator = product(8192, torch.zeros)
    ours, theirs = [], []
    for _ in range(3):
        ours.append(timed("eager", operator)[0]["latency_ms"])
        theirs.append(do_bench(operator.run, warmup=50, rep=200, return_mode="median"))
    assert abs(sorted(ours)[1] / sorted(theirs)[1] - 1) < 0.03


@pytest.mark.parametrize(("launch", "size"), [("eager", 4096), ("graph", 4096), ("graph", 512)])
def test_the_same_kernel_as_two_methods_differs_less_than_its_interval(launch, size):
    agree = 0
    for _ in range(20):
        operator = product(size)
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
    # A replay is long enough to hide itself: half a millisecond, or as many calls as a graph may hold.
    replay_ms = graph["latency_ms"] * graph["timing"]["calls_a_sample"]
    assert replay_ms > 0.4 or graph["timing"]["calls_a_sample"] == MAX_CALLS_IN_GRAPH
    assert eager["host_ms"] > 0 and eager["gpu_ms"] <= eager["latency_ms"] * 1.05


def test_cold_inputs_take_longer_than_warm_ones():
    """A copy within the cache's size: warm it runs at the speed of the cache, cold at that of the memory."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    half = cache // 5

    def copy():
        source, target = (torch.zeros(half, dtype=torch.uint8, device="cuda") for _ in range(2))
        return Operator(run=lambda: target.copy_(source), reference=lambda rows, selected: None)

    copies = rotation(2 * half, 2 * half, cache, "cold", 10**12)
    times = []
    for operators in ([copy()], [copy() for _ in range(copies)]):
        timer = Timer(operators, OPTIONS, "graph", "cuda")
        timer.warm_up()
        timer.sample(0.1)
        times.append(timer.result()["latency_ms"])
    warm, cold = times
    assert cold > 1.2 * warm


def test_a_replay_that_writes_nothing_cannot_pass():
    """The gate sees a poisoned output unless the replay fills it."""
    operator = product(256)
    timer = Timer([operator], OPTIONS, "graph", "cuda")
    replayed = timer.replayed().run()
    torch.cuda.synchronize()
    assert torch.equal(replayed, operator.run())
    timer._graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(timer._graph):
        torch.zeros(1, device="cuda").add_(1)
    assert timer.replayed().run().isnan().all()


@pytest.mark.parametrize(
    ("routing", "phase"), [("topics", "prefill"), ("topics", "decode"), ("uniform", "prefill")]
)
def test_inputs_of_the_largest_point_are_drawn_in_two_seconds(routing, phase):
    from time import perf_counter

    from dashbench.inputs import make_problem
    from dashbench.rows import Point, Shape

    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("256k tokens at batch 8 need 20 GB of inputs")
    asked = Point(
        method="m",
        phase=phase,
        context=262144,
        batch=8,
        dtype="bfloat16",
        routing=routing,
        cache="warm",
        launch="eager",
        shape=Shape(name="minicpm4-8b", query_heads=32, kv_heads=2, head_dim=128),
    )
    problem, _ = make_problem(asked, "cuda")  # memory is asked of the driver once; that is not the drawing
    torch.cuda.synchronize()
    times = []
    for _ in range(3):  # the best: other processes may share the machine
        problem = None
        began = perf_counter()
        problem, _ = make_problem(asked, "cuda")
        torch.cuda.synchronize()
        times.append(perf_counter() - began)
    assert min(times) < 2  # on a quiet host: 2.0 to 4.2 beside compilers and other tests
    assert problem.key.isfinite().all()
