"""ResNets of torchvision's layout in other projects' checkpoints: their stems, and strict loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import require
from ...errors import CheckpointError, ConfigError
from ..checkpoints import listed
from ..spec import EncoderSpec

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")

# Index at which `nn.Sequential(*resnet.children())` puts each child that has weights.
_NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}

Kind = tuple[tuple[int, ...], bool]
"""Shape of a tensor, and whether it is floating-point."""


@dataclass(frozen=True)
class Stem:
    """The first convolution of a ResNet, and whether a max-pool follows."""

    kernel: int
    stride: int
    padding: int
    pool: bool


STEMS = {
    "torchvision": Stem(kernel=7, stride=2, padding=3, pool=True),
    "solo": Stem(kernel=3, stride=1, padding=2, pool=False),
    "zepad": Stem(kernel=3, stride=1, padding=1, pool=False),
    "zepad-7x7": Stem(kernel=7, stride=1, padding=1, pool=False),
}
"""Stems of torchvision, of solo-learn for CIFAR, and of ZePAD's reference code for files of either kernel."""


def build_resnet(name: str, stem: str = "torchvision") -> nn.Module:
    """Build a ResNet without its classifier, with random weights.

    Raises:
        ConfigError: If the architecture or the stem is unknown.
    """
    from torchvision import models

    require(name in ARCHITECTURES, "name", name, f"one of {ARCHITECTURES}")
    require(stem in tuple(STEMS), "stem", stem, f"one of {tuple(STEMS)}")
    model: Any = models.get_model(name, weights=None)
    model.fc = nn.Identity()
    if stem != "torchvision":
        first = STEMS[stem]
        model.conv1 = nn.Conv2d(3, 64, first.kernel, first.stride, first.padding, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
        model.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1) if first.pool else nn.Identity()
    return model  # type: ignore[no-any-return]


def check_request(spec: EncoderSpec, *, pretrained: bool) -> None:
    """Refuse a request for pre-trained weights without a file, or for an architecture without a name.

    Raises:
        ConfigError: If weights are requested without a file, or an architecture without a name.
    """
    if pretrained and not spec.weights:
        raise ConfigError(
            f"no weights of {spec} can be downloaded: they are a file that you have. Name it: '{spec.source}:<file>'."
        )
    if not pretrained and not spec.name:
        raise ConfigError(
            f"the architecture of {spec} is known from the file alone. Ask for its pre-trained weights, or name the "
            f"architecture: EncoderSpec(source={spec.source!r}, name={ARCHITECTURES[0]!r})."
        )


def check_name(spec: EncoderSpec, found: str) -> None:
    """Refuse a file that holds another architecture than the spec names.

    Raises:
        ConfigError: Naming both.
    """
    if spec.name not in ("", found):
        raise ConfigError(f"{spec.weights} holds a {found}, not the {spec.name} asked for. Leave the name out.")


def groups_of(state: Mapping[str, Any]) -> list[str]:
    """Return the names before the first dot of every key: the parts of a model."""
    return sorted({key.partition(".")[0] for key in state})


def load_resnet(path: str | Path, state: Mapping[str, Any], group: str, *, stem: str) -> tuple[str, nn.Module]:
    """Find the architecture of one part of a checkpoint and load it, every key and shape of it.

    Both `backbone.layer1.0.conv1.weight` and, from `nn.Sequential(*resnet.children())`, `backbone.4.0.conv1.weight`
    are read. A classifier `backbone.fc.*` is left out.

    Args:
        path: Path of the checkpoint, for messages.
        state: State dict of the whole checkpoint; its other parts are not looked at.
        group: Name of the part, such as `"backbone"`.
        stem: Name of one of `STEMS`.

    Returns:
        The name of the architecture and the loaded module.

    Raises:
        CheckpointError: Naming every kind of key that is missing, unexpected or of another shape, or not finite.
    """
    prefix = f"{group}."
    found = {
        key: value for key, value in state.items() if key.startswith(prefix) and not key.startswith(f"{prefix}fc.")
    }
    kinds = {key: kind_of(value) for key, value in found.items()}
    layouts = [(name, _layout(name, stem, prefix, numbered)) for numbered in (False, True) for name in ARCHITECTURES]
    name, expected = min(layouts, key=lambda layout: len(layout[1].items() ^ kinds.items()))  # even of a damaged file
    problems = {
        "missing": [key for key in expected if key not in found],
        "unexpected": [key for key in found if key not in expected],
        "of another shape or type": [
            f"{key} ({_words(kinds[key])}, expected {_words(kind)})"
            for key, kind in expected.items()
            if key in found and kinds[key] != kind
        ],
    }
    faults = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in problems.items() if keys)
    if faults:
        raise CheckpointError(
            f"the {group} in {path} is no ResNet-18, -34 or -50 of torchvision's layout; {name} is nearest. {faults}. "
            "Build another architecture yourself and pass the module."
        )
    model = build_resnet(name, stem)
    keys = dict(zip(expected, model.state_dict(), strict=True))
    model.load_state_dict({keys[key]: value for key, value in found.items()})
    check_finite(path, {key: model.state_dict()[own] for key, own in keys.items()})
    return name, model


def check_finite(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights with infinities or NaN, and running variances below zero, of which BatchNorm makes NaN.

    Raises:
        CheckpointError: If a weight is not finite or a variance is negative; the message names the keys.
    """
    broken = [key for key, value in weights.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"{path} has weights that are not finite: {listed(broken)}. Training had diverged.")
    negative = [key for key, value in weights.items() if key.endswith(".running_var") and (value < 0).any()]
    if negative:
        raise CheckpointError(f"{path} has variances below zero: {listed(negative)}. Download or copy it again.")


def kind_of(value: object) -> Kind | None:
    """Return the kind of a plain real tensor in memory, and None for all else that a file may hold."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        return None
    if value.is_complex():
        return None
    return tuple(value.shape), value.is_floating_point()


@cache
def _layout(name: str, stem: str, prefix: str, numbered: bool) -> dict[str, Kind]:
    """Return the keys and kinds that a file has for an architecture, in the order of the module."""
    with torch.device("meta"):
        state = build_resnet(name, stem).state_dict()
    kinds = {}
    for key, value in state.items():
        child, _, rest = key.partition(".")
        child = _NUMBERS[child] if numbered else child
        kinds[f"{prefix}{child}.{rest}"] = tuple(value.shape), value.is_floating_point()
    return kinds


def _words(kind: Kind | None) -> str:
    return (
        f"{'float' if kind[1] else 'integer'} {'x'.join(map(str, kind[0])) or 'scalar'}" if kind else "no plain tensor"
    )
