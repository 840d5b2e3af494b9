"""A saved model is loaded bit-identically, or loading raises an error."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as read_tensors
from safetensors.torch import save as write_tensors
from torch import Tensor, nn

import zepad.persistence.config
import zepad.persistence.folder
import zepad.persistence.hub
from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD
from zepad.encoders import Encoder, EncoderSpec, Preprocessing, build_encoder
from zepad.errors import CheckpointError, ConfigError, HubError, InputWarning, StageError, ZePADError
from zepad.fusion import RFDM
from zepad.persistence import read_config, write_card
from zepad.persistence.config import FORMAT, Base
from zepad.persistence.contents import Home
from zepad.types import ROLES

IMAGES, LABELS = toy_data(24)
BATCHES = [(IMAGES, LABELS)]
WEIGHTS = ("victim.safetensors", "auxiliary.safetensors", "benign.safetensors", "heads.safetensors")


def load(path: str | Path, **arguments: Any) -> ZePAD:
    return ZePAD.from_pretrained(path, **{"victim": TinyEncoder(), "auxiliary": TinyEncoder(), **arguments})


def harden(defense: ZePAD) -> ZePAD:
    return defense.harden(BATCHES, HardenConfig(epochs=1, steps=1), progress=False)


def fit_benign(defense: ZePAD) -> ZePAD:
    return defense.fit_benign(BATCHES, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)


def fit_heads(defense: ZePAD) -> ZePAD:
    return defense.fit_heads(BATCHES, HeadConfig(epochs=1), progress=False)


def assert_same(one: ZePAD, other: ZePAD) -> None:
    """Every tensor equal bit for bit, in value and in dtype, and every fact equal."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.dtype == second[key].dtype
        assert torch.equal(value, second[key])
    facts = ("stage", "channels", "num_classes", "class_names", "threshold", "provenance")
    assert [getattr(one, fact) for fact in facts] == [getattr(other, fact) for fact in facts]
    assert one.fusion == other.fusion
    for role in ROLES:
        assert one.encoder(role).preprocessing == other.encoder(role).preprocessing
        assert one.encoder(role).pooling == other.encoder(role).pooling
        assert one.encoder(role).spec == other.encoder(role).spec


def decide(defense: ZePAD, images: Tensor = IMAGES) -> list[Tensor]:
    return [defense.predict(images), defense.predict_proba(images), defense.detection_score(images)]


def assert_decides_alike(one: ZePAD, other: ZePAD, images: Tensor = IMAGES) -> None:
    for first, second in zip(decide(one, images), decide(other, images), strict=True):
        assert torch.equal(first, second)


def read(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def write(folder: Path, values: object) -> None:
    (folder / "config.json").write_text(json.dumps(values))


def vouch(folder: Path, name: str, blob: bytes) -> None:
    """Replace a weight file as someone would who can also write the config."""
    (folder / name).write_bytes(blob)
    values = read(folder)
    values["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    write(folder, values)


def alter(folder: Path, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    vouch(folder, name, write_tensors(change(read_tensors((folder / name).read_bytes()))))


@pytest.fixture
def saved(fitted: ZePAD, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    fitted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def normalised() -> ZePAD:
    """A fitted model whose encoders resize and normalise. For reading only."""
    torch.manual_seed(2)
    preprocess = Preprocessing.imagenet(size=(12, 12))
    model = fit_benign(harden(ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preprocess=preprocess)))
    model.class_names = ("a", "b", "c")
    return model


# round trips ----------------------------------------------------------------------------------------------------


def test_a_fitted_model_comes_back_bit_for_bit(fitted: ZePAD, tmp_path: Path) -> None:
    fitted.threshold, fitted.class_names = 0.123456789012345678, ("röd", "grün", "蓝")
    fitted.provenance["calibration"] = {"fpr": 0.05, "images": 7}
    fitted.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, fitted)
    assert_decides_alike(loaded, fitted)
    assert torch.equal(loaded.detect(IMAGES), fitted.detect(IMAGES))
    assert loaded.inspect(IMAGES[:1]) is not None
    assert not any(part.training for part in loaded.modules())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in fitted.parameters()]


@pytest.mark.parametrize("stage", ["built", "hardened", "fitted"])
def test_a_model_goes_on_from_the_stage_it_was_saved_at(stage: str, tmp_path: Path) -> None:
    original = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), fusion=RFDM(sharpness=2))
    if stage != "built":
        harden(original)
    if stage == "fitted":
        fit_benign(original)
    original.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.stage == stage
    assert_same(loaded, original)
    following = {"built": harden, "hardened": fit_benign, "fitted": fit_heads}[stage]
    assert_same(following(loaded), following(original))


