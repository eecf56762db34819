"""A worker: the process that owns the GPU for one method. It reads commands and answers on pipes, one JSON
object a line.

Commands, in the order a point needs them; every answer has `status`:

    hello                       -> ok + environment, environment_key
    ceilings                    -> ok + ceilings
    prepare {point, timing, …}  -> ready | skipped | incorrect | oom | error (inputs, knobs, gate, warm-up)
    sample {key, seconds}       -> ok + samples, done
    finish {key}                -> ok | incorrect | …: `fields` of the row; re-check on fresh inputs
    release                     -> ok: all inputs and operators dropped

The runner kills a worker that does not answer; nothing here has a time limit of its own. Points that share
inputs are expected one after the other: the last inputs, knobs and gate results are kept.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import traceback
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

# CUDA errors after which nothing in this process can be trusted.
POISON = (
    "illegal memory access",
    "device-side assert",
    "unspecified launch failure",
    "misaligned address",
    "CUDA error",
)
GIVE_BACK_BYTES = 2**30
"""More unused memory than this is returned before a point is timed."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "DefaultCPUAllocator")


@dataclass
class _Inputs:
    """One set of inputs and what is known of the method on it."""

    key: str
    problem: Any
    facts: dict[str, Any]
    prepared: dict[str, tuple[dict[str, Any], Any]] = field(default_factory=dict)  # by method configuration
    gates: dict[tuple[str, str], Any] = field(default_factory=dict)
    sparsity: dict[str, dict[str, Any]] = field(default_factory=dict)
    peaks: dict[tuple[str, str], int | None] = field(default_factory=dict)
    copies: list[Any] = field(default_factory=list)


