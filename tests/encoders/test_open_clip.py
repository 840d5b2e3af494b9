"""open_clip: the image tower alone, recognised, rebuilt without the network, and dropped back into its model."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from tiny import features, normalised
from zepad.encoders import EncoderSpec, Preprocessing, probe
from zepad.encoders.sources.open_clip import build, wrap
from zepad.errors import ConfigError, HubError

pytestmark = pytest.mark.usefixtures("no_network")

TEXT = {"context_length": 8, "vocab_size": 20, "width": 8, "heads": 2, "layers": 1}
VISION = {"image_size": 16, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2}
PLAIN = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": TEXT}
# Architectures of open_clip's own kinds, small enough to be built by the dozen, put among its configurations.
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": PLAIN,
    "tiny-quickgelu": {**PLAIN, "quick_gelu": True},
    "tiny-siglip": {**PLAIN, "init_logit_bias": -10, "custom_text": True},
    "tiny-coca": {
        **PLAIN,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": TEXT,
        "custom_text": True,
    },
    "tiny-resnet": {**PLAIN, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}},
    "tiny-timm": {
        **PLAIN,
        "vision_cfg": {
            "timm_model_name": "test_vit",
            "timm_model_pretrained": True,
            "timm_pool": "",
            "image_size": 160,
        },
    },
    "tiny-hub-text": {**PLAIN, "text_cfg": {"hf_model_name": "roberta-base", "hf_model_pretrained": True}},
}
KINDS = [name for name in CONFIGS if name not in ("tiny-siglip", "tiny-hub-text")]  # whose image tower is like no other
OPENAI, INCEPTION = open_clip.OPENAI_DATASET_MEAN, (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def _configs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in CONFIGS.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)


def spec_of(name: str, weights: str = "", **arguments: Any) -> EncoderSpec:
    return EncoderSpec(source="open_clip", name=name, weights=weights, arguments=arguments)


def create(name: str = "tiny", **arguments: Any) -> Any:
    model = open_clip.create_model(name, pretrained_text=False, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():  # some start at zero, where no change shows, some as memory was left
            parameter.nan_to_num_().clamp_(-1, 1).add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@torch.no_grad()
def encoded(model: Any, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What the user's own model says; CoCa normalises unless told otherwise."""
    result: Tensor = model.encode_image(normalised(images, preprocessing), normalize=False)
    return result


# wrapping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_features_are_those_of_encode_image(name: str) -> None:
    model = create(name)
    encoder = wrap(model)
    assert encoder is not None
    assert (encoder.spec.name, encoder.spec.arguments) == (name, {})
    images = torch.rand(2, 3, *encoder.preprocessing.size)  # type: ignore[misc]
    assert torch.equal(features(encoder, images), encoded(model, images, encoder.preprocessing))
    assert probe(encoder) == (3, 12)


@pytest.mark.parametrize("name", KINDS)
def test_hardened_weights_drop_back_into_the_model(name: str) -> None:
    model = create(name)
    encoder = wrap(model)
    assert encoder is not None
    images = torch.rand(2, 3, *encoder.preprocessing.size)  # type: ignore[misc]
    before = encoded(model, images, encoder.preprocessing)
    with torch.no_grad():
        for parameter in encoder.backbone.parameters():
            parameter.mul_(1.1)
    model.visual.load_state_dict(encoder.backbone.state_dict())
    after = encoded(model, images, encoder.preprocessing)
    assert torch.equal(after, features(encoder, images))
    assert not torch.allclose(after, before)


def test_the_callers_model_is_left_as_found_and_its_text_tower_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create("tiny-coca").train()
    model.visual.ln_post.eval()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]

    def copied(self: object, memo: object) -> None:
        pytest.fail("a text tower was copied")

    monkeypatch.setattr(type(model.text), "__deepcopy__", copied, raising=False)
    encoder = wrap(model)
    assert encoder is not None
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.visual.output_tokens is True
    assert encoder.backbone.state_dict().keys() == model.visual.state_dict().keys()


@pytest.mark.parametrize("name", ["tiny", "tiny-resnet", "tiny-timm", "tiny-coca"])
def test_a_bare_tower_is_recognised(name: str) -> None:
    encoder = wrap(create(name).visual)
    assert encoder is not None
    assert str(encoder.spec) == f"open_clip:{name}"
    assert probe(encoder) == (3, 12)


def test_a_tower_that_is_anothers_too_takes_the_shortest_name() -> None:
    encoder = wrap(create("tiny-siglip"))
    assert encoder is not None
    assert str(encoder.spec) == "open_clip:tiny"


@pytest.mark.parametrize("arguments", [{"force_image_size": 24}, {"force_image_size": [16, 32]}])
def test_another_image_size_is_found_and_rebuilt(arguments: dict[str, Any]) -> None:
    encoder = wrap(create("tiny", **arguments))
    assert encoder is not None
    assert (encoder.spec.name, encoder.spec.arguments) == ("tiny", arguments)
    rebuilt = build(replaced(encoder.spec), pretrained=False)
    rebuilt.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(features(rebuilt, images), features(encoder, images))


