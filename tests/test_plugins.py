"""A fusion rule and a detector from outside the package, one class each, work in every part of the library."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD, detectors, fusion
from zepad.attacks import PGD
from zepad.errors import CheckpointError
from zepad.evaluation import Attacker, evaluate

IMAGES, LABELS = toy_data(80, seed=5)


@dataclass(frozen=True, kw_only=True)
class Median(fusion.FusionRule):
    """Fuse by the median of the logits, pulled towards their mean."""

    pull: float = 0.0

    def fuse(self, logits):
        return (1 - self.pull) * logits.median(dim=0).values + self.pull * logits.mean(dim=0)

    def calibrate(self, validation, *, benign_floor):
        rules = [Median(pull=pull) for pull in (0.0, 0.5, 1.0)]
        return next((rule for rule in rules if validation.accuracy(rule) >= benign_floor), rules[-1])

    def guarantee(self):
        return "One branch of three cannot move the median beyond the other two."


@dataclass(frozen=True, kw_only=True)
class Drift(detectors.Detector):
    """Score how far the features of the undefended victim are from their benign mean."""

    needs: ClassVar[detectors.DetectorInput] = detectors.DetectorInput.REFERENCE

    def fit(self, inputs):
        return {"mean": inputs.reference_features.mean(dim=0)}

    def state_shapes(self, widths):
        return {"mean": (widths.reference,)}

    def score(self, inputs, state):
        return (inputs.reference_features - state["mean"]).square().mean(dim=1)


fusion.register("test-median", Median)
detectors.register("test-drift", Drift)


@pytest.fixture(scope="module")
def _model():
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(*toy_data()), batch_size=16, shuffle=True)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), fusion="test-median", detector="test-drift")
    defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    defense.fit_benign(loader, BenignConfig(epochs=2), head_config=HeadConfig(epochs=5), progress=False)
    return defense.calibrate([(IMAGES, LABELS)], fpr=0.1, benign_floor=0.2)


@pytest.fixture
def model(_model):
    """A calibrated model with both; a copy for each test."""
    return copy.deepcopy(_model)


def load(folder):
    return ZePAD.from_pretrained(folder, victim=TinyEncoder(), auxiliary=TinyEncoder())


def test_the_classes_are_as_short_as_promised():
    import inspect

    assert all(len(inspect.getsource(cls).splitlines()) <= 25 for cls in (Median, Drift))


def test_they_decide_and_detect(model):
    logits = model.branch_logits(IMAGES)
    assert torch.equal(model(IMAGES), model.fusion.fuse(logits))
    drift = (model.encoder("reference")(IMAGES) - model.detector.mean).square().mean(dim=1)
    torch.testing.assert_close(model.detection_score(IMAGES), drift)
    assert int(model.detect(IMAGES[1::2]).sum()) <= 4
    assert model.provenance["calibration"]["fusion"]["name"] == "test-median"


def test_they_come_back_from_disk_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["fusion"] == {"name": "test-median", "settings": {"pull": model.fusion.pull}}
    assert saved["detector"] == {"name": "test-drift", "settings": {}}
    loaded = load(tmp_path)
    assert loaded.fusion == model.fusion
    assert torch.equal(loaded.predict_proba(IMAGES), model.predict_proba(IMAGES))
    assert torch.equal(loaded.detection_score(IMAGES), model.detection_score(IMAGES))
    assert torch.equal(loaded.detect(IMAGES), model.detect(IMAGES))


def test_they_are_evaluated_and_stand_on_the_card(model, tmp_path):
    attacker = Attacker(name="PGD-2", threat_model="white-box", attack=PGD(eps=8 / 255, steps=2))
    report = evaluate(model, [(IMAGES, LABELS)], [attacker], sanity=False, progress=False)
    assert report.attacks[0].detection is not None
    model.attach(report).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "test-median (pull" in card
    assert "test-drift" in card
    assert "One branch of three cannot move the median" in card
    assert "four encoder passes" in card


def test_they_are_exported(model, tmp_path):
    program = torch.export.load(model.export(tmp_path / "model.pt2", image_size=(16, 16))).module()
    found = program(IMAGES[:3])
    torch.testing.assert_close(found["logits"], model(IMAGES[:3]))
    torch.testing.assert_close(found["detection_score"], model.detection_score(IMAGES[:3]))
    assert "weights" not in found


@pytest.mark.slow
def test_where_they_are_not_registered_the_error_names_the_remedy(model, tmp_path):
    model.save_pretrained(tmp_path)
    code = f"from zepad import ZePAD; ZePAD.from_pretrained({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert CheckpointError.__name__ in message
    assert "which is not registered here; known are" in message
    assert "Import the code that calls zepad." in message
    assert ".register('test-" in message


@pytest.mark.slow
def test_an_installed_package_brings_its_plug_ins_along(model, tmp_path):
    """An entry point of the group `zepad.plugins` is imported when a name is not known, on the command line too."""
    (tmp_path / "their_rules.py").write_text(
        "from dataclasses import dataclass\n"
        "from zepad.fusion import FusionRule, register\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Theirs(FusionRule):\n"
        "    def fuse(self, logits):\n"
        "        return logits.median(dim=0).values\n"
        "register('theirs', Theirs)\n"
    )
    info = tmp_path / "their_rules-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[zepad.plugins]\ntheirs = their_rules\n")
    folder = tmp_path / "model"
    model.configure(fusion="mean", detector="gap").save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["fusion"] = {"name": "theirs", "settings": {}}
    (folder / "config.json").write_text(json.dumps(values))
    command = [sys.executable, "-m", "zepad", "info", str(folder)]
    for path, wanted in ((str(tmp_path), "fusion      theirs"), ("", "'theirs', which is not registered here")):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, *sys.path]), "COLUMNS": "400"}
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert wanted in result.stdout + result.stderr
