"""The timer on a clock that we move by hand: when it stops, what it drops, how wide its interval is."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dashbench.baselines.api import Operator, Unsupported
from dashbench.telemetry import Telemetry, throttled
from dashbench.timing import (
    Timer,
    median_half_width,
    median_ranks,
    peak_bytes,
    rotation,
    stop_reason,
    time_stages,
)
from dashbench.timing_options import TimingOptions

OPTIONS = TimingOptions(min_samples=10, max_samples=1000, max_seconds=60, warmup_seconds=0.1, rounds=3)


class World:
    """A clock, and calls that move it by what `next_ms` says."""

    def __init__(self, next_ms):
        self.now, self.calls, self.next_ms = 0.0, 0, next_ms

    def clock(self):
        return self.now

    def run(self):
        self.now += self.next_ms(self.calls) / 1e3
        self.calls += 1

    def operator(self):
        return Operator(run=self.run, reference=lambda rows, selected: None)

    def timer(self, options=OPTIONS, telemetry=None, copies=1):
        return Timer(
            [self.operator()] * copies, options, "eager", "cpu", clock=self.clock, telemetry=telemetry
        )


class Chip(Telemetry):
    """Readings as we like them instead of NVML's."""

    def __init__(self, reading):
        self.readings, self.note, self._reading = [], None, reading

    def read(self):
        self.readings.append({"power_w": 500.0, "temperature_c": 50.0, **self._reading(len(self.readings))})
        return self.readings[-1]


def finished(timer, seconds=10.0):
    timer.warm_up()
    while not timer.done():
        timer.sample(seconds)
    return timer.result()


def test_a_constant_call_is_measured_exactly_and_briefly():
    world = World(lambda i: 4.0)
    result = finished(world.timer())
    assert result["latency_ms"] == pytest.approx(4.0)
    assert result["latency_ci_ms"] == pytest.approx((4.0, 4.0))
    assert result["timing"]["stopped"] == "precise"
    assert result["timing"]["slice_samples"] == [10, 4, 4]
    assert result["gpu_ms"] is None and result["host_ms"] is None


def test_warm_up_lasts_by_time_and_at_least_two_calls():
    world = World(lambda i: 4.0)
    world.timer().warm_up()
    assert world.calls == math.ceil(0.1 / 4e-3)
    slow = World(lambda i: 900.0)
    slow.timer().warm_up()
    assert slow.calls == 2


def test_outliers_do_not_move_the_median():
    world = World(lambda i: 500.0 if i % 10 == 0 else 2.0 + 0.001 * (i % 7))
    result = finished(world.timer())
    assert result["latency_ms"] == pytest.approx(2.003, abs=0.003)
    assert max(result["samples"]) == pytest.approx(500.0)
    low, high = result["latency_ci_ms"]
    assert 1.99 < low <= result["latency_ms"] <= high < 2.02


def test_the_interval_covers_the_true_median():
    """Log-normal noise of 10 %, true median 3: the 95 % interval holds it in most of 40 runs."""
    covered, widths = 0, []
    options = OPTIONS.model_copy(update={"min_samples": 60, "max_samples": 60})
    for seed in range(40):
        noise = random.Random(seed)
        world = World(lambda i, noise=noise: 3.0 * math.exp(noise.gauss(0, 0.1)))
        timer = world.timer(options)
        for _ in range(3):
            timer.sample(0.06)
        low, high = timer.result(seed)["latency_ci_ms"]
        covered += low <= 3.0 <= high
        widths.append((high - low) / 3.0)
    assert covered >= 36
    assert sorted(widths)[20] < 0.25


def test_drift_between_slices_widens_the_interval():
    options = OPTIONS.model_copy(update={"max_samples": 90, "target_half_width": 1e-9})

    def width(drift):
        noise = random.Random(1)
        world = World(lambda i: 2.0 + noise.gauss(0, 0.01) + drift * (i // 30))
        timer = world.timer(options)
        for _ in range(3):
            timer.sample(0.06)
        low, high = timer.result()["latency_ci_ms"]
        return high - low

    assert width(0.2) > 0.2 > 5 * width(0.0)


def test_the_same_kernel_as_two_methods_agrees_within_its_interval():
    """A slow drift that both share and noise of their own: 20 pairs, interleaved as the runner does it."""
    agree = 0
    for seed in range(20):
        noise = random.Random(seed)
        shared = World(lambda i, noise=noise: 1.0)
        shared.next_ms = lambda i, noise=noise, w=shared: (
            (1 + 0.02 * math.sin(w.now)) * math.exp(noise.gauss(0, 0.02))
        )
        pair = [shared.timer(), shared.timer()]
        for timer in pair:
            timer.warm_up()
        for _ in range(OPTIONS.rounds):
            for timer in pair:
                timer.sample(0.2)
        a, b = (timer.result(seed)["latency_ci_ms"] for timer in pair)
        agree += max(a[0], b[0]) <= min(a[1], b[1])
    assert agree >= 19


def test_noise_that_does_not_narrow_is_a_plateau():
    options = OPTIONS.model_copy(update={"target_half_width": 1e-6})
    flip = [1.0, 2.0]
    assert stop_reason(flip * 8, 0.0, options) is None
    assert stop_reason(flip * 40, 0.0, options) == "plateau"


@pytest.mark.parametrize(
    ("count", "seconds", "expected"),
    [
        (9, 0.0, None),
        (9, 61.0, None),  # too few samples, and four times the budget is not spent yet
        (3, 241.0, "time"),
        (2, 1e6, None),
        (1000, 0.0, "samples"),
        (20, 60.0, "time"),
    ],
)
def test_limits(count, seconds, expected):
    noisy = [1.0 + (i * 37 % 100) for i in range(count)]
    assert stop_reason(noisy, seconds, OPTIONS) == expected


@pytest.mark.parametrize("n", [*range(6, 60), 100, 199, 200, 301, 500, 501, 900])
def test_the_order_statistic_interval_has_its_coverage(n):
    """P(low < number of samples under the median <= high) of a binomial(n, 1/2), ranks counted from zero."""
    low, high = median_ranks(n)
    assert 0 <= low < high < n
    mass = sum(math.comb(n, k) for k in range(low + 1, high + 1)) / 2**n
    assert mass >= 0.95
    if n <= 500:
        narrower = sum(math.comb(n, k) for k in range(low + 2, high)) / 2**n
        assert narrower < 0.95, "no wider than it must be"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=6, max_size=300))
