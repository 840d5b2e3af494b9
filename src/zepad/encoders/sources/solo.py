"""Checkpoints of solo-learn: ResNets that its self-supervised methods pre-trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError
from ..checkpoints import listed, read_checkpoint
from ..encoder import Encoder
from ..preprocessing import Preprocessing
from ..spec import EncoderSpec
from .resnet import STEMS, Kind, build_resnet, check_finite, check_name, check_request, groups_of, kind_of, load_resnet

_BACKBONES = ("backbone", "encoder")  # since solo-learn 1.0.3, and before

_CIFAR = Preprocessing(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
_PREPROCESSING = {
    "torchvision": Preprocessing.imagenet(size=(224, 224)),
    "solo": _CIFAR,
    "zepad": Preprocessing.imagenet(size=(64, 64)),
    "zepad-7x7": Preprocessing.imagenet(size=(64, 64)),
}


def build(spec: EncoderSpec, *, pretrained: bool) -> Encoder:
    """Build the ResNet that a file holds, or the one that the spec names, with the stem of the arguments."""
    check_request(spec, pretrained=pretrained)
    stem = spec.arguments.get("stem")
    if set(spec.arguments) - {"stem"}:
        raise ConfigError(f"a solo encoder takes the one argument stem; got {spec.arguments}.")
    if pretrained:
        encoder = load_solo(spec.weights, stem=stem)
        check_name(spec, encoder.spec.name)
        return encoder
    stem = "solo" if stem is None else stem
    return _encoder(spec.name, build_resnet(spec.name, stem), stem)


def load_solo(path: str | Path, *, stem: str | None = None, ema: bool = False) -> Encoder:
    """Load the encoder of a solo-learn checkpoint: ResNet-18, -34 or -50, every key of it.

    The online classifier, projectors, predictors, prototypes and queues are left out.

    Args:
        path: Path of the checkpoint file; nothing in it is executed.
        stem: How the first convolution is applied, which the weights do not tell. The default for a 3x3 convolution is
            `"solo"`, as solo-learn trained on CIFAR (stride 1, padding 2, no max-pool), and for a 7x7 one
            `"torchvision"` (stride 2, padding 3, max-pool). `"zepad"` is what ZePAD's reference code makes of either:
            stride 1, padding 1, no max-pool, images resized to 64x64. The stem sets the preprocessing: CIFAR's mean and
            std at any size for `"solo"`, ImageNet's for the others.
        ema: Load the exponential moving average that BYOL, MoCo v2+, MoCo v3, ReSSL and DINO train with.

    Raises:
        CheckpointError: If the file cannot be read, holds no such encoder, or one whose keys or shapes do not match.
        ConfigError: If the stem is unknown or contradicts the kernel in the file.
    """
    return _load(path, read_checkpoint(path), stem, ema)


def load_solo_probe(path: str | Path, *, stem: str | None = None, ema: bool = False) -> nn.Sequential:
    """Load the encoder together with the linear classifier that solo-learn trained on it, online.

    Args:
        path: Path of the checkpoint file; nothing in it is executed.
        stem: How the first convolution is applied; `load_solo` lists the choices.
        ema: Load the averaged encoder and the classifier that was trained on it, which solo-learn keeps on request.

    Returns:
        The encoder followed by a linear layer: images `(N, 3, H, W)` in [0, 1] to logits `(N, K)`, in evaluation mode.

    Raises:
        CheckpointError: If the file cannot be read, holds no such encoder or no classifier, or one whose keys or shapes
            do not match.
        ConfigError: If the stem is unknown or contradicts the kernel in the file.
    """
    state = read_checkpoint(path)
    encoder = _load(path, state, stem, ema)
    group = "momentum_classifier" if ema else "classifier"
    found = {key: value for key, value in state.items() if key.startswith(f"{group}.")}
    bias = found.get(f"{group}.bias")
    features: Any = encoder.backbone.inplanes  # torchvision's name for the width it ends with
    classes = bias.numel() if isinstance(bias, Tensor) else 0
    expected: dict[str, Kind] = {
        f"{group}.weight": ((classes, features), True),
        f"{group}.bias": ((classes,), True),
    }
    if not classes or {key: kind_of(value) for key, value in found.items()} != expected:
        raise CheckpointError(
            f"{path} has no linear {group} on {features} features; found {listed(found) or 'nothing by that name'}. "
            "Use load_solo and fit a probe on your own data."
        )
    linear = nn.Linear(features, classes)
    linear.load_state_dict({key.removeprefix(f"{group}."): value for key, value in found.items()})
    check_finite(path, {key: linear.get_parameter(key.removeprefix(f"{group}.")) for key in found})
    return nn.Sequential(encoder, linear).eval()


def _load(path: str | Path, state: Mapping[str, Any], stem: str | None, ema: bool) -> Encoder:
    groups = groups_of(state)
    present = [group for group in _BACKBONES if group in groups]
    if len(present) != 1:
        raise CheckpointError(
            f"{path} holds the parts {', '.join(groups)}; expected either backbone.* or encoder.* of solo-learn, not "
            f"{'both' if present else 'neither'}. Name a pre-training checkpoint of solo-learn."
        )
    group = f"momentum_{present[0]}" if ema else present[0]
    if group not in groups:
        raise CheckpointError(
            f"{path} holds no {group}.*: its method keeps no moving average (BYOL, MoCo v2+, MoCo v3, ReSSL and DINO "
            f"do). It has {', '.join(groups)}. Load it with ema=False."
        )
    stem = _stem(path, state.get(f"{group}.conv1.weight"), stem)
    name, model = load_resnet(path, state, group, stem=stem)
    return _encoder(name, model, stem)


def _stem(path: str | Path, first: object, wanted: str | None) -> str:
    """Return the stem for a first convolution: the one asked for if its kernel fits, or the default."""
    kernel = first.shape[-1] if isinstance(first, Tensor) and first.ndim == 4 else None
    if wanted is None:
        return "solo" if kernel == 3 else "torchvision"
    stem = "zepad-7x7" if (wanted, kernel) == ("zepad", 7) else wanted
    if stem not in tuple(STEMS):
        raise ConfigError(f"stem must be one of {', '.join(STEMS)}; got {wanted!r}.")
    if kernel in (3, 7) and STEMS[stem].kernel != kernel:
        fitting = [name for name, each in STEMS.items() if each.kernel == kernel]
        raise ConfigError(
            f"stem {wanted!r} has a {STEMS[stem].kernel}x{STEMS[stem].kernel} convolution, {path} a {kernel}x{kernel} "
            f"one. Use {' or '.join(fitting)}."
        )
    return stem


def _encoder(name: str, model: nn.Module, stem: str) -> Encoder:
    spec = EncoderSpec(source="solo", name=name, arguments={"stem": stem})
    return Encoder(model, preprocessing=_PREPROCESSING[stem], spec=spec)
