"""Sources of encoders: recognised modules, recorded specs, and what a spec must never do."""

from __future__ import annotations

import copy
import json
import sys
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.error import URLError

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import zepad.encoders
from tiny import TinyEncoder, features
from zepad.encoders import EncoderSpec, Preprocessing, build_encoder, probe
from zepad.encoders.sources.registry import wrap_module
from zepad.errors import CheckpointError, ConfigError, HubError

TIMM, TORCHVISION = "resnet10t", "mobilenet_v3_small"
PACKAGED = ("digits-barlow-twins", "digits-simclr")
# Names of timm and torchvision that choose weights instead of an architecture: a published config could point them at
# a file of this machine or at another repository.
FORBIDDEN = ("checkpoint_path", "pretrained", "pretrained_cfg", "cache_dir", "weights")


def timm_model(name: str = TIMM, **arguments: Any) -> nn.Module:
    model: nn.Module = timm.create_model(name, **arguments)
    return model.eval()


def torchvision_model(name: str = TORCHVISION, **arguments: Any) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None, **arguments)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64)


# recognising ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width"), [(TIMM, 512), ("vit_tiny_patch16_224", 192)], ids=["convolutional", "transformer"]
)
def test_a_timm_model_is_recognised_with_its_own_preprocessing(name: str, width: int, images: Tensor) -> None:
    model = timm_model(name)
    encoder = wrap_module(model)
    assert str(encoder.spec) == f"timm:{name}"
    own = timm.data.resolve_model_data_config(model)
    found = encoder.preprocessing
    assert (found.mean, found.std, found.size) == (own["mean"], own["std"], own["input_size"][1:])
    assert found.interpolation == own["interpolation"]
    resized = torch.nn.functional.interpolate(images, found.size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(own[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():  # what timm itself says of the features below the classifier
        expected = model.forward_head(model.forward_features((resized - mean) / std), pre_logits=True)
    assert expected.shape == (2, width)
    torch.testing.assert_close(features(encoder, images), expected)


@pytest.mark.parametrize(("name", "last"), [("resnet18", "fc"), (TORCHVISION, "classifier")])
def test_a_torchvision_model_is_recognised_with_its_own_preprocessing(name: str, last: str, images: Tensor) -> None:
    model = torchvision_model(name)
    encoder = wrap_module(model)
    assert str(encoder.spec) == f"torchvision:{name}"
    assert encoder.preprocessing == Preprocessing.imagenet(size=(224, 224))
    captured: list[Tensor] = []
    classifier = getattr(model, last)
    linear = classifier if isinstance(classifier, nn.Linear) else classifier[-1]
    linear.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    with torch.no_grad():
        model(
            (torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", antialias=True) - encoder.mean)
            / encoder.std
        )
    torch.testing.assert_close(features(encoder, images), captured[0])


@pytest.mark.parametrize("make", [timm_model, torchvision_model])
def test_the_callers_model_keeps_its_classifier_weights_and_mode(make: Any) -> None:
    model = make().train()
    before, printed = copy.deepcopy(model.state_dict()), str(model)
    wrap_module(model)
    assert str(model) == printed
    assert model.training
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("make", [timm_model, torchvision_model])
def test_a_recorded_spec_rebuilds_the_same_function(make: Any, images: Tensor) -> None:
    encoder = wrap_module(make())
    rebuilt = build_encoder(EncoderSpec.parse(str(encoder.spec)))
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(features(rebuilt, images), features(encoder, images))


def _without_last_stage(model: nn.Module) -> nn.Module:
    model.layer4 = nn.Identity()
    return model


def _with_another_activation(model: nn.Module) -> nn.Module:
    model.act1 = nn.GELU()  # no parameter tells the two apart
    return model


def _torchvision_with_another_activation() -> nn.Module:
    model = torchvision_model("resnet18")
    model.relu = nn.GELU()
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: _with_another_activation(timm_model()),
        lambda: _without_last_stage(timm_model()),
        lambda: timm_model(output_stride=16),
        _torchvision_with_another_activation,
        lambda: _without_last_stage(torchvision_model("resnet18")),
    ],
    ids=["timm activation", "timm layer", "timm argument", "torchvision activation", "torchvision layer"],
)
def test_a_changed_model_is_custom_yet_keeps_its_preprocessing(make: Any) -> None:
    encoder = wrap_module(make())
    assert (encoder.spec.source, encoder.spec.name) == ("custom", "")
    assert encoder.preprocessing.mean == (0.485, 0.456, 0.406)


def test_the_size_of_a_torchvision_model_with_its_own_is_found() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    encoder = wrap_module(model)
    assert encoder.preprocessing == Preprocessing.imagenet(size=(16, 16))
    assert probe(encoder) == (3, 8)


def test_the_size_of_a_timm_model_with_its_own_is_found() -> None:
    encoder = wrap_module(timm_model("vit_tiny_patch16_224", img_size=32, depth=1))
    assert encoder.preprocessing.size == (32, 32)
    assert probe(encoder) == (3, 192)


def test_a_regnet_can_be_wrapped() -> None:
    # Its builder computes with tensor values and so cannot run on the meta device.
    assert probe(wrap_module(torchvision_model("regnet_y_400mf"))) == (3, 440)


def test_a_callers_preprocessing_wins() -> None:
    mine = Preprocessing(size=(32, 32))
    assert wrap_module(timm_model(), mine).preprocessing == mine


def test_a_module_of_unknown_origin_is_copied_as_it_is() -> None:
    class Mine(torchvision.models.ResNet):
        """Looks like torchvision's, but it is the caller's, who decides what it returns."""

    model = Mine(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4)
    encoder = wrap_module(model)
    assert (encoder.spec.source, encoder.spec.name) == ("custom", "")
    assert encoder.preprocessing == Preprocessing()
    assert probe(encoder) == (3, 4)
    assert encoder.backbone is not model


def test_a_part_of_a_timm_model_is_custom() -> None:
    encoder = wrap_module(timm.layers.ConvNormAct(3, 8, 3))
    assert (encoder.spec.source, encoder.spec.name) == ("custom", "")
    assert probe(encoder) == (3, 8)


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("alexnet", 4096),
        ("convnext_tiny", 768),
        ("densenet121", 1024),
        ("efficientnet_b0", 1280),
        ("maxvit_t", 512),
        ("mnasnet0_5", 1280),
        ("resnext50_32x4d", 2048),
        ("shufflenet_v2_x0_5", 1024),
        ("squeezenet1_1", 512),
        ("swin_t", 768),
        ("swin_v2_t", 768),
        ("vgg11", 4096),
        ("vit_b_16", 768),
        ("vit_h_14", 1280),
    ],
)
def test_every_torchvision_family_loses_its_classifier_and_takes_its_stated_size(name: str, width: int) -> None:
    with torch.device("meta"):  # shapes are all that counts, and they cost no memory
        encoder = build_encoder(EncoderSpec(source="torchvision", name=name)).eval()
        images = torch.rand(2, 3, *encoder.preprocessing.size)  # type: ignore[misc]
        assert encoder(images).shape == (2, width)


