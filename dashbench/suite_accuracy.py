"""A suite of kind `accuracy`: checkpoints at several sparsities answer the questions of tasks."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dashbench.models.kinds import KINDS, PRESETS
from dashbench.models.sizes import RANDOM, SIZES, random_size
from dashbench.rows_accuracy import AccuracyPoint
from dashbench.suite_kernels import Sparsity, Tokens
from dashbench.tasks.ruler import PREFIX, TASKS
from dashbench.yaml_lines import At, nearest


class CheckpointEntry(BaseModel):
    """A checkpoint, and the settings it is evaluated with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="label in rows and figures")
    path: str = Field(
        description="a folder, a name on the Hugging Face hub, or `random:SIZE`: random weights"
    )
    attention: Literal["auto", *KINDS] = Field(
        default="auto", description="the kind; auto: as the checkpoint says; random weights need a name"
    )
    preset: Literal[tuple(PRESETS["dash"])] = Field(
        default="package", description="settings that neither the config nor `knobs` give"
    )
    knobs: list[dict[str, Any]] = Field(
        default_factory=list, description="settings to evaluate, one mapping each"
    )
    sparsity: list[Sparsity] = Field(
        default_factory=list, description="targets; the knob is found on held-out prompts"
    )

    @model_validator(mode="after")
    def _random(self) -> CheckpointEntry:
        size = random_size(self.path)
        if size is not None and size not in SIZES:
            known = [RANDOM + name for name in SIZES]
            raise At(f"unknown random weights {self.path!r}{nearest(self.path, known)}", "path")
        if size is not None and self.attention == "auto":
            kinds = ", ".join(KINDS)
            raise At(f"random weights do not say their attention: expected one of {kinds}", "attention")
        return self


class TaskEntry(BaseModel):
    """A task or several, at some lengths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: list[str] = Field(
        min_length=1, description="names of lm-eval tasks; with `folder`, of released RULER prompts, or `all`"
    )
    folder: str | None = Field(default=None, description="released RULER prompts, a file a task")
    length: list[Tokens] = Field(
        default_factory=lambda: [0], description="tokens of generated prompts; released ones have their own"
    )
    samples: int = Field(gt=0, description="documents of each task and length, the first ones")

    @model_validator(mode="after")
    def _known(self) -> TaskEntry:
        if self.folder is not None:
            for number, task in enumerate(self.tasks):
                if task != "all" and task not in TASKS:
                    raise At(f"unknown RULER task {task!r}{nearest(task, [*TASKS, 'all'])}", "tasks", number)
            if self.length != [0]:
                raise At("released prompts have their own length", "length")
        elif self.length == [0] and any(task.startswith(("niah", "ruler")) for task in self.tasks):
            raise At("missing key: lm-eval's RULER generates prompts of a length", "length")
        return self

    def names(self) -> list[str]:
        """Names in lm-eval."""
        if self.folder is None:
            return self.tasks
        return [PREFIX + t for task in self.tasks for t in (TASKS if task == "all" else [task])]


class AccuracySuite(BaseModel):
    """A suite of kind `accuracy`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    RUN: ClassVar[str] = "dashbench.evaluate:run_suite"
    PLAN: ClassVar[str] = "dashbench.evaluate:plan_suite"
    ENDING: ClassVar[str] = "dashbench.evaluate_ending:print_ending"
    REQUIRED_KEYS: ClassVar[tuple[str, ...]] = ()
    EXAMPLES: ClassVar[dict[str, str]] = {
        "CheckpointEntry": " such as {name: dash, path: fasa-org/MiniCPM-4-8B-DashAttention}",
        "TaskEntry": " such as {tasks: [niah_single_1], length: [4k], samples: 20}",
        "Sparsity": " such as {S_flop: 0.75}",
    }
    NESTED: ClassVar[dict[str, type[BaseModel]]] = {
        "checkpoints": CheckpointEntry, "tasks": TaskEntry, "sparsity": Sparsity,
    }  # fmt: skip

    version: Literal[1] = Field(description="version of the suite format")
    kind: Literal["accuracy"] = Field(description="what kind of measurement")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names the result file")
    description: str = Field(default="", description="what the suite is for")
    checkpoints: list[CheckpointEntry] = Field(min_length=1, description="models to evaluate")
    tasks: list[TaskEntry] = Field(min_length=1, description="what they answer")
    calibration_prompts: int = Field(
        default=3, gt=0, description="documents behind the evaluated ones, on which targets are calibrated"
    )
    seed: int = Field(default=0, description="of random weights; kept with the rows; generation is greedy")

    def points(self) -> list[AccuracyPoint]:
        """All questions, checkpoint by checkpoint, setting by setting."""
        found: dict[str, AccuracyPoint] = {}
        for entry in self.checkpoints:
            settings: list[dict[str, Any]] = [{"knobs": knobs} for knobs in entry.knobs]
            settings += [
                {"sparsity_target": s.S_flop, "sparsity_tolerance": s.tolerance} for s in entry.sparsity
            ]
            for setting in settings or [{}]:
                for task in self.tasks:
                    for name in task.names():
                        for length in task.length:
                            for document in range(task.samples):
                                point = AccuracyPoint(
                                    checkpoint=entry.path, label=entry.name, attention=entry.attention,
                                    preset=entry.preset, task=name, length=length, folder=task.folder,
                                    document=document, seed=self.seed, **setting,
                                )  # fmt: skip
                                found.setdefault(point.key(), point)
        return list(found.values())

    def interpreters(self) -> dict[str, str]:
        """All models run in this Python."""
        return {}

    @staticmethod
    def refine_schema(schema: dict[str, Any]) -> None:
        """Nothing that pydantic does not know."""
