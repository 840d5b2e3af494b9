"""`import zepad` stays light."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"timm", "open_clip", "matplotlib", "sklearn", "torchvision", "transformers", "torchmetrics"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & HEAVY


def test_importing_zepad_imports_no_optional_or_heavy_package() -> None:
    assert loaded_by("import zepad, zepad.cli") == set()


def test_the_probe_can_fail() -> None:
    assert loaded_by("import sklearn") == {"sklearn"}
