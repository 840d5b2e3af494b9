"""Models of timm."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ...errors import ConfigError
from ..encoder import Encoder
from ..preprocessing import Preprocessing
from ..spec import EncoderSpec
from .recognition import building_error, same_function


def build(spec: EncoderSpec, *, pretrained: bool) -> Encoder:
    """Build the model without its classifier."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError("timm is not installed. Install it with: pip install 'zepad[timm]'.") from error
    if not timm.is_model(spec.name):
        raise ConfigError(
            f"timm {timm.__version__} knows no model {spec.name!r}. See timm.list_models(), or upgrade with: "
            "pip install -U timm."
        )
    try:
        model = timm.create_model(spec.name, pretrained=pretrained, num_classes=0, **spec.arguments)
    except Exception as error:
        raise building_error(spec, pretrained, error) from error
    origin = _origin(model) if pretrained else ""
    return Encoder(model, preprocessing=_preprocessing(model), spec=spec, origin=origin)


def wrap(module: nn.Module) -> Encoder | None:
    """Copy a timm model without its classifier."""
    if type(module).__module__.partition(".")[0] != "timm":
        return None
    backbone = copy.deepcopy(module)
    if hasattr(backbone, "reset_classifier"):
        backbone.reset_classifier(0)  # type: ignore[operator]
    preprocessing, origin = _preprocessing(backbone), _origin(backbone)
    architecture = getattr(backbone, "pretrained_cfg", {}).get("architecture", "")
    for arguments in ({}, *_sizes(backbone)) if architecture else ():
        spec = EncoderSpec(source="timm", name=architecture, arguments=arguments)
        try:
            built = build(spec, pretrained=False)
        except ConfigError:  # not every model takes a size
            continue
        if same_function(built, backbone, preprocessing):
            return Encoder(backbone, preprocessing=preprocessing, spec=spec, origin=origin)
    return Encoder(backbone, preprocessing=preprocessing, origin=origin)


def _sizes(model: nn.Module) -> list[dict[str, Any]]:
    """Return the argument of a transformer that was built for another image size than it was pre-trained with."""
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return [{"img_size": list(built_for)}] if built_for else []


def _origin(model: nn.Module) -> str:
    return str(getattr(model, "pretrained_cfg", {}).get("hf_hub_id") or "")


def _preprocessing(model: nn.Module) -> Preprocessing:
    from timm.data import resolve_model_data_config  # type: ignore[attr-defined]

    config = resolve_model_data_config(model)
    mode: Any = config["interpolation"] if config["interpolation"] in ("nearest", "bilinear", "bicubic") else "bilinear"
    # Only the patch embedding of a model tells that it was built for another size than it was pre-trained with.
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return Preprocessing(
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        size=tuple(built_for or config["input_size"][1:]),
        interpolation=mode,
    )
