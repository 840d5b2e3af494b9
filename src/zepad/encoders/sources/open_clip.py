"""Image towers of open_clip: CLIP, SigLIP, CoCa and similar models."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ConfigError
from ..encoder import Encoder
from ..preprocessing import Preprocessing
from ..spec import EncoderSpec
from .recognition import building_error, same_function

_TOWERS = ("ModifiedResNet", "TimmModel", "VisionTransformer")
_MAX_SIDE = 2048  # four times the largest published side; position embeddings grow with its square

# open_clip builds an image tower only together with a text tower. This one is as small as can be, and its configuration
# is not downloaded as that of some text towers would be.
_NO_TEXT = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}


def build(spec: EncoderSpec, *, pretrained: bool) -> Encoder:
    """Build the image tower alone; its features are those of `encode_image`, not normalised.

    Mean, std and interpolation are those of the weights (without any, of the first that were published under this
    name). Images are resized to the exact input size, where open_clip resizes the shorter side and crops.

    Args:
        spec: `name` is one of `open_clip.list_models()`, `weights` one of its tags. The arguments that are allowed,
            `force_image_size` and `force_quick_gelu`, mean what they mean to `open_clip.create_model`; weights that
            were trained with QuickGELU switch it on by themselves.
        pretrained: Build the whole model, load the weights of the tag and keep the image tower. A file that is a
            pickle is read with `weights_only=True`, which runs no code of it.

    Raises:
        ConfigError: If a name, tag or argument is not known, or open_clip is not installed.
        HubError: If the weights cannot be downloaded.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError("open_clip is not installed. Install it with: pip install 'zepad[clip]'.") from error
    if spec.name not in open_clip.list_models():
        raise ConfigError(
            f"open_clip {open_clip.__version__} knows no model {spec.name!r}. See open_clip.list_models(), or upgrade "
            "with: pip install -U open_clip_torch."
        )
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    if (pretrained or spec.weights) and spec.weights not in tags:
        raise ConfigError(
            f"{spec.name} has no weights {spec.weights!r} in open_clip; it has: {', '.join(tags) or 'none at all'}. "
            f"Write open_clip:{spec.name}@<weights>."
        )
    config = open_clip.get_model_config(spec.name)
    published = open_clip.get_pretrained_cfg(spec.name, spec.weights or next(iter(tags), ""))
    if spec.weights and published.get("quick_gelu") and not config.get("quick_gelu"):
        spec = replace(spec, arguments={**spec.arguments, "force_quick_gelu": True})
    size = _checked_size(spec, config["vision_cfg"]["image_size"])
    try:
        tower = _pretrained_tower(spec) if pretrained else _random_tower(spec.arguments, config)
    except Exception as error:
        raise building_error(spec, pretrained, error) from error
    return Encoder(
        _features_alone(tower),
        preprocessing=_preprocessing(published, size),
        spec=spec,
        origin=published.get("hf_hub", "").rstrip("/") if pretrained else "",
    )


def wrap(module: nn.Module) -> Encoder | None:
    """Copy the image tower of an open_clip model, or a bare tower. The text tower is not even copied."""
    if type(module).__module__.partition(".")[0] != "open_clip":
        return None
    tower = getattr(module, "visual", module)
    if type(tower).__name__ not in _TOWERS:
        return None
    import open_clip

    backbone = _features_alone(copy.deepcopy(tower))
    preprocessing = _preprocessing(open_clip.get_model_preprocess_cfg(backbone), backbone.image_size)
    for spec in _candidates(backbone):
        try:
            built = build(spec, pretrained=False)
        except ConfigError:  # larger than a published config may ask for
            continue
        if same_function(built, backbone, preprocessing):
            return Encoder(backbone, preprocessing=preprocessing, spec=spec)
    return Encoder(backbone, preprocessing=preprocessing)