# specs ----------------------------------------------------------------------------------------------------------

_names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,20}", fullmatch=True)
_sources = st.sampled_from(["timm", "torchvision", "zepad"])
_words = st.text(st.characters(exclude_characters=":/\\"))
_scalars = (
    st.none() | st.booleans() | st.integers(-256, 256) | st.floats(allow_nan=False, allow_infinity=False) | _words
)


@given(_sources, _names)
def test_a_spec_is_its_string(source: Any, name: str) -> None:
    spec = EncoderSpec.parse(f"{source}:{name}")
    assert (spec.source, spec.name, str(spec)) == (source, name, f"{source}:{name}")


@pytest.mark.parametrize(
    ("text", "name", "weights"),
    [
        ("open_clip:ViT-B-32@openai", "ViT-B-32", "openai"),
        ("torchvision:resnet18@IMAGENET1K_V1", "resnet18", "IMAGENET1K_V1"),
        ("transformers:facebook/dinov2-small", "", "facebook/dinov2-small"),
        ("transformers:dinov2", "dinov2", ""),
        ("solo:runs/byol.ckpt", "", "runs/byol.ckpt"),
        ("solo:C:\\runs\\byol", "", "C:\\runs\\byol"),
        ("lightly:simclr.ckpt", "", "simclr.ckpt"),
        ("lightly:resnet50", "resnet50", ""),
    ],
)
def test_a_string_may_name_weights(text: str, name: str, weights: str) -> None:
    spec = EncoderSpec.parse(text)
    assert (spec.name, spec.weights, str(spec)) == (name, weights, text)


@given(
    _sources,
    _names,
    st.dictionaries(st.text(max_size=4), _scalars | st.lists(_scalars, max_size=3), max_size=3),
    st.none() | st.just(Preprocessing.imagenet(size=(64, 64))),
    st.sampled_from([None, "mean", "class_token"]),
)
def test_a_spec_survives_json(
    source: Any, name: str, arguments: dict[str, Any], preprocessing: Preprocessing | None, pooling: Any
) -> None:
    spec = EncoderSpec(source=source, name=name, arguments=arguments, preprocessing=preprocessing, pooling=pooling)
    assert EncoderSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("text", ["resnet18", "custom:x", "pickle:x", "os.system:x", ":x", "", "timm", "TIMM:resnet18"])
