"""transformers: vision models of every supported type, their loading, and dropping them back into their model."""

from __future__ import annotations

import copy
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tiny import features, normalised
from zepad.encoders import Encoder, EncoderSpec, Preprocessing, probe
from zepad.encoders.sources.transformers import _ARCHITECTURES, build, wrap
from zepad.errors import CheckpointError, ConfigError, HubError

pytestmark = pytest.mark.usefixtures("no_network")

SIZE = 16
VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8}
WITH_MLP = {**VIT, "intermediate_size": 16}
CONVNEXT = {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 1, 1]}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8, 8, 8], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "image_size": SIZE, "patch_size": 2, "window_size": 4}
# One small architecture of every supported type, as a spec's arguments, and the width of its features.
TINY: dict[str, tuple[dict[str, Any], int]] = {
    "beit": (WITH_MLP, 8),
    "clip": ({**WITH_MLP, "projection_dim": 4}, 4),
    "clip_vision_model": (WITH_MLP, 8),
    "convnext": (CONVNEXT, 10),
    "convnextv2": (CONVNEXT, 10),
    "deit": (WITH_MLP, 8),
    "dinov2": (VIT, 8),
    "dinov2_with_registers": (VIT, 8),
    "dinov3_convnext": (CONVNEXT, 10),
    "dinov3_vit": (WITH_MLP, 8),
    "regnet": ({**RESNET, "groups_width": 2}, 8),
    "resnet": (RESNET, 8),
    "siglip_vision_model": (WITH_MLP, 8),
    "swin": (SWIN, 8),
    "swinv2": (SWIN, 8),
    "vit": (WITH_MLP, 8),
    "vit_msn": (WITH_MLP, 8),
}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}
OPENAI = (0.48145466, 0.4578275, 0.40821073)
HALF = (0.5, 0.5, 0.5)


def spec_of(name: str = "vit", **changes: Any) -> EncoderSpec:
    return EncoderSpec(source="transformers", name=name, arguments={**TINY[name][0], **changes})


def spec_at(folder: object) -> EncoderSpec:
    return EncoderSpec(source="transformers", weights=str(folder))


def shaken(model: Any) -> Any:
    """Move every weight and statistic: some start at zero or one, where no mistake shows."""
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value) * 0.2)
    return model.eval()


def tiny(name: str = "vit", **changes: Any) -> Any:
    """The bare model of a type, as a user of transformers has it."""
    known = getattr(transformers, _ARCHITECTURES[name].model)
    return shaken(known(known.config_class(**{**TINY[name][0], **changes})))


def clip(**changes: Any) -> Any:
    vision = {**WITH_MLP, "projection_dim": 77}  # the model's own field decides, not this one
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=4, **changes)
    return shaken(transformers.CLIPModel(config))


def siglip() -> Any:
    return shaken(transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=WITH_MLP)))


def wrapped(module: nn.Module) -> Encoder:
    encoder = wrap(module)
    assert encoder is not None
    return encoder


@torch.no_grad()
def said(model: Any, images: Tensor, preprocessing: Preprocessing) -> Any:
    """What a model of transformers says of the images."""
    call = model.get_image_features if hasattr(model, "get_image_features") else model
    return call(pixel_values=normalised(images, preprocessing))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, SIZE, SIZE)


# wrapping -------------------------------------------------------------------------------------------------------


def test_every_supported_type_is_tested() -> None:
    assert TINY.keys() == _ARCHITECTURES.keys()


@pytest.mark.parametrize("name", TINY)
def test_a_bare_model_is_recognised_and_rebuilt(name: str) -> None:
    model = tiny(name)
    encoder = wrapped(model)
    assert (encoder.spec.source, encoder.spec.name) == ("transformers", name)
    assert probe(encoder) == (3, TINY[name][1])
    rebuilt = build(EncoderSpec.from_dict(json.loads(json.dumps(encoder.spec.to_dict()))), pretrained=False)
    rebuilt.load_state_dict(encoder.state_dict())
    images = torch.rand(2, 3, *encoder.preprocessing.size)  # type: ignore[misc]
    assert torch.equal(features(rebuilt, images), features(encoder, images))


