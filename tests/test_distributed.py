"""Training on two processes gives one model with the metrics of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import two_processes
import two_processes_accumulating
from tiny import TinyEncoder
from zepad import ZePAD
from zepad.types import REFERENCE, ROLES

EXAMPLE = Path(__file__).parents[1] / "examples" / "harden_digits.py"
TINY = Path(two_processes.__file__)
ACCUMULATING = Path(two_processes_accumulating.__file__)
# Batches, order and updates are the same; BatchNorm sees half a batch per process and random starts differ.
TOLERANCE = 0.05


def run(out: Path, *launcher: str) -> dict[str, float]:
    """Run the example and return what its main process printed."""
    command = [*launcher, str(EXAMPLE), "--out", str(out), "--epochs", "4", "--limit", "512"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def start(script: Path, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start_pair(script: Path, *arguments: str | Path) -> list[subprocess.Popen[str]]:
    # What torchrun sets, without the seconds that it takes to start.
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(script, *arguments, **world, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["two stages", "static"])
def test_two_processes_give_one_tiny_model_and_the_metrics_of_one_process(objective: str, tmp_path: Path) -> None:
    pair = start_pair(TINY, tmp_path / "two", objective)
    one = two_processes.train(tmp_path / "one", objective)
    outputs = [process.communicate(timeout=240) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    two = json.loads(outputs[0][0].strip().splitlines()[-1])
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert all(abs(one[key] - two[key]) <= TOLERANCE for key in one), (one, two)
    assert one["benign_accuracy"] > 0.9
    loaded = ZePAD.from_pretrained(tmp_path / "two", victim=TinyEncoder(), auxiliary=TinyEncoder())
    assert loaded.stage == "fitted"


@pytest.mark.slow
def test_two_processes_accumulate_log_and_stop_as_one_does(tmp_path: Path) -> None:
    pair = start_pair(ACCUMULATING, tmp_path / "two")
    two_processes_accumulating.train(tmp_path / "one")
    outputs = [process.communicate(timeout=240) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    first, second = (load_file(tmp_path / "two" / f"2-{rank}.safetensors") for rank in "01")
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first, load_file(tmp_path / "one" / "1-0.safetensors"), rtol=1e-4, atol=1e-5)
    files = [list((tmp_path / folder / "zepad").glob("events.*")) for folder in ("one", "two")]
    assert [len(found) for found in files] == [1, 1]  # the main process alone logs


@pytest.mark.exhaustive
def test_the_example_gives_one_model_and_its_metrics_whoever_starts_it(tmp_path: Path) -> None:
    # `accelerate launch --num_processes 2 --cpu` starts a single process in accelerate 1.15; torchrun starts two, which
    # Accelerate joins in the same way.
    one = run(tmp_path / "one", sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu")
    two = run(tmp_path / "two", sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert all(abs(one[key] - two[key]) <= TOLERANCE for key in one), (one, two)
    assert one["benign_accuracy"] > 0.9
    assert ZePAD.from_pretrained(tmp_path / "two").stage == "fitted"
    names = {path.name for path in (tmp_path / "two").iterdir()}
    parts = {f"{part}.safetensors" for part in (*ROLES, REFERENCE, "heads")}
    assert names == parts | {"README.md", "config.json"}
