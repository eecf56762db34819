"""The suite file: YAML in, points out, and errors that say what to type instead.

A suite of kind `kernels` is a grid of axes. Every axis takes one value or a list; the points are their
product, less `exclude`, plus
`include`, with the axes named in `zip` advancing together. Methods come innermost, so that methods of one
shape are measured side by side.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dashbench.methods import registry
from dashbench.routings import ROUTINGS
from dashbench.rows import Point, Shape
from dashbench.shapes import SHAPES, named
from dashbench.timing_options import TimingOptions

SUITE_VERSION = 1


class SuiteError(Exception):
    """A suite that cannot be used; the message names file, line, key, what was expected, and the nearest
    valid name."""


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
            raise ValueError(f"unknown shape {value!r}{_nearest(value, SHAPES)}")
        return SHAPES[value][0]
    if isinstance(value, dict) and set(value) == {"query_heads", "kv_heads", "head_dim"}:
        return named(**value)
    return value


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


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
            raise ValueError(f"unknown method {self.name!r}{_nearest(self.name, registry())}")
        return self


class RoutingEntry(BaseModel):
    """A routing in a suite: a name, or a name with options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(description="as in `dashbench list routings`")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the generator")

    @model_validator(mode="after")
    def _known(self) -> RoutingEntry:
        if self.name not in ROUTINGS:
            raise ValueError(f"unknown routing {self.name!r}{_nearest(self.name, ROUTINGS)}")
        known = set(ROUTINGS[self.name][1]) | ({"path"} if self.name == "captured" else set())
        for option in self.options:
            if option not in known:
                raise ValueError(f"routing {self.name} has no option {option!r}{_nearest(option, known)}")
        return self


class Sparsity(BaseModel):
    """A sparsity asked for; each method's knob is found so that the measured value is this."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    S_flop: float = Field(ge=0, lt=1, description="1 − kept / causal tokens, summed over queries")
    tolerance: float = Field(default=0.01, gt=0, lt=1, description="how far off the measured value may be")


Tokens = Annotated[int, BeforeValidator(_tokens), Field(gt=0)]
Listed = BeforeValidator(_listed)


class Axes(BaseModel):
    """The axes of a grid, each one value or a list."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    methods: Annotated[list[Annotated[MethodEntry, BeforeValidator(_method)]], Listed] | None = Field(
        default=None, description="what to measure", min_length=1
    )
    phase: Annotated[list[Literal["prefill", "decode", "train"]], Listed] | None = Field(
        default=None,
        description="prefill, decode (one token against a cache) or train (forward and backward)",
    )
    context: Annotated[list[Tokens], Listed] | None = Field(
        default=None, description="tokens; 16k means 16384"
    )
    batch: Annotated[list[Annotated[int, Field(gt=0)]], Listed] | None = Field(
        default=None, description="sequences"
    )
    shape: Annotated[list[Annotated[Shape, BeforeValidator(_shape)]], Listed] | None = Field(
        default=None, description="a preset, or {query_heads, kv_heads, head_dim}"
    )
    dtype: Annotated[list[Literal["bfloat16", "float16", "float32"]], Listed] | None = Field(
        default=None, description="of inputs and outputs"
    )
    sparsity: Annotated[list[Sparsity], Listed] | None = Field(
        default=None, description="targets for sparse methods; dense methods are measured once"
    )
    routing: Annotated[list[Annotated[RoutingEntry, BeforeValidator(_routing)]], Listed] | None = Field(
        default=None, description="generator of the inputs"
    )
    cache: Annotated[list[Literal["cold", "warm"]], Listed] | None = Field(
        default=None, description="whether inputs can be in the L2 cache when the method starts"
    )
    launch: Annotated[list[Literal["eager", "graph"]], Listed] | None = Field(
        default=None, description="from Python each time, or replayed from a CUDA graph"
    )
    block_size: Annotated[list[Annotated[int, Field(gt=0)]], Listed] | None = Field(
        default=None, description="tokens in a chunk or block of keys"
    )
    seed: Annotated[list[int], Listed] | None = Field(default=None, description="of the inputs")


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
COMPARISON = re.compile(r"(<=|>=|<|>)\s*(\d+k?)", re.IGNORECASE)
EXCLUDABLE = ("method", *(a for a in AXES))


class KernelSuite(Axes):
    """A suite of kind `kernels`: attention operators, timed."""

    version: Literal[1] = Field(description="version of the suite format")
    kind: Literal["kernels"] = Field(description="what kind of measurement")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="names the result file")
    description: str = Field(default="", description="what the suite is for")
    zip: list[list[str]] = Field(default_factory=list, description="groups of axes that advance together")
    include: list[Axes] = Field(
        default_factory=list, description="further grids; axes not given are taken from the suite"
    )
    exclude: list[dict[str, Any]] = Field(
        default_factory=list, description="points that match every key of an entry are left out"
    )
    timing: TimingOptions = Field(default_factory=TimingOptions, description="how long and how precisely")

    @model_validator(mode="after")
    def _consistent(self) -> KernelSuite:
        for needed in ("methods", "phase", "context", "shape"):
            if getattr(self, needed) is None:
                raise ValueError(f"missing key {needed!r}")
        for group in self.zip:
            for axis in group:
                if axis not in AXES:
                    raise ValueError(f"zip: unknown axis {axis!r}{_nearest(axis, AXES)}")
            lengths = {axis: len(getattr(self, axis) or DEFAULTS[axis]) for axis in group}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"zip: axes of one group need equal lengths, got {lengths}")
        for entry in self.exclude:
            for name in entry:
                if name not in EXCLUDABLE:
                    raise ValueError(f"exclude: unknown key {name!r}{_nearest(name, EXCLUDABLE)}")
        return self


