"""A saved model computes in half precision where the user asks for it, and decides as before."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tiny import TinyEncoder, toy_data
from zepad import ConfigError, HardenConfig, InputError, StageError, ZePAD
from zepad.errors import CheckpointError

IMAGES, LABELS = toy_data(60, seed=3)
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture
def saved(fitted: ZePAD, tmp_path: Path) -> Path:
    fitted.calibrate(toy_data(60, seed=4)[0], fpr=0.1).save_pretrained(tmp_path)
    return tmp_path


def loaded(folder: Path, dtype: torch.dtype | None) -> ZePAD:
    return ZePAD.from_pretrained(folder, dtype=dtype, victim=TinyEncoder(), auxiliary=TinyEncoder())


@pytest.mark.parametrize("dtype", HALVES)
def test_encoders_are_cast_and_answers_stay_close(saved: Path, dtype: torch.dtype) -> None:
    whole, half = loaded(saved, None), loaded(saved, dtype)
    assert {weight.dtype for weight in half.encoders.parameters()} == {dtype}
    assert {weight.dtype for weight in half.heads.parameters()} == {torch.float32}
    assert half.threshold == whole.threshold
    ours, expected = half.predict_proba(IMAGES), whole.predict_proba(IMAGES)
    assert ours.dtype == torch.float32
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)
    assert not torch.equal(ours, expected), "nothing was cast"
    torch.testing.assert_close(half.detection_score(IMAGES), whole.detection_score(IMAGES), rtol=0, atol=tolerance)
    assert half.inspect(IMAGES[0]).labels.shape == (1,)


def test_the_same_precision_is_bit_identical(saved: Path) -> None:
    assert torch.equal(loaded(saved, torch.float32).predict_proba(IMAGES), loaded(saved, None).predict_proba(IMAGES))


def test_files_are_checked_as_they_were_saved(saved: Path) -> None:
    file = saved / "victim.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="its content was changed"):
        loaded(saved, torch.bfloat16)


def test_a_weight_beyond_the_range_is_named(fitted: ZePAD, tmp_path: Path) -> None:
    fitted.encoder("victim").backbone.norm.running_var[0] = 1e6
    fitted.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"the victim encoder: norm.running_var .* torch.float16, such as 1e\+06"):
        loaded(tmp_path, torch.float16)
    assert loaded(tmp_path, torch.bfloat16).predict(IMAGES).shape == (60,)


def test_half_precision_is_not_trained_and_takes_new_heads(saved: Path) -> None:
    half = loaded(saved, torch.bfloat16)
    before = copy.deepcopy(half.state_dict())
    for call in (half.harden, half.fit_benign):
        with pytest.raises(StageError, match="Load the model without dtype="):
            call([(IMAGES, LABELS)], progress=False)
    assert all(torch.equal(value, before[key]) for key, value in half.state_dict().items())
    assert (half.fit_heads([(IMAGES, LABELS)], progress=False).predict(IMAGES) == LABELS).float().mean() > 0.9
    whole = loaded(saved, torch.float32)
    assert whole.harden([(IMAGES, LABELS)], HardenConfig(epochs=1, steps=1), progress=False).stage == "hardened"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16"])
def test_other_types_are_refused(saved: Path, dtype: object) -> None:
    with pytest.raises((ConfigError, InputError), match="dtype must be"):
        loaded(saved, dtype)
