"""A process is killed at any moment, or the disk is full: the old state is there or the new one, each whole."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faults import COMMAND, Outcome, WarmProcess, fill
from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD
from zepad.persistence.folder import OpenedFolder

PRELUDE = (
    COMMAND
    + """
import sys
sys.path.insert(0, tests)
import torch
torch.set_num_threads(1)
from example_reports import report
from tiny import TinyEncoder, toy_data
from zepad import ZePAD
from zepad.attacks import UniversalPerturbation
from zepad.evaluation import save_report
from zepad.evaluation.rendering import files
from zepad.persistence import export
from zepad.training.checkpoints import save_epoch

def load(folder):
    return ZePAD.from_pretrained(folder, victim=TinyEncoder(), auxiliary=TinyEncoder())

models = {name: load(folder) for name, folder in references.items()}
reports = {name: report(model=name, branches=(), detector=False, failed=False, samples=()) for name in models}
for draw in ("html_page", "overview_png"):  # which take seconds and write nothing
    drawn = {name: getattr(files, draw)(reports[name]) for name in models}
    setattr(files, draw, lambda report, drawn=drawn: drawn[report.model])

program = torch.export.export(torch.nn.Linear(300, 300), (torch.zeros(2, 300),))
export._trace = lambda *_: program  # which takes seconds and writes nothing
"""
)

SAVE = "models[name].save_pretrained(folder)"
CARD = 'command("card", folder, "--license", {"old": "mit", "new": "apache-2.0"}[name])'
REPORT = "save_report(reports[name], folder)"
EXPORT = """
fitted = models["old"]
fitted.threshold = {"old": 0.25, "new": 0.75}[name]
export.export_model(fitted, Path(folder) / "defense.pt2", image_size=(8, 8))
"""
PERTURBATION = """
delta = torch.full((1, 3, 64, 64), {"old": 0.1, "new": 0.2}[name])
UniversalPerturbation(delta=delta, eps=0.25).save(Path(folder) / "uap.safetensors")
"""
CHECKPOINT = "save_epoch(Path(folder), 1, {'state': torch.full((5000,), {'old': 1.0, 'new': 2.0}[name])})"

OPERATIONS = {
    "save": SAVE,
    "card": CARD,
    "report": REPORT,
    "export": EXPORT,
    "perturbation": PERTURBATION,
    "checkpoint": CHECKPOINT,
}
MODELS = ("save", "card")  # operations on the folder of a model, which is one state
PARTS = list(OPERATIONS)
State = list[object]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two saved models of different stages, the older with files that the newer has not."""
    folder = tmp_path_factory.mktemp("references")
    torch.manual_seed(1)
    fitted = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), num_classes=3)
    images, labels = toy_data(24, size=8)
    fitted.harden([(images, labels)], HardenConfig(epochs=1, steps=1), progress=False)
    fitted.fit_benign(
        [(images, labels)], BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False
    ).save_pretrained(folder / "old")
    ZePAD.from_encoders(TinyEncoder(), TinyEncoder()).save_pretrained(folder / "new")
    return {name: folder / name for name in ("old", "new")}


@pytest.fixture(scope="module")
def warm(references: dict[str, Path]) -> Iterator[WarmProcess]:
    with WarmProcess(PRELUDE, tests=Path(__file__).parent, references=references) as process:
        yield process


