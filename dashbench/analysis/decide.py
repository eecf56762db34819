"""A workload, and which method at which sparsity serves it in the least attention time.

The time of a request is that of its attention layers: one prefill of the prompt and one decode step for each
token of output, a step's time shared by the sequences of the batch. Everything else a model does is the same
for every method and is left out. Lengths and sparsities between measured ones are interpolated, beyond them
nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dashbench.analysis.accuracy import accuracy_rows, scores, task_mean
from dashbench.analysis.joining import Cost, KernelCosts
from dashbench.analysis.points import AnalysisError, finished, is_dense, one_environment
from dashbench.analysis.statistics import RESAMPLES, Interval, percentile_interval
from dashbench.cost import ELEMENT

SCAN = tuple(float(x) for x in np.geomspace(1 / 16, 16, 129))
GIB = 2**30


def _tokens(value: Any) -> Any:
    text = str(value).strip().lower()
    return int(text[:-1]) * 1024 if text.endswith("k") and text[:-1].isdigit() else value


Tokens = Annotated[int, BeforeValidator(_tokens)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Request(_Strict):
    """A class of requests."""

    share: float = Field(gt=0, description="of all requests; shares are scaled to add up to 1")
    prompt: Tokens = Field(gt=0, description="tokens, 16384 or 16k")
    output: Tokens = Field(default=0, ge=0, description="tokens")

    @property
    def label(self) -> str:
        """`16k + 256`."""
        size = f"{self.prompt // 1024}k" if self.prompt % 1024 == 0 else str(self.prompt)
        return f"{size} + {self.output}"


class Workload(_Strict):
    """What a server is asked for."""

    version: Literal[1]
    name: str
    requests: list[Request] = Field(min_length=1)
    batch: int = Field(default=1, gt=0, description="sequences that decode together")
    layers: int = Field(default=32, gt=0, description="attention layers of the model")
    accuracy_floor: float | None = Field(
        default=None, ge=0, le=1, description="mean score a method must reach"
    )
    accuracy_loss: float | None = Field(
        default=None, ge=0, le=1, description="mean score it may lose against dense"
    )
    memory_gib: float | None = Field(default=None, gt=0, description="of the device")
    weights_gib: float = Field(default=0.0, ge=0, description="of the model")


def load_workload(path: Path) -> Workload:
    """Reads a workload.

    Raises:
        AnalysisError: one sentence with the file and the key.
    """
    try:
        return Workload.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as problem:
        raise AnalysisError(f"{path}: cannot be read: {problem.strerror}") from None
    except yaml.YAMLError as problem:
        raise AnalysisError(f"{path}: not YAML: {getattr(problem, 'problem', problem)}") from None
    except ValidationError as problem:
        first = problem.errors()[0]
        where = ".".join(str(p) for p in first["loc"])
        raise AnalysisError(f"{path}: {where or 'the workload'}: {first['msg'].lower()}") from None


@dataclass(frozen=True)
class Candidate:
    """A method at a sparsity.

    Attributes:
        method, sparsity: which; dense has 0.
        ms: attention time of a mean request, all layers, 95 % interval.
        by_request: ms of each class of requests.
        accuracy: mean score at the nearest lengths; None without accuracy rows.
        memory_gib: weights, cache of keys and values, and the kernels' own, at the longest request.
        obstacle: why it cannot be recommended; empty if it can.
        draws: of the mean request's ms.
    """

    method: str
    sparsity: float
    ms: Interval | None
    by_request: list[float]
    accuracy: float | None
    memory_gib: float | None
    obstacle: str
    draws: np.ndarray = field(repr=False, default_factory=lambda: np.zeros(0))

    @property
    def label(self) -> str:
        """`dash 75 %`."""
        return self.method if self.method == "dense" else f"{self.method} {100 * self.sparsity:g} %"


@dataclass(frozen=True)
class Decision:
    """What to run.

    Attributes:
        workload: what was asked.
        candidates: eligible ones by time, then the others.
        certainty: share of the draws in which the first is the fastest of the eligible.
        flips: where the recommendation changes, in words.
        note: where the times come from.
    """

    workload: Workload
    candidates: list[Candidate]
    certainty: float
    flips: list[str]
    note: str


class _Times:
    """Times of requests, from the kernel rows of one environment."""

    def __init__(self, rows: list[dict[str, Any]], workload: Workload):
        self.workload = workload
        self.prefill = KernelCosts(rows, "prefill", 1, "latency_ms")
        self.decode = KernelCosts(rows, "decode", workload.batch, "latency_ms")
        self.spent = {
            "prefill": KernelCosts(rows, "prefill", 1, "peak_bytes"),
            "decode": KernelCosts(rows, "decode", workload.batch, "peak_bytes"),
        }

    def request(self, method: str, sparsity: float, prompt: float, output: float) -> Cost | str:
        """Time of one request, or what is missing."""
        parts = [(self.prefill, prompt, 1.0)]
        if output:
            # The trapezoid rule over the growing cache; a step is shared by the batch.
            lengths = np.linspace(prompt, prompt + output, 3)
            weights = np.array([0.25, 0.5, 0.25]) * output / self.workload.batch
            parts += [(self.decode, n, w) for n, w in zip(lengths, weights, strict=True)]
        value, drawn, used = 0.0, np.zeros(RESAMPLES), []
        for costs, length, weight in parts:
            found = costs.cost(method, sparsity, length)
            if found is None:
                batch = f" at batch {costs.batch}" if costs.batch else ""
                return f"no {costs.phase} rows{batch} on both sides of {length:.0f} tokens"
            value += self.workload.layers * weight * found.value
            drawn = drawn + self.workload.layers * weight * found.draws
            used += found.rows
        return Cost(value, drawn, used)

    def extra_bytes(self, method: str, sparsity: float) -> float:
        """Largest extra memory of one layer's kernels at any class of requests."""
        found = [0.0]
        for request in self.workload.requests:
            for phase, costs in self.spent.items():
                length = request.prompt + (request.output if phase == "decode" else 0)
                cost = costs.cost(method, sparsity, length)
                found.append(cost.value if cost else 0.0)
        return max(found)