def replaced(spec: EncoderSpec) -> EncoderSpec:
    """The spec as it comes back from a saved defense."""
    return EncoderSpec.from_dict(spec.to_dict())


def test_the_activation_tells_towers_of_one_shape_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = create("tiny", force_quick_gelu=True)
    encoder = wrap(quick)
    assert encoder is not None
    assert (encoder.spec.name, encoder.spec.arguments) == ("tiny-quickgelu", {})
    monkeypatch.delitem(open_clip.factory._MODEL_CONFIGS, "tiny-quickgelu")
    encoder = wrap(quick)
    assert encoder is not None
    assert (encoder.spec.name, encoder.spec.arguments) == ("tiny", {"force_quick_gelu": True})


def _another_activation(model: Any) -> Any:
    model.visual.transformer.resblocks[1].mlp.gelu = nn.ReLU()
    return model


def _another_depth(model: Any) -> Any:
    del model.visual.transformer.resblocks[1]
    return model


@pytest.mark.parametrize("change", [_another_activation, _another_depth])
def test_a_changed_tower_is_custom_yet_keeps_its_preprocessing(change: Any) -> None:
    encoder = wrap(change(create()))
    assert encoder is not None
    assert str(encoder.spec) == "custom"
    assert encoder.preprocessing == Preprocessing(
        mean=OPENAI, std=open_clip.OPENAI_DATASET_STD, size=(16, 16), interpolation="bicubic"
    )


def test_the_models_own_preprocessing_is_taken() -> None:
    stated = {"mean": INCEPTION, "std": INCEPTION, "interpolation": "bilinear"}
    encoder = wrap(create(force_preprocess_cfg=stated))
    assert encoder is not None
    assert encoder.preprocessing == Preprocessing(mean=INCEPTION, std=INCEPTION, size=(16, 16))


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(3, 8, 3), open_clip.model._build_text_tower(12, TEXT), open_clip.ClipLoss()],
    ids=["foreign", "text", "loss"],
)
def test_what_is_no_image_tower_is_left_to_others(module: nn.Module) -> None:
    assert wrap(module) is None


@pytest.mark.slow  # 150 million weights
def test_a_published_architecture_is_recognised_by_name() -> None:
    model = open_clip.create_model("ViT-B-32")
    encoder = wrap(model)
    assert encoder is not None
    assert str(encoder.spec) == "open_clip:ViT-B-32"
    assert encoder.preprocessing.size == (224, 224)
    images = torch.rand(1, 3, 224, 224)
    assert torch.equal(features(encoder, images), encoded(model.eval(), images, encoder.preprocessing))


# building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_name_is_built_without_text_tower_and_weights(name: str) -> None:
    encoder = build(spec_of(name), pretrained=False)
    assert encoder.spec.name == name
    assert encoder.backbone.state_dict().keys() == create(name).visual.state_dict().keys()
    assert encoder.origin == ""
    assert probe(encoder) == (3, 12)


HUB_TEXT = [name for name in open_clip.list_models() if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]]


@pytest.mark.parametrize("name", HUB_TEXT)
def test_a_name_whose_text_tower_would_be_fetched_is_built_offline(name: str) -> None:
    with torch.device("meta"):
        encoder = build(spec_of(name), pretrained=False)
        images = torch.rand(1, 3, *encoder.preprocessing.size)  # type: ignore[misc]
        assert encoder(images).shape == (1, open_clip.get_model_config(name)["embed_dim"])


def test_there_are_names_whose_text_tower_would_be_fetched() -> None:
    assert len(HUB_TEXT) > 5


@pytest.mark.parametrize(
    ("name", "mean", "interpolation"),
    [
        ("ViT-B-16-SigLIP", INCEPTION, "bicubic"),
        ("ViT-B-32", OPENAI, "bicubic"),
        ("PE-Core-T-16-384", INCEPTION, "bilinear"),
    ],
)
def test_mean_and_interpolation_are_those_of_the_published_weights(name: str, mean: Any, interpolation: str) -> None:
    with torch.device("meta"):
        preprocessing = build(spec_of(name), pretrained=False).preprocessing
    assert (preprocessing.mean, preprocessing.interpolation) == (mean, interpolation)


@pytest.mark.parametrize("size", [224, [224, 224]])
def test_a_timm_tower_takes_another_size(size: Any) -> None:
    encoder = build(spec_of("tiny-timm", force_image_size=size), pretrained=False)
    assert encoder.preprocessing.size == (224, 224)
    encoder.backbone.load_state_dict(create("tiny-timm", force_image_size=224).visual.state_dict())
    assert probe(encoder) == (3, 12)
    again = wrap(encoder.backbone)
    assert again is not None
    assert (again.spec.name, again.spec.arguments) == ("tiny-timm", {"force_image_size": 224})