def test_saving_writes_these_files_and_the_config_vouches_for_them(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {"config.json", "README.md", *WEIGHTS}
    files = read(saved)["files"]
    for name in WEIGHTS:
        blob = (saved / name).read_bytes()
        assert files[name] == {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}


def test_weight_files_hold_what_predict_needs_and_nothing_else(saved: Path, fitted: ZePAD) -> None:
    stored = {
        f"branches.{role}.encoder.backbone.{k}"
        for role in ROLES
        for k in read_tensors((saved / f"{role}.safetensors").read_bytes())
    }
    heads = read_tensors((saved / "heads.safetensors").read_bytes())
    stored |= {f"branches.{role}.head.{key}" for role, _, key in (name.partition(".") for name in heads)}
    assert stored == fitted.state_dict().keys()


def test_the_card_tells_stage_and_recipe_without_the_epochs(saved: Path, fitted: ZePAD) -> None:
    text = (saved / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: zepad\n")
    assert "Stage: fitted.\nClasses: 3." in text
    assert "| fusion | rfdm (sharpness 3) |" in text
    assert "| detector | gap, threshold 0.1 |" in text
    assert "| victim | custom, 8 features | mlp |" in text
    recipe = json.loads(text.partition("```json\n")[2].partition("```")[0])
    assert recipe.keys() == fitted.provenance.keys()
    assert recipe["harden"] == {k: v for k, v in fitted.provenance["harden"].items() if k != "history"}


def test_the_callers_modules_give_the_architecture_alone(saved: Path, fitted: ZePAD) -> None:
    victim = TinyEncoder().train()
    before = copy.deepcopy(victim.state_dict())
    stated_otherwise = Encoder(victim, preprocessing=Preprocessing.imagenet())
    loaded = load(saved, victim=stated_otherwise)
    assert_same(loaded, fitted)
    assert all(torch.equal(value, before[key]) for key, value in victim.state_dict().items())
    assert victim.training
    assert all(p.requires_grad for p in victim.parameters())


def test_a_benign_encoder_of_its_own_is_asked_for_by_its_own_name(tmp_path: Path) -> None:
    original = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), benign=TinyEncoder(width=4))
    original.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"the benign encoder is .* from_pretrained\(\.\.\., benign=module\)"):
        load(tmp_path)
    assert_same(load(tmp_path, benign=TinyEncoder(width=4)), original)


def test_one_module_may_serve_as_victim_and_auxiliary(tmp_path: Path) -> None:
    module = TinyEncoder()
    with pytest.warns(InputWarning):
        original = fit_benign(harden(ZePAD.from_encoders(module, module)))
    original.save_pretrained(tmp_path)
    loaded = load(tmp_path, victim=module, auxiliary=module)
    assert_same(loaded, original)
    assert_decides_alike(loaded, original)
    weights = [loaded.encoder(role).backbone.conv.weight for role in ("victim", "auxiliary")]  # type: ignore[union-attr]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("model", ["fitted", pytest.param("normalised", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_comes_back(
    dtype: torch.dtype, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    original = copy.deepcopy(request.getfixturevalue(model)).to(dtype)
    original.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.heads["victim"][0].weight.dtype == dtype  # type: ignore[index]
    assert_decides_alike(loaded, original, IMAGES.to(dtype))
    assert_decides_alike(loaded, original)


def test_preprocessing_and_pooling_come_from_the_config(tmp_path: Path) -> None:
    class Tokens(TinyEncoder):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(2).transpose(1, 2)

    setting = Preprocessing.imagenet(size=(12, 10), interpolation="bicubic")
    original = ZePAD.from_encoders(Encoder(Tokens(), preprocessing=setting, pooling="class_token"), TinyEncoder())
    original.save_pretrained(tmp_path)
    loaded = load(tmp_path, victim=Tokens())
    assert_same(loaded, original)
    assert torch.equal(loaded.encoder("victim")(IMAGES), original.encoder("victim")(IMAGES))


def test_encoders_of_known_sources_need_no_module(tmp_path: Path) -> None:
    original = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
    original.save_pretrained(tmp_path)
    loaded = ZePAD.from_pretrained(tmp_path)
    assert_same(loaded, original)
    assert str(loaded.encoder("victim").spec) == "zepad:digits-barlow-twins"


def test_every_architecture_is_known_before_a_file_is_opened(saved: Path) -> None:
    (saved / "victim.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the auxiliary encoder is a module of the caller's"):
        load(saved, auxiliary=None)


def test_an_encoder_that_cannot_be_laid_out_without_memory_comes_back_too(tmp_path: Path) -> None:
    regnet = build_encoder(EncoderSpec.parse("torchvision:regnet_y_400mf"))  # computes its widths with tensors
    original = ZePAD.from_encoders(regnet, "zepad:digits-simclr")
    original.save_pretrained(tmp_path)
    assert_same(ZePAD.from_pretrained(tmp_path), original)


def test_a_config_too_deep_to_be_written_again_is_refused(saved: Path) -> None:
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    (saved / "config.json").write_text(json.dumps({**read(saved), "provenance": {"harden": deep}}))
    with pytest.raises(CheckpointError, match="is damaged: .*recursion limit"):
        load(saved)


def test_a_card_that_cannot_be_written_leaves_the_older_save_whole(saved: Path, fitted: ZePAD) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    fitted.threshold = 0.7
    fitted.provenance = {**fitted.provenance, "evaluation": {"images": 1}}
    with pytest.raises(CheckpointError, match="no card can be written"):
        fitted.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_heads_alone_are_a_model_beside_the_encoders_they_were_fitted_on(
    saved: Path, fitted: ZePAD, tmp_path: Path
) -> None:
    home = Base(repo_id="me/x", revision="0" * 40)
    fitted._home = Home(base=home, files=read_config(saved / "config.json").files)  # as a push would leave it
    folder = tmp_path / "heads"
    fitted.save_pretrained(folder, heads_only=True)
    assert {path.name for path in folder.iterdir()} == {"config.json", "README.md", "heads.safetensors"}
    assert read(folder)["base"] == home.to_dict()
    for name in WEIGHTS[:3]:
        shutil.copyfile(saved / name, folder / name)
    assert_same(load(folder), fitted)

    fitted.encoder("benign").backbone.conv.bias.add_(1)
    with pytest.raises(CheckpointError, match=r"benign.safetensors changed since the encoders were published as me/x"):
        fitted.save_pretrained(folder, heads_only=True)
    assert_decides_alike(load(folder), load(saved))