def _accuracies(rows: list[dict[str, Any]], workload: Workload) -> dict[tuple[str, float], float]:
    """Mean score by (method, sparsity asked for), each class of requests at the nearest length measured; of
    several checkpoints the best one's."""
    tables = scores(rows)
    shares = np.array([r.share for r in workload.requests]) / sum(r.share for r in workload.requests)
    nearest = [min(tables, key=lambda t: abs(np.log(t.length / r.prompt))) for r in workload.requests]
    out: dict[tuple[str, float], float] = {}
    for c in {c for t in tables for c in t.configurations}:
        values = [
            float(task_mean(t, t.score)[t.configurations.index(c)]) if c in t.configurations else np.nan
            for t in nearest
        ]
        mean = float(shares @ values)
        asked = c.method, c.sparsity_target or 0.0
        if np.isfinite(mean):
            out[asked] = max(mean, out.get(asked, mean))
    return out


def _memory(workload: Workload, shape: dict[str, Any] | None, extra: float) -> float | None:
    if shape is None:
        return None
    longest = max(r.prompt + r.output for r in workload.requests)
    cache = 2 * shape["kv_heads"] * shape["head_dim"] * ELEMENT["bfloat16"] * longest * workload.batch
    return workload.weights_gib + (workload.layers * cache + extra) / GIB


def _obstacle(
    workload: Workload, label: str, accuracy: float | None, dense: float | None, memory: float | None
) -> str:
    if workload.memory_gib is not None and memory is not None and memory > workload.memory_gib:
        return f"needs {memory:.1f} GiB"
    floors = [f for f in (workload.accuracy_floor,) if f is not None]
    if workload.accuracy_loss is not None and dense is not None:
        floors.append(dense - workload.accuracy_loss)
    if not floors or label == "dense":
        return ""
    if accuracy is None:
        return "its accuracy was not measured"
    return f"accuracy {accuracy:.3f} is below {max(floors):.3f}" if accuracy < max(floors) else ""


def _share_flips(workload: Workload, eligible: list[Candidate]) -> list[str]:
    shares = np.array([r.share for r in workload.requests]) / sum(r.share for r in workload.requests)
    if len(shares) < 2 or len(eligible) < 2:
        return []
    first, out = eligible[0], []
    for i, request in enumerate(workload.requests):
        rest = np.delete(shares, i) / np.delete(shares, i).sum()
        crossings = []
        for other in eligible[1:]:
            gap = np.array(other.by_request) - np.array(first.by_request)
            mine, others = gap[i], float(rest @ np.delete(gap, i))
            if (mine < 0) != (others < 0):
                crossings.append((others / (others - mine), other))
        above = min(((s, c) for s, c in crossings if s > shares[i]), key=lambda x: x[0], default=None)
        below = max(((s, c) for s, c in crossings if s <= shares[i]), key=lambda x: x[0], default=None)
        for found, word in ((above, "more"), (below, "less")):
            if found:
                out.append(
                    f"switch to {found[1].label} if {word} than {100 * found[0]:.0f} % of the requests are "
                    f"{request.label} (now {100 * shares[i]:.0f} %)"
                )
    return out


