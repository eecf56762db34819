"""Rows of accuracy suites: one answered question each. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dashbench.rows import BaseRow


class AccuracyPoint(BaseModel):
    """One question asked for: a document of a task, and the model with its settings that shall answer it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    label: str
    attention: str = "auto"
    preset: str = "package"
    knobs: dict[str, Any] = Field(default_factory=dict)
    sparsity_target: float | None = None
    sparsity_tolerance: float = 0.01
    task: str
    length: int
    folder: str | None = None
    document: int
    seed: int = 0

    @property
    def method(self) -> str:
        """The label: what `--only` and plans go by."""
        return self.label

    def key(self) -> str:
        """Stable name of this point: equal for equal content, whatever its label. 16 hex digits."""
        content = self.model_dump(mode="json", exclude={"label"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class AccuracyRow(BaseRow):
    """One answered question. An answer without a score cannot be built."""

    kind: Literal["accuracy"] = "accuracy"
    label: str = Field(description="the checkpoint's name in the suite")
    checkpoint: str = Field(description="folder, hub name, or `random:SIZE`")
    weights: str | None = Field(
        default=None, description="first 12 digits of the weights' SHA-256, or `random:SIZE seed N`"
    )
    attention: str = Field(description="dense, infllmv2, nsa or dash")
    preset: str = Field(description="where settings come from that neither suite nor config give")
    settings: dict[str, Any] = Field(default_factory=dict, description="all settings in force")
    task: str
    length: int = Field(description="tokens asked for; 0: the task has one length")
    doc_id: int
    prompt_hash: str | None = Field(default=None, description="first 12 digits of the prompt's SHA-256")
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    answer: str | None = None
    target: str | None = None
    score: float | None = Field(default=None, ge=0, le=1)
    prompt_ms: float | None = Field(default=None, description="wall time of reading the prompt")
    generate_ms: float | None = Field(default=None, description="wall time of the tokens after the first")
    s_decode: float | None = Field(default=None, description="s_flop of the generated tokens' queries")
    s_by_layer: list[float] = Field(default_factory=list, description="s_flop of the prompt, by layer")

    @model_validator(mode="after")
    def _scored(self) -> AccuracyRow:
        if self.status == "ok" and (self.score is None or self.answer is None):
            raise ValueError("status ok needs an answer and a score")
        return self