@pytest.mark.parametrize("name", TINY)
def test_the_features_are_the_documented_output(name: str) -> None:
    model = tiny(name)
    encoder = wrapped(model)
    images = torch.rand(2, 3, *encoder.preprocessing.size)  # type: ignore[misc]
    output = said(model, images, encoder.preprocessing)
    if name == "clip":
        expected = output.image_embeds
    elif name in ("deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "vit_msn"):
        expected = output.last_hidden_state[:, 0]
    else:
        expected = output.pooler_output.flatten(1)
    assert torch.equal(features(encoder, images), expected)


@pytest.mark.parametrize("make", [clip, siglip])
def test_the_features_of_an_image_text_model_are_its_image_features(make: Any, images: Tensor) -> None:
    model = make()
    encoder = wrapped(model)
    assert encoder.spec.source == "transformers"
    assert torch.equal(features(encoder, images), said(model, images, encoder.preprocessing).pooler_output)


@pytest.mark.parametrize("make", [clip, siglip])
def test_hardened_weights_drop_back_into_the_model(make: Any, images: Tensor) -> None:
    model = make()
    encoder = wrapped(model)
    before = said(model, images, encoder.preprocessing).pooler_output
    with torch.no_grad():
        for parameter in encoder.backbone.parameters():
            parameter.mul_(1.1)
    hardened: Any = encoder.backbone.model
    if isinstance(model, transformers.CLIPModel):
        model.visual_projection.load_state_dict(hardened.visual_projection.state_dict())
        hardened = hardened.vision_model
    model.vision_model.load_state_dict(hardened.state_dict())
    after = said(model, images, encoder.preprocessing).pooler_output
    assert torch.equal(after, features(encoder, images))
    assert not torch.allclose(after, before)


@pytest.mark.parametrize("make", [clip, siglip])
def test_the_callers_model_is_left_as_found_and_its_text_tower_not_copied(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make().train()
    model.vision_model.encoder.eval()
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]

    def copied(self: object, memo: object) -> None:
        pytest.fail("the text tower was copied")

    monkeypatch.setattr(type(model.text_model), "__deepcopy__", copied, raising=False)
    encoder = wrapped(model)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.vision_config.projection_dim != 4 if make is clip else True


@pytest.mark.parametrize(
    "name", ["beit", "convnext", "convnextv2", "deit", "resnet", "regnet", "swin", "swinv2", "vit"]
)
def test_a_classifier_is_removed_and_its_input_is_the_feature(name: str) -> None:
    bare = _ARCHITECTURES[name].model.removesuffix("Model")
    known = getattr(transformers, f"{bare}ForImageClassification")
    model = shaken(known(known.config_class(**TINY[name][0], num_labels=5)))
    encoder = wrapped(model)
    assert encoder.spec.name == name
    captured: list[Tensor] = []
    linear = next(part for part in reversed(list(model.modules())) if isinstance(part, nn.Linear))
    linear.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    images = torch.rand(2, 3, *encoder.preprocessing.size)  # type: ignore[misc]
    said(model, images, encoder.preprocessing)
    assert torch.equal(features(encoder, images), captured[0])
    assert not any(value.shape[:1] == (5,) for value in encoder.state_dict().values())


@pytest.mark.parametrize(("kind", "name"), [("CLIP", "clip_vision_model"), ("Siglip", "siglip_vision_model")])
def test_of_a_clip_classifier_the_tower_is_taken(kind: str, name: str, images: Tensor) -> None:
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT, vision_config=WITH_MLP)
    model = shaken(getattr(transformers, f"{kind}ForImageClassification")(config))
    encoder = wrapped(model)
    assert encoder.spec.name == name
    expected = said(model.vision_model, images, encoder.preprocessing).pooler_output
    assert torch.equal(features(encoder, images), expected)


