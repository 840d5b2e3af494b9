"""The command line, one module for each group of commands.

To make a model: `zepad harden`, `fit`, `calibrate`, `export`. To look at one and use it: `demo`, `info`, `predict`,
`app`. To attack and measure: `attack`, `evaluate`, `compare`. To publish: `push`, `pull`, `card`.
"""

from __future__ import annotations

import sys

from .. import progress
from ..errors import ZePADError
from . import hardening, models, publishing, robustness, serving  # noqa: F401 - each registers its commands
from .ending import INTERRUPTED
from .root import app, say

__all__ = ["main"]


def main() -> None:
    """Run the command line.

    The exit status is 0 on success, 1 after an error of zepad, 2 after wrong usage and 130 after an interruption.
    """
    try:
        app()
    except ZePADError as error:
        progress.close()
        say(f"error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:  # before a command began, or after its work was done
        sys.exit(INTERRUPTED)
