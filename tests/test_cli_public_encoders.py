"""`zepad evaluate` on models built from every source of encoders: which public encoders the attackers are given."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from command_line import zepad
from tiny import TinyEncoder, features
from zepad import BenignConfig, HardenConfig, HeadConfig, Preprocessing, ZePAD, protocols
from zepad.cli import robustness
from zepad.data import digits
from zepad.encoders import Encoder, EncoderSpec, build_encoder
from zepad.encoders.given import as_encoder
from zepad.errors import StageError

pytestmark = pytest.mark.usefixtures("no_network")

AUXILIARY = "zepad:digits-simclr"
CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1},
}
VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def resnet(stem: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = torchvision.models.resnet18()
    if stem != "torchvision":
        model.conv1 = nn.Conv2d(3, 64, 3, bias=False)
    return {f"backbone.{key}": value for key, value in model.state_dict().items() if not key.startswith("fc.")}


def solo(folder: Path) -> EncoderSpec:
    """A file whose weights the victim uses in another way than by default."""
    torch.save({"state_dict": resnet("zepad")}, folder / "byol.ckpt")
    return EncoderSpec(source="solo", weights=str(folder / "byol.ckpt"), arguments={"stem": "zepad"})


def lightly(folder: Path) -> EncoderSpec:
    torch.save({"state_dict": resnet("torchvision")}, folder / "simclr.ckpt")
    small = Preprocessing.imagenet(size=(32, 32))
    return EncoderSpec(source="lightly", weights=str(folder / "simclr.ckpt"), preprocessing=small)


def vit(folder: Path) -> EncoderSpec:
    torch.manual_seed(1)
    model = transformers.ViTModel(transformers.ViTConfig(**VIT, image_size=16, patch_size=8), add_pooling_layer=False)
    model.save_pretrained(folder / "vit")
    return EncoderSpec(source="transformers", weights=str(folder / "vit"), pooling="mean")


def clip(folder: Path) -> EncoderSpec:
    torch.manual_seed(1)
    open_clip.factory._MODEL_CONFIGS["tiny"] = CLIP
    model = open_clip.create_model("tiny")
    safetensors.torch.save_file(model.state_dict(), folder / "clip.safetensors")
    colors = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear"}
    open_clip.pretrained._PRETRAINED["tiny"] = {"here": {"file": str(folder / "clip.safetensors"), **colors}}
    return EncoderSpec(source="open_clip", name="tiny", weights="here")


SOURCES: dict[str, Callable[[Path], EncoderSpec]] = {
    "solo": solo,
    "lightly": lightly,
    "transformers": vit,
    "open_clip": clip,
}


# Both readers of files build a ResNet-18 for every model, which takes seconds.
EVERY_SOURCE = pytest.mark.parametrize(
    "source",
    [*(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("solo", "lightly")), "transformers", "open_clip"],
)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for known in (open_clip.factory._MODEL_CONFIGS, open_clip.pretrained._PRETRAINED):
            patch.setitem(known, "tiny", None)  # and taken out again at the end
        yield {name: make(tmp_path_factory.mktemp(name)) for name, make in SOURCES.items()}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Encoder]]:
    """The public encoders that each evaluation gives its attackers; nothing is evaluated."""
    seen: list[dict[str, Encoder]] = []

    def measure(models: Mapping[str, nn.Module], *_: Any, public: dict[str, Encoder], **settings: Any) -> Any:
        seen.append(public)
        raise StageError("stopped here")

    monkeypatch.setattr(protocols, "measure", measure)
    return seen


def saved(folder: Path, victim: Any, detector: str = "gap") -> Path:
    """A saved model whose hardened encoders are no longer the public ones."""
    defense = ZePAD.from_encoders(victim, AUXILIARY, preset="paper", detector=detector)
    with torch.no_grad():
        for role in ("victim", "auxiliary"):
            for weight in defense.encoder(role).parameters():
                weight.mul_(1.25)
    defense.save_pretrained(folder)
    return folder


def evaluated(model: Path, out: Path, *options: object) -> str:
    done = zepad("evaluate", model, "--out", out, "--limit", 4, "--train-limit", 4, "--quiet", *options)
    assert "stopped here" in done.stderr
    assert done.returncode == 1
    return done.stderr


def same(one: Encoder, other: Encoder) -> bool:
    images = digits("test").images[:3]
    return torch.equal(features(one, images), features(other, images))


@EVERY_SOURCE
def test_every_saved_model_gets_the_attackers_there_can_be(source: str, specs: Any, given: Any, tmp_path: Path) -> None:
    public = as_encoder("victim", specs[source])
    model = saved(tmp_path / "model", specs[source])
    message = evaluated(model, tmp_path / "out")
    assert given[-1].keys() == {"auxiliary"}
    assert "The public victim is not known, so no attacker has it: " in message
    assert f"--victim {source}:..." in message
    # What is given is used as the model uses its own: with the same stem, preprocessing and pooling.
    assert "not known" not in evaluated(model, tmp_path / "out", "--victim", str(specs[source]))
    assert same(given[-1]["victim"], public)
    assert given[-1]["victim"].spec == public.spec
    assert same(given[-1]["auxiliary"], as_encoder("auxiliary", AUXILIARY))


@EVERY_SOURCE
def test_a_detector_that_keeps_the_public_victim_gives_it_to_the_attackers(
    source: str, specs: Any, given: Any, tmp_path: Path
) -> None:
    model = saved(tmp_path / "model", specs[source], detector="features")
    assert "not known" not in evaluated(model, tmp_path / "out")
    assert given[-1].keys() == {"victim", "auxiliary"}
    assert same(given[-1]["victim"], as_encoder("victim", specs[source]))


def test_no_public_encoder_is_built_that_was_given(specs: Any, given: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model = saved(tmp_path / "model", "zepad:digits-barlow-twins")
    built: list[str] = []

    def spy(spec: EncoderSpec, *, pretrained: bool = False) -> Encoder:
        built.append(str(spec))
        return build_encoder(spec, pretrained=pretrained)

    monkeypatch.setattr("zepad.encoders.build_encoder", spy)
    evaluated(model, tmp_path / "out", "--victim", specs["transformers"], "--auxiliary", "zepad:digits-barlow-twins")
    assert built == [str(specs["transformers"]), "zepad:digits-barlow-twins"]
    assert same(given[-1]["auxiliary"], as_encoder("auxiliary", "zepad:digits-barlow-twins"))


def test_a_module_of_ones_own_can_be_given_by_nobody_else(given: Any, tmp_path: Path) -> None:
    """Such a model loads with its modules alone, which the command line does not have."""
    defense = ZePAD.from_encoders(TinyEncoder(), AUXILIARY, preset="paper")
    assert robustness._public_encoders(defense, {}).keys() == {"auxiliary"}
    found = robustness._public_encoders(defense, {"victim": "zepad:digits-barlow-twins"})
    assert same(found["victim"], as_encoder("victim", "zepad:digits-barlow-twins"))


def test_an_undefended_encoder_has_the_public_encoders_that_are_given() -> None:
    assert robustness._public_encoders(None, {}) == {}
    assert robustness._public_encoders(None, {"victim": AUXILIARY}).keys() == {"victim"}


def test_what_an_attacker_is_given_is_no_part_of_the_model(specs: Any) -> None:
    defense = ZePAD.from_encoders(specs["transformers"], AUXILIARY, detector="features")
    found = robustness._public_encoders(defense, {})["victim"]
    kept = copy.deepcopy(defense.encoder("reference"))
    with torch.no_grad():
        next(found.parameters()).add_(1)
    assert same(defense.encoder("reference"), kept)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("source", "detector"),
    # The network of solo takes minutes; it is read as that of lightly is.
    [*((source, "gap") for source in SOURCES if source != "solo"), ("transformers", "features")],
)
def test_a_model_of_every_source_is_evaluated(source: str, detector: str, specs: Any, tmp_path: Path) -> None:
    loader = DataLoader(Subset(digits("train"), range(64)), batch_size=32, shuffle=True)
    defense = ZePAD.from_encoders(specs[source], AUXILIARY, preset="paper", detector=detector)
    defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    defense.fit_benign(loader, BenignConfig(epochs=1), head_config=HeadConfig(epochs=20), progress=False)
    defense.calibrate(digits("test").images[100:200], fit_loader=loader)
    defense.save_pretrained(tmp_path / "model")
    few = ("--steps", 1, "--queries", 1, "--limit", 4, "--train-limit", 4, "--universal", "", "--quiet", "--json")
    options = ("--victim", str(specs[source])) if detector == "gap" else ()
    done = zepad("evaluate", tmp_path / "model", "--out", tmp_path / "out", *few, *options)
    assert done.returncode == 0, done.stderr
    groups = {attack["threat_model"] for attack in json.loads(done.stdout)["attacks"]}
    assert groups == {"semi-black-box", "semi-black-box+", "published", "white-box"}