class Suite:
    """A validated suite with its name and hash.

    Attributes:
        path: where it was read from.
        spec: the validated content.
        id: `name@hash`; the hash covers the content, not comments or key order.
    """

    def __init__(self, path: Path, spec: KernelSuite):
        self.path = path
        self.spec = spec
        digest = hashlib.sha256(spec.model_dump_json(exclude_none=True).encode()).hexdigest()[:8]
        self.id = f"{spec.name}@{digest}"

    def points(self) -> list[Point]:
        """All points, without duplicates, in a stable order: methods innermost."""
        found: dict[str, Point] = {}
        for axes in [self.spec, *(_filled(extra, self.spec) for extra in self.spec.include)]:
            groups = self.spec.zip if axes is self.spec else []
            for point in _expand(axes, groups):
                if not any(_matches(point, entry) for entry in self.spec.exclude):
                    found.setdefault(point.key(), point)
        return list(found.values())

    def interpreters(self) -> dict[str, str]:
        """Python interpreter by method, where the suite names one."""
        entries = itertools.chain(
            self.spec.methods or [], *((extra.methods or []) for extra in self.spec.include)
        )
        return {entry.name: entry.python for entry in entries if entry.python}


def _filled(extra: Axes, base: KernelSuite) -> Axes:
    given = {name: getattr(extra, name) for name in Axes.model_fields if getattr(extra, name) is not None}
    return Axes.model_construct(**{name: given.get(name, getattr(base, name)) for name in Axes.model_fields})


def _expand(axes: Axes, zips: list[list[str]]) -> Iterable[Point]:
    values = {
        axis: getattr(axes, axis) if getattr(axes, axis) is not None else DEFAULTS[axis] for axis in AXES
    }
    targets = values.pop("sparsity")
    groups = [g for g in zips if "sparsity" not in g]
    zipped = {axis for group in groups for axis in group}
    dimensions: list[list[dict[str, Any]]] = []
    for axis in values:
        if axis in zipped:
            group = next(g for g in groups if axis in g)
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
        for entry in axes.methods or []:
            method = registry()[entry.name]
            wanted: list[Sparsity | None] = [None]
            if method.knob is not None and method.knob not in entry.knobs and targets:
                wanted = list(targets)
            spans = [[(k, v) for v in _listed(value)] for k, value in entry.knobs.items()]
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
        limit = _tokens(match[2])
        limit = float(limit)
        return {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}[match[1]]
    return value == _tokens(wanted)


# Reading: pydantic says which key is wrong, the YAML nodes say on which line it is.


def _check_duplicates(node: yaml.Node, path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise SuiteError(f"{path}:{key.start_mark.line + 1}: key {key.value!r} is given twice")
            seen.add(key.value)
            _check_duplicates(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_duplicates(item, path)


def _line_of(node: yaml.Node | None, location: tuple[Any, ...]) -> int:
    """1-based line of the deepest part of `location` that exists in the file."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            entry = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if entry is None:
                return line
            line, node = entry[0].start_mark.line + 1, entry[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        # A scalar that stands for a list of one, or a union's name: stay where we are.
    return line


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    """Valid keys beside the key at the end of `location`."""
    models = {
        "timing": TimingOptions,
        "methods": MethodEntry,
        "routing": RoutingEntry,
        "sparsity": Sparsity,
        "include": Axes,
    }
    parents = [part for part in location[:-1] if isinstance(part, str) and part in models]
    if parents:
        return list(models[parents[-1]].model_fields)
    return list(KernelSuite.model_fields)


def _explain(path: Path, node: yaml.Node | None, problem: ValidationError) -> str:
    first = problem.errors()[0]
    location = tuple(part for part in first["loc"] if not (isinstance(part, str) and "[" in part))
    line = _line_of(node, location)
    key = ".".join(str(part) for part in location) or "the suite"
    kind, message = first["type"], first["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        message = f"unknown key{_nearest(str(location[-1]), _known_keys(location))}"
    elif kind == "missing":
        message = "missing key"
    elif kind == "literal_error":
        expected = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        message = f"expected one of {', '.join(expected)}, got {first['input']!r}"
        close = difflib.get_close_matches(str(first["input"]), expected, n=1)
        message += f"; did you mean {close[0]!r}?" if close else ""
    elif kind != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {first['input']!r}"
    more = problem.error_count() - 1
    return f"{path}:{line}: {key}: {message}" + (f" (and {more} more problems)" if more else "")


def load_suite(path: Path | str) -> Suite:
    """Reads and validates a suite file.

    Args:
        path: of the YAML file.

    Raises:
        SuiteError: one sentence with file, line and key.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = (
            _nearest(path.name, [p.name for p in path.parent.glob("*.yaml")]) if path.parent.is_dir() else ""
        )
        raise SuiteError(f"{path}: no such suite{near.replace('; known: ', '') and near}") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise SuiteError(f"{path}: cannot be read: {problem}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise SuiteError(f"{path}:1: a suite is a mapping of keys to values")
        _check_duplicates(node, path)
        content = yaml.safe_load(text)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise SuiteError(f"{path}{where}: not YAML: {getattr(problem, 'problem', problem)}") from None
    try:
        spec = KernelSuite.model_validate(content)
        suite = Suite(path, spec)
        if not suite.points():
            raise SuiteError(f"{path}: no points are left after `exclude`")
        return suite
    except ValidationError as problem:
        raise SuiteError(_explain(path, node, problem)) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema of suite files, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **KernelSuite.model_json_schema()}
