"""Encoders in the checkpoints of solo-learn and lightly.

The layouts below are those of real files, key by key. solo-learn's newest classes (all 11 methods, lightning 2.1.2) and
those of its 1.0.2 (the seven of them it had that still run; pytorch-lightning 1.4.9, 1.5.10, 1.6.5) were trained for a
batch and saved by their Trainer; every file was read, and features, averaged features and online logits of the newest
were equal, bit for bit, to those of solo-learn's own model. Of lightly 1.6.0 the ResNet-50 benchmarks (SimCLR, BYOL,
MoCo v2, DINO, SwAV, VICReg, Barlow Twins, TiCo, DCL) and the ResNet-18 examples were checked in the same way. As
solo-learn pins a torch too old to install beside this one, only lightly's part is repeated here, where it is installed.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from zepad.encoders import Encoder, EncoderSpec, Preprocessing
from zepad.encoders.sources import lightly, solo
from zepad.encoders.sources.lightly import load_lightly
from zepad.encoders.sources.registry import wrap_module
from zepad.encoders.sources.resnet import load_resnet
from zepad.encoders.sources.solo import load_solo, load_solo_probe
from zepad.errors import CheckpointError, ConfigError

STEMS = {  # convolution (kernel, stride, padding), max-pool
    "solo": ((3, 1, 2), False),
    "zepad": ((3, 1, 1), False),
    "zepad-7x7": ((7, 1, 1), False),
    "torchvision": ((7, 2, 3), True),
}
CLASSES, WIDTH = 5, 8


@cache
def source(seed: int = 0, name: str = "resnet18", stem: str = "solo") -> Any:
    """A ResNet whose every tensor, statistics of BatchNorm included, is its own."""
    generator = torch.Generator().manual_seed(seed)
    model = torchvision.models.get_model(name, weights=None)
    model.fc = nn.Identity()
    (kernel, stride, padding), pool = STEMS[stem]
    model.conv1 = nn.Conv2d(3, 64, kernel, stride, padding, bias=False)
    if not pool:
        model.maxpool = nn.Identity()
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(seed + 1)
        elif value.ndim == 1:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        else:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
    return model.eval()


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "method-cifar10-abc-ep=999.ckpt"
    yield file
    file.unlink(missing_ok=True)  # pytest would keep gigabytes of them


@pytest.fixture
def images() -> Tensor:
    return torch.rand(1, 3, 32, 32)


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    result: Tensor = model.eval()(images)
    return result


def expected_features(model: nn.Module, images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """What the source computes, normalised by hand."""
    if preprocessing.size:
        images = nn.functional.interpolate(images, preprocessing.size, mode="bilinear", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return features(model, (images - mean) / std)


def part(name: str, module: nn.Module) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


# solo-learn -----------------------------------------------------------------------------------------------------


def mlp(*sizes: int, norm: bool = False, last_norm: bool = False, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(itertools.pairwise(sizes)):
        last = index == len(sizes) - 2
        layers.append(nn.Linear(before, after, bias=bias))
        if last_norm if last else norm:
            layers.append(nn.BatchNorm1d(after, affine=bias or not last))
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


def weight_normed(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight_g": torch.rand(WIDTH, 1), f"{name}.weight_v": torch.rand(WIDTH, WIDTH)}


def extras(method: str, wide: int) -> dict[str, Any]:
    """What a method keeps beside encoder and classifier."""
    plain, normed = mlp(wide, WIDTH, WIDTH), mlp(wide, WIDTH, WIDTH, norm=True)
    queue, pointer = torch.rand(4, WIDTH), torch.zeros(1, dtype=torch.long)
    unbiased = mlp(wide, WIDTH, WIDTH, norm=True, last_norm=True, bias=False)
    head = part("head.mlp", mlp(wide, WIDTH, WIDTH, WIDTH)) | weight_normed("head.last_layer")
    iter_norm = {"weight": (1, WIDTH), "bias": (1, WIDTH), "running_mean": (4, 2, 1), "running_wm": (4, 2, 2)}
    found: dict[str, dict[str, Any]] = {
        "wmse": part("projector", normed),
        "byol": part("projector", normed)
        | part("momentum_projector", normed)
        | part("predictor", mlp(WIDTH, WIDTH, WIDTH, norm=True)),
        "nnclr": part("projector", mlp(wide, WIDTH, WIDTH, WIDTH, norm=True, last_norm=True))
        | part("predictor", mlp(WIDTH, WIDTH, WIDTH, norm=True))
        | {"queue": queue, "queue_y": torch.zeros(4, dtype=torch.long), "queue_ptr": pointer},
        "simclr": part("projector", plain),
        "mocov2plus": part("projector", plain)
        | part("momentum_projector", plain)
        | {"queue": torch.rand(2, WIDTH, 4), "queue_ptr": pointer},
        "mocov3": part("projector", unbiased)
        | part("momentum_projector", unbiased)
        | part("predictor", mlp(WIDTH, WIDTH, WIDTH, norm=True, bias=False)),
        "supcon": part("projector", plain),
        "ressl": part("projector", plain) | part("momentum_projector", plain) | {"queue": queue, "queue_ptr": pointer},
        "dino": head
        | {f"momentum_{key}": value for key, value in head.items()}
        | {"dino_loss_func.center": torch.zeros(1, WIDTH)},
        "swav": part("projector", normed) | weight_normed("prototypes") | {"queue": torch.rand(2, 4, WIDTH)},
        "vibcreg": part("projector", mlp(wide, WIDTH, WIDTH, WIDTH, norm=True))
        | {f"projector.7.{key}": torch.rand(shape) for key, shape in iter_norm.items()},
    }
    return found[method]


METHODS = ("wmse", "byol", "nnclr", "simclr", "mocov2plus", "mocov3", "supcon", "ressl", "dino", "swav", "vibcreg")
AVERAGED = ("byol", "mocov2plus", "mocov3", "ressl", "dino")


def cases(table: Iterable[str], other: tuple[Any, Any], default: tuple[tuple[str, Any], ...]) -> list[Any]:
    """Every method in both layouts; all but a few are exhaustive, because each writes and reads a file of 90 MB."""
    return [
        pytest.param(method, layout, marks=() if (method, layout) in default else pytest.mark.exhaustive)
        for method in table
        for layout in other
    ]


GROUPS = ("backbone", "encoder")


def classifier(seed: int, wide: int = 512) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(wide, CLASSES)


def solo_state(method: str = "simclr", group: str = "backbone", model: nn.Module | None = None) -> dict[str, Any]:
    state = part(group, model or source()) | part("classifier", classifier(1))
    if method in AVERAGED:
        state |= part(f"momentum_{group}", source(1)) | part("momentum_classifier", classifier(2))
    return state | extras(method, 512)


def write(path: Path, state: dict[str, Any]) -> Path:
    torch.save({"epoch": 999, "global_step": 1, "pytorch-lightning_version": "1.6.4", "state_dict": state}, path)
    return path


@pytest.mark.parametrize(
    ("method", "group"), cases(METHODS, GROUPS, (("simclr", "backbone"), ("dino", "backbone"), ("mocov3", "encoder")))
)
def test_every_method_gives_the_encoder_it_holds(method: str, group: str, path: Path, images: Tensor) -> None:
    write(path, solo_state(method, group))
    encoder, probe = load_solo(path), load_solo_probe(path)
    wanted = expected_features(source(), images, encoder.preprocessing)
    assert wanted.shape == (1, 512)
    assert torch.equal(features(encoder, images), wanted)
    assert not probe.training
    with torch.no_grad():
        assert torch.equal(probe(images), classifier(1)(wanted))
    assert all(torch.equal(value, source().state_dict()[key]) for key, value in encoder.backbone.state_dict().items())


@pytest.mark.parametrize(("method", "group"), cases(AVERAGED, GROUPS, (("byol", "backbone"), ("dino", "encoder"))))
def test_the_moving_average_is_another_encoder(method: str, group: str, path: Path, images: Tensor) -> None:
    write(path, solo_state(method, group))
    encoder = load_solo(path, ema=True)
    wanted = expected_features(source(1), images, encoder.preprocessing)
    assert torch.equal(features(encoder, images), wanted)
    with torch.no_grad():
        assert torch.equal(load_solo_probe(path, ema=True)(images), classifier(2)(wanted))


@pytest.mark.parametrize(
    "method",
    ["simclr", *(pytest.param(m, marks=pytest.mark.exhaustive) for m in METHODS if m not in (*AVERAGED, "simclr"))],
)
def test_a_method_without_a_moving_average_says_so(method: str, path: Path) -> None:
    write(path, solo_state(method))
    with pytest.raises(CheckpointError, match=r"no momentum_backbone.*keeps no moving average.*projector.*ema=False"):
        load_solo(path, ema=True)


def test_a_bare_state_dict_in_half_precision_is_read(path: Path, images: Tensor) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in solo_state().items()}
    torch.save(state, path)
    rounded = copy.deepcopy(source()).half().float()
    encoder = load_solo(path)
    assert torch.equal(features(encoder, images), expected_features(rounded, images, encoder.preprocessing))


@pytest.mark.parametrize("name", [pytest.param("resnet34", marks=pytest.mark.exhaustive), "resnet50"])
def test_the_architecture_is_found(name: str, path: Path, images: Tensor) -> None:
    model = source(0, name)
    wide = {"resnet34": 512, "resnet50": 2048}[name]
    write(path, part("backbone", model) | part("classifier", classifier(1, wide)))
    encoder = load_solo(path)
    assert encoder.spec.name == name
    wanted = expected_features(model, images, encoder.preprocessing)
    assert wanted.shape == (1, wide)
    with torch.no_grad():
        assert torch.equal(load_solo_probe(path)(images), classifier(1, wide)(wanted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {f"other.{k}": v for k, v in s.items()}, "parts other; expected either .* not neither"),
        (lambda s: s | {"encoder.conv1.weight": torch.zeros(1)}, "backbone, classifier, encoder, .* not both"),
        (lambda s: {f"model.{k}": v for k, v in s.items()}, "parts model; .* not neither"),
        (lambda _: source().state_dict(), "parts bn1, conv1, layer1, .* not neither"),
    ],
)
def test_a_file_with_both_or_neither_encoder_is_refused(
    change: Callable[[dict[str, Any]], dict[str, Any]], message: str, path: Path
) -> None:
    write(path, change(solo_state()))
    with pytest.raises(CheckpointError, match=message):
        load_solo(path)


def test_the_prefix_is_taken_away_at_the_start_and_once(path: Path) -> None:
    state = solo_state() | {"backbone.backbone.conv1.weight": source().conv1.weight}
    with pytest.raises(CheckpointError, match="unexpected: backbone.backbone.conv1.weight"):
        load_solo(write(path, state))


def test_a_classifier_inside_the_encoder_is_left_out(path: Path, images: Tensor) -> None:
    state = solo_state() | part("backbone.fc", nn.Linear(512, 1000))
    encoder = load_solo(write(path, state))
    assert torch.equal(features(encoder, images), expected_features(source(), images, encoder.preprocessing))
    state["backbone.fcx.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="unexpected: backbone.fcx.weight"):
        load_solo(write(path, state))


# strictness -----------------------------------------------------------------------------------------------------

FIRST, DEEP = "backbone.conv1.weight", "backbone.layer3.1.bn2.running_var"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({DEEP: None}, f"missing: {DEEP}\\. Build"),
        ({FIRST: None}, f"missing: {FIRST}\\. Build"),
        ({"backbone.extra.weight": torch.zeros(1)}, r"unexpected: backbone.extra.weight\. Build"),
        ({DEEP: torch.ones(3)}, rf"of another shape or type: {DEEP} \(float 3, expected float 256\)\. Build"),
        ({DEEP: torch.ones(256, dtype=torch.long)}, r"\(integer 256, expected float 256\)"),
        ({DEEP: torch.ones(256).to_sparse()}, r"\(no plain tensor, expected float 256\)"),
        ({DEEP: torch.ones(256, device="meta")}, r"\(no plain tensor, expected float 256\)"),
        ({DEEP: [1.0] * 256}, r"\(no plain tensor, expected float 256\)"),
        ({DEEP: torch.full((256,), torch.nan)}, f"not finite: {DEEP}"),
        ({DEEP: torch.full((256,), 1e300, dtype=torch.double)}, f"not finite: {DEEP}"),
        ({DEEP: torch.full((256,), -1e-9)}, f"variances below zero: {DEEP}. Download"),
        ({DEEP: torch.ones(256, dtype=torch.cfloat)}, r"\(no plain tensor, expected float 256\)"),
        ({FIRST: torch.ones(64, 3, 5, 5)}, rf"{FIRST} \(float 64x3x5x5, expected float 64x3x7x7\)"),
        ({DEEP: None, DEEP.replace("var", "std"): torch.ones(256)}, f"missing: {DEEP}; unexpected: .*running_std"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")  # torch checks it, and says so
def test_one_wrong_key_is_named(change: dict[str, Any], message: str, path: Path) -> None:
    state = {key: value for key, value in (solo_state() | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        load_solo(write(path, state))


@pytest.mark.parametrize("numbered", [False, True])
def test_no_key_may_be_missing_renamed_or_of_another_shape(numbered: bool) -> None:
    model = nn.Sequential(*source(stem="torchvision").children()) if numbered else source(stem="torchvision")
    state = part("backbone", model)
    assert len(state) == 120
    load_resnet("file", state, "backbone", stem="torchvision")
    for key, value in state.items():
        others = {name: each for name, each in state.items() if name != key}
        for changed in (others, others | {f"{key}s": value}, others | {key: value[..., None]}):
            with pytest.raises(CheckpointError, match=f"{key}[ .;]"):
                load_resnet("file", changed, "backbone", stem="torchvision")


def test_another_architecture_is_refused_in_a_readable_message(path: Path) -> None:
    model = torchvision.models.mobilenet_v3_small(weights=None)
    with pytest.raises(CheckpointError, match="no ResNet-18, -34 or -50.* and 115 more; unexpected") as caught:
        load_solo(write(path, part("backbone", model)))
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classifier.weight": None, "classifier.bias": None}, "no linear classifier on 512 features; found nothing"),
        ({"classifier.bias": None}, "found classifier.weight. Use load_solo"),
        ({"classifier.weight": torch.zeros(CLASSES, 4)}, "no linear classifier on 512 features"),
        ({"classifier.bias": torch.zeros(CLASSES + 1)}, "no linear classifier"),
        ({"classifier.2.bias": torch.zeros(1)}, "found classifier.weight, classifier.bias, classifier.2.bias"),
        ({"classifier.weight": torch.zeros(0, 512), "classifier.bias": torch.zeros(0)}, "no linear classifier"),
        ({"classifier.bias": torch.full((CLASSES,), torch.inf)}, "not finite: classifier.bias"),
    ],
)
def test_a_probe_needs_the_online_classifier(change: dict[str, Any], message: str, path: Path) -> None:
    state = {key: value for key, value in (solo_state() | change).items() if value is not None}
    write(path, state)
    assert isinstance(load_solo(path), Encoder)
    with pytest.raises(CheckpointError, match=message):
        load_solo_probe(path)


# stems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "asked", "used", "size"),
    [
        ("solo", None, "solo", None),
        pytest.param("solo", "zepad", "zepad", (64, 64), marks=pytest.mark.exhaustive),
        ("torchvision", None, "torchvision", (224, 224)),
        ("torchvision", "zepad", "zepad-7x7", (64, 64)),
    ],
)
def test_a_stem_decides_how_the_same_weights_are_used(
    written: str, asked: str | None, used: str, size: tuple[int, int] | None, path: Path, images: Tensor
) -> None:
    write(path, solo_state(model=source(stem=written)))
    encoder = load_solo(path, stem=asked)
    assert encoder.spec.arguments == {"stem": used}
    assert encoder.preprocessing.size == size
    assert encoder.preprocessing.mean == ((0.4914, 0.4822, 0.4465) if used == "solo" else (0.485, 0.456, 0.406))
    wanted = expected_features(source(stem=used), images, encoder.preprocessing)
    assert torch.equal(features(encoder, images), wanted)
    with torch.no_grad():
        assert torch.equal(load_solo_probe(path, stem=asked)(images), classifier(1)(wanted))

    spec = EncoderSpec.from_dict(json.loads(json.dumps(encoder.spec.to_dict())) | {"preprocessing": None})
    rebuilt = solo.build(spec, pretrained=False)
    assert rebuilt.spec == encoder.spec
    assert not torch.equal(features(rebuilt, images), wanted)
    rebuilt.load_state_dict(encoder.state_dict())
    assert torch.equal(features(rebuilt, images), wanted)


@pytest.mark.parametrize(
    ("written", "asked", "message"),
    [
        ("solo", "torchvision", "'torchvision' has a 7x7 convolution, .* a 3x3 one. Use solo or zepad"),
        ("torchvision", "solo", "'solo' has a 3x3 convolution, .* a 7x7 one. Use torchvision or zepad-7x7"),
        ("solo", "zepad-7x7", "has a 7x7 convolution"),
        ("solo", "cifar", "stem must be one of torchvision, solo, zepad, zepad-7x7; got 'cifar'"),
        ("solo", ["solo"], "stem must be one of"),
    ],
)
def test_a_stem_that_the_file_contradicts_is_refused(written: str, asked: Any, message: str, path: Path) -> None:
    write(path, part("backbone", source(stem=written)))
    with pytest.raises(ConfigError, match=message):
        load_solo(path, stem=asked)


# specs ----------------------------------------------------------------------------------------------------------


def test_a_spec_of_a_file_builds_what_the_file_holds(path: Path, images: Tensor) -> None:
    write(path, solo_state())
    for arguments in ({}, {"stem": "zepad"}):
        spec = EncoderSpec(source="solo", weights=str(path), arguments=arguments)
        encoder, loaded = solo.build(spec, pretrained=True), load_solo(path, **arguments)
        assert encoder.spec == loaded.spec
        assert not encoder.spec.weights
        assert torch.equal(features(encoder, images), features(loaded, images))


def test_a_name_builds_without_a_file(images: Tensor) -> None:
    encoder = solo.build(EncoderSpec(source="solo", name="resnet50"), pretrained=False)
    assert encoder.spec.arguments == {"stem": "solo"}
    assert features(encoder, images).shape == (1, 2048)
    encoder = lightly.build(EncoderSpec(source="lightly", name="resnet18"), pretrained=False)
    assert features(encoder, images).shape == (1, 512)
    assert encoder.spec == EncoderSpec(
        source="lightly", name="resnet18", preprocessing=Preprocessing.imagenet(size=(224, 224))
    )


@pytest.mark.parametrize("source_", [solo, lightly])
def test_a_request_that_no_file_or_name_can_answer_is_refused(source_: Any, path: Path) -> None:
    kind = source_.__name__.rpartition(".")[2]
    write(path, solo_state(model=source(stem="torchvision")))
    with pytest.raises(ConfigError, match=f"{kind}:resnet18 can be downloaded.*Name it: '{kind}:<file>'"):
        source_.build(EncoderSpec(source=kind, name="resnet18"), pretrained=True)
    with pytest.raises(ConfigError, match=r"known from the file alone.*name='resnet18'"):
        source_.build(EncoderSpec(source=kind, weights=str(path)), pretrained=False)
    with pytest.raises(ConfigError, match=r"name must be one of .*got 'resnet19'"):
        source_.build(EncoderSpec(source=kind, name="resnet19"), pretrained=False)
    with pytest.raises(ConfigError, match="holds a resnet18, not the resnet50 asked for"):
        source_.build(EncoderSpec(source=kind, name="resnet50", weights=str(path)), pretrained=True)
    with pytest.raises(ConfigError, match="argument"):
        source_.build(EncoderSpec(source=kind, name="resnet18", arguments={"width": 2}), pretrained=False)
    assert wrap_module(source()).spec.source != kind, "their ResNets are torchvision's"


@pytest.mark.parametrize("stem", ["cifar", ["solo"], 3])
def test_an_unknown_stem_in_a_spec_is_refused(stem: Any) -> None:
    with pytest.raises(ConfigError, match="stem must be one of"):
        solo.build(EncoderSpec(source="solo", name="resnet18", arguments={"stem": stem}), pretrained=False)


# lightly --------------------------------------------------------------------------------------------------------

# Part by part: the encoder trained, and its moving average, of lightly's benchmarks and (numbered) of its examples.
LIGHTLY = {
    "SimCLR": ("backbone", None),
    "BYOL": ("backbone", "teacher_backbone"),
    "MoCo v2": ("backbone", "key_backbone"),
    "TiCo": ("backbone", "backbone_momentum"),
    "DINO": ("student_backbone", "backbone"),
    "DINO example": ("student_backbone", "teacher_backbone"),
}


def lightly_state(trained: str, average: str | None, numbered: bool, name: str = "resnet18") -> dict[str, Any]:
    def body(seed: int) -> nn.Module:
        model = source(seed, name, "torchvision")
        return nn.Sequential(*list(model.children())[:-1]) if numbered else model

    state = part(trained, body(0)) | part("projection_head.layers", mlp(512, WIDTH, WIDTH, norm=True))
    state |= part("online_classifier.classification_head", classifier(1))
    return state | (part(average, body(1)) if average else {})


@pytest.mark.parametrize(
    ("method", "numbered"), cases(LIGHTLY, (False, True), (("SimCLR", True), ("BYOL", False), ("DINO", True)))
)
def test_every_lightly_method_gives_the_encoder_it_holds(
    method: str, numbered: bool, path: Path, images: Tensor
) -> None:
    trained, average = LIGHTLY[method]
    write(path, lightly_state(trained, average, numbered))
    encoder = load_lightly(path)
    assert str(encoder.spec) == "lightly:resnet18"
    assert encoder.preprocessing == Preprocessing.imagenet(size=(224, 224))
    assert torch.equal(features(encoder.backbone, images), features(source(0, stem="torchvision"), images))
    if average:
        averaged = load_lightly(path, ema=True).backbone
        assert torch.equal(features(averaged, images), features(source(1, stem="torchvision"), images))
    else:
        with pytest.raises(CheckpointError, match=r"no moving average \(teacher_backbone, .*ema=False"):
            load_lightly(path, ema=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("numbered", [False, True])
def test_a_resnet50_of_lightly_is_found(numbered: bool, path: Path, images: Tensor) -> None:
    write(path, lightly_state("backbone", None, numbered, "resnet50"))
    encoder = lightly.build(EncoderSpec(source="lightly", weights=str(path)), pretrained=True)
    assert str(encoder.spec) == "lightly:resnet50"
    wanted = expected_features(source(0, "resnet50", "torchvision"), images, encoder.preprocessing)
    assert wanted.shape == (1, 2048)
    assert torch.equal(features(encoder, images), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone.4.0.conv1.weight": None}, r"missing: backbone.4.0.conv1.weight\. Build"),
        ({"backbone.9.weight": torch.zeros(1)}, r"unexpected: backbone.9.weight\. Build"),
        ({"backbone.layer1.0.conv1.weight": torch.zeros(1)}, "unexpected: backbone.layer1.0.conv1.weight"),
        ({"backbone.0.weight": torch.zeros(64, 3, 3, 3)}, r"0.weight \(float 64x3x3x3, expected float 64x3x7x7\)"),
    ],
)
def test_one_wrong_key_of_a_numbered_layout_is_named(change: dict[str, Any], message: str, path: Path) -> None:
    state = lightly_state("backbone", None, numbered=True) | change
    with pytest.raises(CheckpointError, match=message):
        load_lightly(write(path, {key: value for key, value in state.items() if value is not None}))


def test_a_file_of_another_project_is_refused_with_its_parts(path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"parts classifier, encoder, projector, and no backbone.\* of lightly"):
        load_lightly(write(path, solo_state(group="encoder")))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")  # of other packages about each other
def test_files_that_lightly_and_lightning_write_themselves(path: Path, images: Tensor) -> None:
    pytest.importorskip("lightly")
    pl = pytest.importorskip("pytorch_lightning")
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.utils.benchmarking import OnlineLinearClassifier

    class BYOL(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, num_classes: int) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.backbone = copy.deepcopy(source(0, stem="torchvision"))
            self.projection_head = BYOLProjectionHead(512, WIDTH, WIDTH)
            self.prediction_head = BYOLPredictionHead(WIDTH, WIDTH, WIDTH)
            self.teacher_backbone = copy.deepcopy(source(1, stem="torchvision"))
            self.teacher_projection_head = BYOLProjectionHead(512, WIDTH, WIDTH)
            self.online_classifier = OnlineLinearClassifier(512, num_classes)

    trainer = pl.Trainer(logger=False, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    trainer.strategy.connect(BYOL(num_classes=CLASSES))
    trainer.save_checkpoint(path)
    for ema in (False, True):
        encoder = load_lightly(path, ema=ema)
        wanted = expected_features(source(int(ema), stem="torchvision"), images, encoder.preprocessing)
        assert torch.equal(features(encoder, images), wanted)