def test_a_head_of_another_class_is_no_head_to_save(saved: Path, fitted: ZePAD) -> None:
    fitted.branch("victim").head = nn.Linear(8, 3)
    with pytest.raises(CheckpointError, match="must be an MLPHead or a ZeroShotHead to be saved; got Linear"):
        fitted.save_pretrained(saved)
    assert load(saved).stage == "fitted", "the older save is whole"


def test_device_is_where_the_model_ends_up(saved: Path) -> None:
    assert load(saved, device="meta").device.type == "meta"


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Nested(nn.Module):
    """An attribute by the name that wrappers such as DistributedDataParallel use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = TinyEncoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class TensorState(TinyEncoder):
    """Extra state that a weight file can hold."""

    scale = 2.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.scale)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = state.item()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize("make", [Tied, Nested, TensorState])
def test_unusual_modules_come_back(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    module = make()
    if isinstance(module, TensorState):
        module.scale = 3.0
    original = ZePAD.from_encoders(module, TinyEncoder())
    original.save_pretrained(tmp_path)
    loaded = load(tmp_path, victim=make())
    assert_same(loaded, original)
    assert torch.equal(loaded.encoder("victim")(IMAGES), original.encoder("victim")(IMAGES))


def test_a_tie_holds_after_loading(tmp_path: Path) -> None:
    # Two weights that drift apart in the next training are another model.
    ZePAD.from_encoders(Tied(), TinyEncoder()).save_pretrained(tmp_path)
    backbone = load(tmp_path, victim=Tied()).encoder("victim").backbone
    assert backbone.first.weight is backbone.second.weight  # type: ignore[union-attr]
    alter(tmp_path, "victim.safetensors", lambda t: {**t, "second.weight": t["second.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"(first|second)\.weight"):
        load(tmp_path, victim=Tied())


# saving ---------------------------------------------------------------------------------------------------------


def test_saving_over_an_older_save_leaves_nothing_of_it(saved: Path) -> None:
    (saved / "notes.txt").write_text("the user's own")
    built = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper")
    built.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == {"config.json", "README.md", "notes.txt", *WEIGHTS[:3]}
    assert "Stage: built" in (saved / "README.md").read_text()
    assert_same(load(saved), built)


@pytest.mark.parametrize("below", ["", "model"])
def test_a_target_that_cannot_be_written_is_refused(fitted: ZePAD, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.* cannot be written: .*Choose a writable folder"):
        fitted.save_pretrained(tmp_path / "file" / below)


@pytest.mark.parametrize("failing", ["auxiliary.safetensors", "README.md", "config.json"])
def test_a_save_that_fails_half_way_leaves_the_older_save_whole(
    fitted: ZePAD, saved: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def full(method: Callable[..., int]) -> Callable[..., int]:
        def write(self: Path, data: Any, **arguments: Any) -> int:
            if self.name == failing:
                method(self, data[: len(data) // 2], **arguments)
                raise OSError(28, "No space left on device")
            return method(self, data, **arguments)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full(Path.write_bytes))
        patch.setattr(Path, "write_text", full(Path.write_text))
        with pytest.raises(CheckpointError, match=r"cannot be written: .*No space left on device"):
            ZePAD.from_encoders(TinyEncoder(), TinyEncoder()).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert_same(load(saved), fitted)


class ForeignState(TinyEncoder):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def _foreign_state(folder: Path) -> ZePAD:
    model = load(folder)
    model.encoder("victim").backbone = ForeignState()  # from_encoders would refuse it
    return model


def _foreign_provenance(folder: Path) -> ZePAD:
    model = load(folder)
    model.provenance["note"] = {"path": Path("x")}
    return model


def _not_a_number(folder: Path) -> ZePAD:
    model = load(folder)
    model.threshold = float("nan")
    return model


def _partial(folder: Path) -> ZePAD:
    return load(folder, branches=["victim"])


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (_foreign_state, CheckpointError, r"victim has state that is no tensor \(_extra_state\).* Drop it"),
        (_foreign_provenance, CheckpointError, "provenance|JSON"),
        (_not_a_number, CheckpointError, "threshold|JSON"),
        (_partial, StageError, r"save_pretrained needs all encoders, .* loaded with victim alone"),
    ],
    ids=["state that is no tensor", "provenance that is no JSON", "threshold that is no number", "partial model"],
)
def test_a_model_that_cannot_be_saved_leaves_the_older_save_whole(
    saved: Path, fitted: ZePAD, make: Callable[[Path], ZePAD], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make(saved).save_pretrained(saved)
    assert_same(load(saved), fitted)


@pytest.mark.parametrize("threshold", [1, None])
def test_a_whole_threshold_comes_back_and_so_does_none(fitted: ZePAD, tmp_path: Path, threshold: float | None) -> None:
    fitted.threshold = threshold
    fitted.save_pretrained(tmp_path)
    assert load(tmp_path).threshold == threshold


# modules that do not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["victim", "auxiliary"])
def test_a_module_that_was_not_passed_is_asked_for(saved: Path, role: str) -> None:
    with pytest.raises(CheckpointError, match=rf"the {role} encoder is .*Pass its architecture .*{role}=module"):
        load(saved, **{role: None})


def test_the_benign_copy_asks_for_the_auxiliary(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the benign encoder is .*auxiliary=module"):
        ZePAD.from_pretrained(saved, branches=["benign"])


def test_another_width_is_refused_with_the_shapes(saved: Path) -> None:
    message = (
        r"victim.safetensors does not fit TinyEncoder: shapes: conv.bias is \(8,\), expected \(4,\), conv.weight is "
        r"\(8, 3, 3, 3\), expected \(4, 3, 3, 3\), .* and 3 more. Pass the module it was saved from"
    )
    with pytest.raises(CheckpointError, match=message):
        load(saved, victim=TinyEncoder(width=4))


def test_another_architecture_is_refused_with_the_keys(saved: Path) -> None:
    message = r"does not fit Conv2d: missing keys: bias, weight; unexpected keys: conv.bias, .* and 4 more"
    with pytest.raises(CheckpointError, match=message):
        load(saved, auxiliary=nn.Conv2d(3, 8, 3))


# weight files ---------------------------------------------------------------------------------------------------

each_file = pytest.mark.parametrize("name", WEIGHTS)


@each_file
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: No such file"):
        load(saved)


@each_file
def test_a_truncated_file_is_called_so(saved: Path, name: str) -> None:
    path = saved / name
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"{name} has {size - 1} bytes, expected {size}: it is truncated"):
        load(saved)
    path.write_bytes(bytes(size + 1))
    with pytest.raises(CheckpointError, match="not the file that was saved"):
        load(saved)


@each_file
@pytest.mark.parametrize("position", [0, 20, -1], ids=["length", "header", "data"])
def test_one_flipped_bit_is_found(saved: Path, name: str, position: int) -> None:
    blob = bytearray((saved / name).read_bytes())
    blob[position] ^= 1
    (saved / name).write_bytes(blob)
    with pytest.raises(CheckpointError, match=rf"{name} has sha256 .*its content was changed"):
        load(saved)


def test_a_renamed_key_is_refused_although_the_digest_fits(saved: Path) -> None:
    alter(saved, "victim.safetensors", lambda t: {key.replace("conv2", "conv3"): value for key, value in t.items()})
    message = "missing keys: conv2.bias, conv2.weight; unexpected keys: conv3.bias, conv3.weight"
    with pytest.raises(CheckpointError, match=message):
        load(saved)


@each_file
def test_an_extra_tensor_is_refused_although_the_digest_fits(saved: Path, name: str) -> None:
    key = "victim.extra" if name == "heads.safetensors" else "extra"
    alter(saved, name, lambda t: {**t, key: torch.ones(1)})
    with pytest.raises(CheckpointError, match="unexpected keys: extra"):
        load(saved)


def test_a_head_of_an_unknown_branch_is_refused(saved: Path) -> None:
    alter(saved, "heads.safetensors", lambda t: {**t, "attacker.0.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"heads.safetensors holds tensors of no branch: attacker.0.weight"):
        load(saved)


def test_a_head_of_another_shape_names_its_branch(saved: Path) -> None:
    alter(saved, "heads.safetensors", lambda t: {**t, "benign.5.bias": torch.zeros(4)})
    with pytest.raises(
        CheckpointError, match=r"heads.safetensors \(benign\) does not fit .* 5.bias is \(4,\), expected \(3,\)"
    ):
        load(saved)


@pytest.mark.parametrize("name", ["victim.safetensors", "heads.safetensors"])
def test_integers_in_place_of_weights_are_refused(saved: Path, name: str) -> None:
    alter(saved, name, lambda t: {key: value.int() for key, value in t.items()})
    with pytest.raises(CheckpointError, match="int32"):
        load(saved)


def _header(dtype: str, end: int) -> bytes:
    text = json.dumps({"conv.weight": {"dtype": dtype, "shape": [2], "data_offsets": [0, end]}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


@pytest.mark.parametrize(
    "blob",
    [
        b"\0" * 50,
        b"not safetensors at all",
        _header("F32", 4),
        _header("F8_E8M0", 2),
        _header("F4", 1),
        _header("X", 2),
    ],
    ids=["zeros", "text", "too short for its shape", "float 8", "float 4", "unknown type"],
)
def test_a_file_that_torch_cannot_read_is_refused_although_the_digest_fits(saved: Path, blob: bytes) -> None:
    vouch(saved, "victim.safetensors", blob)
    with pytest.raises(CheckpointError, match=r"victim.safetensors"):
        load(saved)


class Bomb:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_never_opened(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists(), "the bomb must work, or the test shows nothing"
    mark.unlink()
    only = tmp_path / "only"
    only.mkdir()
    (only / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        load(only)
    shutil.copy(saved / "config.json", only)
    with pytest.raises(CheckpointError, match=r"victim.safetensors cannot be read"):
        load(only)
    vouch(saved, "victim.safetensors", bomb)
    with pytest.raises(CheckpointError, match=r"victim.safetensors is no safetensors file"):
        load(saved)
    assert not mark.exists()


def test_a_config_cannot_make_timm_open_a_file(saved: Path, tmp_path: Path) -> None:
    values = read(saved)
    arguments = {"checkpoint_path": str(tmp_path / "evil.pth")}
    values["encoders"]["victim"]["spec"].update(source="timm", name="resnet10t", arguments=arguments)
    write(saved, values)
    with pytest.raises(CheckpointError, match="checkpoint_path"):
        load(saved, victim=None)


# config.json ----------------------------------------------------------------------------------------------------


def test_a_folder_without_config_is_no_model(saved: Path) -> None:
    (saved / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no config.json: it is not a saved ZePAD, or saving was interrupted"
    ):
        load(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\x00", b"[" * 200_000, b'{"format": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut off", "no UTF-8", "endlessly nested", "endless number"],
)
def test_a_config_that_is_no_json_is_refused(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json is no readable JSON"):
        load(saved)


def test_a_config_that_is_a_folder_is_refused(saved: Path) -> None:
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: Is a directory"):
        load(saved)


def test_a_huge_config_is_not_even_parsed(saved: Path) -> None:
    (saved / "config.json").write_bytes(b" " * (10 * 2**20 + 1) + b"{}")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read: it is larger than 10485760 bytes"):
        load(saved)


@pytest.mark.parametrize("values", [{}, [], None, 1, "zepad", {"model_type": "bert"}, {"library": "timm", "format": 1}])
def test_a_config_of_another_library_is_refused(saved: Path, values: object) -> None:
    write(saved, values)
    with pytest.raises(CheckpointError, match="was not written by zepad"):
        load(saved)


def test_a_newer_format_says_who_wrote_it_and_how_to_read_it(saved: Path) -> None:
    write(saved, {**read(saved), "format": FORMAT + 1, "library_version": "9.8.7", "a_field_of_the_future": 1})
    with pytest.raises(
        CheckpointError, match=rf"has format {FORMAT + 1}, written by zepad 9.8.7; .*pip install -U zepad"
    ):
        load(saved)


@pytest.mark.parametrize("version", [1, 2])
def test_a_format_from_before_the_first_release_is_refused(saved: Path, version: int) -> None:
    write(saved, {**read(saved), "format": version})
    with pytest.raises(CheckpointError, match=rf"has format {version}, older than zepad's first release. Save the"):
        load(saved)


def test_an_older_format_is_brought_up_to_date_step_by_step(
    saved: Path, fitted: ZePAD, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A format before, as it might have been: another name of a field, and of a role in the files."""

    def upgrade(values: dict[str, Any]) -> dict[str, Any]:
        return {"stage" if name == "step" else name: value for name, value in values.items()}

    monkeypatch.setattr(zepad.persistence.config, "_UPGRADES", {FORMAT - 1: upgrade})
    monkeypatch.setattr(zepad.persistence.config, "_FORMER_ROLES", {FORMAT - 1: {"victim": "prey"}})
    monkeypatch.setattr(zepad.persistence.folder, "_FILES", ("config.json", "README.md", "prey.safetensors", *WEIGHTS))
    (saved / "victim.safetensors").rename(saved / "prey.safetensors")
    heads = read_tensors((saved / "heads.safetensors").read_bytes())
    vouch(saved, "heads.safetensors", write_tensors({k.replace("victim.", "prey."): t for k, t in heads.items()}))
    values = read(saved)
    values["step"] = values.pop("stage")
    values["files"]["prey.safetensors"] = values["files"].pop("victim.safetensors")
    write(saved, {**values, "format": FORMAT - 1})
    loaded = load(saved)
    assert_same(loaded, fitted)
    loaded.save_pretrained(saved)
    assert read(saved)["format"] == FORMAT

    write(saved, {**values, "format": FORMAT - 1, "files": []})
    with pytest.raises(CheckpointError, match=r"is damaged: files"):
        load(saved)
    monkeypatch.setattr(zepad.persistence.config, "_UPGRADES", {FORMAT - 1: lambda values: values["lost"]})
    with pytest.raises(
        CheckpointError, match=rf"is damaged: it is not what format {FORMAT - 1} was \(KeyError: 'lost'\)"
    ):
        load(saved)


