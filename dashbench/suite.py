"""The suite file: YAML in, a validated suite out, and errors that say what to type instead.

Every suite has a `kind`; what belongs to one kind is in a module of its own, imported when a file asks for
it. A kind is a pydantic model (its *spec*) with

    points() -> list            what to measure; a point has `key()` (16 hex digits) and `method`
    interpreters() -> dict      Python interpreters by method, where the suite names some
    RUN, PLAN, ENDING           "module:function" that run a suite, plan it, and print what a run found;
                                signatures as `runner.run_suite`, `plan.plan_suite`, `ending.print_ending`
    NESTED, EXAMPLES            key -> model below it, and model name -> what to write: for error messages
    REQUIRED_KEYS               required keys that the model itself declares optional
    refine_schema(schema)       finishes the JSON Schema
"""

from __future__ import annotations

import difflib
import hashlib
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dashbench.yaml_lines import At, SuiteError, check_keys, find, nearest

SUITE_VERSION = 1
SUITE_KINDS = {
    "kernels": "dashbench.suite_kernels:KernelSuite",
    "accuracy": "dashbench.suite_accuracy:AccuracySuite",
    "latency": "dashbench.suite_latency:LatencySuite",
    "train": "dashbench.suite_train:TrainSuite",
}


def imported(name: str) -> Any:
    """The object that `module:name` names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


class Suite:
    """A validated suite with its name and hash.

    Attributes:
        path: where it was read from.
        spec: the validated content.
        id: `name@hash`; the hash covers the content, not comments or the order of the suite's keys (but that
            inside `exclude`, `knobs` and `options`).
    """

    def __init__(self, path: Path, spec: BaseModel):
        self.path = path
        self.spec = spec
        digest = hashlib.sha256(spec.model_dump_json(exclude_none=True).encode()).hexdigest()[:8]
        self.id = f"{spec.name}@{digest}"

    def points(self) -> list[Any]:
        """All points, without duplicates, in a stable order."""
        return self.spec.points()

    def interpreters(self) -> dict[str, str]:
        """Python interpreter by method, where the suite names one."""
        return self.spec.interpreters()


def _known_keys(spec: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Valid keys beside the key at the end of `location`."""
    parents = [part for part in location[:-1] if isinstance(part, str) and part in spec.NESTED]
    model = spec.NESTED[parents[-1]] if parents else spec
    return list(model.model_fields)


def _explain(path: Path, node: yaml.Node | None, spec: type[BaseModel], problem: ValidationError) -> str:
    first = problem.errors()[0]
    cause = first.get("ctx", {}).get("error")
    below = cause.location if isinstance(cause, At) else ()
    location = (*(p for p in first["loc"] if not (isinstance(p, str) and "[" in p)), *below)
    line, name = find(node, location)
    kind, message, got = first["type"], first["msg"].removeprefix("Value error, "), first["input"]
    if kind == "extra_forbidden":
        message = f"unknown key{nearest(str(location[-1]), _known_keys(spec, location))}"
    elif kind == "missing":
        message = "missing key"
    elif kind == "literal_error":
        expected = first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        message = f"expected one of {', '.join(expected)}, got {got!r}"
        close = difflib.get_close_matches(str(got), expected, n=1)
        message += f"; did you mean {close[0]!r}?" if close else ""
    elif kind in ("int_type", "int_parsing", "int_from_float"):
        example = ", such as 4096 or 4k" if "context" in location else ""
        message = f"expected a whole number{example}, got {got!r}"
    elif kind == "model_type":
        message = f"expected a mapping{spec.EXAMPLES.get(first['ctx']['class_name'], '')}, got {got!r}"
    elif kind != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {got!r}"
    more = problem.error_count() - 1
    rest = f" (and {more} more problem{'s' if more > 1 else ''})" if more else ""
    return f"{path}:{line}: {name or 'the suite'}: {message}{rest}"


def _read(path: Path) -> tuple[yaml.MappingNode, dict[str, Any]]:
    """The YAML nodes of a file, for line numbers, and its content."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise SuiteError(f"{path}: no such suite{hint}") from None
    except OSError as problem:
        raise SuiteError(f"{path}: cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError:
        raise SuiteError(f"{path}: cannot be read: not UTF-8 text") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise SuiteError(f"{path}:1: a suite is a mapping of keys to values")
        check_keys(node, path)
        return node, yaml.safe_load(text)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise SuiteError(f"{path}{where}: not YAML: {getattr(problem, 'problem', problem)}") from None


def _spec_of(path: Path, node: yaml.Node, content: dict[str, Any]) -> type[BaseModel]:
    kind = content.get("kind")
    line, _ = find(node, ("kind",))
    if "kind" not in content:
        raise SuiteError(f"{path}:{line}: kind: missing key; one of {', '.join(SUITE_KINDS)}")
    if kind not in SUITE_KINDS:
        expected = ", ".join(SUITE_KINDS)
        hint = nearest(str(kind), SUITE_KINDS)
        hint = hint if "did you mean" in hint else ""
        raise SuiteError(f"{path}:{line}: kind: expected one of {expected}, got {kind!r}{hint}")
    return imported(SUITE_KINDS[kind])


def load_suite(path: Path | str) -> Suite:
    """Reads and validates a suite file.

    Args:
        path: of the YAML file.

    Raises:
        SuiteError: one sentence with file, line and key.
    """
    path = Path(path)
    node, content = _read(path)
    spec = _spec_of(path, node, content)
    try:
        suite = Suite(path, spec.model_validate(content))
        if not suite.points():
            raise SuiteError(f"{path}: no points are left after `exclude`")
        return suite
    except ValidationError as problem:
        raise SuiteError(_explain(path, node, spec, problem)) from None


def json_schema() -> dict[str, Any]:
    """JSON Schema of suite files, for editors. Method names stay open: they depend on what is installed."""
    definitions: dict[str, Any] = {}
    kinds = []
    for name in SUITE_KINDS.values():
        spec = imported(name)
        schema = spec.model_json_schema()
        schema["required"] = [*schema["required"], *spec.REQUIRED_KEYS]
        spec.refine_schema(schema)
        definitions |= schema.pop("$defs", {})
        kinds.append(schema)
    found = kinds[0] if len(kinds) == 1 else {"oneOf": kinds}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "$defs": definitions}