def test_a_siglip_without_its_pooling_head_averages_its_tokens(images: Tensor) -> None:
    model = tiny("siglip_vision_model", vision_use_head=False)
    encoder = wrapped(model)
    assert encoder.spec.pooling == "mean"
    expected = said(model, images, encoder.preprocessing).last_hidden_state.mean(dim=1)
    assert torch.equal(features(encoder, images), expected)


def test_an_unused_pooler_is_left_behind(images: Tensor) -> None:
    model = tiny("vit")
    assert any("pooler" in key for key in model.state_dict())
    assert not any("pooler" in key for key in wrapped(model).state_dict())
    assert model.pooler is not None


def test_a_model_that_returns_tuples_is_read_all_the_same(images: Tensor) -> None:
    model = tiny("vit", return_dict=False)
    encoder = wrapped(model)
    assert torch.equal(features(encoder, images), said(model, images, encoder.preprocessing)[0][:, 0])


def _another_activation(model: Any) -> Any:
    model.layers[0].mlp.activation_fn = nn.ReLU()
    return model


def _another_depth(model: Any) -> Any:
    del model.layers[1]
    return model


@pytest.mark.parametrize("change", [_another_activation, _another_depth])
def test_a_changed_model_is_custom_yet_keeps_its_preprocessing(change: Any) -> None:
    encoder = wrapped(change(tiny()))
    assert str(encoder.spec) == "custom"
    assert encoder.preprocessing == Preprocessing(mean=HALF, std=HALF, size=(SIZE, SIZE))
    assert probe(encoder) == (3, 8)


def test_a_setting_that_no_spec_may_hold_makes_a_model_custom() -> None:
    model = tiny("vit")
    model.config.hidden_act = "https://example.org/act"
    assert str(wrapped(model).spec) == "custom"


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("clip", {}, {"mean": OPENAI, "size": (SIZE, SIZE), "interpolation": "bicubic"}),
        ("siglip_vision_model", {}, {"mean": HALF, "std": HALF, "size": (SIZE, SIZE), "interpolation": "bicubic"}),
        ("resnet", {}, {"mean": (0.485, 0.456, 0.406), "size": (224, 224), "interpolation": "bicubic"}),
        ("vit", {"image_size": [16, 32]}, {"mean": HALF, "size": (16, 32)}),
        ("dinov2", {"image_size": 518}, {"mean": (0.485, 0.456, 0.406), "size": (224, 224)}),
        ("vit", {"num_channels": 1}, {"mean": None, "std": None, "size": (SIZE, SIZE)}),
    ],
)
def test_preprocessing_is_that_of_the_type(name: str, changes: dict[str, Any], expected: dict[str, Any]) -> None:
    encoder = wrapped(tiny(name, **changes))
    assert {field: getattr(encoder.preprocessing, field) for field in expected} == expected
    assert encoder.spec.source == "transformers"


@pytest.mark.parametrize(
    ("name", "origin"),
    [
        ("facebook/dinov2-small", "facebook/dinov2-small"),
        ("/models/vit", ""),
        ("./vit", ""),
        ("vit", ""),
        ("tests/encoders", ""),
        ("", ""),
    ],
)
def test_the_origin_is_a_hub_id_alone(name: str, origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    model = tiny()
    model.config.name_or_path = name
    assert wrapped(model).origin == origin


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 8, 3),
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)),
        transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**WITH_MLP, encoder_stride=8)),
    ],
    ids=["foreign", "text", "another task"],
)
def test_what_is_no_vision_model_is_left_to_others(module: nn.Module) -> None:
    assert wrap(module) is None


# building -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_a_type_is_built_from_its_own_fields(name: str) -> None:
    encoder = build(spec_of(name), pretrained=False)
    assert probe(encoder) == (3, TINY[name][1])
    assert encoder.origin == ""