def test_half_a_surrogate_pair_in_a_name_is_read_as_a_question_mark(fitted: ZePAD, tmp_path: Path) -> None:
    # Such a name is that of a folder whose bytes are no UTF-8.
    fitted.class_names = ("\udcff", "b", "c")
    fitted.save_pretrained(tmp_path)
    assert load(tmp_path).class_names == ("?", "b", "c")


def test_a_config_that_could_not_be_read_back_is_not_written(saved: Path, fitted: ZePAD) -> None:
    changed = copy.deepcopy(fitted)
    changed.class_names = ("a", "b")
    with pytest.raises(CheckpointError, match=r"cannot hold this model: .*class_names must be one per class"):
        changed.save_pretrained(saved)
    assert_same(load(saved), fitted)


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True, [1]])
def test_a_format_that_is_no_version_is_refused(saved: Path, value: object) -> None:
    write(saved, {**read(saved), "format": value})
    with pytest.raises(CheckpointError, match="format must be a positive integer; got"):
        load(saved)


def paths(values: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field that the format defines, outermost first."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield (*prefix, key)
            if key not in ("provenance", "arguments"):  # free-form below
                yield from paths(value, (*prefix, key))


def at(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def refused(folder: Path, values: object) -> bool:
    write(folder, values)
    try:
        load(folder)
    except CheckpointError:
        return True
    return False


def test_every_field_is_needed(saved: Path) -> None:
    whole = read(saved)
    accepted = []
    for path in paths(whole):
        values = copy.deepcopy(whole)
        del at(values, path[:-1])[path[-1]]
        if not refused(saved, values):
            accepted.append(path)
    assert accepted == []


def test_no_field_is_unknown(saved: Path) -> None:
    whole = read(saved)
    strict = [path for path in [(), *paths(whole)] if isinstance(at(whole, path), dict) and "provenance" not in path]
    assert len(strict) >= 16, "the config itself, encoders, files, fusion, and what they hold"
    accepted = []
    for path in strict:
        values = copy.deepcopy(whole)
        at(values, path)["surplus"] = None
        if not refused(saved, values):
            accepted.append(path)
    assert accepted == []


HUGE = 10**30
_ENCODER = ("encoders", "victim")
_PIXELS = (*_ENCODER, "spec", "preprocessing")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("stage",), "finished"),
        (("stage",), "built"),
        (("stage",), None),
        (("channels",), 0),
        (("channels",), True),
        (("channels",), 3.0),
        (("num_classes",), None),
        (("num_classes",), 0),
        (("num_classes",), 4),
        (("num_classes",), HUGE),
        (("class_names",), ["a", "b"]),
        (("class_names",), [1, 2, 3]),
        (("class_names",), "abc"),
        (("class_names",), {"a": 0, "b": 1, "c": 2}),
        (("library_version",), 1),
        (("threshold",), []),
        (("threshold",), "0.1"),
        (("threshold",), True),
        (("threshold",), float("nan")),
        (("threshold",), float("inf")),
        (("provenance",), []),
        (("provenance",), {"harden": 1}),
        (("fusion",), None),
        (("fusion", "rule"), "vote"),
        (("fusion", "sharpness"), -1),
        (("fusion", "sharpness"), "3"),
        (("fusion", "sharpness"), True),
        (("fusion", "sharpness"), 10**400),
        (("fusion", "temperatures"), None),
        (("fusion", "temperatures"), [0.0]),
        (("fusion", "temperatures"), "1"),
        (("fusion", "vote"), -1),
        (("fusion", "depth"), float("inf")),
        (("fusion", "power"), 0),
        (("fusion", "benign_weight"), 1),
        (("detector",), None),
        (("detector",), "gap"),
        (("detector", "name"), "vote"),
        (("detector", "name"), ["gap"]),
        (("detector", "name"), "features"),  # whose reference is not there
        (("encoders", "reference"), {}),
        (("heads", "reference"), "mlp"),
        (("encoders",), []),
        (("encoders", "victim"), None),
        (("encoders", "attacker"), {}),
        ((*_ENCODER, "features"), 9),
        ((*_ENCODER, "features"), 0),
        ((*_ENCODER, "features"), 10**12),
        ((*_ENCODER, "features"), HUGE),
        ((*_ENCODER, "spec", "pooling"), "max"),
        ((*_ENCODER, "spec", "weights"), "/home/me/byol.ckpt"),
        ((*_ENCODER, "spec", "preprocessing"), None),
        (("heads",), {}),
        (("heads",), ["victim", "auxiliary", "benign"]),
        (("heads",), {"victim": "mlp", "auxiliary": "mlp"}),
        (("heads", "victim"), "os.system"),
        (("heads", "victim"), "zero_shot"),
        (("heads", "victim"), []),
        (("base",), []),
        (("base",), {"repo_id": "me/x"}),
        (("base",), {"repo_id": "me/x", "revision": "main"}),
        (("base",), {"repo_id": "../x", "revision": "0" * 40}),
        (("base",), {"repo_id": "hf-hub:me/x", "revision": "0" * 40}),
        (("base",), {"repo_id": 1, "revision": "0" * 40}),
        ((*_ENCODER, "architecture_of"), "os"),
        ((*_ENCODER, "spec"), "timm:resnet18"),
        ((*_ENCODER, "spec", "source"), "os"),
        ((*_ENCODER, "spec", "name"), "system"),
        ((*_ENCODER, "spec", "arguments"), {"a": 1}),
        (_PIXELS, {}),
        ((*_PIXELS, "mean"), [0.5, 0.5, 0.5]),
        ((*_PIXELS, "size"), [0, 0]),
        ((*_PIXELS, "size"), [HUGE, HUGE]),
        ((*_PIXELS, "size"), 32),
        ((*_PIXELS, "interpolation"), "lanczos"),
        (_PIXELS, {"mean": [0.5] * 5, "std": [0.5] * 5, "size": None, "interpolation": "bilinear"}),
        (_PIXELS, {"mean": [True] * 3, "std": [True] * 3, "size": None, "interpolation": "bilinear"}),
        (_PIXELS, {"mean": [], "std": [], "size": None, "interpolation": "bilinear"}),
        (_PIXELS, {"mean": [10**400] * 3, "std": [1] * 3, "size": None, "interpolation": "bilinear"}),
        (("files",), []),
        (("files", "victim.safetensors"), None),
        (("files", "../../etc/passwd"), {"sha256": "0" * 64, "bytes": 1}),
        (("files", "victim.safetensors", "sha256"), 0),
        (("files", "victim.safetensors", "sha256"), ""),
        (("files", "victim.safetensors", "bytes"), 0),
        (("files", "victim.safetensors", "bytes"), "4000"),
        (("files", "victim.safetensors", "bytes"), HUGE),
    ],
    ids=lambda part: ".".join(map(str, part)) if isinstance(part, tuple) else repr(part)[:20],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(saved: Path, path: tuple[Any, ...], value: object) -> None:
    values = read(saved)
    at(values, path[:-1])[path[-1]] = value
    write(saved, values)
    with pytest.raises(CheckpointError, match=r"is damaged|does not fit|expected|is not registered"):
        load(saved)