def _scale_flips(times: _Times, eligible: list[Candidate]) -> list[str]:
    """Factors on all prompts, then on all outputs, from which on another candidate is the fastest."""
    out = []
    requests = times.workload.requests

    def fastest(prompts: float, outputs: float) -> Candidate | None:
        ranked = []
        for candidate in eligible:
            parts = [
                times.request(candidate.method, candidate.sparsity, prompts * r.prompt, outputs * r.output)
                for r in requests
            ]
            if any(isinstance(p, str) for p in parts):
                return None  # a comparison with one left out is none
            ranked.append((sum(r.share * p.value for r, p in zip(requests, parts, strict=True)), candidate))
        return min(ranked, key=lambda x: x[0])[1]

    for what, at in (("prompts", lambda f: (f, 1.0)), ("outputs", lambda f: (1.0, f))):
        if what == "outputs" and not any(r.output for r in requests):
            continue
        for factors, word in (
            ([f for f in SCAN if f > 1], "longer"),
            ([f for f in SCAN[::-1] if f < 1], "shorter"),
        ):
            for factor in factors:
                found = fastest(*at(factor))
                if found is None:
                    break
                if found is not eligible[0]:
                    out.append(
                        f"switch to {found.label} if {what} are {max(factor, 1 / factor):.2g} times {word}"
                    )
                    break
    return out


def decide(rows: Iterable[dict[str, Any]], workload: Workload, environment: str | None = None) -> Decision:
    """Ranks methods and sparsities for a workload.

    Raises:
        AnalysisError: no kernel rows, none of this batch, several environments, or an accuracy asked for
            that no row can check.
    """
    rows = list(rows)
    timed = finished(rows)
    if not timed:
        raise AnalysisError("no kernel rows here: times come from a suite of kind kernels")
    timed = one_environment(timed, environment)
    if any(r.output for r in workload.requests):
        batches = sorted({r["batch"] for r in timed if r["phase"] == "decode"})
        if workload.batch not in batches:
            have = ", ".join(map(str, batches)) or "none"
            raise AnalysisError(f"no decode rows at batch {workload.batch}; measured: {have}")
    samples = accuracy_rows(rows)
    if not samples and (workload.accuracy_floor is not None or workload.accuracy_loss is not None):
        raise AnalysisError(
            "an accuracy was asked for and there are no accuracy rows here; leave it out to decide by time "
            "alone"
        )
    accuracies = _accuracies(one_environment(samples, environment), workload) if samples else {}
    times = _Times(timed, workload)
    shares = np.array([r.share for r in workload.requests]) / sum(r.share for r in workload.requests)
    options = {("dense", 0.0)} | {
        (r["method"].split("@")[0], r["sparsity_target"])
        for r in timed
        if not is_dense(r) and r["sparsity_target"] is not None and not r["method"].endswith("@reference")
    }
    candidates = []
    for method, sparsity in sorted(options):
        parts = [times.request(method, sparsity, r.prompt, r.output) for r in workload.requests]
        missing = next((p for p in parts if isinstance(p, str)), None)
        accuracy = accuracies.get((method, sparsity))
        memory = _memory(workload, times.prefill.shape, times.extra_bytes(method, sparsity))
        label = Candidate(method, sparsity, None, [], None, None, "").label
        obstacle = missing or _obstacle(workload, label, accuracy, accuracies.get(("dense", 0.0)), memory)
        if missing:
            candidates.append(Candidate(method, sparsity, None, [], accuracy, memory, obstacle))
            continue
        drawn = sum(w * p.draws for w, p in zip(shares, parts, strict=True))
        mean = float(shares @ [p.value for p in parts])
        candidates.append(
            Candidate(
                method,
                sparsity,
                percentile_interval(drawn, mean),
                [p.value for p in parts],
                accuracy,
                memory,
                obstacle,
                drawn,
            )
        )
    eligible = sorted((c for c in candidates if not c.obstacle), key=lambda c: (c.ms.value, c.label))
    others = sorted((c for c in candidates if c.obstacle), key=lambda c: c.label)
    if not eligible:
        raise AnalysisError(f"no method fits the workload: {others[0].label}: {others[0].obstacle}")
    ranks = np.argmin(np.stack([c.draws for c in eligible]), axis=0)
    flips = _share_flips(workload, eligible) + _scale_flips(times, eligible[:3])
    if workload.accuracy_floor is None and workload.accuracy_loss is None:
        flips.append("no accuracy was asked for, so time alone decides")
    elif eligible[0].accuracy is not None and len(eligible) > 1:
        flips.append(f"switch to {eligible[1].label} if accuracy has to be above {eligible[0].accuracy:.3f}")
    way = ", ".join(f"{c.phase} {c.way[0]} cache, {c.way[1]}" for c in (times.prefill, times.decode) if c.way)
    return Decision(workload, [*eligible, *others], float(np.mean(ranks == 0)), flips, way)
