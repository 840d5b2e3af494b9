"""Build encoders from known sources, and recognise modules that came from one.

Building never touches the network unless pre-trained weights are asked for.
"""

from __future__ import annotations

import copy
import inspect
import logging
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, HubError
from .encoder import Encoder, probe
from .preprocessing import Preprocessing
from .small_resnet import SmallResNet
from .spec import EncoderSpec

logger = logging.getLogger(__name__)

_CLASSIFIERS = ("fc", "classifier", "head", "heads")
_PACKAGED = ("digits-barlow-twins", "digits-simclr")


def build_encoder(spec: EncoderSpec, *, pretrained: bool = False) -> Encoder:
    """Build the encoder a spec names, without its classifier and with its own preprocessing.

    Args:
        spec: Any source but `"custom"`.
        pretrained: Load the source's pre-trained weights (timm and torchvision download them if they are not
            cached); otherwise the weights are random and the network is not touched.

    Raises:
        ConfigError: If the source does not know the name, or its package is not installed.
        HubError: If the weights cannot be had.
    """
    builders = {"timm": _build_timm, "torchvision": _build_torchvision, "zepad": _build_packaged}
    if spec.source not in builders:
        raise ConfigError(f"a {spec.source} encoder can only be built by its owner. Pass the module itself.")
    return builders[spec.source](spec, pretrained)


def wrap_module(module: nn.Module, preprocessing: Preprocessing | None = None) -> Encoder:
    """Copy a module and wrap it, finding source, preprocessing and classifier by itself for timm and torchvision.

    A timm or torchvision model loses its classifier in the copy: the features below it are what tasks build on.
    A module of unknown origin is taken as it is and, without a `preprocessing`, as one that takes raw pixels.

    Args:
        module: The caller's module; never modified.
        preprocessing: Overrides what would be found.
    """
    package = type(module).__module__.partition(".")[0]
    backbone = copy.deepcopy(module)
    if package == "timm":
        spec, found = _recognise_timm(backbone)
    elif type(module).__module__.startswith("torchvision.models."):
        spec, found = _recognise_torchvision(backbone)
    else:
        spec, found = EncoderSpec(source="custom"), Preprocessing()
    return Encoder(backbone, preprocessing=preprocessing or found, spec=spec)


def _same_function(spec: EncoderSpec, backbone: nn.Module, preprocessing: Preprocessing) -> bool:
    """Whether the spec builds this very function: same keys and shapes, and same features with the same weights."""
    try:
        rebuilt = build_encoder(spec).backbone
        rebuilt.load_state_dict(backbone.state_dict())
        ours = Encoder(copy.deepcopy(backbone).eval(), preprocessing=preprocessing)
        channels, _ = probe(ours)
        size = preprocessing.size or (64, 64)
        image = torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0))
        reference = next(backbone.parameters(), image)
        image = image.to(reference.device, reference.dtype)
        rebuilt = rebuilt.to(reference.device, reference.dtype)
        with torch.no_grad():
            return torch.equal(ours(image), Encoder(rebuilt.eval(), preprocessing=preprocessing)(image))
    except Exception as error:  # any failure to rebuild means only that the caller must pass the module again
        logger.info("%s does not rebuild from %s: %s", type(backbone).__name__, spec, error)
        return False


# timm -----------------------------------------------------------------------------------------------------------


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise ConfigError("timm is not installed. Install it with: pip install 'zepad[timm]'.") from error
    return timm


def _timm_preprocessing(model: nn.Module) -> Preprocessing:
    from timm.data import resolve_model_data_config  # type: ignore[attr-defined]

    config = resolve_model_data_config(model)
    mode: Any = config["interpolation"] if config["interpolation"] in ("nearest", "bilinear", "bicubic") else "bilinear"
    # A model built for another size than its pre-training says so in its patch embedding alone.
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=tuple(built_for or config["input_size"][1:]),
        interpolation=mode,
    )


def _build_timm(spec: EncoderSpec, pretrained: bool) -> Encoder:
    timm = _import_timm()
    if not timm.is_model(spec.name):
        raise ConfigError(f"timm {timm.__version__} knows no model {spec.name!r}. See timm.list_models().")
    try:
        model = timm.create_model(spec.name, pretrained=pretrained, num_classes=0, **spec.arguments)
    except Exception as error:
        raise _source_error(spec, pretrained, error) from error
    return Encoder(model, preprocessing=_timm_preprocessing(model), spec=spec)


