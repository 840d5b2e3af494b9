"""Nothing that is not a number reads as a decision, is saved, or is loaded."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save
from torch import nn

from command_line import zepad
from tiny import TinyEncoder, toy_data
from zepad import CheckpointError, ConfigError, InputError, ZePAD
from zepad.ensemble import BranchEnsemble
from zepad.finite import check_finite, faulty_weight
from zepad.functional import conformal_threshold

IMAGES, LABELS = toy_data(12)
DECISIONS = ("predict", "predict_proba", "detection_score", "detect", "inspect")
STRANGE = (math.nan, math.inf, -math.inf)


def damage(defense: ZePAD, value: float, role: str = "auxiliary") -> ZePAD:
    with torch.no_grad():
        defense.branch(role).head[5].bias[1] = value
    return defense


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, -3e38, *STRANGE]), min_size=2, max_size=2), min_size=1))
def test_values_are_refused_exactly_where_one_is_not_finite(rows: list[list[float]]) -> None:
    bad = [i for i, row in enumerate(rows) if not all(map(math.isfinite, row))]
    worst = [next((value for value in row if not math.isfinite(value)), row[0]) for row in rows]
    for values in (torch.tensor(rows), torch.tensor(worst)):
        if not bad:
            assert check_finite(values, "logits") is values
            continue
        with pytest.raises(InputError) as error:
            check_finite(values, "logits", first=7)
        assert f"the logits of {len(bad)} of {len(rows)} images are not finite, first at image {7 + bad[0]}" in str(
            error.value
        )


@pytest.mark.parametrize("value", STRANGE)
@pytest.mark.parametrize("call", DECISIONS)
def test_a_damaged_branch_decides_nothing(fitted: ZePAD, call: str, value: float) -> None:
    damage(fitted, value)
    if value == -math.inf and call in ("detection_score", "detect"):  # the other classes still have a probability
        assert getattr(fitted, call)(IMAGES).isfinite().all()
        return
    with pytest.raises(InputError, match=r"the (logits|detection scores) of 12 of 12 images are not finite.*branch"):
        getattr(fitted, call)(IMAGES)


class Overflows(nn.Module):
    """Logits that are infinite for dark images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        brightness = images.mean(dim=(1, 2, 3))
        return torch.stack([brightness.where(brightness > 0.1, math.inf), -brightness], dim=1)


def test_the_image_that_cannot_be_decided_is_named_in_batches_and_chunks_alike() -> None:
    model = BranchEnsemble({"one": Overflows(), "two": Overflows()}, fusion="mean", threshold=0.0)
    images = torch.rand(300, 3, 2, 2) * 0.5 + 0.5
    assert model.predict(images).shape == (300,)
    images[290] = 0
    for given_images in (images, list(images.split(7))):
        for call in (model.predict, model.detect):
            with pytest.raises(InputError, match="first at image 290, so nothing is decided"):
                call(given_images)


@pytest.mark.parametrize("threshold", [*STRANGE, "0.1"])
@pytest.mark.parametrize("call", ["detect", "inspect"])
def test_a_threshold_that_is_no_number_flags_nothing_in_silence(fitted: ZePAD, call: str, threshold: Any) -> None:
    fitted.threshold = threshold
    with pytest.raises(ConfigError, match=r"threshold must be a finite number.*calibrate"):
        getattr(fitted, call)(IMAGES)


@pytest.mark.parametrize("fusion", ["rfdm", "mean", "bounded", "mixed", "temperature"])
def test_no_rule_decides_where_a_hardened_branch_gives_nan(fitted: ZePAD, fusion: str) -> None:
    damage(fitted.configure(fusion=fusion), math.nan, "victim")
    with pytest.raises(InputError, match="not finite"):
        fitted.predict(IMAGES)


def test_calibration_on_a_damaged_model_is_refused_and_changes_nothing(fitted: ZePAD) -> None:
    images, labels = toy_data(90, seed=8)
    damage(fitted.configure(fusion="bounded"), math.nan, "benign")
    before = (fitted.threshold, fitted.fusion, copy.deepcopy(fitted.provenance))
    with pytest.raises(InputError, match="the branches' logits of 90 of 90 images are not finite"):
        fitted.calibrate([(images, labels)])
    assert before == (fitted.threshold, fitted.fusion, fitted.provenance)


