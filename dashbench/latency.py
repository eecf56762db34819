"""Runs a suite of kind `latency`: a model reads a prompt and continues it, timed as its user would see it.

Time to first token: from the prompt's tokens on the device to the first new token on the host. Time between
tokens: from one token on the host to the next (`eager`), or of one step captured as a CUDA graph and replayed
where it stands (`graph`), which hides the launches. Random weights do not route like trained ones: with
`planted` routing every layer's attention sees planted queries and keys of the asked sparsity in place of the
model's own, all else is computed as always; the text that comes out is meaningless.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from dashbench.find_knob import find_knob
from dashbench.models.kinds import KNOBS, CheckpointError
from dashbench.plan import Planned
from dashbench.rows_latency import LatencyPoint, LatencyRow
from dashbench.runner import DONE, Event, Summary
from dashbench.store import Store, stored_rows
from dashbench.suite import Suite
from dashbench.tasks.documents import TaskSkipped

ENOUGH_MS = 20_000.0
"""Readings of a prompt that took so long together are not followed by another."""
SHORT_MS, MOST_READINGS = 1_000.0, 10
"""A short prompt, whose time is the host's, is read on until its readings took so long, or so many times."""

KERNEL_METHODS = {"dense": ("fa3", "dense@cudnn", "dense@flash"), "dash": ("dash",), "nsa": ("nsa",),
                  "infllmv2": ("infllmv2",)}  # fmt: skip


def plan_suite(suite: Suite, points: list[LatencyPoint], device: dict[str, Any]) -> list[Planned]:
    """Every point, at about the 8B model's time on a large GPU."""
    planned = []
    for point in points:
        skip = "CUDA graphs need a GPU" if point.launch == "graph" and device.get("kind") == "cpu" else None
        reading = point.batch * point.context * 2e-5
        timed = min(point.repeats, 1 + int(ENOUGH_MS / 1e3 / reading))
        seconds = 2 + (1 + timed) * reading * (point.launch == "eager")
        planned.append(Planned(point, skip, 0.0 if skip else seconds))
    return planned


@dataclass
class _Reading:
    """A prompt that was read, and where its continuation stands.

    Attributes:
        times: ms of each timed reading.
        found: sparsity of the prompt's queries.
        before: bytes allocated when it began, on a GPU.
        sequences, token: what holds the prompt and the steps so far, and the last token.
    """

    times: list[float]
    found: dict[str, Any]
    before: int | None
    sequences: Any
    token: Any