def test_an_unknown_name_is_refused_with_where_to_look() -> None:
    with pytest.raises(ConfigError, match=r"knows no model 'ViT-Z-99'. See open_clip.list_models\(\)"):
        build(spec_of("ViT-Z-99"), pretrained=False)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pretrained_hf": True},
        {"cast_dtype": "bf16"},
        {"vision_cfg": None},
        {"force_image_size": 0},
        {"force_image_size": 10**6},
        {"force_image_size": True},
        {"force_image_size": None},
        {"force_image_size": "224"},
        {"force_image_size": [224]},
        {"force_image_size": [224, 224, 224]},
        {"force_quick_gelu": 1},
    ],
)
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_hostile_argument_is_refused(
    arguments: dict[str, Any], pretrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"here": {}})
    with pytest.raises(ConfigError, match="pretrained|takes the arguments force_image_size|must be at most 65536"):
        build(spec_of("tiny", weights="here", **arguments), pretrained=pretrained)


def test_a_size_the_architecture_cannot_take_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="open_clip:tiny-resnet could not be built"):
        build(spec_of("tiny-resnet", force_image_size=[64, 32]), pretrained=False)


def test_without_open_clip_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ConfigError, match=r"pip install 'zepad\[clip\]'"):
        build(spec_of("tiny"), pretrained=False)


# weights --------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A tiny model and a function that publishes weights of it under the tag `here`."""

    def publish(state: Any, suffix: str = ".safetensors", name: str = "tiny", **config: Any) -> Path:
        path = tmp_path / f"weights{suffix}"
        if suffix == ".safetensors":
            safetensors.torch.save_file(state, path)
        else:
            torch.save(state, path)
        colors = {"mean": INCEPTION, "std": INCEPTION, "interpolation": "bilinear"}
        entry = {"file": str(path), "hf_hub": "someone/tiny/", **colors, **config}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"here": entry, "there": entry})
        return path

    return publish


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_pretrained_weights_are_those_of_the_tag(suffix: str, published: Any) -> None:
    model = create()
    published(model.state_dict(), suffix)
    encoder = build(spec_of("tiny", weights="here"), pretrained=True)
    assert encoder.preprocessing == Preprocessing(mean=INCEPTION, std=INCEPTION, size=(16, 16))
    assert encoder.origin == "someone/tiny"
    assert encoder.spec.weights == ""
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(features(encoder, images), encoded(model, images, encoder.preprocessing))


@pytest.mark.parametrize("pretrained", [True, False])
def test_weights_of_another_activation_get_theirs(pretrained: bool, published: Any) -> None:
    quick = create("tiny-quickgelu")
    published(quick.state_dict(), quick_gelu=True)
    encoder = build(spec_of("tiny", weights="here"), pretrained=pretrained)
    assert encoder.spec.arguments == {"force_quick_gelu": True}
    encoder.backbone.load_state_dict(quick.visual.state_dict())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(features(encoder, images), encoded(quick, images, encoder.preprocessing))


@pytest.mark.parametrize("weights", ["", "nowhere", "/etc/passwd", "weights.safetensors"])
def test_weights_that_no_tag_names_are_refused_with_the_tags(weights: str, published: Any) -> None:
    published(create().state_dict())
    with pytest.raises(ConfigError, match=r"has no weights .*; it has: here, there. Write open_clip:tiny@<weights>"):
        build(spec_of("tiny", weights=weights), pretrained=True)


def test_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(ConfigError, match="it has: none at all"):
        build(spec_of("tiny"), pretrained=True)


class _Payload:
    def __reduce__(self) -> Any:
        return (sys.exit, ("a pickle was run",))


def test_a_pickle_with_code_is_not_run_nor_handed_to_open_clip(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = published({}, ".pt")
    path.write_bytes(pickle.dumps({"state_dict": _Payload()}))

    def reached(*_: object, **__: object) -> None:
        pytest.fail("open_clip was asked to read it")

    monkeypatch.setattr(open_clip, "create_model", reached)
    with pytest.raises(HubError, match="weights of open_clip:tiny@here could not be loaded"):
        build(spec_of("tiny", weights="here"), pretrained=True)


def test_weights_of_another_layout_are_refused(published: Any) -> None:
    published(create("tiny-siglip").state_dict())
    with pytest.raises(HubError, match="weights of open_clip:tiny@here could not be loaded"):
        build(spec_of("tiny", weights="here"), pretrained=True)


def test_weights_that_cannot_be_had_are_a_hub_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match=r"weights of open_clip:ViT-B-32@laion2b_s34b_b79k could not be loaded"):
        build(spec_of("ViT-B-32", weights="laion2b_s34b_b79k"), pretrained=True)