class Worker:
    """Answers commands; see the module's docstring."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        wanted = os.environ.get("DASHBENCH_DEVICE")
        self.device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
        from dashbench import environment

        self.environment = environment.describe(self.device)
        self.environment_key = environment.key(self.environment)
        self.inputs: _Inputs | None = None
        self.fresh: _Inputs | None = None
        self.trained: tuple[Any, Any] | None = None
        self.points: dict[str, dict[str, Any]] = {}
        self.ceilings_: dict[str, float] = {}
        cache_folder = os.environ.get("DASHBENCH_KNOBS")
        from dashbench.calibrate import KnobCache

        self.knobs = KnobCache(Path(cache_folder) if cache_folder else None)

    # commands

    def hello(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"status": "ok", "environment": self.environment, "environment_key": self.environment_key}

    def ceilings(self, _: dict[str, Any]) -> dict[str, Any]:
        from dashbench import environment

        return {"status": "ok", "ceilings": environment.ceilings(self.device)}

    def release(self, _: dict[str, Any]) -> dict[str, Any]:
        self.points.clear()
        self.inputs = self.fresh = self.trained = None
        gc.collect()
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
        return {"status": "ok"}

    def prepare(self, command: dict[str, Any]) -> dict[str, Any]:
        from dashbench import check, cost, sparsity, timing
        from dashbench.methods import registry
        from dashbench.rows import Point
        from dashbench.timing_options import TimingOptions

        point = Point.model_validate(command["point"])
        options = TimingOptions.model_validate(command["timing"])
        self.ceilings_ = command.get("ceilings") or self.ceilings_
        method = registry()[point.method]
        if self.device not in method.devices:
            return {"status": "skipped", "reason": f"{point.method} does not run on a {self._device_word()}"}
        asked = point.of_attention()
        inputs = self._inputs(asked)
        label = json.dumps([point.method, point.knobs, point.sparsity_target], sort_keys=True)
        operator, knobs = self._operator(method, asked, inputs, label)
        fields: dict[str, Any] = {"knob": knobs, "notes": dict(operator.notes), "inputs": inputs.facts}

        gate = inputs.gates.get((label, "eager"))
        if gate is None:
            gate = check.gate(operator, inputs.problem, options.checked_rows, point.seed)
            inputs.gates[label, "eager"] = gate
        fields["checked"] = gate.model_dump()
        if not gate.passed:
            return {"status": "incorrect", "reason": gate.detail, "fields": fields}
        if label not in inputs.sparsity:
            inputs.sparsity[label] = sparsity.measure(operator, inputs.problem)
        fields |= inputs.sparsity[label]
        if point.phase == "layer":
            from dashbench.layer import around

            operator = around(self._layer(point.shape), operator, inputs.problem)
            fields["notes"] = dict(operator.notes)
        if (label, point.phase) not in inputs.peaks:
            inputs.peaks[label, point.phase] = timing.peak_bytes(operator.run, self.device)
        fields["peak_bytes"] = inputs.peaks[label, point.phase]

        copies = 1  # of a layer's step, which sweeps the cache many times over
        if point.phase != "layer":
            touched = cost.work(point, method.family, fields["s_flop"] or 0.0).bytes
            copies = timing.rotation(
                cost.problem_bytes(point), touched, self.environment["l2_bytes"], point.cache,
                self._spare_bytes() // 2,
            )  # fmt: skip
        operators = self._copies(method, inputs, operator, knobs, copies)
        timer = timing.Timer(operators, options, point.launch, self.device)
        if point.launch == "graph":
            gate = check.gate(timer.replayed(), inputs.problem, options.checked_rows, point.seed)
            fields["checked"] = gate.model_dump()
            if not gate.passed:
                return {
                    "status": "incorrect",
                    "reason": f"replayed from a graph: {gate.detail}",
                    "fields": fields,
                }
        self._give_back()
        timer.warm_up()
        self.points[point.key()] = {
            "point": point,
            "options": options,
            "timer": timer,
            "fields": fields,
            "method": method,
        }
        return {"status": "ready"}

    def sample(self, command: dict[str, Any]) -> dict[str, Any]:
        timer = self.points[command["key"]]["timer"]
        count = timer.sample(command["seconds"])
        return {"status": "ok", "samples": count, "done": timer.done()}

    def finish(self, command: dict[str, Any]) -> dict[str, Any]:
        from dashbench import check, cost, timing
        from dashbench.methods import registry

        held = self.points.pop(command["key"])
        point, fields, timer = held["point"], held["fields"], held["timer"]
        result = timer.result(point.seed)
        fields["stages_ms"] = timing.time_stages(timer.operators[0], self.device)
        done = cost.work(point, registry()[point.method].family, fields["s_flop"] or 0.0)
        floor = cost.floor_ms(done, self.ceilings_, point.cache == "cold", self.environment["l2_bytes"])
        del timer, held["timer"]
        if result["latency_ms"] < floor:
            took = f"{result['latency_ms']:.4g} ms"
            reason = f"faster than this machine can be: {took}, and its ceilings allow {floor:.4g} ms"
            return {"status": "incorrect", "reason": reason, "fields": fields}
        fresh = self._inputs(point.of_attention(), variant=1)
        operator = import_prepare(held["method"].target)(fresh.problem, **fields["knob"])
        again = check.gate(operator, fresh.problem, held["options"].checked_rows, point.seed + 1)
        fields["recheck"] = again.model_dump()
        if not again.passed:
            return {
                "status": "incorrect",
                "reason": f"on fresh inputs, after timing: {again.detail}",
                "fields": fields,
            }
        self._give_back()
        fields |= result
        fields |= cost.rates(done, result["latency_ms"], self.ceilings_)
        return {"status": "ok", "fields": fields}

    # parts

    def _device_word(self) -> str:
        return "CPU" if self.device == "cpu" else "GPU"

    def _give_back(self) -> None:
        """Returns what the gate's reference needed to the GPU: other workers share it."""
        if self.device == "cuda":
            unused = self.torch.cuda.memory_reserved() - self.torch.cuda.memory_allocated()
            if unused > GIVE_BACK_BYTES:
                self.torch.cuda.empty_cache()

    def _spare_bytes(self) -> int:
        if self.device == "cuda":
            return self.torch.cuda.mem_get_info()[0]
        import psutil

        return psutil.virtual_memory().available

    def _inputs(self, point: Any, variant: int = 0) -> _Inputs:
        """The inputs of a point, kept until other inputs are asked for."""
        from dashbench.inputs import make_problem

        same = {"method": "", "cache": "cold", "launch": "eager", "knobs": {}, "sparsity_target": None}
        key = point.model_copy(update=same).key()
        held = self.inputs if variant == 0 else self.fresh
        if held is not None and held.key == key:
            return held
        if variant == 0:
            if not self.points:  # nothing prepared on the old inputs is waiting to be timed
                self.release({})
        else:
            self.fresh = None
        problem, facts = make_problem(point, self.device, variant)
        made = _Inputs(key, problem, facts)
        if variant == 0:
            self.inputs = made
        else:
            self.fresh = made
        return made

    def _layer(self, shape: Any) -> Any:
        """The layer around an attention's shape, kept until inputs are released."""
        from dashbench.layer import TrainedLayer

        if self.trained is None or self.trained[0] != shape:
            self.trained = shape, TrainedLayer(shape, self.device)
        return self.trained[1]

    def _operator(self, method: Any, point: Any, inputs: _Inputs, label: str) -> tuple[Any, dict[str, Any]]:
        from dashbench.calibrate import find_knobs

        if label not in inputs.prepared:
            knobs, operator = find_knobs(
                method, point, inputs.problem, import_prepare(method.target), self.knobs
            )
            inputs.prepared[label] = (knobs, operator)
        knobs, operator = inputs.prepared[label]
        return operator, knobs

    def _copies(
        self, method: Any, inputs: _Inputs, operator: Any, knobs: dict[str, Any], count: int
    ) -> list[Any]:
        from dashbench.inputs import clone_problem

        while len(inputs.copies) < count - 1:
            inputs.copies.append(clone_problem(inputs.problem))
        prepare = import_prepare(method.target)
        return [operator, *(prepare(copy, **knobs) for copy in inputs.copies[: count - 1])]