class Bench:
    """One loaded model and its measurements."""

    def __init__(self, suite: Suite, store: Store, emit: Callable[[Event], None]):
        import torch

        from dashbench import environment

        self.suite, self.store, self.emit = suite, store, emit
        self.summary = Summary(store.path)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.environment = environment.describe(self.device)
        self.environment_key = environment.key(self.environment)
        self.loaded: tuple | None = None
        self.model: Any = None
        self.planted_for: tuple | None = None
        # Of the setting at work. The launch of the steps does not change how a prompt is read: the second
        # launch goes on behind the first one's steps.
        self.reading: _Reading | None = None
        folder = suite.spec.kernel_rows
        self.kernel_rows = kernel_rows(Path(folder), self.environment_key) if folder else []

    def load(self, point: LatencyPoint) -> None:
        """The model of a point, kept until another one is asked for."""
        wanted = point.checkpoint, point.attention, point.preset
        if self.loaded == wanted:
            return
        import torch

        from dashbench.models.checkpoint import load

        self.loaded = self.model = self.planted_for = None
        if self.device == "cuda":
            torch.cuda.empty_cache()
        options = {"preset": point.preset, "device": self.device, "seed": point.seed}
        self.model = load(point.checkpoint, point.attention, **options)
        self.defaults = dict(self.model.dashbench.settings)
        self.loaded = wanted

    def settle(self, point: LatencyPoint) -> dict[str, Any]:
        """Plants the routing and finds the knob; returns the knobs in force.

        Raises:
            TaskSkipped: the sparsity cannot be reached.
        """
        state = self.model.dashbench
        for key in point.knobs:
            if key not in self.defaults:
                raise CheckpointError(f"{state.kind} attention has no setting {key!r}")
        state.settings.clear()
        state.settings.update({**self.defaults, **point.knobs})
        wanted = point.context, point.batch, point.new_tokens, point.routing, point.seed
        if self.planted_for != wanted:
            state.planted = None
            if point.routing == "planted":
                state.planted = planted_states(self.model, point)
            self.planted_for = wanted
        knobs = dict(point.knobs)
        if point.sparsity_target is not None:
            knobs |= self.calibrate(point)
            state.settings.update(knobs)
        return knobs

    def calibrate(self, point: LatencyPoint) -> dict[str, Any]:
        """The knob at which one layer over the prompt has the sparsity asked for.

        Raises:
            TaskSkipped: see `find_knob`; or the routing is the model's own.
        """
        state = self.model.dashbench
        knob, target = KNOBS[state.kind], point.sparsity_target
        if state.planted is None:
            raise TaskSkipped("a sparsity is calibrated on planted routing; with the model's own give a knob")

        def measure(value: float) -> float:
            state.settings[knob] = value
            return layer_sparsity(self.model, point.context)

        most = point.context // state.block_size + 1
        return {knob: find_knob(measure, knob, most, target, point.sparsity_tolerance)}

    def measure(self, point: LatencyPoint) -> dict[str, Any]:
        """Row fields of one point."""
        import torch

        from dashbench.models.generate import rows_at_once

        model, cuda = self.model, self.device == "cuda"
        if self.reading is None:
            self.reading = self.read(point)
        reading = self.reading
        times, found = reading.times, reading.found
        if point.launch == "graph":
            between = _graph_steps(model, reading.sequences, reading.token, point.new_tokens)
        else:
            between, reading.token = _eager_steps(
                model, reading.sequences, reading.token, point.new_tokens, cuda
            )
        fields = {
            "ttft_ms": statistics.median(times), "ttft_samples": times,
            "itl_ms": statistics.median(between), "itl_samples": between,
            "itl_p90_ms": _quantile(between, 0.9), "itl_p99_ms": _quantile(between, 0.99),
            "tokens_per_s": 1e3 * point.batch / statistics.median(between),
            "s_flop": found["s_flop"], "s_mean": found["s_mean"], "s_up": found["s_up"],
            "peak_bytes": torch.cuda.max_memory_allocated() - reading.before if cuda else None,
            "layers": model.config.num_hidden_layers,
            "rows_at_once": rows_at_once(point.batch, point.context),
        }  # fmt: skip
        return fields | self.predictions(point, fields)

    def read(self, point: LatencyPoint) -> _Reading:
        """Reads the prompt a first time, which warms up and counts, then for its time."""
        import torch

        from dashbench.models.generate import new_sequences, read

        model, cuda = self.model, self.device == "cuda"
        generator = torch.Generator().manual_seed(point.seed)
        shape = point.batch, point.context
        prompt = torch.randint(3, min(256, model.config.vocab_size), shape, generator=generator)
        prompt = prompt.to(self.device)
        before = None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        # Behind the eager steps a captured one has a place of its own.
        capacity = point.context + point.new_tokens + 1
        times: list[float] = []
        found: dict[str, Any] = {}
        sequences = token = None
        for number in range(1 + max(point.repeats, MOST_READINGS)):
            sequences = None
            sequences = new_sequences(model, point.batch, capacity)
            sequences.counting = number == 0
            began = _now(cuda)
            token = read(model, prompt, sequences).argmax(-1, keepdim=True)
            token.tolist()
            if number:
                times.append(1e3 * (_now(cuda) - began))
            else:
                found = sequences.ledger.summary()["prefill"]
            if sum(times) > ENOUGH_MS:
                break
            if number >= point.repeats and sum(times) > SHORT_MS:
                break
        sequences.counting = False
        return _Reading(times, found, before, sequences, token)

    def predictions(self, point: LatencyPoint, fields: dict[str, Any]) -> dict[str, Any]:
        """What the kernel rows say that attention takes, and what is left."""
        told: dict[str, Any] = {}
        for phase, name in (("prefill", "ttft"), ("decode", "itl")):
            times = [
                r["latency_ms"]
                for r in self.kernel_rows
                if r["method"] in KERNEL_METHODS[point.attention] and r["phase"] == phase
                and (r["context"], r["batch"]) == (point.context, point.batch) and r["launch"] == "graph"
                and not r["routing_options"] and r["routing"] == "topics"
                and (point.attention == "dense" or abs(r["s_flop"] - fields["s_flop"]) < 0.02)
            ]  # fmt: skip
            if times:
                predicted = fields["layers"] * min(times)
                told[f"predicted_{name}_ms"] = predicted
                told[f"unexplained_{name}_ms"] = fields[f"{name}_ms"] - predicted
        return told

    def write(self, point: LatencyPoint, began: float, status: str, reason: str | None = None, **fields):
        """Stores a row and shows it."""
        state = self.model.dashbench if self.model is not None else None
        row = LatencyRow(
            key=point.key(), method=point.attention, label=point.label, checkpoint=point.checkpoint,
            attention=point.attention, settings=dict(state.settings) if state else {}, routing=point.routing,
            context=point.context, batch=point.batch, launch=point.launch, seed=point.seed,
            sparsity_target=point.sparsity_target, suite=self.suite.id, status=status, reason=reason,
            notes={"dense_backend": state.backend} if state and state.backend else {},
            environment=self.environment, environment_key=self.environment_key,
            timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_s=round(time.monotonic() - began, 3), **{"knob": point.knobs, **fields},
        )  # fmt: skip
        self.store.append(row)
        self.summary.counts[status] = self.summary.counts.get(status, 0) + 1
        self.emit(Event("row", text=row_line(row), row=row.model_dump(mode="json"), seconds=row.wall_s))


