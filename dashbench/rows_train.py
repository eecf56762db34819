"""Rows of training: one a tenth of a stage. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dashbench.rows import BaseRow

Stage = Literal["base", "continuation"]
REPORTS = 10
"""Rows of a stage: one after each tenth of it."""


class TrainPoint(BaseModel):
    """One report of one stage: everything that decides what is trained until then.

    Attributes:
        method: attention that is trained: dense, infllmv2, nsa or dash.
        stage: `base` (dense, from nothing) or `continuation` (from the base).
        seed: of the parameters and of the data's order; a continuation starts from the base of seed
            `base_seed`.
        report: 1 to REPORTS.
        recipe: hash of all that the suite says of this stage and of the stages before it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    stage: Stage
    seed: int
    base_seed: int
    report: int = Field(ge=1, le=REPORTS)
    recipe: str

    def key(self) -> str:
        """Stable name of this point, 16 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class TrainRow(BaseRow):
    """What training a tenth of a stage gave."""

    kind: Literal["train"] = "train"
    stage: Stage
    report: int = Field(description="tenth of the stage, 1 to 10")
    base_seed: int = Field(description="seed of the base that a continuation starts from")
    length: int = Field(description="longest context in the mix, tokens")
    step: int | None = Field(default=None, description="optimizer steps since the stage began")
    tokens: int | None = Field(default=None, description="tokens since the stage began")
    loss: float | None = Field(default=None, description="mean cross entropy of answer tokens in this tenth")
    tokens_per_s: float | None = Field(default=None, description="in this tenth, evaluation left out")
    gpu_s: float | None = Field(default=None, description="seconds of training since the stage began")
    learning_rate: float | None = Field(default=None, description="at the end of this tenth")
    alpha: float | None = Field(default=None, description="order of entmax (dash only)")
    s_by_layer: list[float] = Field(default_factory=list, description="S_flop of each layer, held-out rows")
    summary_query_grad_norm: float | None = Field(default=None, description="over all layers (dash only)")
    exact_match: dict[str, float] = Field(
        default_factory=dict, description="task@length -> share of held-out questions answered exactly"
    )
    checkpoint: str | None = Field(default=None, description="folder and hash, where this report wrote one")

    @model_validator(mode="after")
    def _trained(self) -> TrainRow:
        if self.status == "ok" and (self.loss is None or self.step is None):
            raise ValueError("status ok needs a loss and a step")
        return self


def mean_by_length(exact: dict[str, float]) -> dict[int, float]:
    """Mean of `TrainRow.exact_match` over the tasks at every length, ascending."""
    lengths = sorted({int(name.rpartition("@")[2]) for name in exact})
    found = {n: [v for k, v in exact.items() if k.endswith(f"@{n}")] for n in lengths}
    return {n: sum(values) / len(values) for n, values in found.items()}