def test_a_mean_over_tokens_can_be_asked_for(images: Tensor) -> None:
    from zepad.encoders.sources.registry import _adapted

    built = build(spec_of("dinov2"), pretrained=False)
    averaged = _adapted(built, None, EncoderSpec(source="transformers", name="dinov2", pooling="mean"))
    with torch.no_grad():
        tokens = built.backbone(built._prepare(images))
    assert torch.equal(features(averaged, images), tokens.mean(dim=1))


@pytest.mark.parametrize(
    "name", ["bert", "vit_mae", "clip_text_model", "timm_wrapper", "llama", "ViTModel", "os.system"]
)
def test_a_type_that_is_not_on_the_list_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(ConfigError, match=f"can be of the types beit, clip, .* vit_msn; got '{name}'"):
        build(EncoderSpec(source="transformers", name=name), pretrained=False)


def test_weights_alone_say_nothing_of_an_architecture() -> None:
    with pytest.raises(ConfigError, match="can be of the types .*; got 'transformers:facebook/dinov2-small'"):
        build(EncoderSpec.parse("transformers:facebook/dinov2-small"), pretrained=False)


@pytest.mark.parametrize(
    "field",
    [
        "attn_implementation",
        "_attn_implementation",
        "auto_map",
        "trust_remote_code",
        "architectures",
        "dtype",
        "torch_dtype",
        "quantization_config",
        "transformers_weights",
        "name_or_path",
        "_name_or_path",
        "use_timm_backbone",
        "backbone",
        "use_pretrained_backbone",
        "num_labels",
        "output_hidden_states",
        "return_dict",
        "_out_features",
        "kwargs",
        "self",
    ],
)
@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_a_field_that_is_not_the_types_own_is_refused(name: str, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"are fields of \w+Config; got {field}"):
        build(spec_of(name, **{field: "eager"}), pretrained=False)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"num_hidden_layers": 10**9}),
        ("vit", {"num_hidden_layers": 257}),
        ("resnet", {"depths": [200, 200, 200, 200]}),
        ("resnet", {"depths": [0] * 1000}),
        ("resnet", {"depths": [10**9, -(10**9)]}),
    ],
)
def test_a_config_cannot_ask_for_hours(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"arguments\[.*\] must be at most 256 layers"):
        build(spec_of(name, **changes), pretrained=False)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"hidden_size": 2**15, "intermediate_size": 2**15, "num_hidden_layers": 16}),
        ("vit", {"image_size": 2**15, "patch_size": 1}),
        ("swin", {"window_size": 400}),  # few parameters, but an index of 400^4
        ("swinv2", {"window_size": 400, "image_size": 1600}),
    ],
)
def test_a_config_cannot_ask_for_all_memory(name: str, changes: dict[str, Any]) -> None:
    # The message says that it was refused by its size; a model that was built first would fail to be allocated.
    with pytest.raises(ConfigError, match=f"transformers:{name} .* takes [0-9,]+ bytes; at most 32,000,000,000"):
        build(spec_of(name, **changes), pretrained=False)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"hidden_size": 2**40}),
        ("vit", {"hidden_size": -8}),
        ("vit", {"hidden_size": "8"}),
        ("vit", {"hidden_size": None}),
        ("vit", {"hidden_size": True}),
        ("vit", {"hidden_act": "os.system"}),
        ("vit", {"num_attention_heads": 0}),
        ("vit", {"patch_size": 0}),
        ("vit", {"image_size": [8, 8, 8]}),
        ("vit", {"num_hidden_layers": "2"}),
        ("swin", {"mlp_ratio": 1e30}),
        ("swin", {"window_size": 2**15}),
        ("convnext", {"num_stages": 9}),
        ("convnext", {"num_stages": 10**9}),
        ("convnext", {"depths": "1"}),
        ("dinov3_vit", {"image_size": 10**9}),
        ("resnet", {"layer_type": "nonsense"}),
    ],
)
def test_a_wrong_value_is_a_config_error(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"transformers:{name} could not be built|must be at most 65536|size must be"):
        build(spec_of(name, **changes), pretrained=False)