def import_prepare(target: str) -> Any:
    """The function that `module:function` names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def classify(problem: BaseException) -> dict[str, Any]:
    """The answer for an exception: its status and a one-sentence reason; `fatal` when the process must not
    go on."""
    from dashbench.baselines.api import Unsupported

    text = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    if isinstance(problem, Unsupported):
        return {"status": "skipped", "reason": text}
    whole = str(problem)
    if isinstance(problem, MemoryError) or any(words in whole for words in OUT_OF_MEMORY):
        # CUDA's message goes on with every process on the GPU; the log has it.
        return {"status": "oom", "reason": f"out of memory: {text.partition(' GPU 0 has')[0]}"}
    if any(words in whole for words in POISON):
        return {
            "status": "crashed",
            "reason": f"CUDA failed and the process cannot go on: {text}",
            "fatal": True,
        }
    return {"status": "error", "reason": f"{type(problem).__name__}: {text}"}


def _serve(commands: TextIO, answers: TextIO) -> None:
    worker = Worker()
    for line in commands:
        command = json.loads(line)
        try:
            answer = getattr(worker, command["do"])(command)
        except Exception as problem:  # every failure of a method becomes a typed row
            traceback.print_exc()
            answer = classify(problem)
            worker.points.pop(command.get("key", ""), None)
            del problem
            if answer["status"] == "oom":
                worker.release({})
        sys.stdout.flush()
        sys.stderr.flush()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if answer.get("fatal"):
            os._exit(70)


def main() -> None:
    """Entry point: commands on standard input, answers on the original standard output; prints of methods go
    to standard error."""
    if sys.platform == "linux":  # die with the runner, even if it is killed
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
