"""What a command says when somebody interrupts it: what is kept, and how to go on."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .. import progress
from ..escaping import clean
from .root import say

INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a command that was interrupted, as shells have it."""


@contextmanager
def interruptible(kept: str, *options: str) -> Iterator[None]:
    """Turn Ctrl-C inside the block into two lines that help, and exit status 130.

    Args:
        kept: A sentence that says what is kept of the work.
        *options: Options that the command needs to go on from there, where it was called without them.
    """
    try:
        yield
    except KeyboardInterrupt:
        progress.close()
        say(f"Interrupted. {clean(kept)}", err=True)
        say(f"Go on with: {again(*options)}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def again(*options: str) -> str:
    """Return the command that is running as it can be typed again, with further options."""
    arguments = sys.argv[1:]
    return clean(shlex.join(["zepad", *arguments, *(option for option in options if option not in arguments)]))
