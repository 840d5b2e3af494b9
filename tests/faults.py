"""Processes that are killed while they write, and disks that are full.

Importing PyTorch takes seconds, so one process imports and prepares, and forks a child for each piece of source. The
child is killed after some time or at the n-th event of its files, or may write only so many bytes to a file.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

_PATIENCE = 120.0  # seconds for one piece of source; only a hang takes so long
_EVENTS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "shutil.rmtree"}


COMMAND = """
import contextlib, io, sys
from zepad.cli import main

def command(*arguments):
    sys.argv, said = ["zepad", *map(str, arguments)], io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as exit:
        assert not exit.code, said.getvalue()
"""
"""Source that defines `command(*arguments)`, which runs the command line and asserts that it succeeds."""


@dataclass(frozen=True)
class Outcome:
    """What became of a child.

    Attributes:
        killed: Whether it was killed.
        error: Class and message of what it raised, or None.
        events: How many times it opened, made, renamed or removed something, unless it was killed.
        seconds: How long it ran.
    """

    killed: bool
    error: str | None
    events: int
    seconds: float


class WarmProcess:
    """The process that forks. A context manager.

    Args:
        prelude: Source that it runs first. The names that it defines are those of every child.
        environment: Set before anything is imported.
        **values: Further names for the prelude; plain JSON, and paths become strings.
    """

    def __init__(self, prelude: str, environment: Mapping[str, str] | None = None, **values: Any) -> None:
        self._prelude = {"source": prelude, "values": values}
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}

    def __enter__(self) -> WarmProcess:
        with ExitStack() as opened:
            self._stderr: Any = opened.enter_context(tempfile.TemporaryFile())
            self._process = opened.enter_context(
                subprocess.Popen(
                    [sys.executable, str(Path(__file__))],
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                )
            )
            opened.callback(self._process.kill)
            self._ask(self._prelude)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def run(
        self,
        source: str,
        *,
        after: float | None = None,
        at: int | None = None,
        within: Path | None = None,
        largest_file: int | None = None,
        **values: Any,
    ) -> Outcome:
        """Run source in a child.

        Args:
            source: May use `values` and what the prelude defined.
            after: Seconds after which the child is killed.
            at: Number of the event, from 1, at which the child is killed, just before it takes place.
            within: Count only events of paths that contain this one.
            largest_file: Number of bytes that the child can write to one file, as on a disk that is nearly full.
            **values: Plain JSON; paths become strings.
        """
        limits = {"after": after, "at": at, "within": within, "largest_file": largest_file}
        return Outcome(**self._ask({"source": source, "values": values, **limits}))

    def _ask(self, call: Mapping[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        timer = threading.Timer(_PATIENCE, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(call, default=str).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self._stderr.seek(0)
            raise RuntimeError(f"the process is gone: {self._stderr.read()[-4000:].decode()}")
        return json.loads(line)


def fill(folder: Path, *, free: int) -> Path:
    """Fill the disk of a folder up to so many free bytes, and return the file that takes the space."""
    space = os.statvfs(folder)
    path = folder / "filler"
    path.write_bytes(b"\0" * max(0, space.f_bavail * space.f_frsize - free))
    return path


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what the source prints must not mix with the answers
    names: dict[str, Any] = {}
    for line in sys.stdin:
        call = json.loads(line)
        if names:
            answer = asdict(_fork(call, names))
        else:
            names = {"Path": Path, **call["values"]}
            exec(call["source"], names)
            answer = {}
        answers.write(json.dumps(answer).encode() + b"\n")


def _fork(call: Mapping[str, Any], names: Mapping[str, Any]) -> Outcome:
    receiving, sending = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        try:
            answer = _run(call, {**names, **call["values"]})
            os.write(sending, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        text = _read_until(pipe, call["after"])
    seconds = time.perf_counter() - start
    if text is None:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    answer = json.loads(text) if text else {"killed": True, "error": None, "events": 0}
    return Outcome(**answer, seconds=seconds)


def _read_until(pipe: BinaryIO, seconds: float | None) -> bytes | None:
    """Return what a child wrote before it ended, or None where it did not end in time."""
    ended, _, _ = select.select([pipe], [], [], seconds)
    return pipe.read() if ended else None


def _run(call: Mapping[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    events, error = 0, None

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events
        if event not in _EVENTS:
            return
        path = str(arguments[0])  # a name alone is relative to an opened folder, as where a tree is removed
        if call["within"] is None or call["within"] in path or "/" not in path:
            events += 1
            if events == call["at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    sys.addaudithook(count)
    try:
        if call["largest_file"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (call["largest_file"], unlimited[1]))
        exec(call["source"], names)
    except BaseException as raised:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"
    return {"killed": False, "error": error, "events": events}


if __name__ == "__main__":
    _serve()