@pytest.mark.parametrize("pretrained", [False, True])
def test_without_transformers_the_error_names_the_extra(pretrained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    spec = spec_at("someone/vit") if pretrained else spec_of()
    with pytest.raises(ConfigError, match=r"^transformers is not installed. .*pip install 'zepad\[transformers\]'"):
        build(spec, pretrained=pretrained)


# weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_saved_weights_are_loaded_into_the_same_encoder(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    encoder, own = build(spec_at(tmp_path), pretrained=True), wrapped(model)
    assert encoder.spec == own.spec
    assert (encoder.origin, encoder.spec.weights) == ("", "")
    images = torch.rand(2, 3, *own.preprocessing.size)  # type: ignore[misc]
    assert torch.equal(features(encoder, images), features(own, images))


def _classifier() -> Any:
    return shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**WITH_MLP)))


@pytest.mark.parametrize("make", [clip, siglip, _classifier])
def test_of_a_larger_model_the_image_tower_alone_is_loaded(make: Any, tmp_path: Path, images: Tensor) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    encoder = build(spec_at(tmp_path), pretrained=True)
    assert torch.equal(features(encoder, images), features(wrapped(model), images))
    assert encoder.spec == wrapped(model).spec


def test_buffers_that_old_checkpoints_hold_do_not_matter(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "vision_model.embeddings.position_ids": torch.arange(5)}, file, {"format": "pt"})
    assert build(spec_at(tmp_path), pretrained=True).spec.name == "clip"


def test_half_precision_weights_are_loaded_in_full(tmp_path: Path) -> None:
    tiny().half().save_pretrained(tmp_path)
    assert {value.dtype for value in build(spec_at(tmp_path), pretrained=True).parameters()} == {torch.float32}


STATED = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 0, "do_center_crop": False}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"size": {"height": 16, "width": 16}}, {"size": (16, 16)}),
        ({"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}, {"size": (20, 20)}),
        (
            {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": True},
            {"size": (16, 16)},
        ),
        ({"size": 16, "resample": 3}, {"size": (16, 16), "interpolation": "bicubic"}),
        ({"resample": 2}, {"size": (16, 16), "interpolation": "bilinear"}),
        ({"do_normalize": False}, {"mean": None, "std": None}),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["image processor", "processor"])
def test_the_saved_image_processor_decides(
    nested: bool, stated: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path)
    values = {**STATED, **stated}
    if nested:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": values}))
    else:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    preprocessing = build(spec_at(tmp_path), pretrained=True).preprocessing
    wanted = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "nearest", **expected}
    assert {field: getattr(preprocessing, field) for field in wanted} == wanted


def test_a_processor_saved_by_transformers_is_read(tmp_path: Path) -> None:
    clip().save_pretrained(tmp_path)
    size = {"height": SIZE, "width": SIZE}
    transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(tmp_path)
    preprocessing = build(spec_at(tmp_path), pretrained=True).preprocessing
    assert (preprocessing.mean, preprocessing.size) == (OPENAI, (SIZE, SIZE))


def test_a_folder_with_what_is_no_file_or_has_no_end_is_refused_before_it_is_read(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with (tmp_path / "preprocessor_config.json").open("wb") as file:
        file.truncate(2**40)  # all of it a hole
    with pytest.raises(CheckpointError, match="preprocessor_config.json is larger than 16777216 bytes"):
        build(spec_at(tmp_path), pretrained=True)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="config.json is no regular file"):
        build(spec_at(tmp_path), pretrained=True)


@pytest.mark.parametrize("text", ["{", "[]", '{"image_mean": 1, "image_std": 1}', '{"image_mean": "x"}'])
def test_a_damaged_image_processor_is_refused(text: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises((CheckpointError, ConfigError), match="preprocessor_config|mean"):
        build(spec_at(tmp_path), pretrained=True)


def _without(prefix: str) -> Any:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value for key, value in tensors.items() if not key.startswith(prefix)}

    return change


def _shallower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if ".1." not in key}