def kernel_rows(folder: Path, environment_key: str) -> list[dict[str, Any]]:
    """Measured kernel rows of this environment in a folder."""
    ok = [r for r in stored_rows(folder) if r.get("kind") == "kernel" and r["status"] == "ok"]
    return [r for r in ok if r["environment_key"] == environment_key]


def planted_states(model: Any, point: LatencyPoint) -> tuple[Any, Any]:
    """Queries and keys of planted topics, for the prompt and every token after it."""
    from dashbench.inputs import make_problem
    from dashbench.rows import Point, Shape

    config, block = model.config, model.dashbench.block_size
    heads = config.num_attention_heads, config.num_key_value_heads
    shape = Shape(name="model", query_heads=heads[0], kv_heads=heads[1], head_dim=config.head_dim)
    length = -(-(point.context + point.new_tokens + 1) // block) * block
    asked = Point(
        method="dash", phase="prefill", context=length, batch=point.batch, shape=shape,
        dtype=str(model.dtype).removeprefix("torch."), routing="topics", cache="warm", launch="eager",
        block_size=block, seed=point.seed,
    )  # fmt: skip
    problem, _ = make_problem(asked, str(model.device))
    return problem.query, problem.key


def layer_sparsity(model: Any, context: int) -> float:
    """s_flop of the first layer's attention over the planted states."""
    import torch

    from dashbench.models.attention import _whole

    state, attention = model.dashbench, model.model.layers[0].self_attn
    query, key = (x[:, :, :context] for x in state.planted)
    with torch.no_grad():
        _, active = _whole(attention, state, query, key, key)
    place = torch.arange(context, device=active.device)
    kept = ((active - 1) * state.block_size + place % state.block_size + 1).double()
    return 1 - float(kept.sum() / (place + 1).double().sum()) / (kept.shape[0] * kept.shape[1])


def _now(cuda: bool) -> float:
    if cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def _quantile(samples: list[float], share: float) -> float:
    return sorted(samples)[min(len(samples) - 1, int(share * len(samples)))]


def _eager_steps(model: Any, sequences: Any, token: Any, count: int, cuda: bool) -> tuple[list[float], Any]:
    """(ms of each step: token in, token on the host out, the last token); the first two warm up."""
    from dashbench.models.generate import read

    found = []
    for _ in range(count):
        began = _now(cuda)
        token = read(model, token, sequences).argmax(-1, keepdim=True)
        token.tolist()
        found.append(1e3 * (_now(cuda) - began))
    return (found[2:] if len(found) > 4 else found), token


def _graph_steps(model: Any, sequences: Any, token: Any, count: int) -> list[float]:
    """ms of replays of one captured step."""
    import torch

    from dashbench.models.generate import read

    length = sequences.length
    token = token.clone()

    def step() -> Any:
        sequences.length = length
        return read(model, token, sequences).argmax(-1, keepdim=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            sequences.length = length
            sequences.restart_step()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    sequences.length = length
    sequences.restart_step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    found = []
    for _ in range(count + 2):
        began = _now(True)
        graph.replay()
        out.tolist()
        found.append(1e3 * (_now(True) - began))
    return found[2:]


def row_line(row: LatencyRow) -> str:
    """One line for a progress display."""
    where = f"{row.label} {row.context} x{row.batch} {row.launch}"
    if row.status != "ok":
        return f"{row.status:8} {where}: {row.reason}"
    return (
        f"ok       {where}: first token {row.ttft_ms:.4g} ms, then {row.itl_ms:.4g} ms a token, "
        f"S {100 * row.s_flop:.1f} %"
    )


def run_suite(
    suite: Suite,
    out: Path,
    only: list[str] | None = None,
    time_budget_s: float | None = None,
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    again: bool = False,
) -> Summary:
    """Measures every point of a suite that is not measured yet; see `runner.run_suite`."""
    until = time.monotonic() + time_budget_s if time_budget_s is not None else None
    points = [p for p in suite.points() if only is None or p.label in only]
    with Store(out / f"{suite.spec.name}.jsonl") as store:
        for notice in store.notices:
            on_event(Event("notice", text=notice))
        bench = Bench(suite, store, on_event)
        todo = []
        for point in points:
            row = store.find(point.key(), bench.environment_key)
            if not again and row is not None and (row["status"] in DONE or not retry_failed):
                bench.summary.already += 1
            else:
                todo.append(point)
        on_event(Event("start", total=len(todo), text=bench.environment["device"]))
        try:
            for _, members in groupby(todo, key=lambda p: (p.label, p.context, p.batch)):
                _one_setting(bench, list(members), until)
        except KeyboardInterrupt:
            bench.summary.interrupted = True
        bench.summary.left = len(todo) - sum(bench.summary.counts.values())
        return bench.summary


def _one_setting(bench: Bench, points: list[LatencyPoint], until: float | None) -> None:
    """Points that differ in the launch alone."""
    bench.reading = None  # the setting before needs no memory any more
    knobs: dict[str, Any] | None = None
    for point in points:
        began = time.monotonic()
        if until is not None and began >= until:
            return
        bench.emit(Event("point", text=f"{point.label} {point.context} x{point.batch} {point.launch}"))
        try:
            if point.launch == "graph" and bench.device == "cpu":
                raise TaskSkipped("CUDA graphs need a GPU")
            bench.load(point)
            knobs = bench.settle(point) if knobs is None else knobs
            fields = bench.measure(point)
        except TaskSkipped as reason:
            bench.write(point, began, "skipped", str(reason))
        except (CheckpointError, ValueError) as problem:
            bench.write(point, began, "error", str(problem).splitlines()[0])
        except Exception as problem:
            if "out of memory" not in str(problem):
                raise
            bench.write(point, began, "oom", str(problem).splitlines()[0])
            import torch

            torch.cuda.empty_cache()
        else:
            bench.write(point, began, "ok", knob=knobs, **fields)
