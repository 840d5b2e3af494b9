"""A process of its own with the real client, pointed at the loopback Hub.

The client reads `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_DISABLE_XET` when it is imported, and importing it takes seconds,
so each setting has one process, which runs one piece of source after another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import zepad.errors

_PATIENCE = 60.0  # seconds for one piece of source; only a hang takes so long


class ForeignError(Exception):
    """Something that zepad did not raise came out of the process."""


class HubClient:
    """The process. A context manager.

    Args:
        environment: Set in the process before anything is imported.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.slept: list[float] = []
        """What the last call would have waited for, in seconds."""

    def __enter__(self) -> HubClient:
        self._stderr = tempfile.TemporaryFile()
        command = [sys.executable, str(Path(__file__))]
        self._process = subprocess.Popen(
            command, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(_PATIENCE)
        self._process.stdout.close()
        self._stderr.close()

    def run(self, source: str, **values: Any) -> Any:
        """Run source in the process and return what it leaves in `result`.

        Args:
            source: May use `values`, `HubRepo`, `locate`, `publish` and `Path`.
            **values: Plain JSON; paths become strings.

        Raises:
            ZePADError: Of the class and with the message that the source raised.
            ForeignError: If it raised anything else.
        """
        assert self._process.stdin
        assert self._process.stdout
        timer = threading.Timer(_PATIENCE, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"source": source, "values": values}, default=str).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            self._stderr.seek(0)
            raise ForeignError(f"the process is gone: {self._stderr.read()[-4000:].decode()}")
        answer = json.loads(line)
        self.slept = answer["slept"]
        if "error" in answer:
            raise getattr(zepad.errors, answer["error"], ForeignError)(answer["message"])
        return answer["result"]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the client prints must not mix with the answers
    import time
    from types import SimpleNamespace

    import huggingface_hub.file_download
    import huggingface_hub.utils._http

    from zepad.persistence.commits import publish
    from zepad.persistence.hub import HubRepo, locate

    slept: list[float] = []
    clock = SimpleNamespace(**{**vars(time), "sleep": slept.append})
    huggingface_hub.file_download.time = huggingface_hub.utils._http.time = clock  # type: ignore[attr-defined]
    for line in sys.stdin:
        call = json.loads(line)
        slept.clear()
        names = {"HubRepo": HubRepo, "locate": locate, "publish": publish, "Path": Path, **call["values"]}
        answer: dict[str, Any] = {}
        try:
            exec(call["source"], names)
            answer["result"] = names.get("result")
        except Exception as error:  # whatever it is, the test is to see it
            known = isinstance(error, zepad.errors.ZePADError)
            message = str(error) if known else "".join(traceback.format_exception(error))
            answer.update(error=type(error).__name__ if known else "ForeignError", message=message)
        print(json.dumps({**answer, "slept": slept}, default=str), file=answers)


if __name__ == "__main__":
    _serve()