def _deeper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {key.replace(".1.", ".2."): value.clone() for key, value in tensors.items() if ".1." in key}


def _wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.cat([value, value]) for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", _without("layernorm"), "layernorm.*missing"),
        ("vit", _without("embeddings"), "embeddings.*missing"),
        ("vit", _shallower, "layers.1.*missing"),
        ("clip", _without("visual_projection"), "visual_projection.weight is missing"),
        ("beit", _without("pooler"), "pooler.*missing"),
        ("vit", _deeper, "has no place"),
        ("clip", _deeper, "has no place"),
        ("siglip_vision_model", _deeper, "has no place"),
        ("vit", _wider, "could not be loaded"),
        ("vit", lambda _: {"a": torch.zeros(1)}, "missing"),
    ],
)
def test_weights_that_are_not_exactly_the_encoders_are_refused(
    name: str, change: Any, message: str, tmp_path: Path
) -> None:
    tiny(name).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    assert changed.keys() != tensors.keys() or change is _wider
    save_file(changed, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        build(spec_at(tmp_path), pretrained=True)


def test_a_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    model = tiny()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Only safetensors are read"):
        build(spec_at(tmp_path), pretrained=True)


def test_code_in_a_folder_is_not_run(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build(spec_at(tmp_path), pretrained=True).spec.name == "vit"
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(ConfigError, match="holds no config that transformers can read"):
        build(spec_at(tmp_path), pretrained=True)


def test_settings_of_a_checkpoint_that_choose_code_or_precision_do_not_count(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "attn_implementation": "someone/kernels",
        "_attn_implementation": "someone/kernels",
        "return_dict": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = build(spec_at(tmp_path), pretrained=True).backbone.model
    assert model.config._attn_implementation == "sdpa"
    assert model.config.return_dict is True


def test_a_type_that_is_not_on_the_list_is_refused_before_its_weights(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigError, match="can be of the types .*; got 'bert'"):
        build(spec_at(tmp_path), pretrained=True)


def test_an_architecture_beside_weights_must_be_theirs(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    named = EncoderSpec(source="transformers", name="vit", weights=str(tmp_path))
    built = build(named, pretrained=True).spec
    assert built.name == "vit"
    assert build(replace(built, weights=str(tmp_path)), pretrained=True).spec == built
    for other in ({"name": "dinov2"}, {"name": "vit", "arguments": {"hidden_size": 8}}):
        with pytest.raises(ConfigError, match="states the architecture, a vit; give no other"):
            build(EncoderSpec(source="transformers", weights=str(tmp_path), **other), pretrained=True)


def test_pretrained_without_weights_says_how_to_name_them() -> None:
    with pytest.raises(ConfigError, match="names no weights. Write transformers:<Hub id or folder>"):
        build(spec_of(), pretrained=True)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no config that transformers can read"):
        build(spec_at(tmp_path), pretrained=True)


@pytest.mark.parametrize("name", ["facebook/dinov2-small", "no/such/folder", "../nowhere", "resnet-50"])
def test_a_repository_that_cannot_be_had_is_a_hub_error(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match=f"weights of transformers:{name} could not be loaded.*Check the connection"):
        build(spec_at(name), pretrained=True)


def test_of_a_repository_no_pickle_and_no_adapter_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    offered = (
        "config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors",
        "model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "model.pt",
        "adapter_config.json", "adapter_model.safetensors", "modeling_evil.py", "tokenizer.json", "tf_model.h5",
    )  # fmt: skip

    def download(repo_id: str, *, allow_patterns: list[str]) -> str:
        assert repo_id == "someone/vit"
        assert list(huggingface_hub.utils.filter_repo_objects(offered, allow_patterns=allow_patterns)) == list(
            offered[:6]
        )
        return str(tmp_path)

    monkeypatch.setattr("zepad.encoders.sources.transformers.snapshot_download", download)
    encoder = build(spec_at("someone/vit"), pretrained=True)
    assert encoder.origin == "someone/vit"
    assert str(encoder.spec) == "transformers:vit"
