"""Models saved by an earlier version load and decide as before; tests/data/README.md says how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tiny import TinyEncoder
from zepad import HardenConfig, ZePAD
from zepad.types import ENCODER_ROLES

FORMAT_3 = Path(__file__).parent / "data" / "format3"
FITTED = ("plain", "recommended", "temperature", "mixed")


def load(name: str) -> ZePAD:
    return ZePAD.from_pretrained(FORMAT_3 / name, victim=TinyEncoder(), auxiliary=TinyEncoder())


def expected(name: str) -> dict[str, Tensor]:
    return load_file(FORMAT_3 / name / "expected.safetensors")


def assert_as_then(found: Tensor, then: Tensor, *, exactly: bool) -> None:
    if exactly:
        assert torch.equal(found, then)
    else:
        torch.testing.assert_close(found, then, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def computes_as_then(name: str) -> bool:
    """Whether convolution, matrix product and softmax of this machine and torch round as those of the fixture did.

    Computed with plain torch from the stored tensors, so that no change of zepad can turn the comparison lenient.
    """
    then, bare = expected(name), TinyEncoder().eval()
    bare.load_state_dict(load_file(FORMAT_3 / name / "victim.safetensors"))
    return torch.equal(bare(then["images"]), then["plain.features"]) and torch.equal(
        (then["plain.features"] @ then["plain.features"].T).softmax(dim=-1), then["plain.softmax"]
    )


@pytest.mark.parametrize("name", FITTED)
def test_a_fitted_model_decides_bit_for_bit_as_when_it_was_saved(name: str) -> None:
    then, exactly = expected(name), computes_as_then(name)
    defense = load(name)
    images = then["images"]
    with torch.no_grad():
        assert_as_then(defense.branch_logits(images), then["branch_logits"], exactly=exactly)
    assert_as_then(defense.predict_proba(images), then["predict_proba"], exactly=exactly)
    assert_as_then(defense.detection_score(images), then["detection_score"], exactly=exactly)
    assert torch.equal(defense.detect(images), then["detect"])


@pytest.mark.parametrize("name", [*FITTED, "hardened"])
def test_every_encoder_gives_the_features_that_it_gave_then(name: str) -> None:
    then, exactly = expected(name), computes_as_then(name)
    defense = load(name)
    assert len(defense.encoders) == sum(key.startswith("features.") for key in then)
    for role, encoder in defense.encoders.items():
        place = ENCODER_ROLES.index(role)
        assert_as_then(encoder(then["images"]), then[f"features.{place}"], exactly=exactly)


def test_stage_and_class_names_come_along() -> None:
    assert load("hardened").stage == "hardened"
    recommended = load("recommended")
    assert (recommended.stage, recommended.class_names) == ("fitted", ("red", "green", "blue"))
    assert recommended.provenance["calibration"]["fpr"] == 0.05


@pytest.mark.parametrize("name", FITTED)
def test_saved_anew_it_is_still_the_same(name: str, tmp_path: Path) -> None:
    defense, images = load(name), expected(name)["images"]
    defense.save_pretrained(tmp_path)
    again = ZePAD.from_pretrained(tmp_path, victim=TinyEncoder(), auxiliary=TinyEncoder())
    assert torch.equal(again.predict_proba(images), defense.predict_proba(images))
    assert torch.equal(again.detection_score(images), defense.detection_score(images))
    assert again.threshold == defense.threshold


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("restoration(own_eps=0.015, own_steps=2)", 2),
        ("restoration(own_eps=None, own_steps=2)", None),
        ("trades(beta=6)", 5),
    ],
)
def test_steps_that_format_6_did_not_record_are_those_of_the_recipe(
    method: str, steps: int | None, tmp_path: Path
) -> None:
    ZePAD.from_encoders(TinyEncoder(), TinyEncoder()).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    record = {"config": HardenConfig(steps=5).to_dict(), "method": method}
    values = {**json.loads(file.read_text()), "format": 6, "provenance": {"harden": record}}
    file.write_text(json.dumps(values))
    loaded = ZePAD.from_pretrained(tmp_path / "model", victim=TinyEncoder(), auxiliary=TinyEncoder())
    assert loaded.provenance["harden"]["config"] == HardenConfig(steps=steps).to_dict()
