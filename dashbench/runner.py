"""The runner: plans, drives the workers, keeps the store. It never imports torch; what crashes, crashes in a
worker.

Points that differ only in method and sparsity form a group. All of a group are prepared and gated, then
sampled in turns (A B C A B C), so that drift of clocks and temperature hits all alike; each finished point
is stored at once. Where a group does not fit into memory together, its members run one after the other and
their rows say so.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from dashbench.cost import estimate_ms, problem_bytes
from dashbench.plan import skip_reason
from dashbench.rows import Point, Row
from dashbench.store import Store
from dashbench.suite import Suite
from dashbench.timing_options import TimingOptions

DONE = ("ok", "skipped")
LOG_TAIL = 2000
START_TIMEOUT_S = 180.0
# A worker on a CPU may take this share of the memory that is free when the run starts, or as many GiB as the
# variable says.
HOST_MEMORY_SHARE = 0.8
MEMORY_VARIABLE = "DASHBENCH_HOST_MEMORY_GIB"
# Points of a group are loaded together while all that they hold takes less than this share of the GPU.
GROUP_SHARE = 0.6


class WorkerFailed(Exception):
    """A worker that did not answer: its status and the reason for the row."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


class WorkerProcess:
    """A worker and its pipes, restarted by making a new one.

    Args:
        python: interpreter to run it with.
        knob_cache: file of calibrated knobs.
        memory_limit: bytes of host memory after which it is killed, or None.
    """

    def __init__(self, python: str, knob_cache: Path | None, memory_limit: int | None):
        self.memory_limit = memory_limit
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
        if knob_cache is not None:
            environment["DASHBENCH_KNOBS"] = str(knob_cache)
        self.process = subprocess.Popen(
            [python, "-m", "dashbench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            start_new_session=True,
        )
        self._answers: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    def ask(self, command: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Sends a command and waits for its answer.

        Raises:
            WorkerFailed: it died, hung, or took too much memory; it is dead then.
        """
        try:
            self.process.stdin.write(json.dumps(command).encode() + b"\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):
            raise self._death() from None
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._answers.get(timeout=0.05)
            except queue.Empty:
                if time.monotonic() > until:
                    self.kill()
                    raise WorkerFailed(
                        "timeout", f"no answer to {command['do']} within {timeout_s:g} s"
                    ) from None
                self._watch_memory()
                continue
            if not line:
                raise self._death()
            answer = json.loads(line)
            if answer.get("fatal"):
                self.kill()
            return answer

    def _watch_memory(self) -> None:
        if self.memory_limit is None:
            return
        try:
            used = psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:
            return
        if used > self.memory_limit:
            self.kill()
            raise WorkerFailed(
                "oom", f"out of memory: took more than {self.memory_limit / 2**30:.1f} GiB of host memory"
            )

    def _death(self) -> WorkerFailed:
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
            return WorkerFailed("crashed", "the worker closed its pipe and did not end")
        if code < 0:
            if -code == signal.SIGKILL:
                return WorkerFailed(
                    "oom", "the worker was killed (SIGKILL), as the system does when memory runs out"
                )
            return WorkerFailed(
                "crashed", f"the worker died of {signal.strsignal(-code) or f'signal {-code}'}"
            )
        return WorkerFailed("crashed", f"the worker ended with exit code {code}")

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def tail(self) -> str:
        """End of what it printed."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - LOG_TAIL))
        return self.log.read().decode("utf-8", "replace")

    def kill(self) -> None:
        """Kills it and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Lets it end, then makes sure."""
        try:
            self.process.stdin.close()
            self.process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self.kill()
        self.log.close()


@dataclass(frozen=True)
class Event:
    """Something to show: `kind` is start, point, row, notice or stop."""

    kind: str
    text: str = ""
    row: dict[str, Any] | None = None
    total: int = 0
    seconds: float = 0.0


@dataclass
class Summary:
    """How a run ended.

    Attributes:
        counts: rows written in this run by status.
        already: points that were finished before.
        left: points not done because time ran out.
        store: the file.
        interrupted: Ctrl-C.
    """

    store: Path
    counts: dict[str, int] = field(default_factory=dict)
    already: int = 0
    left: int = 0
    interrupted: bool = False

    @property
    def failed(self) -> int:
        """Rows of this run that are neither ok nor skipped."""
        return sum(n for status, n in self.counts.items() if status not in DONE)


@dataclass(eq=False)
class _Held:
    """A point in work."""

    point: Point
    began: float
    fields: dict[str, Any] = field(default_factory=dict)
    together: bool = True


class Runner:
    """Runs a suite into a store. See `run_suite`."""

    def __init__(self, suite: Suite, store: Store, on_event: Callable[[Event], None], budget_s: float | None):
        self.suite = suite
        self.store = store
        self.emit = on_event
        self.options: TimingOptions = suite.spec.timing
        self.until = time.monotonic() + budget_s if budget_s is not None else None
        self.interpreters = suite.interpreters()
        self.workers: dict[str, WorkerProcess] = {}
        self.environments: dict[str, tuple[dict[str, Any], str]] = {}
        self.ceilings: dict[str, float] = {}
        self.summary = Summary(store.path)
        self.memory_limit: int | None = None

    # workers

    def _python(self, method: str) -> str:
        return self.interpreters.get(method, sys.executable)

    def _worker(self, method: str) -> WorkerProcess:
        worker = self.workers.get(method)
        if worker is None or not worker.alive:
            worker = WorkerProcess(
                self._python(method), self.store.path.with_suffix(".knobs.json"), self.memory_limit
            )
            self.workers[method] = worker
            answer = worker.ask({"do": "hello"}, START_TIMEOUT_S)
            self.environments[self._python(method)] = (answer["environment"], answer["environment_key"])
        return worker

    def _environment(self, method: str) -> tuple[dict[str, Any], str]:
        if self._python(method) not in self.environments:
            self._worker(method)
        return self.environments[self._python(method)]

    def _drop_worker(self, method: str) -> None:
        worker = self.workers.pop(method, None)
        if worker is not None:
            worker.close()

    def _ask(self, method: str, command: dict[str, Any]) -> dict[str, Any]:
        """An answer in every case: a dead worker's answer is its typed failure."""
        try:
            worker = self._worker(method)
            answer = worker.ask(command, self.options.timeout_seconds)
        except WorkerFailed as failure:
            answer = {"status": failure.status, "reason": str(failure)}
        worker = self.workers.get(method)
        if worker is not None and answer["status"] not in ("ok", "ready", "skipped"):
            answer.setdefault("log", worker.tail())
        if worker is not None and not worker.alive:
            self._drop_worker(method)
        return answer

    # rows

    def _write(self, held: _Held, answer: dict[str, Any]) -> None:
        point = held.point
        environment, environment_key = self._environment(point.method)
        fields = {**held.fields, **answer.get("fields", {})}
        fields["knob"] = fields.get("knob") or point.knobs
        if "timing" in fields:
            fields["timing"]["interleaved"] = held.together
        status = answer["status"]
        row = Row(
            key=point.key(),
            **point.model_dump(exclude={"knobs", "sparsity_tolerance"}),
            suite=self.suite.id,
            status=status,
            reason=answer.get("reason"),
            log_tail=answer.get("log") if status not in DONE else None,
            environment={**environment, "ceilings": self.ceilings},
            environment_key=environment_key,
            timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
            wall_s=round(time.monotonic() - held.began, 3),
            **fields,
        )
        self.store.append(row)
        self.summary.counts[status] = self.summary.counts.get(status, 0) + 1
        self.emit(Event("row", row=row.model_dump(mode="json"), seconds=row.wall_s or 0.0))

    def _out_of_time(self) -> bool:
        return self.until is not None and time.monotonic() >= self.until

    # the work

    def run(self, points: list[Point], retry_failed: bool, again: bool) -> Summary:
        """Runs what is not finished yet; see `run_suite`."""
        first = points[0].method
        environment, _ = self._environment(first)
        if environment["kind"] == "cpu":
            given = os.environ.get(MEMORY_VARIABLE)
            free = psutil.virtual_memory().available
            self.memory_limit = int(float(given) * 2**30) if given else int(HOST_MEMORY_SHARE * free)
            self._worker(first).memory_limit = self.memory_limit

        todo = []
        for point in points:
            row = self.store.find(point.key(), self._environment(point.method)[1])
            if not again and row is not None and (row["status"] in DONE or not retry_failed):
                self.summary.already += 1
            else:
                todo.append(point)
        self.emit(Event("start", total=len(todo), text=environment["device"]))
        if todo:
            self.ceilings = self._ask(first, {"do": "ceilings"}).get("ceilings", {})
        groups: dict[str, list[Point]] = {}
        for point in sorted(todo, key=_cost_order):
            groups.setdefault(_group_key(point), []).append(point)
        for members in groups.values():
            if self._out_of_time():
                break
            self._group(members)
        self.summary.left = len(todo) - sum(self.summary.counts.values())
        return self.summary

    def _group(self, members: list[Point]) -> None:
        runnable = []
        for point in members:
            environment = self._environment(point.method)[0]
            reason = skip_reason(point, environment, point.method in self.interpreters)
            if reason:
                self._write(_Held(point, time.monotonic()), {"status": "skipped", "reason": reason})
            else:
                runnable.append(point)
        if not runnable:
            return
        memory = self._environment(runnable[0].method)[0].get("memory_bytes")
        # A worker holds inputs, and fresh ones for the check after timing; a point what its call allocates.
        needed = problem_bytes(runnable[0]) * (1.5 * len({p.method for p in runnable}) + len(runnable))
        crowded = bool(memory and needed > GROUP_SHARE * memory)
        for point in runnable if crowded else self._measure(runnable, together=True):
            if self._out_of_time():
                return
            self._release()
            self._measure([point], together=False)

    def _measure(self, points: list[Point], together: bool) -> list[Point]:
        """Prepares points, lets them take turns and finishes them, a row each; returns those without a row,
        which are to be measured alone.

        A point that runs out of memory beside others may not be at fault. A worker that runs out drops all
        it held, and a new one after a death holds nothing: its other points are lost as well.
        """
        held: list[_Held] = []
        lost: list[Point] = []

        def ask(item: _Held, do: str, **arguments: Any) -> dict[str, Any]:
            method = item.point.method
            answer = self._ask(method, {"do": do, "key": item.point.key(), **arguments})
            if do != "finish" and answer["status"] in ("ok", "ready"):
                return answer
            out_of_memory = answer["status"] == "oom"
            if not (out_of_memory and together):
                self._write(item, answer)
                held.remove(item)
            if out_of_memory or method not in self.workers:
                lost.extend(h.point for h in held if h.point.method == method)
                held[:] = [h for h in held if h.point.method != method]
            return answer

        for point in points:
            self.emit(Event("point", text=describe_point(point)))
            held.append(_Held(point, time.monotonic(), together=together))
            ask(
                held[-1],
                "prepare",
                point=point.model_dump(mode="json"),
                timing=self.options.model_dump(mode="json"),
                ceilings=self.ceilings,
            )
        slice_s = self.options.max_seconds / self.options.rounds
        active = list(held)
        while active:
            active = [h for h in active if h in held and not ask(h, "sample", seconds=slice_s).get("done")]
        for item in list(held):
            if item in held:
                ask(item, "finish")
        return lost

    def _release(self) -> None:
        for method in list(self.workers):
            self._ask(method, {"do": "release"})

    def close(self) -> None:
        """Ends all workers."""
        for method in list(self.workers):
            self._drop_worker(method)


def _group_key(point: Point) -> str:
    shared = {"method": "", "knobs": {}, "sparsity_target": None, "sparsity_tolerance": 1.0}
    return point.model_copy(update=shared).key()


def _cost_order(point: Point) -> tuple[float, int, str]:
    """Cheap shapes first, all ways of timing one shape together: stable otherwise."""
    return (round(estimate_ms(point, {"kind": "cuda"}), 6), point.context, point.phase)


def describe_point(point: Point) -> str:
    """One line for progress displays."""
    target = "" if point.sparsity_target is None else f", S {100 * point.sparsity_target:g} %"
    knobs = "".join(f", {k} {v}" for k, v in point.knobs.items())
    where = f"{point.method} {point.phase} {point.context} x{point.batch}"
    return f"{where}, {point.cache}, {point.launch}{target}{knobs}"


def run_suite(
    suite: Suite,
    out: Path,
    only: list[str] | None = None,
    time_budget_s: float | None = None,
    retry_failed: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    again: bool = False,
) -> Summary:
    """Measures every point of a suite that is not finished yet, one row at a time.

    Args:
        suite: what to run.
        out: folder of the store; the file is named after the suite.
        only: methods to restrict the run to.
        time_budget_s: stop cleanly after this many seconds; the same call goes on later.
        retry_failed: also run points again whose newest row is neither ok nor skipped.
        on_event: told of every step.
        again: measure finished points once more, as after a change of a method; the newest row counts.

    Returns:
        The summary of this call.

    Raises:
        StoreError: the store is in use, broken, or the disk is full.
        WorkerFailed: not even an idle worker starts.
    """
    points = [p for p in suite.points() if only is None or p.method in only]
    with Store(out / f"{suite.spec.name}.jsonl") as store:
        for notice in store.notices:
            on_event(Event("notice", text=notice))
        runner = Runner(suite, store, on_event, time_budget_s)
        try:
            return runner.run(points, retry_failed, again)
        except KeyboardInterrupt:
            runner.summary.interrupted = True
            return runner.summary
        finally:
            runner.close()