def test_a_string_of_no_known_source_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(
        ConfigError, match="must read timm:<model>, torchvision:<model>@<weights>, .*; got .*registered"
    ):
        EncoderSpec.parse(text)


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:x/y",
        "hf_hub:x",
        "local-dir:/models/x",
        "../x",
        "..",
        "/etc/passwd",
        "C:\\x",
        "os.system",
        "__import__('os')",
        ".hidden",
        "-flag",
        "resnet18\n",
        "resnet18 ",
        "",
    ],
)
@pytest.mark.parametrize("source", ["timm", "torchvision", "zepad"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_a_hostile_name_is_refused_before_anything_is_built(
    source: Any, name: str, pretrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*_: object, **__: object) -> None:
        pytest.fail(f"{source} was asked to build {name!r}")

    monkeypatch.setattr(timm, "create_model", built)
    monkeypatch.setattr(torchvision.models, "get_model", built)
    with pytest.raises(ConfigError):
        build_encoder(EncoderSpec(source=source, name=name), pretrained=pretrained)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "os.path", "name": "join"}, "source must be a plain word"),
        ({"source": "Timm", "name": "x"}, "source must be a plain word"),
        ({"source": ["timm"], "name": "x"}, "source must be a plain word"),
        ({"source": "timm", "name": None}, "name must be a string"),
        ({"source": "timm", "name": ".hidden"}, "name must be a plain model name of timm"),
        ({"source": "torchvision", "name": "-flag"}, "name must be a plain model name of torchvision"),
        ({"source": "custom", "name": "x"}, "name must be empty"),
        ({"source": "custom", "arguments": {"a": 1}}, "name must be empty"),
        (
            {"source": "timm", "name": "x", "arguments": []},
            "arguments must be a mapping of names to plain JSON scalars",
        ),
        ({"source": "timm", "name": "x", "arguments": {1: 1}}, "arguments must be"),
        ({"source": "timm", "name": "x", "arguments": {"a": [[1]]}}, "arguments must be"),
        ({"source": "timm", "name": "x", "arguments": {"a": ["b/c"]}}, "arguments must be"),
        ({"source": "timm", "name": "x", "arguments": {"a": "hf-hub:b"}}, "arguments must be"),
        ({"source": "timm", "name": "x", "weights": "y"}, "weights must be .*empty for timm"),
        ({"source": "timm", "name": "x", "arguments": {"a": 2**16 + 1}}, "at most 65536, .*; got 65537"),
        ({"source": "timm", "name": "x", "arguments": {"a": [1, -(2**17)]}}, "at most 65536"),
        (
            {"source": "timm", "name": "x", "arguments": {"a": [1] * 257}},
            "of at most 256 entries; got .1, .*[.]{3}",
        ),
        ({"source": "timm", "name": "x", "arguments": {"depth": 257}}, "at most 256 layers; got 257"),
        ({"source": "timm", "name": "x", "arguments": {"layers": [128, 129]}}, "at most 256 layers"),
        ({"source": "solo"}, "name must be a plain model name of solo"),
        ({"source": "timm", "name": "x", "preprocessing": {}}, "preprocessing must be"),
        ({"source": "timm", "name": "x", "pooling": "max"}, "pooling must be"),
        ({"source": "timm", "name": "x", "arguments": {"a": {}}}, "arguments must be"),
        ({"source": "timm", "name": "x", "arguments": {"act_layer": nn.ReLU}}, "arguments must be"),
        ({"source": "timm", "name": "x", "arguments": {"drop_rate": float("nan")}}, "arguments must be"),
    ],
)
def test_a_spec_holds_names_and_scalars_alone(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EncoderSpec(**fields)


@pytest.mark.parametrize("argument", FORBIDDEN)
@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_an_argument_that_chooses_weights_is_refused(source: Any, argument: str, tmp_path: Path) -> None:
    name = {"timm": TIMM, "torchvision": TORCHVISION}[source]
    path = tmp_path / "weights.pth"
    torch.save(timm_model(num_classes=0).state_dict(), path)
    with pytest.raises(ConfigError, match=argument):
        build_encoder(EncoderSpec(source=source, name=name, arguments={argument: str(path)}))


def test_an_argument_of_the_architecture_is_used() -> None:
    spec = EncoderSpec(source="timm", name=TIMM, arguments={"in_chans": 1})
    assert next(build_encoder(spec).parameters()).shape[1] == 1


@pytest.mark.parametrize(("source", "name"), [("timm", TIMM), ("torchvision", "resnet18")])
@pytest.mark.parametrize("pretrained", [True, False])
def test_an_argument_the_source_does_not_know_is_named(source: Any, name: str, pretrained: bool) -> None:
    spec = EncoderSpec(source=source, name=name, arguments={"nonsense": 1})
    with pytest.raises(ConfigError, match=rf"{source}:{name} could not be built .*nonsense"):
        build_encoder(spec, pretrained=pretrained)


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_a_name_the_source_does_not_know_is_refused_with_where_to_look(source: Any) -> None:
    with pytest.raises(ConfigError, match=r"knows no .*'resnet999'. See .*list_models\(\)"):
        build_encoder(EncoderSpec(source=source, name="resnet999"))


def test_detection_and_segmentation_models_are_no_encoders() -> None:
    with pytest.raises(ConfigError, match="no classification model 'fcn_resnet50'"):
        build_encoder(EncoderSpec(source="torchvision", name="fcn_resnet50"))


def test_a_custom_encoder_is_built_by_its_owner() -> None:
    with pytest.raises(ConfigError, match="Pass the module itself"):
        build_encoder(wrap_module(TinyEncoder()).spec)


# weights --------------------------------------------------------------------------------------------------------


def test_without_timm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'zepad\[timm\]'"):
        build_encoder(EncoderSpec.parse(f"timm:{TIMM}"))


@pytest.mark.parametrize("text", [f"timm:{TIMM}", f"torchvision:{TORCHVISION}", "zepad:digits-simclr"])
@pytest.mark.usefixtures("no_network")
def test_building_without_weights_never_touches_the_network(text: str) -> None:
    assert str(build_encoder(EncoderSpec.parse(text)).spec) == text


def test_timm_weights_that_cannot_be_had_are_a_hub_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(HubError, match=f"weights of timm:{TIMM} could not be loaded: .*Check the connection"):
        build_encoder(EncoderSpec.parse(f"timm:{TIMM}"), pretrained=True)


def test_torchvision_weights_that_cannot_be_had_are_a_hub_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    with pytest.raises(HubError, match=f"weights of torchvision:{TORCHVISION} could not be loaded: URLError.*no route"):
        build_encoder(EncoderSpec.parse(f"torchvision:{TORCHVISION}"), pretrained=True)


def test_torchvision_weights_are_those_of_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    published = torchvision_model().state_dict()
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", lambda *_, **__: published)
    loaded = build_encoder(EncoderSpec.parse(f"torchvision:{TORCHVISION}"), pretrained=True).backbone.state_dict()
    assert loaded.keys() < published.keys()
    assert all(torch.equal(value, published[key]) for key, value in loaded.items())


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_encoder_loads_trained_weights(name: str) -> None:
    spec = EncoderSpec(source="zepad", name=name)
    encoder, again, untrained = (build_encoder(spec, pretrained=p) for p in (True, True, False))
    assert probe(encoder) == (3, 128)
    assert encoder.preprocessing.size == (32, 32)
    state = encoder.state_dict()
    assert all(value.isfinite().all() for value in state.values())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in state.items())
    assert state["backbone.bn1.num_batches_tracked"] > 0
    assert untrained.state_dict()["backbone.bn1.num_batches_tracked"] == 0


