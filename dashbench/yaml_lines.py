"""Lines of a YAML file: pydantic says which key is wrong, the YAML nodes say on which line it is."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


class At(ValueError):
    """A problem below the model that found it: the location is added to the model's own.

    Args:
        message: the sentence.
        location: keys and indices from the model to the culprit.
    """

    def __init__(self, message: str, *location: str | int):
        super().__init__(message)
        self.location = location


class SuiteError(Exception):
    """A suite that cannot be used; the message names file, line, key, what was expected, and the nearest
    valid name."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


def check_keys(node: yaml.Node, path: Path, above: tuple[yaml.Node, ...] = ()) -> None:
    """Every key is a plain word given once, and no alias contains itself."""
    if node in above:
        raise SuiteError(f"{path}:{node.start_mark.line + 1}: an alias contains itself")
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise SuiteError(f"{path}:{line}: a key is a word, not a list or a mapping")
            if key.tag not in KEY_TAGS:
                raise SuiteError(f"{path}:{line}: key {key.value} is not a word; quote it if it is one")
            if key.value in seen:
                raise SuiteError(f"{path}:{line}: key {key.value!r} is given twice")
            seen.add(key.value)
            check_keys(value, path, (*above, node))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            check_keys(item, path, (*above, node))


def find(node: yaml.Node | None, location: tuple[Any, ...]) -> tuple[int, str]:
    """Where a location is in the file: the 1-based line of its deepest part there, and its dotted name.

    A scalar may stand for a list of one: the index is then not part of the name.
    """
    line = node.start_mark.line + 1 if node is not None else 1
    shown: list[str] = []
    for part in location:
        below = None
        if isinstance(node, yaml.MappingNode) and not isinstance(part, int):
            for key, value in node.value:
                if key.value == str(part):
                    line, below = key.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            below = node.value[part]
            line = below.start_mark.line + 1
        elif isinstance(part, int) and node is not None:
            continue
        shown.append(str(part))
        node = below
    return line, ".".join(shown)
