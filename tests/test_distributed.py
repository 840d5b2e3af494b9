"""The example on two processes gives one model with the metrics of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from zepad import ZePAD

EXAMPLE = Path(__file__).parents[1] / "examples" / "harden_digits.py"
# Batches, order and updates are the same; BatchNorm sees half a batch per process and random starts differ.
TOLERANCE = 0.03


def test_accelerate_launch_with_two_processes_matches_a_single_process(tmp_path: Path) -> None:
    def run(name: str, *launcher: str) -> dict[str, float]:
        command = [*launcher, str(EXAMPLE), "--out", str(tmp_path / name), "--epochs", "2", "--steps", "1"]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.strip().splitlines()[-1])

    one = run("one", sys.executable)
    two = run("two", sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu")
    assert one.keys() == two.keys()
    assert all(abs(one[key] - two[key]) <= TOLERANCE for key in one), (one, two)
    assert one["benign_accuracy"] > 0.9
    saved = ZePAD.from_pretrained(tmp_path / "two")
    assert saved.stage == "fitted"
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        "README.md", "auxiliary.safetensors", "benign.safetensors", "config.json", "heads.safetensors", "victim.safetensors",
    ]  # fmt: skip