def _checked_size(spec: EncoderSpec, default: Any) -> tuple[int, int]:
    """Return the input size, once every argument is known to be harmless."""
    arguments = {"force_image_size": default, "force_quick_gelu": False, **spec.arguments}
    size = _pair(arguments["force_image_size"])
    sides = len(size) == 2 and all(type(side) is int and 0 < side <= _MAX_SIDE for side in size)
    if len(arguments) > 2 or not sides or not isinstance(arguments["force_quick_gelu"], bool):
        raise ConfigError(
            "an open_clip encoder takes the arguments force_image_size (one or two integers of at most "
            f"{_MAX_SIDE}) and force_quick_gelu (True or False); got {spec.arguments}."
        )
    return size


def _random_tower(arguments: dict[str, Any], config: dict[str, Any]) -> nn.Module:
    import open_clip

    size = arguments.get("force_image_size", config["vision_cfg"]["image_size"])
    tower: Any = open_clip.CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg={**config["vision_cfg"], "image_size": size, "timm_model_pretrained": False},
        text_cfg=_NO_TEXT,
        quick_gelu=arguments.get("force_quick_gelu") or config.get("quick_gelu", False),
    ).visual
    if "force_image_size" in arguments and hasattr(tower, "set_input_size"):
        tower.set_input_size(size)  # open_clip tells a timm model only afterwards
    return tower  # type: ignore[no-any-return]


def _pretrained_tower(spec: EncoderSpec) -> nn.Module:
    import open_clip

    file = Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(spec.name, spec.weights)))
    if file.suffix not in (".safetensors", ".npz"):
        # open_clip reads a pickle with weights_only=True, but on a TypeError it reads it again without, which before
        # torch 2.6 would run any code inside. A pickle that passes here raises none there.
        torch.load(file, map_location="cpu", weights_only=True)
    model = open_clip.create_model(
        spec.name, pretrained=spec.weights, require_pretrained=True, weights_only=True, **spec.arguments
    )
    tower: nn.Module = model.visual
    return tower


def _features_alone(tower: nn.Module) -> nn.Module:
    """Make a tower return the pooled features without the tokens that CoCa's decoder attends to."""
    if hasattr(tower, "output_tokens"):
        tower.output_tokens = False  # type: ignore[assignment]
    return tower


def _candidates(tower: nn.Module) -> Iterator[EncoderSpec]:
    """Yield the specs that build a tower of these shapes, the plainest first."""
    import open_clip

    shapes = {key: value.shape for key, value in tower.state_dict().items()}
    quick_gelu = any(type(part).__name__ == "QuickGELU" for part in tower.modules())
    size = _pair(tower.image_size)
    fitting: list[EncoderSpec] = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        if not _alike(config, tower):
            continue
        arguments: dict[str, Any] = {}
        if _pair(config["vision_cfg"]["image_size"]) != size:
            arguments["force_image_size"] = size[0] if size[0] == size[1] else list(size)
        if quick_gelu and not config.get("quick_gelu"):
            arguments["force_quick_gelu"] = True
        try:
            with torch.device("meta"):
                candidate = _random_tower(arguments, config)
        except Exception:  # noqa: S112 - not every architecture takes this size
            continue
        if {key: value.shape for key, value in candidate.state_dict().items()} == shapes:
            fitting.append(EncoderSpec(source="open_clip", name=name, arguments=arguments))
    yield from sorted(fitting, key=lambda spec: (len(spec.arguments), len(spec.name)))


def _alike(config: dict[str, Any], tower: nn.Module) -> bool:
    """Whether a name could be that of this tower. It rules out most names before anything is built."""
    trunk: Any = getattr(tower, "trunk", None)
    named = config["vision_cfg"].get("timm_model_name")
    if trunk is not None or named is not None:
        return trunk is not None and bool(named == trunk.pretrained_cfg.get("architecture"))
    return bool(config["embed_dim"] == tower.output_dim)


def _preprocessing(config: dict[str, Any], size: Any) -> Preprocessing:
    """Return the preprocessing that a configuration of open_clip states, with defaults for what it leaves out."""
    import open_clip

    mode: Any = config.get("interpolation")
    return Preprocessing(
        mean=tuple(config.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(config.get("std", open_clip.OPENAI_DATASET_STD)),
        size=_pair(size),
        interpolation=mode if mode in ("nearest", "bilinear", "bicubic") else "bicubic",
    )


def _pair(size: Any) -> tuple[Any, ...]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)
