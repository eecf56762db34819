"""Rows of latency suites: how long a whole model takes to its first token and between tokens."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dashbench.rows import BaseRow


class LatencyPoint(BaseModel):
    """One measurement asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    checkpoint: str = Field(description="folder, hub name, or `random:SIZE`")
    attention: str
    preset: str = "package"
    knobs: dict[str, Any] = Field(default_factory=dict)
    sparsity_target: float | None = None
    sparsity_tolerance: float = 0.01
    routing: Literal["planted", "model"] = "planted"
    context: int
    batch: int
    launch: Literal["eager", "graph"]
    new_tokens: int
    repeats: int
    seed: int = 0

    @property
    def method(self) -> str:
        """The label: what `--only` and plans go by."""
        return self.label

    def key(self) -> str:
        """Stable name of this point, whatever its label. 16 hex digits."""
        content = self.model_dump(mode="json", exclude={"label"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class LatencyRow(BaseRow):
    """One model, prompt length and batch. Status ok needs both times."""

    kind: Literal["latency"] = "latency"
    label: str = Field(description="the model's name in the suite")
    checkpoint: str = Field(description="folder, hub name, or `random:SIZE` for random weights of a shape")
    attention: str = Field(description="dense, infllmv2, nsa or dash")
    settings: dict[str, Any] = Field(default_factory=dict, description="all settings in force")
    routing: str = Field(
        description="`planted`: attention sees planted topics; `model`: the model's own states"
    )
    context: int = Field(description="tokens of the prompt")
    batch: int
    launch: str = Field(description="of the decode steps: `eager`, or `graph` of one step")
    layers: int | None = None
    rows_at_once: int | None = Field(default=None, description="prompts of the batch read together")
    ttft_ms: float | None = Field(default=None, description="median time to the first token")
    ttft_samples: list[float] = Field(default_factory=list)
    itl_ms: float | None = Field(default=None, description="median time between tokens")
    itl_p90_ms: float | None = None
    itl_p99_ms: float | None = None
    itl_samples: list[float] = Field(default_factory=list)
    tokens_per_s: float | None = Field(default=None, description="batch / itl_ms")
    s_decode: float | None = Field(default=None, description="s_flop of the generated tokens' queries")
    predicted_ttft_ms: float | None = Field(default=None, description="layers × the kernel rows' prefill")
    unexplained_ttft_ms: float | None = Field(default=None, description="the rest: everything but attention")
    predicted_itl_ms: float | None = Field(default=None, description="layers × the kernel rows' decode step")
    unexplained_itl_ms: float | None = None

    @model_validator(mode="after")
    def _timed(self) -> LatencyRow:
        if self.status == "ok" and (self.ttft_ms is None or self.itl_ms is None):
            raise ValueError("status ok needs ttft_ms and itl_ms")
        return self