# fuzzing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(normalised: ZePAD, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Tensor]]:
    """A saved model that uses every field, and what it decides."""
    folder = tmp_path_factory.mktemp("published") / "model"
    normalised.save_pretrained(folder)
    return folder, decide(normalised)


def _kind(value: object) -> str:
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__


_junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_junk = st.recursive(
    _junk, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@given(data=st.data())
@settings(deadline=None, max_examples=40)  # test_fuzzing.py tries hundreds
def test_a_config_that_was_tampered_with_is_refused_or_decides_alike(
    published: tuple[Path, list[Tensor]], data: st.DataObject
) -> None:
    source, expected = published
    values = read(source)
    path = data.draw(st.sampled_from(list(paths(values))), label="path")
    action = data.draw(st.sampled_from(["replace", "delete", "add"]), label="action")
    owner, key = at(values, path[:-1]), path[-1]
    junk = data.draw(_junk, label="junk")
    # A valid setting of the right type is another model, which nobody can tell from the intended one.
    another_setting = action == "replace" and (_kind(junk) == _kind(owner[key]) or (junk is None and key == "size"))
    if action == "replace":
        owner[key] = junk
    elif action == "delete":
        del owner[key]
    else:
        owner[data.draw(st.text(max_size=8), label="name")] = junk
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(source, folder)
        write(folder, values)
        try:
            decided = decide(load(folder))
        except ZePADError:
            return
    assert another_setting or all(map(torch.equal, decided, expected))


@given(st.sampled_from(WEIGHTS), st.integers(0, 10**6), st.binary(min_size=1, max_size=9), st.booleans())
@example("victim.safetensors", 0, b"\xff" * 8, True)  # a header longer than the file
@settings(deadline=None, max_examples=30)
def test_a_weight_file_that_was_tampered_with_is_refused(
    published: tuple[Path, list[Tensor]], name: str, position: int, patch: bytes, vouched: bool
) -> None:
    source, expected = published
    blob = bytearray((source / name).read_bytes())
    position %= 600 if vouched else len(blob)  # the header is where a vouched change can do harm
    original = bytes(blob)
    blob[position : position + len(patch)] = patch
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(source, folder)
        (folder / name).write_bytes(blob)
        if vouched:
            vouch(folder, name, bytes(blob))
        try:
            decided = decide(load(folder))
        except ZePADError:
            return
    # Whoever writes the config vouches for the weights as well: then they are another model's.
    assert vouched or (bytes(blob) == original and all(map(torch.equal, decided, expected)))


# branches -------------------------------------------------------------------------------------------------------


def test_one_branch_reads_nothing_but_its_own_file(saved: Path, fitted: ZePAD) -> None:
    for name in WEIGHTS[1:]:
        (saved / name).unlink()
    part = ZePAD.from_pretrained(saved, victim=TinyEncoder(), branches=["victim"])
    assert list(part.encoders) == ["victim"]
    assert torch.equal(part.encoder("victim")(IMAGES), fitted.encoder("victim")(IMAGES))
    calls: list[Callable[[], Any]] = [
        lambda: part(IMAGES),
        lambda: part.predict(IMAGES),
        lambda: part.detect(IMAGES),
        lambda: part.inspect(IMAGES),
        lambda: part.calibrate(IMAGES),
        lambda: harden(part),
        lambda: fit_benign(part),
        lambda: fit_heads(part),
        lambda: part.save_pretrained(saved / "again"),
    ]
    for call in calls:
        with pytest.raises(
            StageError, match=r"needs all encoders, .* loaded with victim alone. Load it without branches"
        ):
            call()
    with pytest.raises(ConfigError, match="there is no encoder 'auxiliary'; this model has victim"):
        part.encoder("auxiliary")


def test_a_head_that_was_not_loaded_is_missed_with_the_right_remedy(saved: Path) -> None:
    part = load(saved, branches=["victim"])
    with pytest.raises(StageError, match="without branches"):
        part.branch("victim")


def test_several_branches_come_in_the_order_of_the_roles(saved: Path, fitted: ZePAD) -> None:
    part = load(saved, branches=["benign", "victim"])
    assert list(part.encoders) == ["victim", "benign"]
    assert torch.equal(part.encoder("benign")(IMAGES), fitted.encoder("benign")(IMAGES))


@pytest.mark.parametrize("branches", [["attacker"], ["victim", "heads"], [], "victim"])
def test_an_unknown_branch_is_refused_with_the_known(saved: Path, branches: Any) -> None:
    with pytest.raises(ConfigError, match=r"branches.* must be .*\Wvictim\W, \Wauxiliary\W(,| or) \Wbenign\W"):
        load(saved, branches=branches)


# the Hub's cache ------------------------------------------------------------------------------------------------

FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def cache(saved: Path, normalised: ZePAD, tmp_path: Path) -> Path:
    """A cache as the Hub client lays it out: `main` is the saved model, tag `v2` another one."""
    repo = tmp_path / "cache" / "models--me--x"
    shutil.copytree(saved, repo / "snapshots" / FIRST)
    normalised.save_pretrained(repo / "snapshots" / SECOND)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(FIRST)
    (repo / "refs" / "v2").write_text(SECOND)
    return tmp_path / "cache"


def from_cache(cache: Path, model_id: str = "me/x", **arguments: Any) -> ZePAD:
    return load(model_id, cache_dir=cache, local_files_only=True, **arguments)


def test_the_hub_client_delivers_the_same_model(cache: Path, fitted: ZePAD) -> None:
    loaded = from_cache(cache)
    assert_same(loaded, fitted)
    assert_decides_alike(loaded, fitted)


@pytest.mark.parametrize("revision", ["v2", SECOND])
def test_a_revision_is_obeyed(cache: Path, normalised: ZePAD, revision: str) -> None:
    assert_same(from_cache(cache, revision=revision), normalised)


def test_every_file_comes_from_one_commit(cache: Path, fitted: ZePAD, monkeypatch: pytest.MonkeyPatch) -> None:
    # Someone pushes while we download.
    download = zepad.persistence.hub.hf_hub_download

    def pushed(*arguments: Any, **named: Any) -> Any:
        path = download(*arguments, **named)
        (cache / "models--me--x" / "refs" / "main").write_text(SECOND)
        return path

    monkeypatch.setattr(zepad.persistence.hub, "hf_hub_download", pushed)
    assert_same(from_cache(cache), fitted)


def test_one_branch_asks_the_hub_for_nothing_else(cache: Path, fitted: ZePAD) -> None:
    snapshot = cache / "models--me--x" / "snapshots" / FIRST
    for name in WEIGHTS[1:]:
        (snapshot / name).unlink()
    part = from_cache(cache, branches=["victim"])
    assert torch.equal(part.encoder("victim")(IMAGES), fitted.encoder("victim")(IMAGES))
    with pytest.raises(HubError, match=r"auxiliary.safetensors of 'me/x' could not be fetched"):
        from_cache(cache)


def test_digests_are_checked_in_the_cache_too(cache: Path) -> None:
    path = cache / "models--me--x" / "snapshots" / FIRST / "benign.safetensors"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CheckpointError, match=r"benign.safetensors has sha256"):
        from_cache(cache)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"model_id": "me/y"}, "it is not in the cache"),
        ({"revision": "v3"}, "it is not in the cache"),
        ({"model_id": "me/a b"}, "is no id of a repository"),
    ],
)
def test_what_the_hub_does_not_have_is_a_hub_error(cache: Path, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(HubError, match=f"config.json of 'me/.*' could not be fetched: .*{reason}"):
        from_cache(cache, **arguments)


def test_a_download_that_may_not_go_online_is_a_hub_error(cache: Path) -> None:
    with pytest.raises(HubError, match="local_files_only"):
        from_cache(cache, force_download=True)


@pytest.mark.parametrize("path", ["./x", "../x", "/nowhere/x", "a/b/c", "x", "x" * 5000, "a/b/" + "c" * 300])
def test_a_path_that_is_not_there_is_no_hub_id(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"is no folder. Pass the folder of a saved model or a Hub id"):
        load(path)


def test_a_file_is_no_folder(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json is no folder"):
        load(saved / "config.json")


# links, and files that are no files -----------------------------------------------------------------------------


def test_a_save_replaces_links_and_leaves_what_they_point_at(saved: Path, fitted: ZePAD, tmp_path: Path) -> None:
    for name in ("README.md", "victim.safetensors", "config.json"):
        (saved / name).unlink()
        (tmp_path / name).write_text("the user's own")
        (saved / name).symlink_to(tmp_path / name)
    fitted.save_pretrained(saved)
    assert_same(load(saved), fitted)
    for name in ("README.md", "victim.safetensors", "config.json"):
        assert (tmp_path / name).read_text() == "the user's own"
        assert not (saved / name).is_symlink()


@pytest.mark.parametrize("link", [".zepad-saved", ".zepad-next"])
def test_the_folders_of_a_save_are_no_links(saved: Path, fitted: ZePAD, tmp_path: Path, link: str) -> None:
    """Else a folder that came from elsewhere could have files moved or deleted."""
    elsewhere = tmp_path / "elsewhere"
    ZePAD.from_encoders(TinyEncoder(), TinyEncoder()).save_pretrained(elsewhere)
    before = {path.name: path.read_bytes() for path in elsewhere.iterdir()}
    (saved / link).symlink_to(elsewhere)
    assert_same(load(saved), fitted)
    with pytest.raises(CheckpointError, match="cannot be written"):
        fitted.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in elsewhere.iterdir()} == before
    assert_same(load(saved), fitted)


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", ["config.json", "victim.safetensors", "heads.safetensors"])
def test_what_is_no_file_is_refused_before_it_is_read(saved: Path, fitted: ZePAD, name: str, kind: str) -> None:
    (saved / name).unlink()
    os.mkfifo(saved / name) if kind == "fifo" else (saved / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: it is no regular file"):
        load(saved)


def test_a_save_in_the_place_of_a_fifo_or_folder_is_refused_and_changes_nothing(saved: Path, fitted: ZePAD) -> None:
    (saved / "heads.safetensors").unlink()
    (saved / "heads.safetensors").mkdir()
    before = {path.name for path in saved.iterdir()}
    with pytest.raises(CheckpointError, match="cannot be written: Is a directory"):
        fitted.save_pretrained(saved)
    assert {path.name for path in saved.iterdir()} == before


def test_a_save_that_was_interrupted_after_its_commit_is_what_is_read(
    saved: Path, fitted: ZePAD, tmp_path: Path
) -> None:
    """Files that the new model has not are gone for readers too, where they still lie in the folder."""
    built = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper")
    built.save_pretrained(tmp_path / "built")
    shutil.copytree(tmp_path / "built", saved / ".zepad-saved")
    (saved / ".zepad-saved" / "heads.safetensors").touch()
    assert_same(load(saved), built)
    assert read_config(saved / "config.json").stage == "built"
    write_card(saved, "# A card")
    assert {path.name for path in saved.iterdir()} == {"config.json", "README.md", *WEIGHTS[:3]}
    assert_same(load(saved), built)


def _saves_while_opening(monkeypatch: pytest.MonkeyPatch, save: Callable[[], None], calls: Collection[int]) -> None:
    """Let saves come between the files that a reader opens, before the calls of these numbers."""
    numbers, real = itertools.count(), zepad.persistence.folder._open

    def opening(*arguments: Any) -> Any:
        if next(numbers) in calls:
            save()
        return real(*arguments)

    monkeypatch.setattr(zepad.persistence.folder, "_open", opening)


@pytest.mark.parametrize("before", range(10))
def test_a_save_between_two_files_that_are_opened_does_not_mix_models(
    saved: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    built = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    _saves_while_opening(monkeypatch, lambda: built.save_pretrained(saved), [before])
    assert_same(load(saved), built)


def test_saves_without_end_are_an_error(saved: Path, fitted: ZePAD, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zepad.persistence.folder, "_TRIES", 3)
    _saves_while_opening(monkeypatch, lambda: fitted.save_pretrained(saved), range(1000))
    with pytest.raises(CheckpointError, match="is saved over and over. Wait until that is done"):
        load(saved)


def test_two_saves_at_once_wait_for_each_other(saved: Path, fitted: ZePAD) -> None:
    built = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(model.save_pretrained, saved) for model in [fitted, built] * 6]:
            done.result()
    assert load(saved).stage in ("built", "fitted")
    assert not list(saved.glob(".*"))