def test_the_packaged_encoders_are_two_different_ones() -> None:
    first, second = (build_encoder(EncoderSpec(source="zepad", name=name), pretrained=True) for name in PACKAGED)
    assert not torch.equal(first.backbone.conv1.weight, second.backbone.conv1.weight)  # type: ignore[union-attr]


def test_packaged_weights_that_are_missing_ask_for_a_new_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(resources, "files", lambda _: tmp_path)
    with pytest.raises(CheckpointError, match=r"digits-simclr.safetensors is missing .*Reinstall zepad"):
        build_encoder(EncoderSpec.parse("zepad:digits-simclr"), pretrained=True)


@pytest.mark.parametrize("fields", [{"name": "digits"}, {"name": PACKAGED[0], "arguments": {"width": 1}}])
def test_an_unknown_packaged_encoder_is_refused_with_the_known(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="digits-barlow-twins, digits-simclr"):
        build_encoder(EncoderSpec(source="zepad", **fields), pretrained=True)


def test_the_packaged_weights_stay_small() -> None:
    files = [path for path in (resources.files(zepad.encoders) / "weights").iterdir() if path.is_file()]
    assert {path.name for path in files} == {f"{name}.safetensors" for name in PACKAGED}
    assert sum(len(path.read_bytes()) for path in files) < 2 * 2**20
