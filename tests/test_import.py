"""`import zepad` stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zepad

HEAVY = {"timm", "open_clip", "matplotlib", "sklearn", "torchvision", "transformers", "torchmetrics"}


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & HEAVY


def test_importing_zepad_imports_no_optional_or_heavy_package() -> None:
    assert loaded_by("import zepad, zepad.cli") == set()


def test_the_probe_can_fail() -> None:
    assert loaded_by("import sklearn") == {"sklearn"}


def test_the_command_line_starts_without_pytorch() -> None:
    code = "import sys, zepad.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_found_when_it_is_asked_for() -> None:
    assert set(zepad.__all__) <= set(dir(zepad))
    assert all(getattr(zepad, name).__name__ == name for name in zepad.__all__ if name != "__version__")
    with pytest.raises(AttributeError, match="module 'zepad' has no attribute 'zepad'"):
        zepad.__getattr__("zepad")


def test_rooms_are_found_below_the_package() -> None:
    code = "import zepad; print(zepad.fusion.Bounded(vote=1.0), zepad.attacks.PGD(eps=0.1).steps)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Bounded(vote=1.0)")
