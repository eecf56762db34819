"""What the verbs share: how lists are given, and how one ends on bad input."""

from __future__ import annotations

from typing import NoReturn

import typer

BAD_INPUT = 2


def listed(text: str | None) -> list[str] | None:
    """`dash, nsa` -> [`dash`, `nsa`]; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def stop(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Ends the program with one sentence on standard error."""
    typer.echo(f"dashbench: {message}", err=True)
    raise typer.Exit(code)
