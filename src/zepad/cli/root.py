"""The application that commands register with, and the options they share."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from ..escaping import printable

app = typer.Typer(
    help="Make pre-trained image encoders safe to build on.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def say(text: str, *, err: bool = False) -> None:
    """Print text without the control characters that a name in a file may hold.

    Args:
        text: Lines of text. Names in them are cleaned before, so that none can pass for a line of its own.
        err: Whether to print to standard error.
    """
    typer.echo(printable(text), err=err)


MODEL = typer.Argument(metavar="MODEL", help="Folder of a saved model.")
JSON_OPTION = typer.Option("--json", help="Print one JSON object and nothing else.")
QUIET = typer.Option("--quiet", help="Show no progress.")
SEED = typer.Option(min=0, metavar="NUMBER", help="Seed of everything that is drawn at random.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zepad {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version