@pytest.mark.parametrize("value", STRANGE)
def test_a_threshold_is_never_set_on_scores_that_are_not_finite(value: float) -> None:
    scores = torch.arange(99.0)
    scores[3] = value
    with pytest.raises(ValueError, match="finite scores; got NaN or infinity"):
        conformal_threshold(scores, fpr=0.05)


# files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(fitted: ZePAD, tmp_path: Path) -> Path:
    fitted.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def alter(folder: Path, name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one tensor as someone would who can also write the digest."""
    tensors = load((folder / name).read_bytes())
    tensors[key] = change(tensors[key].clone())
    blob = save(tensors)
    (folder / name).write_bytes(blob)
    config = json.loads((folder / "config.json").read_text())
    config["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    (folder / "config.json").write_text(json.dumps(config))


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "key", "change", "message"),
    [
        ("victim.safetensors", "conv.weight", first(math.nan), "conv.weight holds 1 values of 216 that are NaN"),
        ("benign.safetensors", "conv2.bias", first(math.inf), "conv2.bias holds 1 values of 8"),
        ("victim.safetensors", "norm.running_mean", first(math.nan), "norm.running_mean holds 1"),
        ("auxiliary.safetensors", "norm.running_var", first(-1e-9), "norm.running_var holds negative values"),
        ("heads.safetensors", "victim.5.bias", first(-math.inf), r"5.bias holds 1 values of 3"),
        (
            "heads.safetensors",
            "victim.5.bias",
            lambda bias: bias.to(torch.float8_e4m3fn),
            "types: 5.bias is torch.float8_e4m3fn, expected torch.float32",
        ),
    ],
)
def test_a_file_whose_weights_cannot_be_computed_with_is_refused(
    saved: Path, name: str, key: str, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    alter(saved, name, key, change)
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        ZePAD.from_pretrained(saved, victim=TinyEncoder(), auxiliary=TinyEncoder())


def test_a_damaged_model_is_not_saved_over_a_whole_one(saved: Path, fitted: ZePAD) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(CheckpointError, match="auxiliary: 5.bias holds 1 values of 3 .*is not saved"):
        damage(fitted, math.nan).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_damaged_model_is_not_exported(fitted: ZePAD, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the logits of 2 of 2 images are not finite"):
        damage(fitted, math.nan).export(tmp_path / "model.pt2", image_size=(16, 16))
    assert not list(tmp_path.iterdir())


def test_the_command_line_prints_no_decision_that_is_none(
    demo_model: ZePAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "image.png")
    demo_model.save_pretrained(tmp_path / "model")
    assert zepad("predict", tmp_path / "model", tmp_path / "image.png").returncode == 0
    monkeypatch.setattr("zepad.model.ZePAD._detector_inputs", _not_finite(ZePAD._detector_inputs))
    run = zepad("predict", tmp_path / "model", tmp_path / "image.png", "--json")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: the logits of 1 of 1 images are not finite")


def _not_finite(look: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: ZePAD, images: torch.Tensor) -> Any:
        inputs, silent = look(self, images)
        return inputs._replace(logits=inputs.logits * math.nan), silent

    return wrapped


@pytest.fixture
def demo_model() -> ZePAD:
    from torch.utils.data import DataLoader, Subset

    from zepad import BenignConfig, HardenConfig, HeadConfig
    from zepad.data import digits

    loader = DataLoader(Subset(digits("train"), range(60)), batch_size=20)
    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
    defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    return defense.fit_benign(
        loader, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1, batch_size=20), progress=False
    )


def test_weights_may_be_anything_that_is_a_number() -> None:
    module = TinyEncoder()
    module.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    module.register_buffer("count", torch.tensor(-3))
    module.register_buffer("running_variable", torch.tensor([-1.0]))
    module.register_buffer("none", torch.zeros(0))
    module.register_buffer("phase", torch.tensor([1j]))
    module.register_buffer("eight_bits", torch.ones(2).to(torch.float8_e4m3fn))
    module.half_bias = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    assert faulty_weight(module) is None
    module.mask[0] = math.nan
    assert faulty_weight(module) == "mask holds 1 values of 2 that are NaN or infinite"
