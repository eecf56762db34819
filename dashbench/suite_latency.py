"""A suite of kind `latency`: time to first token and between tokens of whole models."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dashbench.models.kinds import KINDS, PRESETS
from dashbench.models.sizes import RANDOM, SIZES
from dashbench.rows_latency import LatencyPoint
from dashbench.suite_kernels import Positive, Sparsity, Tokens, _axis
from dashbench.yaml_lines import At


class ModelEntry(BaseModel):
    """A model: a checkpoint, or random weights of a shape."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="label in rows and figures")
    attention: Literal[KINDS] = Field(description="the kind")
    path: str | None = Field(default=None, description="a folder, or a name on the Hugging Face hub")
    random: Literal[tuple(SIZES)] | None = Field(default=None, description="random weights of this shape")
    preset: Literal[tuple(PRESETS["dash"])] = Field(
        default="package", description="settings that neither the config nor `knobs` give"
    )
    knobs: dict[str, Any] = Field(default_factory=dict, description="settings of the attention")
    sparsity: Sparsity | None = Field(default=None, description="target; the knob is found for every length")

    @model_validator(mode="after")
    def _one_source(self) -> ModelEntry:
        if (self.path is None) == (self.random is None):
            raise ValueError("expected exactly one of `path` and `random`")
        if self.attention == "dense" and self.sparsity is not None:
            raise At("dense attention has no sparsity to set", "sparsity")
        return self


class LatencySuite(BaseModel):
    """A suite of kind `latency`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    RUN: ClassVar[str] = "dashbench.latency:run_suite"
    PLAN: ClassVar[str] = "dashbench.latency:plan_suite"
    ENDING: ClassVar[str] = "dashbench.latency_ending:print_ending"
    REQUIRED_KEYS: ClassVar[tuple[str, ...]] = ()
    EXAMPLES: ClassVar[dict[str, str]] = {
        "ModelEntry": " such as {name: dash, attention: dash, random: 8b, sparsity: {S_flop: 0.75}}",
        "Sparsity": " such as {S_flop: 0.75}",
    }
    NESTED: ClassVar[dict[str, type[BaseModel]]] = {"models": ModelEntry, "sparsity": Sparsity}

    version: Literal[1] = Field(description="version of the suite format")
    kind: Literal["latency"] = Field(description="what kind of measurement")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names the result file")
    description: str = Field(default="", description="what the suite is for")
    models: list[ModelEntry] = Field(min_length=1, description="what to measure")
    context: _axis(Tokens) = Field(description="tokens of the prompt")
    batch: _axis(Positive) = Field(default=[1], description="sequences")
    launch: _axis(Literal["eager", "graph"]) = Field(
        default=["eager"], description="decode steps from Python, or one captured step"
    )
    routing: Literal["planted", "model"] = Field(
        default="planted", description="what attention sees: planted topics, or the model's own states"
    )
    new_tokens: Positive = Field(default=32, description="tokens generated and timed")
    repeats: Positive = Field(
        default=3,
        description="times the prompt is read and timed, after a first; fewer once 20 s are spent, up to 10 "
        "in the first second",
    )
    kernel_rows: str | None = Field(
        default=None, description="folder of kernel rows of the same machine, for predictions"
    )
    seed: int = Field(default=0, description="of weights and prompts")

    def points(self) -> list[LatencyPoint]:
        """All points, model by model, short prompts first."""
        found: dict[str, LatencyPoint] = {}
        for entry in self.models:
            for context in sorted(self.context):
                for batch in self.batch:
                    for launch in self.launch:
                        target = entry.sparsity
                        point = LatencyPoint(
                            label=entry.name, checkpoint=entry.path or f"{RANDOM}{entry.random}",
                            attention=entry.attention, preset=entry.preset, knobs=entry.knobs,
                            sparsity_target=target.S_flop if target else None,
                            **({"sparsity_tolerance": target.tolerance} if target else {}),
                            routing=self.routing, context=context, batch=batch, launch=launch,
                            new_tokens=self.new_tokens, repeats=self.repeats, seed=self.seed,
                        )  # fmt: skip
                        found.setdefault(point.key(), point)
        return list(found.values())

    def interpreters(self) -> dict[str, str]:
        """All models run in this Python."""
        return {}

    @staticmethod
    def refine_schema(schema: dict[str, Any]) -> None:
        """Nothing that pydantic does not know."""
