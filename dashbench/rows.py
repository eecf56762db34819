"""Points and rows: what is asked for, and what is stored once it has been measured.

The field names are a contract (written down for users in results/README.md, versioned by `ROW_VERSION`).
Nothing here needs torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

ROW_VERSION = 1

Phase = Literal["prefill", "decode", "train", "layer"]
Status = Literal["ok", "skipped", "incorrect", "oom", "timeout", "crashed", "error"]


class Shape(BaseModel):
    """Attention shape of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="preset name, or a name made of the numbers")
    query_heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)

    @model_validator(mode="after")
    def _groups(self) -> Shape:
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads {self.query_heads} is not a multiple of kv_heads {self.kv_heads}")
        return self


class Point(BaseModel):
    """One measurement asked for: everything that decides what runs, and nothing about where or when."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    phase: Phase
    context: int = Field(
        gt=0,
        description="tokens: the cache with the new token in decode, the sequence in every other phase",
    )
    batch: int = Field(gt=0)
    shape: Shape
    dtype: Literal["bfloat16", "float16", "float32"]
    routing: str = Field(description="name of the input generator")
    routing_options: dict[str, Any] = Field(default_factory=dict)
    cache: Literal["cold", "warm"] = Field(
        description="whether inputs can be in the L2 cache when the method starts"
    )
    launch: Literal["eager", "graph"] = Field(
        description="launched from Python each time, or replayed from a CUDA graph"
    )
    knobs: dict[str, Any] = Field(default_factory=dict, description="explicit method parameters")
    sparsity_target: float | None = Field(
        default=None, ge=0, lt=1, description="S_flop asked for; None: whatever the knobs give"
    )
    sparsity_tolerance: float = Field(default=0.01, gt=0)
    block_size: int = Field(default=64, gt=0)
    seed: int = 0

    def of_attention(self) -> Point:
        """What a method is asked for: its training step where a whole layer is timed around it."""
        return self.model_copy(update={"phase": "train"}) if self.phase == "layer" else self

    def key(self) -> str:
        """Stable name of this point: equal for equal content, whatever the order of keys. 16 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Check(BaseModel):
    """The outcome of the correctness gate (see dashbench.check)."""

    model_config = ConfigDict(extra="forbid")

    passed: bool
    rows: int = Field(description="query rows compared with the fp64 reference")
    max_abs: float | None = None
    relative_l2: float | None = None
    selection_errors: int | None = Field(
        default=None, description="blocks on the wrong side outside the tie margin; None if dense"
    )
    detail: str = ""


class BaseRow(BaseModel):
    """What rows of every kind share. A failed status without a reason cannot be built."""

    model_config = ConfigDict(extra="forbid")

    row_version: int = ROW_VERSION
    key: str = Field(description="key() of the point")
    method: str
    knob: dict[str, Any] = Field(default_factory=dict, description="parameters the method really ran with")
    sparsity_target: float | None = None
    suite: str = Field(description="name and hash of the suite, name@hash")
    seed: int = 0
    status: Status
    reason: str | None = None
    log_tail: str | None = Field(default=None, description="end of the worker's log when it failed")
    checked: Check | None = None
    # sparsity, definitions in dashbench.sparsity; dense methods are 0 by construction
    s_flop: float | None = None
    s_mean: float | None = None
    s_up: float | None = None
    s_routed: float | None = None
    s_definitions: dict[str, float] = Field(
        default_factory=dict, description="all definitions, whole sequence and from position 4096"
    )
    s_spread: dict[str, float] = Field(
        default_factory=dict, description="kept tokens per query: p10, p50, p90, p99, min, max, mean"
    )
    peak_bytes: int | None = Field(
        default=None, description="peak device memory of one call beyond its inputs"
    )
    notes: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    environment_key: str = ""
    timestamp: str = Field(description="UTC, ISO 8601, when the point finished")
    wall_s: float | None = Field(default=None, description="what the point cost in all")

    @model_validator(mode="after")
    def _explained(self) -> BaseRow:
        if self.status != "ok" and not self.reason:
            raise ValueError(f"status {self.status} needs a reason")
        return self


class Row(BaseRow):
    """One attention operator, timed. A latency without a passed check cannot be built."""

    kind: Literal["kernel"] = "kernel"
    # what was asked
    phase: Phase
    context: int
    batch: int
    shape: Shape
    dtype: str
    routing: str
    routing_options: dict[str, Any] = Field(default_factory=dict)
    cache: str
    launch: str
    block_size: int = 64
    # what was found
    recheck: Check | None = Field(
        default=None, description="the gate once more, after timing, on fresh inputs"
    )
    tile_inflation: dict[str, float] = Field(
        default_factory=dict, description='by tile size: {"4": 1.12, "8": 1.2}'
    )
    inputs: dict[str, Any] = Field(
        default_factory=dict, description="histogram and facts of the generated inputs"
    )
    # time
    latency_ms: float | None = Field(default=None, description="median")
    latency_ci_ms: tuple[float, float] | None = Field(
        default=None, description="95 % bootstrap interval of the median"
    )
    gpu_ms: float | None = Field(
        default=None, description="time on the GPU alone, launches hidden (eager only)"
    )
    host_ms: float | None = Field(
        default=None, description="median time Python and the driver need to launch it (eager only)"
    )
    stages_ms: dict[str, float] = Field(default_factory=dict)
    samples: list[float] = Field(default_factory=list, description="raw samples, ms")
    timing: dict[str, Any] = Field(
        default_factory=dict, description="timer version, warm-up, rounds, throttled samples, stop reason"
    )
    telemetry: dict[str, Any] = Field(
        default_factory=dict, description="SM clock, power, temperature: min, median, max"
    )
    # work
    tflops: float | None = Field(default=None, description="TFLOP/s of the work actually kept")
    tb_per_s: float | None = None
    percent_of_ceiling: float | None = Field(
        default=None, description="of the measured matmul or copy ceiling, whichever binds"
    )

    @model_validator(mode="after")
    def _honest(self) -> Row:
        if self.latency_ms is not None and not (self.checked and self.checked.passed):
            raise ValueError("a latency needs a passed check")
        if self.latency_ms is not None and self.recheck is not None and not self.recheck.passed:
            raise ValueError("a latency needs a passed re-check")
        if self.status == "ok" and self.latency_ms is None:
            raise ValueError("status ok needs a latency")
        return self
