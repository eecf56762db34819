"""A suite of kind `train`: a small Llama from nothing, then continued with each attention on equal data."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from dashbench.miniature.shape import LlamaShape
from dashbench.rows_train import REPORTS, TrainPoint
from dashbench.yaml_lines import At

METHODS = ("dense", "infllmv2", "nsa", "dash")
Share = Annotated[float, Field(ge=0, le=1)]


class Closed(BaseModel):
    """No unknown keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MixEntry(Closed):
    """What the rows of a batch are made of; see `dashbench.miniature.rows.Mix`."""

    single: float = Field(default=3.0, ge=0, description="weight of: one value of one key")
    multiquery: float = Field(default=1.0, ge=0, description="weight of: the values of four keys")
    multivalue: float = Field(default=1.0, ge=0, description="weight of: four values of one key")
    track: float = Field(default=1.0, ge=0, description="weight of: a chain of five variables")
    short_form: Share = Field(default=0.0, description="share of rows with nothing but `KEY is: VALUE`")
    short_key: Share = Field(default=0.0, description="share of rows whose keys are one word")
    needles_only: Share = Field(default=0.5, description="share of rows without noise")
    few: Share = Field(default=0.2, description="share of rows with at most eight needles")


class Level(Closed):
    """A level of the base's curriculum, left when its longest context is mastered."""

    lengths: list[int] = Field(
        min_length=1, description="context lengths in the mix, tokens; the last counts"
    )
    mix: MixEntry = Field(default_factory=MixEntry, description="what rows are made of")


class Base(Closed):
    """Training from nothing with dense attention."""

    seeds: list[int] = Field(default=[0], min_length=1, description="of parameters and data")
    steps: int = Field(gt=0, description="optimizer steps in all")
    rate: float = Field(gt=0, description="peak learning rate of AdamW")
    muon_ratio: float = Field(default=0.0, ge=0, description="Muon's rate over AdamW's; 0: AdamW alone")
    warmup: int = Field(default=200, ge=0, description="steps")
    decay: float = Field(default=0.25, gt=0, le=1, description="share of the steps over which the rate falls")
    mastered: float = Field(default=0.9, gt=0, le=1, description="exact match of `single` that ends a level")
    tokens_per_step: int = Field(default=16384, gt=0, description="up to 256 tokens; 2x to 1k, 4x beyond")
    levels: list[Level] = Field(min_length=1, description="the curriculum")


class Continuation(Closed):
    """Continued training: the same tokens in the same order for every method."""

    methods: list[Literal[METHODS]] = Field(default=list(METHODS), min_length=1)
    seeds: list[int] = Field(
        default=[0], min_length=1, description="of the data; the first base is continued"
    )
    steps: int = Field(gt=0, description="optimizer steps")
    tokens_per_step: int = Field(gt=0, description="tokens of a step")
    lengths: list[int] = Field(min_length=1, description="context lengths, in turns")
    rate: float = Field(gt=0, description="peak learning rate of AdamW")
    rates: dict[Literal[METHODS], PositiveFloat] = Field(
        default_factory=dict, description="of a method, in place of `rate`"
    )
    warmup: int = Field(default=20, ge=0, description="steps")
    summary_ratio: float = Field(
        default=1.0, gt=0, description="rate of DashAttention's summary queries over the others'"
    )
    mix: MixEntry = Field(default_factory=MixEntry, description="what rows are made of")
    settings: dict[Literal[METHODS], dict[str, Any]] = Field(
        default_factory=dict, description="settings of a method in place of its defaults"
    )

    def rate_of(self, method: str) -> float:
        """Peak learning rate of a method's continuation."""
        return self.rates.get(method, self.rate)


class Evaluation(Closed):
    """Held-out rows after every tenth."""

    lengths: list[int] = Field(min_length=1, description="context lengths, tokens")
    tokens: int = Field(default=131072, gt=0, description="tokens of rows for each task and length")
    sweep: dict[Literal[METHODS], list[float]] = Field(
        default_factory=dict,
        description="values of a method's knob at which its finished checkpoint is scored once more",
    )


class TrainSuite(BaseModel):
    """A suite of kind `train`."""

    model_config = ConfigDict(extra="forbid")

    RUN: ClassVar[str] = "dashbench.train:run_suite"
    PLAN: ClassVar[str] = "dashbench.train:plan_suite"
    ENDING: ClassVar[str] = "dashbench.train_ending:print_ending"
    REQUIRED_KEYS: ClassVar[tuple[str, ...]] = ()
    EXAMPLES: ClassVar[dict[str, str]] = {"LlamaShape": " such as {hidden_size: 128}"}
    NESTED: ClassVar[dict[str, type[BaseModel]]] = {
        "model": LlamaShape,
        "base": Base,
        "continuation": Continuation,
        "evaluation": Evaluation,
        "mix": MixEntry,
        "levels": Level,
    }

    version: Literal[1] = Field(description="version of the suite format")
    kind: Literal["train"] = Field(description="what kind of measurement")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names the result file")
    description: str = Field(default="", description="what the suite is for")
    model: LlamaShape = Field(default_factory=LlamaShape, description="sizes, by transformers' names")
    pieces: int = Field(default=32768, ge=1024, description="keys, values and variables in the data's pool")
    base: Base = Field(description="training from nothing")
    continuation: Continuation | None = Field(default=None, description="continued training, by method")
    evaluation: Evaluation = Field(description="held-out rows after every tenth")

    @model_validator(mode="after")
    def _possible(self) -> TrainSuite:
        if self.base.steps < REPORTS:
            raise At(f"expected at least {REPORTS} steps, one a report", "base", "steps")
        if self.continuation and self.continuation.steps < REPORTS:
            raise At(f"expected at least {REPORTS} steps, one a report", "continuation", "steps")
        return self

    def recipe(self, stage: str, method: str) -> str:
        """Hash of what decides a stage's outcome: its own section, and for a continuation the base's too."""
        told = self.model_dump(mode="json", include={"model", "pieces", "base", "evaluation"})
        if stage == "continuation":
            apart = {"methods", "seeds", "settings", "summary_ratio", "rates"}
            own = self.continuation.model_dump(mode="json", exclude=apart)
            own["rate"] = self.continuation.rate_of(method)
            if method == "dash":  # other methods have no summary queries
                own["summary_ratio"] = self.continuation.summary_ratio
            told["continuation"] = own | {"settings": self.continuation.settings.get(method, {})}
        told["evaluation"]["sweep"] = self.evaluation.sweep.get(method) if stage == "continuation" else None
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]

    def points(self) -> list[TrainPoint]:
        """Ten reports a stage: the bases first, then each method by seed."""
        stages = [("base", "dense", seed, seed) for seed in self.base.seeds]
        if self.continuation:
            first = self.base.seeds[0]
            stages += [
                ("continuation", method, seed, first)
                for seed in self.continuation.seeds
                for method in self.continuation.methods
            ]
        return [
            TrainPoint(
                method=method,
                stage=stage,
                seed=seed,
                base_seed=base_seed,
                report=report,
                recipe=self.recipe(stage, method),
            )
            for stage, method, seed, base_seed in stages
            for report in range(1, REPORTS + 1)
        ]

    def interpreters(self) -> dict[str, str]:
        """None: everything trains in this Python."""
        return {}

    @staticmethod
    def refine_schema(schema: dict[str, Any]) -> None:
        """Nothing to add."""
