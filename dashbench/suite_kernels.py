"""A suite of kind `kernels`: attention operators, timed on a grid of axes.

Every axis takes one value or a list; the points are their product, less `exclude`, plus `include`, with the
axes named in `zip` advancing together. Methods come innermost, so that methods of one shape are measured side
by side.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dashbench.methods import registry
from dashbench.routings import ROUTINGS
from dashbench.rows import Point, Shape
from dashbench.shapes import SHAPES, named
from dashbench.timing_options import TimingOptions
from dashbench.yaml_lines import At, nearest


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _tokens(value: Any) -> Any:
    """`16k` -> 16384."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d+)k", value.strip(), re.IGNORECASE)):
        return int(match[1]) * 1024
    return value


def _method(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _routing(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _shape(value: Any) -> Any:
    if isinstance(value, str):
        if value not in SHAPES:
            raise ValueError(f"unknown shape {value!r}{nearest(value, SHAPES)}")
        return SHAPES[value][0]
    if isinstance(value, dict):
        return named(**ShapeNumbers.model_validate(value).model_dump())
    return value


class ShapeNumbers(BaseModel):
    """A shape by numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query_heads: int = Field(gt=0, description="query heads; a multiple of kv_heads")
    kv_heads: int = Field(gt=0, description="heads of keys and values")
    head_dim: int = Field(gt=0, description="elements of a head")


class MethodEntry(BaseModel):
    """A method in a suite: a name, or a name with parameters. A list as a parameter's value spans an axis of
    its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="as in `dashbench list methods`")
    knobs: dict[str, Any] = Field(default_factory=dict, description="parameters of the method")
    python: str | None = Field(
        default=None, description="another Python interpreter to run this method's worker with"
    )

    @model_validator(mode="after")
    def _known(self) -> MethodEntry:
        if self.name not in registry():
            raise ValueError(f"unknown method {self.name!r}{nearest(self.name, registry())}")
        for knob, value in self.knobs.items():
            if value == []:
                raise At("expected at least one value, got []", "knobs", knob)
        return self


class RoutingEntry(BaseModel):
    """A routing in a suite: a name, or a name with options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="as in `dashbench list routings`")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the generator")

    @model_validator(mode="after")
    def _known(self) -> RoutingEntry:
        if self.name not in ROUTINGS:
            raise ValueError(f"unknown routing {self.name!r}{nearest(self.name, ROUTINGS)}")
        known = set(ROUTINGS[self.name][1]) | ({"path"} if self.name == "captured" else set())
        for option in self.options:
            if option not in known:
                raise ValueError(f"routing {self.name} has no option {option!r}{nearest(option, known)}")
        return self


class Sparsity(BaseModel):
    """A sparsity asked for; each method's knob is found so that the measured value is this."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    S_flop: float = Field(ge=0, lt=1, description="1 − kept / causal tokens, summed over queries")
    tolerance: float = Field(default=0.01, gt=0, lt=1, description="how far off the measured value may be")


def _axis(item: Any) -> Any:
    """An axis: one item or a list of them."""
    return Annotated[list[item], BeforeValidator(_listed, json_schema_input_type=item | list[item])]


# What users may write is wider than what the models hold; the JSON Schema has to describe the former.
Positive = Annotated[int, Field(gt=0, strict=True)]
Tokens = Annotated[
    Positive,
    BeforeValidator(
        _tokens, json_schema_input_type=Positive | Annotated[str, Field(pattern=r"^[0-9]+[kK]$")]
    ),
]
MethodItem = Annotated[MethodEntry, BeforeValidator(_method, json_schema_input_type=str | MethodEntry)]
RoutingItem = Annotated[
    RoutingEntry,
    BeforeValidator(_routing, json_schema_input_type=Literal[tuple(ROUTINGS)] | RoutingEntry),
]
ShapeItem = Annotated[
    Shape, BeforeValidator(_shape, json_schema_input_type=Literal[tuple(SHAPES)] | ShapeNumbers)
]
ITEMS: dict[str, Any] = {
    "phase": Literal["prefill", "decode", "train", "layer"],
    "context": Tokens,
    "batch": Positive,
    "shape": ShapeItem,
    "dtype": Literal["bfloat16", "float16", "float32"],
    "sparsity": Sparsity,
    "routing": RoutingItem,
    "cache": Literal["cold", "warm"],
    "launch": Literal["eager", "graph"],
    "block_size": Positive,
    "seed": Annotated[int, Field(strict=True)],
}


class Axes(BaseModel):
    """The axes of a grid, each one value or a list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: _axis(MethodItem) | None = Field(default=None, description="what to measure")
    phase: _axis(ITEMS["phase"]) | None = Field(
        default=None,
        description="prefill, decode (one token against a cache) or train (forward and backward)",
    )
    context: _axis(ITEMS["context"]) | None = Field(default=None, description="tokens; 16k means 16384")
    batch: _axis(ITEMS["batch"]) | None = Field(default=None, description="sequences")
    shape: _axis(ITEMS["shape"]) | None = Field(
        default=None, description="a preset, or {query_heads, kv_heads, head_dim}"
    )
    dtype: _axis(ITEMS["dtype"]) | None = Field(default=None, description="of inputs and outputs")
    sparsity: _axis(ITEMS["sparsity"]) | None = Field(
        default=None, description="targets for sparse methods; dense methods are measured once"
    )
    routing: _axis(ITEMS["routing"]) | None = Field(default=None, description="generator of the inputs")
    cache: _axis(ITEMS["cache"]) | None = Field(
        default=None, description="whether inputs can be in the L2 cache when the method starts"
    )
    launch: _axis(ITEMS["launch"]) | None = Field(
        default=None, description="from Python each time, or replayed from a CUDA graph"
    )
    block_size: _axis(ITEMS["block_size"]) | None = Field(
        default=None, description="tokens in a chunk or block of keys"
    )
    seed: _axis(ITEMS["seed"]) | None = Field(default=None, description="of the inputs")

    @model_validator(mode="before")
    @classmethod
    def _not_empty(cls, content: Any) -> Any:
        for name in cls.model_fields if isinstance(content, dict) else ():
            if name in content and content[name] is None:
                raise At("expected a value, got nothing", name)
            if content.get(name) == [] and name in Axes.model_fields and name != "sparsity":
                raise At("expected at least one value, got []", name)
        return content


AXES = tuple(name for name in Axes.model_fields if name != "methods")
DEFAULTS: dict[str, list[Any]] = {
    "batch": [1],
    "dtype": ["bfloat16"],
    "sparsity": [],
    "routing": [RoutingEntry(name="topics")],
    "cache": ["cold"],
    "launch": ["eager"],
    "block_size": [64],
    "seed": [0],
}
COMPARISON = re.compile(r"(<=|>=|<|>)\s*(\d+k|\d*\.?\d+)", re.IGNORECASE)
EXCLUDABLE = ("method", *AXES)
REQUIRED = ("methods", "phase", "context", "shape")
NUMERIC = ("context", "batch", "sparsity", "block_size", "seed")


class IncludedGrid(Axes):
    """A further grid; axes not given are taken from the suite."""

    zip: list[list[str]] | None = Field(
        default=None, description="groups of this grid's axes that advance together (default: none)"
    )


class KernelSuite(Axes):
    """A suite of kind `kernels`: attention operators, timed."""

    RUN: ClassVar[str] = "dashbench.runner:run_suite"
    PLAN: ClassVar[str] = "dashbench.plan:plan_suite"
    ENDING: ClassVar[str] = "dashbench.ending:print_ending"
    REQUIRED_KEYS: ClassVar[tuple[str, ...]] = REQUIRED
    EXAMPLES: ClassVar[dict[str, str]] = {
        "Sparsity": " such as {S_flop: 0.75}",
        "MethodEntry": " such as {name: dash@reference}, or a name",
        "RoutingEntry": " such as {name: topics}, or a name",
        "Shape": " such as {query_heads: 32, kv_heads: 2, head_dim: 128}, or a preset",
        "TimingOptions": " such as {max_seconds: 0.5}",
    }
    NESTED: ClassVar[dict[str, type[BaseModel]]] = {
        "timing": TimingOptions,
        "methods": MethodEntry,
        "routing": RoutingEntry,
        "sparsity": Sparsity,
        "shape": ShapeNumbers,
        "include": IncludedGrid,
    }

    version: Literal[1] = Field(description="version of the suite format")
    kind: Literal["kernels"] = Field(description="what kind of measurement")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names the result file")
    description: str = Field(default="", description="what the suite is for")
    zip: list[list[str]] = Field(default_factory=list, description="groups of axes that advance together")
    include: list[IncludedGrid] = Field(
        default_factory=list, description="further grids; axes not given are taken from the suite"
    )
    exclude: list[dict[str, Any]] = Field(
        default_factory=list, description="points that match every key of an entry are left out"
    )
    timing: TimingOptions = Field(default_factory=TimingOptions, description="how long and how precisely")

    @model_validator(mode="after")
    def _consistent(self) -> KernelSuite:
        for needed in REQUIRED:
            if getattr(self, needed) is None:
                raise At("missing key", needed)
        _check_zip(self, self)
        for number, grid in enumerate(self.include):
            _check_zip(grid, _filled(grid, self), "include", number)
        python: dict[str, str | None] = {}
        for grid, where in ((self, ()), *((grid, ("include", n)) for n, grid in enumerate(self.include))):
            for number, entry in enumerate(grid.methods or []):
                if python.setdefault(entry.name, entry.python) != entry.python:
                    message = f"{entry.name} has another `python` elsewhere in this suite"
                    raise At(message, *where, "methods", number)
        shapes = {shape.name for grid in (self, *self.include) for shape in grid.shape or []}
        for number, entry in enumerate(self.exclude):
            if not entry:
                raise At("expected at least one key; an empty entry matches every point", "exclude", number)
            for name, wanted in entry.items():
                if name not in EXCLUDABLE:
                    raise At(f"unknown key{nearest(name, EXCLUDABLE)}", "exclude", number, name)
                for option in _listed(wanted):
                    if complaint := _unmatchable(name, option, shapes):
                        raise At(complaint, "exclude", number, name)
        return self

    def points(self) -> list[Point]:
        """All points, without duplicates, in a stable order: methods innermost."""
        found: dict[str, Point] = {}
        grids = [(self, self.zip), *((_filled(extra, self), extra.zip or []) for extra in self.include)]
        for axes, groups in grids:
            for point in _expand(axes, groups):
                if not any(_matches(point, entry) for entry in self.exclude):
                    found.setdefault(point.key(), point)
        return list(found.values())

    def interpreters(self) -> dict[str, str]:
        """Python interpreter by method, where the suite names one."""
        entries = itertools.chain(self.methods or [], *((extra.methods or []) for extra in self.include))
        return {entry.name: entry.python for entry in entries if entry.python}

    @staticmethod
    def refine_schema(schema: dict[str, Any]) -> None:
        """What pydantic does not know of the JSON Schema: names that depend on others."""
        properties = schema["properties"]
        properties["exclude"]["items"]["propertyNames"] = {"enum": list(EXCLUDABLE)}
        properties["zip"]["items"]["items"]["enum"] = list(AXES)
        included = schema["$defs"]["IncludedGrid"]["properties"]["zip"]["anyOf"][0]
        included["items"]["items"]["enum"] = list(AXES)


def _check_zip(grid: KernelSuite | IncludedGrid, axes: Axes, *where: str | int) -> None:
    """Every group of `grid.zip` names axes once, and they have equally many values in `axes`."""
    seen: set[str] = set()
    for number, group in enumerate(grid.zip or []):
        for place, axis in enumerate(group):
            if axis not in AXES:
                raise At(f"unknown axis {axis!r}{nearest(axis, AXES)}", *where, "zip", number, place)
            if axis in seen:
                raise At(f"axis {axis!r} is zipped twice", *where, "zip", number, place)
            seen.add(axis)
        lengths = {axis: len(getattr(axes, axis) or DEFAULTS[axis]) for axis in group}
        if len(set(lengths.values())) > 1:
            raise At(f"axes of one group need equal lengths, got {lengths}", *where, "zip", number)


def _unmatchable(name: str, option: Any, shapes: set[str]) -> str | None:
    """Why a value in `exclude` could never match a point, or None: a typo must not bring points back."""
    if name in NUMERIC:
        if isinstance(option, str) and COMPARISON.fullmatch(option.strip()):
            return None
        number = _tokens(option)
        fine = number is None or isinstance(number, float) if name == "sparsity" else False
        if fine or (isinstance(number, int) and not isinstance(number, bool)):
            return None
        return f"expected a number, or a comparison such as '>16k', got {option!r}"
    known = {
        "method": set(registry()),
        "routing": set(ROUTINGS),
        "shape": shapes | set(SHAPES),
    }.get(name) or set(get_args(ITEMS[name]))
    if isinstance(option, str) and option in known:
        return None
    return f"expected the name of a {name}, got {option!r}{nearest(str(option), known)}"


def _filled(extra: Axes, base: KernelSuite) -> Axes:
    given = {name: getattr(extra, name) for name in Axes.model_fields if getattr(extra, name) is not None}
    return Axes.model_construct(**{name: given.get(name, getattr(base, name)) for name in Axes.model_fields})


def _expand(axes: Axes, zips: list[list[str]]) -> Iterable[Point]:
    values = {
        axis: getattr(axes, axis) if getattr(axes, axis) is not None else DEFAULTS[axis] for axis in AXES
    }
    zipped = {axis for group in zips for axis in group}
    # Targets vary innermost, with the methods; zipped ones advance with their group.
    targets = values["sparsity"] if "sparsity" in zipped else values.pop("sparsity")
    dimensions: list[list[dict[str, Any]]] = []
    for axis in values:
        if axis in zipped:
            group = next(g for g in zips if axis in g)
            if axis == next(a for a in values if a in group):
                dimensions.append(
                    [
                        dict(zip(group, row, strict=True))
                        for row in zip(*(values[a] for a in group), strict=True)
                    ]
                )
        else:
            dimensions.append([{axis: value} for value in values[axis]])
    for combination in itertools.product(*dimensions):
        setting: dict[str, Any] = {k: v for part in combination for k, v in part.items()}
        routing: RoutingEntry = setting.pop("routing")
        here = [setting.pop("sparsity")] if "sparsity" in setting else targets
        for entry in axes.methods or []:
            method = registry()[entry.name]
            wanted: list[Sparsity | None] = [None]
            if method.knob is not None and method.knob not in entry.knobs and here:
                wanted = list(here)
            spans = [[(k, v) for v in _listed(value)] for k, value in sorted(entry.knobs.items())]
            for chosen in itertools.product(*spans):
                for target in wanted:
                    yield Point(
                        method=entry.name,
                        knobs=dict(chosen),
                        routing=routing.name,
                        routing_options=routing.options,
                        sparsity_target=target.S_flop if target else None,
                        **({"sparsity_tolerance": target.tolerance} if target else {}),
                        **setting,
                    )


def _matches(point: Point, entry: dict[str, Any]) -> bool:
    actual = {
        **{axis: getattr(point, axis) for axis in AXES if axis not in ("shape", "sparsity")},
        "method": point.method,
        "shape": point.shape.name,
        "sparsity": point.sparsity_target,
    }
    return all(
        any(_fits(actual[name], option) for option in _listed(wanted)) for name, wanted in entry.items()
    )


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str) and (match := COMPARISON.fullmatch(wanted.strip())):
        if value is None:
            return False
        limit = float(_tokens(match[2]))
        return {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}[match[1]]
    return value == _tokens(wanted)
