"""What the verbs share: how one ends on bad input."""

from __future__ import annotations

from typing import NoReturn

import typer

BAD_INPUT = 2


def stop(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Ends the program with one sentence on standard error."""
    typer.echo(f"dashbench: {message}", err=True)
    raise typer.Exit(code)