def _recognise_timm(backbone: nn.Module) -> tuple[EncoderSpec, Preprocessing]:
    if hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(0)  # type: ignore[operator]
    preprocessing = _timm_preprocessing(backbone)
    architecture = getattr(backbone, "pretrained_cfg", {}).get("architecture", "")
    if architecture:
        spec = EncoderSpec(source="timm", name=architecture)
        if _same_function(spec, backbone, preprocessing):
            return spec, preprocessing
    return EncoderSpec(source="custom"), preprocessing


# torchvision ----------------------------------------------------------------------------------------------------


def _remove_classifier(model: nn.Module) -> None:
    """Replace the last linear layer, or 1x1 convolution, of a torchvision classifier by the identity."""
    for name in _CLASSIFIERS:
        part = getattr(model, name, None)
        if isinstance(part, nn.Linear):
            setattr(model, name, nn.Identity())
            return
        if isinstance(part, nn.Sequential):
            for key, layer in reversed(list(part.named_children())):
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    setattr(part, key, nn.Identity())
                    return


def _torchvision_preprocessing(name: str, model: nn.Module) -> Preprocessing:
    from torchvision.models import get_model_weights

    transforms = get_model_weights(name).DEFAULT.transforms()
    size = int(getattr(model, "image_size", transforms.crop_size[0]))  # only a vision transformer insists on one
    return Preprocessing(
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        size=(size, size),
        interpolation="bicubic" if "bicubic" in str(transforms.interpolation).lower() else "bilinear",
    )


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))  # classification alone: no backbone is downloaded behind our back


def _build_torchvision(spec: EncoderSpec, pretrained: bool) -> Encoder:
    from torchvision import models

    if spec.name not in _torchvision_names():
        raise ConfigError(
            f"torchvision knows no classification model {spec.name!r}. See torchvision.models.list_models()."
        )
    try:
        model = models.get_model(spec.name, weights="DEFAULT" if pretrained else None, **spec.arguments)
    except Exception as error:
        raise _source_error(spec, pretrained, error) from error
    _remove_classifier(model)
    return Encoder(model, preprocessing=_torchvision_preprocessing(spec.name, model), spec=spec)


def _recognise_torchvision(backbone: nn.Module) -> tuple[EncoderSpec, Preprocessing]:
    from torchvision import models

    _remove_classifier(backbone)
    shapes = {key: value.shape for key, value in backbone.state_dict().items()}
    for name in _torchvision_names():
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
        spec, preprocessing = EncoderSpec(source="torchvision", name=name), _torchvision_preprocessing(name, backbone)
        if _same_function(spec, backbone, preprocessing):
            return spec, preprocessing
    size = getattr(backbone, "image_size", 224)
    return EncoderSpec(source="custom"), Preprocessing.imagenet(size=(size, size))


# encoders shipped inside the package ----------------------------------------------------------------------------


def _build_packaged(spec: EncoderSpec, pretrained: bool) -> Encoder:
    if spec.name not in _PACKAGED or spec.arguments:
        raise ConfigError(f"zepad ships the encoders {', '.join(_PACKAGED)} (no arguments); got {str(spec)!r}.")
    model = SmallResNet(width=16)
    if pretrained:
        model.load_state_dict(_packaged_weights(spec.name))
    return Encoder(model, preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, size=(32, 32)), spec=spec)


def _packaged_weights(name: str) -> dict[str, Tensor]:
    from safetensors.torch import load

    path = resources.files(__package__) / "weights" / f"{name}.safetensors"
    try:
        stored = load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} is missing from the installed package. Reinstall zepad.") from error
    # Stored in half precision to keep the package small.
    return {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}


def _source_error(spec: EncoderSpec, pretrained: bool, error: Exception) -> Exception:
    if pretrained and not isinstance(error, TypeError):
        return HubError(
            f"the pre-trained weights of {spec} could not be loaded: {type(error).__name__}: {error}. "
            "Check the connection, or build the model yourself and pass the module."
        )
    return ConfigError(f"{spec} could not be built with {spec.arguments}: {type(error).__name__}: {error}.")