def test_the_half_width_is_read_off_the_ordered_samples(samples):
    ordered = sorted(samples)
    low, high = median_ranks(len(samples))
    expected = (ordered[high] - ordered[low]) / 2 / ordered[len(samples) // 2]
    assert median_half_width(samples) == pytest.approx(expected)


def test_too_few_samples_have_no_interval():
    assert median_half_width([1.0] * 5) == math.inf


def test_samples_of_a_throttled_chip_are_dropped_and_counted():
    def reading(i):
        return {"sm_mhz": 1200.0 if i % 3 == 0 else 1980.0, "reasons": 0.0}

    world = World(lambda i: 100.0)
    world.next_ms = lambda i: 100.0 if world.calls % 2 else 101.0
    chip = Chip(reading)
    result = finished(
        world.timer(OPTIONS.model_copy(update={"min_samples": 30}), telemetry=chip), seconds=100
    )
    timing = result["timing"]
    assert timing["throttled_dropped"] >= 10
    assert timing["throttled_kept"] == 0
    assert len(result["samples"]) == sum(timing["slice_samples"])
    assert result["telemetry"]["sm_mhz"] == [1200.0, 1980.0, 1980.0]


def test_throttling_never_empties_a_row():
    world = World(lambda i: 100.0)
    chip = Chip(lambda i: {"sm_mhz": 1980.0, "reasons": float(0x40)})
    result = finished(world.timer(telemetry=chip))
    assert len(result["samples"]) >= OPTIONS.min_samples
    assert result["timing"]["throttled_dropped"] == 0
    assert result["timing"]["throttled_kept"] == len(result["samples"])


@pytest.mark.parametrize(
    ("mhz", "reasons", "expected"),
    [(1980, 0, False), (1980, 0x4, False), (1500, 0, False), (1480, 0, True)]
    + [(1980, bit, True) for bit in (0x8, 0x20, 0x40, 0x80)],
)
def test_what_counts_as_throttled(mhz, reasons, expected):
    assert throttled({"sm_mhz": float(mhz), "reasons": float(reasons)}, 1980.0) is expected


def test_missing_nvml_costs_only_the_telemetry(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pynvml", None)
    chip = Telemetry()
    assert chip.read() is None
    assert chip.summary()["note"].startswith("no NVML")


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**9), st.floats(0.01, 1), st.integers(10**6, 10**8))
def test_what_rotating_copies_touch_exceeds_twice_the_cache(one, share, cache):
    touched = one * share
    copies = rotation(one, touched, cache, "cold", 10**15)
    assert copies * touched > 2 * cache or copies == 512
    assert rotation(one, touched, cache, "warm", 10**15) == 1
    assert rotation(one, touched, 0, "cold", 10**15) == 1
    assert rotation(one, touched, cache, "cold", 3 * one) <= 3


def test_calls_rotate_through_the_copies():
    seen = []
    operators = [
        Operator(run=lambda i=i: seen.append(i), reference=lambda rows, selected: None) for i in range(3)
    ]
    timer = Timer(operators, OPTIONS, "eager", "cpu")
    timer.sample(0.001)
    assert seen[:7] == [0, 1, 2, 0, 1, 2, 0]


def test_a_graph_needs_a_gpu():
    with pytest.raises(Unsupported, match="graphs need a GPU"):
        Timer([World(lambda i: 1.0).operator()], OPTIONS, "graph", "cpu")


def test_a_result_needs_samples():
    with pytest.raises(ValueError, match="no samples"):
        World(lambda i: 1.0).timer().result()


def test_stages_are_timed_only_where_there_are_several():
    operator = World(lambda i: 1.0).operator()
    operator.stages = {"attend": lambda: None}
    assert time_stages(operator, "cpu") == {}
    operator.stages = {"route": lambda: sum(range(20000)), "attend": lambda: None}
    stages = time_stages(operator, "cpu", 0.01)
    assert stages["route"] > 10 * stages["attend"] > 0
    assert peak_bytes(lambda: None, "cpu") is None
