"""The command line: one module for each group of commands."""

from __future__ import annotations

import sys

from ..errors import ZePADError
from . import models, publishing, robustness, serving  # noqa: F401 - each registers its commands
from .root import app, say

__all__ = ["main"]


def main() -> None:
    """Run the command line. The exit status is 0 on success, 1 after an error of zepad, and 2 after wrong usage."""
    try:
        app()
    except ZePADError as error:
        say(f"error: {error}", err=True)
        sys.exit(1)
