"""The examples run from start to end on images that ship with the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(folder: Path, script: str, *options: str) -> str:
    """Run an example in a folder and return what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_encoders_hardened_once_without_labels_defend_three_tasks(tmp_path: Path) -> None:
    printed = run(tmp_path, "harden_once.py", "--limit", "200", "--epochs", "2", "--test-limit", "40")
    tasks = [json.loads(line) for line in printed.splitlines()]
    assert [found["task"] for found in tasks] == ["which digit", "even or odd", "below five"]
    for found in tasks:
        assert found["undefended"]["benign"] > 0.9
        assert found["ZePAD"]["benign"] > 0.9
        assert found["ZePAD"]["attacked"] > found["undefended"]["attacked"] + 0.15


@pytest.mark.exhaustive
def test_two_clips_are_trained_hardened_and_attacked(tmp_path: Path) -> None:
    quick = ["--clip-epochs", "10", "--epochs", "1", "--limit", "512", "--test-limit", "10", "--eps", "8"]
    found = json.loads(run(tmp_path, "clip_zero_shot.py", *quick))
    assert (found["images"], found["eps"]) == (10, "8/255")
    undefended = found["undefended victim"]
    assert undefended["benign"] > 0.6, "the small CLIP learned the digits, or the attack shows nothing"
    assert undefended["white-box"] < undefended["benign"]
    for objective in ("restoration", "FARE"):
        for model in ("hardened victim", "ZePAD"):
            scores = found[f"{objective}, {model}"]
            assert set(scores) == {"benign", "semi-black-box", "semi-black-box+", "white-box", "all"}
