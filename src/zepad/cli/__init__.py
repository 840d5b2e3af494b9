"""The command line: `zepad demo`, `info`, `predict`, `attack`, `evaluate`, `compare`, `push`, `pull` and `card`."""

from __future__ import annotations

import sys

import typer

from ..errors import ZePADError
from . import models, publishing, robustness
from .root import app

__all__ = ["app", "main", "models", "publishing", "robustness"]


def main() -> None:
    """Run the command line: 0 when all is well, 1 for an error of zepad's, 2 for wrong usage."""
    try:
        app()
    except ZePADError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
