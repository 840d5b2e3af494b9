"""Classification models of torchvision."""

from __future__ import annotations

import copy
import inspect

import torch
from torch import nn

from ...errors import ConfigError
from ..encoder import Encoder
from ..preprocessing import Preprocessing
from ..spec import EncoderSpec
from .recognition import building_error, same_function

_CLASSIFIERS = ("fc", "classifier", "head", "heads")


def build(spec: EncoderSpec, *, pretrained: bool) -> Encoder:
    """Build the model without its classifier."""
    from torchvision import models

    if spec.name not in _names():
        raise ConfigError(
            f"torchvision knows no classification model {spec.name!r}. See torchvision.models.list_models()."
        )
    try:
        weights = (spec.weights or "DEFAULT") if pretrained else None
        model = models.get_model(spec.name, weights=weights, **spec.arguments)
    except Exception as error:
        raise building_error(spec, pretrained, error) from error
    _remove_classifier(model)
    return Encoder(model, preprocessing=_preprocessing(spec.name, model), spec=spec)


def wrap(module: nn.Module) -> Encoder | None:
    """Copy a torchvision model without its classifier."""
    from torchvision import models

    if not type(module).__module__.startswith("torchvision.models."):
        return None
    backbone = copy.deepcopy(module)
    _remove_classifier(backbone)
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    for name in _names():
        builder = models.get_model_builder(name)
        if inspect.signature(builder).return_annotation not in (type(backbone), type(backbone).__name__):
            continue
        try:
            with torch.device("meta"):
                candidate = builder(weights=None)
        except NotImplementedError:  # a RegNet computes its widths with tensors
            continue
        _remove_classifier(candidate)
        if {key: value.shape for key, value in candidate.state_dict().items()} != shapes:
            continue
        spec, preprocessing = EncoderSpec(source="torchvision", name=name), _preprocessing(name, backbone)
        if same_function(build(spec, pretrained=False), backbone, preprocessing):
            return Encoder(backbone, preprocessing=preprocessing, spec=spec)
    size = getattr(backbone, "image_size", 224)
    return Encoder(backbone, preprocessing=Preprocessing.imagenet(size=(size, size)))


def _names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))  # classification models alone: others may download a backbone


def _remove_classifier(model: nn.Module) -> None:
    """Replace the last linear layer, or 1x1 convolution, of a torchvision classifier by the identity.

    One whose last layer the caller replaced by the identity already is left alone.
    """
    for name in _CLASSIFIERS:
        part = getattr(model, name, None)
        if isinstance(part, nn.Linear):
            setattr(model, name, nn.Identity())
            return
        if isinstance(part, nn.Sequential):
            for key, layer in reversed(list(part.named_children())):
                if isinstance(layer, nn.Identity):
                    return
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    setattr(part, key, nn.Identity())
                    return


def _preprocessing(name: str, model: nn.Module) -> Preprocessing:
    from torchvision.models import get_model_weights

    transforms = get_model_weights(name).DEFAULT.transforms()
    size = int(getattr(model, "image_size", transforms.crop_size[0]))  # a vision transformer takes no other size
    return Preprocessing(
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        size=(size, size),
        interpolation="bicubic" if "bicubic" in str(transforms.interpolation).lower() else "bilinear",
    )
