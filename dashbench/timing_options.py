"""How long and how precisely a point is timed; part of a suite. No torch here."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TimingOptions(BaseModel):
    """The `timing` block of a suite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    warmup_seconds: float = Field(
        default=0.05, ge=0, description="run untimed for this long (at least twice)"
    )
    min_samples: int = Field(default=10, ge=3, description="never fewer samples than this")
    max_samples: int = Field(default=1000, ge=3, description="never more samples than this")
    max_seconds: float = Field(
        default=1.0, gt=0, description="stop after this much sampling, once min_samples are in"
    )
    target_half_width: float = Field(
        default=0.01,
        gt=0,
        description="stop once the 95 % interval of the median is this narrow, relative, each side",
    )
    rounds: int = Field(default=3, ge=1, description="slices in which the methods of one shape take turns")
    timeout_seconds: float = Field(
        default=300, gt=0, description="a point that takes longer in any one step is `timeout`"
    )
    checked_rows: int = Field(
        default=64, ge=1, description="query rows that the gate compares with the fp64 reference"
    )

    @model_validator(mode="after")
    def _ordered(self) -> TimingOptions:
        if self.min_samples > self.max_samples:
            raise ValueError(f"min_samples {self.min_samples} is more than max_samples {self.max_samples}")
        return self