class Scene:
    """A folder that one operation writes, and what it holds before and after."""

    def __init__(self, warm: WarmProcess, operation: str, home: Path, model: Path) -> None:
        self.warm, self.operation, self.folder = warm, operation, home / "folder"
        self._model = model if operation == "card" else None
        self._kept = home / "kept"
        self.old = self._undisturbed("old")
        shutil.copytree(self.folder, self._kept)
        self.new = self._undisturbed("new")
        assert self.old != self.new
        self.start_anew()

    def _undisturbed(self, name: str) -> State:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._model, self.folder) if self._model else self.folder.mkdir()
        outcome = self.write(name)
        assert outcome.error is None
        return self.state()

    def start_anew(self) -> None:
        """Put the old state into the folder, which may be the root of a disk."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self._kept, self.folder, dirs_exist_ok=True)

    def write(self, name: str = "new", **faults: Any) -> Outcome:
        source = OPERATIONS[self.operation]
        return self.warm.run(source, within=self.folder, folder=self.folder, name=name, **faults)

    def state(self) -> State:
        """What readers see: the files of a model together, other files one by one."""
        if self.operation not in MODELS:
            return [path.read_bytes() for path in sorted(self.folder.glob("[!.]*")) if path.name != "filler"]
        load(self.folder)
        with OpenedFolder(self.folder) as opened:
            names = ("config.json", "README.md", *opened.config.own_files)
            return [{name: opened.read(name, limit=2**20) for name in names}]

    def assert_whole(self) -> None:
        """The old state or the new one, and nothing is in the way of the next write."""
        state = self.state()
        assert len(state) == len(self.old)
        for part, old, new in zip(state, self.old, self.new, strict=True):
            assert part in (old, new)

    def assert_recovers(self) -> None:
        assert self.write().error is None
        assert self.state() == self.new
        if self.operation in MODELS:
            assert {path.name for path in self.folder.iterdir()} == self.new[0].keys()  # type: ignore[attr-defined]


def load(folder: Path) -> ZePAD:
    return ZePAD.from_pretrained(folder, victim=TinyEncoder(), auxiliary=TinyEncoder())


@pytest.fixture
def scene(request: pytest.FixtureRequest, warm: WarmProcess, references: dict[str, Path], tmp_path: Path) -> Scene:
    return Scene(warm, request.param, tmp_path, references["old"])


# killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", PARTS, indirect=True)
@pytest.mark.parametrize("step", [11, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_killed_at_an_event_of_its_files(scene: Scene, step: int) -> None:
    events = scene.write().events
    assert events > 3
    for at in range(1 + events % step, events + 1, step):
        scene.start_anew()
        assert scene.write(at=at).killed
        scene.assert_whole()
        scene.assert_recovers()


@pytest.mark.exhaustive
@pytest.mark.parametrize("scene", PARTS, indirect=True)
def test_killed_at_any_moment(scene: Scene) -> None:
    moments = random.Random(0)
    seconds = scene.write().seconds
    killed = 0
    for _ in range(100):
        scene.start_anew()
        killed += scene.write(after=moments.uniform(0, seconds)).killed
        scene.assert_whole()
        if killed == 10:
            break
    assert killed
    scene.assert_recovers()


# full disks -------------------------------------------------------------------------------------------------------


def assert_refused(outcome: Outcome) -> None:
    assert outcome.error is None or "cannot be written" in outcome.error


@pytest.mark.parametrize("scene", PARTS, indirect=True)
def test_a_file_that_may_not_grow(scene: Scene) -> None:
    for largest in (0, 100, 4096):
        scene.start_anew()
        outcome = scene.write(largest_file=largest)
        assert_refused(outcome)
        assert outcome.error is not None or largest == 4096
        scene.assert_whole()
    scene.assert_recovers()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path]).returncode:
        pytest.skip("mounting a small disk takes root")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("operation", PARTS)
@pytest.mark.parametrize("points", [3, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_a_full_disk(
    warm: WarmProcess, references: dict[str, Path], disk: Path, tmp_path: Path, operation: str, points: int
) -> None:
    scene = Scene(warm, operation, tmp_path, references["old"])
    size = sum(path.stat().st_size + 4096 for path in scene.folder.rglob("*"))
    scene.folder = disk
    refused = 0
    for point in range(points):
        scene.start_anew()
        filler = fill(disk, free=point * size // points)
        outcome = scene.write()
        refused += outcome.error is not None
        assert_refused(outcome)
        scene.assert_whole()
        if outcome.error is not None:
            assert scene.state() == scene.old
        filler.unlink()
        scene.assert_recovers()
    assert refused


# readers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0.7, pytest.param(8, marks=pytest.mark.exhaustive)])
def test_a_reader_during_saves_sees_one_whole_model_each_time(
    warm: WarmProcess, references: dict[str, Path], tmp_path: Path, seconds: float
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(references["old"], folder)
    source = """
while True:
    for name in models:
        models[name].save_pretrained(folder)
"""
    saving = threading.Thread(target=warm.run, args=(source,), kwargs={"after": seconds, "folder": folder})
    saving.start()
    seen: list[str] = []
    while saving.is_alive():
        seen.append(load(folder).stage)
    saving.join()
    assert set(seen) == {"built", "fitted"}
    assert len(seen) > 5
