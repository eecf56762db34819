"""The one timer. What it measures, in words:

* `graph`: calls are captured into a CUDA graph that lasts long enough to make event resolution and launch
  negligible; a sample is one replay divided by its calls. This is time on the GPU, back to back.
* `eager`: a sample is the time between CUDA events around one call issued from Python, so a call shorter
  than its own launch shows the launch. Beside it `host_ms` (Python and driver time of the call) and `gpu_ms`
  (the same call queued behind a blocking kernel, launches hidden).
* `cold`: calls rotate through copies of the inputs, of which the calls together read and write more than
  twice the L2 cache. `warm`: always the same inputs.
* On a CPU a sample is `perf_counter` around one call.

Sampling comes in slices so that a runner can let several methods take turns, and stops by itself: when the
interval of the median is narrow enough, when more samples no longer narrow it (a plateau), or when time is
up; never below a minimum of samples. Samples taken while the chip reports a thermal slowdown or a power
brake, or while its clock is under three quarters of the highest seen, are dropped, unless too few would be
left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from dashbench.analysis.statistics import percentile_interval, resampled_medians
from dashbench.baselines.api import Operator, Unsupported
from dashbench.telemetry import Telemetry, throttled
from dashbench.timing_options import TimingOptions

TIMER_VERSION = 1
# One replay of a captured graph lasts at least this long.
REPLAY_MS = 0.5
MAX_CALLS_IN_GRAPH = 256
# More copies than this are not made: inputs so small that these do not fill the cache are reported as such.
MAX_COPIES = 512
# Calls queued between two synchronisations: fewer than the driver's launch queue holds, or enqueueing blocks.
MAX_QUEUED = 128
PLATEAU_GAIN = 0.9
# NVML answers slowly; the chip's temperature changes slowly too.
TELEMETRY_EVERY_S = 0.05
# Resolution of CUDA events (CUDA runtime API: about half a microsecond).
EVENT_RESOLUTION_MS = 5e-4
# Calls timed behind one blocking kernel, and calls for which hiding the launch is not worth it.
HIDDEN_CALLS = 20
LONG_CALL_MS = 5.0


def rotation(bytes_of_one: int, touched_bytes: float, cache_bytes: int, cache: str, spare_bytes: int) -> int:
    """Copies of the inputs to rotate through.

    Args:
        bytes_of_one: inputs and output of one call, in memory.
        touched_bytes: what a call reads and writes of them; a sparse method's decode step leaves most of its
            cache alone, and so little would still be in L2 a turn later.
        cache_bytes: L2 size.
        cache: `cold` or `warm`.
        spare_bytes: memory that copies may take.

    Returns:
        1 when warm, or when one call alone sweeps the cache many times over; else enough to touch more than
        twice the cache, as far as memory and `MAX_COPIES` allow.
    """
    if cache == "warm" or cache_bytes == 0 or touched_bytes > 16 * cache_bytes:
        return 1
    wanted = math.ceil(2 * cache_bytes / max(touched_bytes, 1)) + 1
    return max(1, min(wanted, MAX_COPIES, spare_bytes // max(bytes_of_one, 1)))


@cache
def median_ranks(n: int) -> tuple[int, int]:
    """Ranks, from zero, of the ordered samples between which the median lies with at least 95 % confidence,
    n ≥ 6.

    The number of samples under the true median is binomial(n, 1/2). Exact up to 500 samples; beyond, the
    normal approximation errs by less than a rank.
    """
    if n > 500:
        reach = 0.98 * math.sqrt(n) + 1
        return math.floor(n / 2 - reach), min(n - 1, math.ceil(n / 2 + reach))
    rank, term = 0, 0.5**n
    below = term
    while below < 0.025:
        rank += 1
        term *= (n - rank + 1) / rank
        below += term
    return rank - 1, n - rank


def median_half_width(samples: Sequence[float]) -> float:
    """Relative half-width of the 95 % order-statistic interval of the median; infinite below 6 samples,
    where no pair of ranks covers 95 %."""
    n = len(samples)
    if n < 6:
        return math.inf
    ordered = sorted(samples)
    low, high = median_ranks(n)
    middle = ordered[n // 2]
    return (ordered[high] - ordered[low]) / 2 / middle if middle > 0 else 0.0


def stop_reason(samples: Sequence[float], seconds: float, options: TimingOptions) -> str | None:
    """Why sampling may stop now, or None.

    Args:
        samples: ms, in the order taken.
        seconds: spent sampling.
        options: of the suite.

    Returns:
        `precise`, `plateau`, `samples`, `time`, or None. A plateau means that the last doubling of the
        samples narrowed the interval by less than a tenth (it would by 30 % if they were independent).
    """
    n = len(samples)
    if n < options.min_samples:
        # A call so long that even the minimum is unaffordable stops at three samples.
        return "time" if n >= 3 and seconds > 4 * options.max_seconds else None
    if n >= options.max_samples:
        return "samples"
    if seconds >= options.max_seconds:
        return "time"
    width = median_half_width(samples)
    if width <= options.target_half_width:
        return "precise"
    if n >= 8 * options.min_samples and width > PLATEAU_GAIN * median_half_width(samples[: n // 2]):
        return "plateau"
    return None


class Timer:
    """Times one prepared point; see the module's docstring.

    Args:
        operators: prepared copies of the same operator on copies of the same inputs (one if warm).
        options: of the suite.
        launch: `eager` or `graph`.
        device: `cpu` or `cuda`.
        clock: seconds, for the time budget and, on a CPU, for the samples.
        telemetry: reads the chip; by default NVML on a GPU, nothing on a CPU.

    Raises:
        Unsupported: `graph` on a CPU, or an operator that cannot be captured.
    """

    def __init__(
        self,
        operators: Sequence[Operator],
        options: TimingOptions,
        launch: str,
        device: str,
        clock: Callable[[], float] = time.perf_counter,
        telemetry: Telemetry | None = None,
    ):
        self.operators = list(operators)
        self.options = options
        self.launch = launch
        self.device = device
        self.samples: list[float] = []
        self.host: list[float] = []
        self.seconds = 0.0
        self.slice_samples: list[int] = []
        self.calls = 1
        self.telemetry = telemetry or (Telemetry(torch.cuda.current_device()) if device == "cuda" else None)
        self._clock = clock
        # Of every sample the latest reading of the chip (an index; −1: none).
        self._reading: list[int] = []
        self._read_at = -math.inf
        self._next = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static: torch.Tensor | None = None
        if launch == "graph":
            if device != "cuda":
                raise Unsupported("CUDA graphs need a GPU")
            self._capture()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for operator in self.operators:
                operator.run()
        torch.cuda.current_stream().wait_stream(stream)
        copies = self.calls = len(self.operators)
        self._record()
        # The graph is asked how long a call lasts, not an eager call, which may be all launch; and asked
        # again
        # once it is longer, because a short replay is mostly launch too.
        for _ in range(3):
            wanted = math.ceil(self.calls / copies * REPLAY_MS / max(self._replay_ms(), 1e-3))
            rounds = min(wanted, max(1, MAX_CALLS_IN_GRAPH // copies))
            if rounds * copies <= self.calls:
                break
            self.calls = rounds * copies
            self._graph = self._static = None
            self._record()

    def _replay_ms(self) -> float:
        for _ in range(2):  # the first replay uploads the graph
            ((begin, end),) = _events(1)
            begin.record()
            self._graph.replay()
            end.record()
            torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def _record(self) -> None:
        """Captures `self.calls` calls, through the copies in turn, and keeps the output of the first."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in range(self.calls):
                    output = self.operators[call % len(self.operators)].run()
                    if call == 0:
                        self._static = output
        except RuntimeError as problem:
            if "out of memory" in str(problem):
                raise
            raise Unsupported(f"cannot be captured in a CUDA graph: {str(problem).splitlines()[0]}") from None
        self._graph = graph
        torch.cuda.synchronize()

    def replayed(self) -> Operator:
        """The first operator with `run` going through the captured graph, for the gate.

        The output is poisoned first: a replay that writes nothing must not pass with what the capture left.
        """
        if self._graph is None:
            return self.operators[0]

        def run() -> torch.Tensor:
            with torch.no_grad():
                self._static.detach().fill_(math.nan)
            self._graph.replay()
            return self._static

        return replace(self.operators[0], run=run)

    def _call(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self.operators[self._next].run()
            self._next = (self._next + 1) % len(self.operators)

    def warm_up(self) -> None:
        """Runs untimed by time, at least twice and through all copies, so that clocks and caches settle."""
        until = self._clock() + self.options.warmup_seconds
        done, least = 0, 2 if self._graph is not None else max(2, len(self.operators))
        while done < least or self._clock() < until:
            self._call()
            done += 1
            if self.device == "cuda":
                torch.cuda.synchronize()

    def sample(self, seconds: float) -> int:
        """Takes samples for about this long (at least one); returns how many there are now.

        Ends early when this slice has its share of the fewest samples and all samples together are precise
        enough.
        """
        begin = self._clock()
        first = len(self.samples)
        share = math.ceil(self.options.min_samples / self.options.rounds)
        while True:
            before = len(self.samples)
            if self.device == "cuda":
                self._burst(seconds - (self._clock() - begin))
            else:
                started = self._clock()
                self._call()
                self.samples.append(1e3 * (self._clock() - started))
                self._look()
            latest = len(self.telemetry.readings) - 1 if self.telemetry else -1
            self._reading += [latest] * (len(self.samples) - before)
            elapsed = self._clock() - begin
            fair = len(self.samples) - first >= share
            if elapsed >= seconds or (
                fair and stop_reason(self.samples, self.seconds + elapsed, self.options)
            ):
                break
        self.slice_samples.append(len(self.samples) - first)
        self.seconds += self._clock() - begin
        return len(self.samples)

    def _look(self) -> None:
        """Reads the chip, if the last reading is old."""
        if self.telemetry and self._clock() - self._read_at >= TELEMETRY_EVERY_S:
            self.telemetry.read()
            self._read_at = self._clock()

    def _burst(self, seconds: float) -> None:
        """Queues as many calls between events as should fit the time left, then synchronises once."""
        typical = self.samples[-1] * self.calls if self.samples else None
        count = 1 if typical is None else int(1e3 * seconds / max(typical, 1e-3))
        # No slice takes more than its share of the most samples, or the first would leave none to the others.
        share = math.ceil(self.options.max_samples / self.options.rounds)
        count = max(1, min(count, MAX_QUEUED, share))
        events = _events(count)
        for begin, end in events:
            begin.record()
            started = time.perf_counter()
            self._call()
            self.host.append(1e3 * (time.perf_counter() - started))
            end.record()
        # Now, while the GPU is at work: an idle chip shows an idle clock.
        self._look()
        torch.cuda.synchronize()
        self.samples += [begin.elapsed_time(end) / self.calls for begin, end in events]

    def done(self) -> str | None:
        """Why sampling may stop, or None.

        Never before every round has had its slice, so that drift between slices shows in the interval.
        """
        if len(self.slice_samples) < self.options.rounds:
            return None
        return stop_reason(self.samples, self.seconds, self.options)

    def gpu_ms(self, latency: float) -> float:
        """GPU time (ms) of a call in a row of them, their launches hidden behind a blocking kernel.

        Args:
            latency: ms of a call with its launch; long calls hide their own launch and this is returned.
        """
        if latency > LONG_CALL_MS:
            return latency
        queue_ms = 1.5 * HIDDEN_CALLS * float(np.median(self.host)) + 0.5
        times = []
        for _ in range(3):
            ((begin, end),) = _events(1)
            torch.cuda._sleep(int(queue_ms * 2e6))  # cycles, at about 2 GHz
            begin.record()
            for _ in range(HIDDEN_CALLS):
                self._call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / HIDDEN_CALLS)
        return float(np.median(times))

    def result(self, seed: int = 0) -> dict[str, Any]:
        """The time fields of a row.

        Args:
            seed: of the bootstrap.

        Raises:
            ValueError: nothing was sampled.
        """
        if not self.samples:
            raise ValueError("no samples: sample() before result()")
        readings = self.telemetry.readings if self.telemetry else []
        fastest = max((r["sm_mhz"] for r in readings), default=0.0)
        bad = [i >= 0 and throttled(readings[i], fastest) for i in self._reading]
        dropped = sum(bad)
        emptied = dropped > 0 and len(bad) - dropped < self.options.min_samples
        keep = [emptied or not b for b in bad]
        samples = [s for s, k in zip(self.samples, keep, strict=True) if k]
        ends = accumulate(self.slice_samples, initial=0)
        slices = [sum(keep[a:b]) for a, b in pairwise(ends)]
        latency = float(np.median(samples))
        interval = percentile_interval(resampled_medians(samples, seed, slices), latency)
        on_gpu = self.device == "cuda"
        eager = self.launch == "eager" and on_gpu
        resolution = EVENT_RESOLUTION_MS / self.calls if on_gpu else 0.0
        return {
            "latency_ms": latency,
            "latency_ci_ms": (
                min(interval.low, latency - resolution),
                max(interval.high, latency + resolution),
            ),
            "gpu_ms": self.gpu_ms(latency) if eager else None,
            "host_ms": float(np.median(self.host)) if eager else None,
            "samples": [float(f"{s:.6g}") for s in samples],
            "timing": {
                "timer": TIMER_VERSION,
                "stopped": self.done() or "slices",
                "half_width": _finite(median_half_width(samples)),
                "seconds": round(self.seconds, 4),
                "slice_samples": slices,
                "copies": len(self.operators),
                "calls_a_sample": self.calls,
                "throttled_dropped": 0 if emptied else dropped,
                "throttled_kept": dropped if emptied else 0,
            },
            "telemetry": self.telemetry.summary() if self.telemetry else {},
        }


def time_stages(operator: Operator, device: str, seconds: float = 0.05) -> dict[str, float]:
    """Median ms of each stage alone, its inputs prepared and warm, on a GPU with its launch hidden.

    Nothing for an operator that is a single stage: its time is the latency.
    """
    out: dict[str, float] = {}
    if len(operator.stages) < 2:
        return out
    options = TimingOptions(warmup_seconds=seconds / 5, min_samples=5, max_samples=200, max_seconds=seconds)
    for name, stage in operator.stages.items():
        timer = Timer([replace(operator, run=stage)], options, "eager", device)
        timer.warm_up()
        timer.sample(seconds)
        latency = float(np.median(timer.samples))
        out[name] = timer.gpu_ms(latency) if device == "cuda" else latency
    return out


def peak_bytes(run: Callable[[], object], device: str) -> int | None:
    """Peak device memory of one call beyond what was allocated before it; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _events(count: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    return [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
    ]


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
