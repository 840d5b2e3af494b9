"""The CLIP example runs from two untrained models to a table, on images that ship with the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "clip_zero_shot.py"


@pytest.mark.exhaustive
def test_two_clips_are_trained_hardened_and_attacked(tmp_path: Path) -> None:
    quick = ["--clip-epochs", "10", "--epochs", "1", "--limit", "512", "--test-limit", "10", "--eps", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *quick],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["images"], found["eps"]) == (10, "8/255")
    undefended = found["undefended victim"]
    assert undefended["benign"] > 0.6, "the small CLIP learned the digits, or the attack shows nothing"
    assert undefended["white-box"] < undefended["benign"]
    for name in ("hardened victim", "ZePAD"):
        assert set(found[name]) == {"benign", "semi-black-box", "white-box", "all"}
