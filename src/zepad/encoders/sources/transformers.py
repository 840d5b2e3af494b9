"""Vision models of Hugging Face transformers."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError
from ..encoder import Encoder
from ..preprocessing import Interpolation, Preprocessing
from ..spec import EncoderSpec, Pooling
from .recognition import building_error, same_function

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MAX_JSON = 2**24  # tokenizers that lie beside the settings of models with text take some megabytes
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5,) * 3, (0.5,) * 3)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    """How one type of model is built and read.

    Attributes:
        model: Name of the class in transformers.
        output: Field of the class's output that describes the image, or holds the tokens that do.
        pooling: How tokens become one vector; None where the output is no sequence of tokens.
        colors: Mean and std of the image processor that its published weights come with.
        interpolation: Interpolation of that image processor.
        largest: Side in pixels that the image processor crops to where the configuration states a larger one.
        arguments: Keyword arguments of the class beside the configuration.
    """

    model: str
    output: Literal["image_embeds", "pooler_output", "last_hidden_state"]
    pooling: Pooling | None = None
    colors: tuple[tuple[float, ...], tuple[float, ...]] = _IMAGENET
    interpolation: Interpolation = "bicubic"
    largest: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


def _tokens(model: str, **fields: Any) -> _Architecture:
    """Take the class token after the last layer norm, because the pooler is random in most published weights."""
    return _Architecture(model=model, output="last_hidden_state", pooling="class_token", **fields)


def _pooled(model: str, **fields: Any) -> _Architecture:
    return _Architecture(model=model, output="pooler_output", **fields)


_NO_POOLER = {"add_pooling_layer": False}
_ARCHITECTURES = {
    "beit": _pooled("BeitModel", colors=_HALF, interpolation="bilinear"),
    "clip": _Architecture(model="CLIPVisionModelWithProjection", output="image_embeds", colors=_CLIP),
    "clip_vision_model": _pooled("CLIPVisionModel", colors=_CLIP),
    "convnext": _pooled("ConvNextModel"),
    "convnextv2": _pooled("ConvNextV2Model"),
    "deit": _tokens("DeiTModel", arguments=_NO_POOLER),
    "dinov2": _tokens("Dinov2Model", largest=224),
    "dinov2_with_registers": _tokens("Dinov2WithRegistersModel", largest=224),
    "dinov3_convnext": _pooled("DINOv3ConvNextModel", interpolation="bilinear"),
    "dinov3_vit": _tokens("DINOv3ViTModel", interpolation="bilinear"),
    "regnet": _pooled("RegNetModel"),
    "resnet": _pooled("ResNetModel"),
    "siglip_vision_model": _pooled("SiglipVisionModel", colors=_HALF),
    "swin": _pooled("SwinModel"),
    "swinv2": _pooled("Swinv2Model"),
    "vit": _tokens("ViTModel", colors=_HALF, interpolation="bilinear", arguments=_NO_POOLER),
    "vit_msn": _tokens("ViTMSNModel"),
}

# Files that are fetched from a repository. Pickles, adapters of other weights and code are never among them.
_FILES = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "model.safetensors*",
    "model-*.safetensors",
)
_RESAMPLING: dict[object, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}

_MAX_BYTES = 32 * 10**9  # above every published vision model


class VisionTower(nn.Module):
    """A vision model of transformers that returns one tensor instead of a record.

    Attributes:
        model: The model; its weights fit the one it was copied from.
        output: Name of the field of the record that is returned.
    """

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        """Return features `(N, D)`, a map `(N, D, H, W)` or tokens `(N, T, D)` of normalised images."""
        features: Tensor = self.model(pixel_values=images, return_dict=True)[self.output]
        return features

    def extra_repr(self) -> str:
        """Show the name of the returned field."""
        return f"output={self.output!r}"


def build(spec: EncoderSpec, *, pretrained: bool) -> Encoder:
    """Build a vision model without its classifier.

    The features are `image_embeds` of CLIP, the pooled output of SigLIP, BEiT, Swin and the convolutional networks,
    and the class token after the last layer norm of the other transformers; `pooling="mean"` averages all their
    tokens instead. ViT's own pooler is left out, because most published weights lack it. For a classification model
    these are the inputs of its last layer, except that DINOv2's also reads the mean of the patches, and that CLIP's and
    SigLIP's read nothing but that mean.

    A spec names its architecture in full: `name` is a model type and `arguments` are fields of that type's own
    configuration class. No other field is accepted: not those of every configuration, which choose precision,
    attention kernels (which transformers may download) or code. A model is laid out without memory first; one of more
    than 32 GB is refused.

    Args:
        spec: `name` and `arguments` to build with random weights; `weights`, a Hub id or a folder, to load them.
        pretrained: Load the weights, in float32. Only safetensors are fetched and read. Mean, std and size are those
            of the image processor that was saved with them, where one was.

    Raises:
        ConfigError: If the type or an argument is not supported, or transformers is not installed.
        CheckpointError: If there are no safetensors, or they do not hold exactly the weights of the encoder.
        HubError: If the repository cannot be downloaded.
    """
    if pretrained:
        return _pretrained(spec)
    config = _config(spec)
    try:
        tower = _class(spec.name)(config, **_ARCHITECTURES[spec.name].arguments)
    except Exception as error:
        raise building_error(spec, pretrained, error) from error
    return _encoder(spec.name, tower, spec=spec)


def wrap(module: nn.Module) -> Encoder | None:
    """Copy a vision model, or the image tower of a CLIP or SigLIP model or a classifier; the rest is not even copied.

    A bare model does not carry its image processor. Mean, std and interpolation are therefore those that weights of
    its type were published with, and the size is `config.image_size` (at most 224 for DINOv2, as its processor has
    it): pass a `preprocess` if yours differ.
    """
    if type(module).__module__.partition(".")[0] != "transformers":
        return None
    found = _tower(module)
    if found is None:
        return None
    name, tower = found
    encoder = _encoder(name, tower, origin=_hub_id(module.config))
    try:
        built = build(
            EncoderSpec(source="transformers", name=name, arguments=_arguments(tower.config)), pretrained=False
        )
    except ConfigError:  # a setting that no spec may hold
        return encoder
    if same_function(built, encoder.backbone, encoder.preprocessing):
        return _encoder(name, tower, spec=built.spec, origin=encoder.origin)
    return encoder


def _pretrained(spec: EncoderSpec) -> Encoder:
    auto = _transformers().AutoConfig
    if not spec.weights:
        raise ConfigError(f"{spec} names no weights. Write transformers:<Hub id or folder>.")
    local = Path(spec.weights).is_dir()
    try:
        folder = Path(spec.weights if local else snapshot_download(spec.weights, allow_patterns=list(_FILES)))
    except Exception as error:
        raise building_error(spec, True, error) from error
    _check_files(folder)
    # The model is built from the spec that a saved defense will hold, never from the repository's own config.
    spec = _stated(auto, folder, spec)
    config = _config(spec)
    architecture = _ARCHITECTURES[spec.name]
    try:
        tower, report = _class(spec.name).from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **architecture.arguments,
        )
    except Exception as error:
        raise CheckpointError(
            f"the weights of {spec.weights} could not be loaded: {type(error).__name__}: {error}. Only safetensors "
            "are read; save the model anew with save_pretrained."
        ) from error
    parts = {part for part, _ in tower.named_children()}
    wrong = [f"{key} is missing" for key in report["missing_keys"]]
    wrong += [f"{key} has no place" for key in report["unexpected_keys"] if key.partition(".")[0] in parts]
    if wrong:
        raise CheckpointError(f"{spec.weights} does not hold the weights of its {spec.name}: {'; '.join(wrong[:5])}.")
    preprocessing = _stated_preprocessing(_processor(folder), _default_preprocessing(architecture, config))
    return _encoder(spec.name, tower, preprocessing=preprocessing, spec=spec, origin="" if local else spec.weights)


def _check_files(folder: Path) -> None:
    """Refuse what transformers would wait for or read without end: FIFOs, devices and settings of any length.

    Raises:
        CheckpointError: Naming the file.
    """
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is no regular file. Name a folder written by save_pretrained.")
        if path.suffix == ".json" and path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON} bytes, which no settings are. Download it again.")


def _stated(auto: Any, folder: Path, spec: EncoderSpec) -> EncoderSpec:
    """Return the spec with the architecture that the config in a folder states."""
    try:
        stored = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(f"{spec.weights} holds no config that transformers can read: {error}") from error
    name = "siglip_vision_model" if stored.model_type == "siglip" else stored.model_type
    config = getattr(stored, "vision_config", stored)
    if stored.model_type == "clip":
        config.projection_dim = stored.projection_dim
    if name == "clip_vision_model" and "CLIPVisionModelWithProjection" in (stored.architectures or ()):
        name = "clip"
    arguments = _arguments(config) if name in _ARCHITECTURES else {}
    if spec.name not in ("", name) or spec.arguments not in ({}, arguments):
        raise ConfigError(f"the config of {spec.weights} states the architecture, a {name}; give no other with {spec}.")
    return replace(spec, name=name, arguments=arguments)


def _tower(module: nn.Module) -> tuple[str, PreTrainedModel] | None:
    """Copy the vision tower: the module itself, or the child of a model that is known to hold one."""
    kind = type(module).__name__
    parts: Any = module.children() if kind == "SiglipModel" or kind.endswith("ForImageClassification") else [module]
    if kind == "CLIPModel":
        parts = [_projected(module)]
    for part in parts:
        for name, architecture in _ARCHITECTURES.items():
            if type(part).__name__ == architecture.model:
                tower = copy.deepcopy(part)
                if "add_pooling_layer" in architecture.arguments:
                    tower.pooler = None
                return name, tower
    return None


def _projected(model: Any) -> nn.Module:
    """Put the image tower of a CLIP model and its projection into the class that has these two alone."""
    config = copy.deepcopy(model.vision_model.config)
    config.projection_dim = model.visual_projection.out_features
    with torch.device("meta"):
        tower: nn.Module = _class("clip")(config)
    tower.vision_model, tower.visual_projection = model.vision_model, model.visual_projection
    tower.training = model.training  # its own flag alone: train() would reach into the caller's parts
    return tower


def _encoder(
    name: str,
    tower: PreTrainedModel,
    *,
    preprocessing: Preprocessing | None = None,
    spec: EncoderSpec | None = None,
    origin: str = "",
) -> Encoder:
    architecture = _ARCHITECTURES[name]
    output, pooling = architecture.output, architecture.pooling
    if not getattr(tower.config, "vision_use_head", True):  # a SigLIP without its pooling head
        output, pooling = "last_hidden_state", "mean"
    preprocessing = preprocessing or _default_preprocessing(architecture, tower.config)
    return Encoder(VisionTower(tower, output), preprocessing=preprocessing, pooling=pooling, spec=spec, origin=origin)


def _config(spec: EncoderSpec) -> PreTrainedConfig:
    """Return the configuration a spec describes, once it is known to be harmless.

    Raises:
        ConfigError: If the type or a field is not supported, or a value is wrong or far too large.
    """
    if spec.name not in _ARCHITECTURES:
        raise ConfigError(
            f"transformers encoders can be of the types {', '.join(_ARCHITECTURES)}; got {spec.name or str(spec)!r}. "
            "Any other: pick its feature tensor out in a module of your own and pass that."
        )
    model = _class(spec.name)
    unknown = set(spec.arguments) - _own_fields(model.config_class)
    if unknown:
        raise ConfigError(
            f"the arguments of {spec} are fields of {model.config_class.__name__}; got {', '.join(sorted(unknown))}."
        )
    try:
        config: PreTrainedConfig = model.config_class(**spec.arguments)
        with torch.device("meta"):
            layout = model(config, **_ARCHITECTURES[spec.name].arguments)
    except Exception as error:
        raise building_error(spec, False, error) from error
    size = sum(tensor.nbytes for tensors in (layout.parameters(), layout.buffers()) for tensor in tensors)
    if size > _MAX_BYTES:
        raise ConfigError(f"{spec} with {spec.arguments} takes {size:,} bytes; at most {_MAX_BYTES:,} are built.")
    return config


def _arguments(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of the configuration's own class that differ from its defaults."""
    names = sorted(_own_fields(type(config)))
    ours, default = ({name: _as_json(getattr(one, name)) for name in names} for one in (config, type(config)()))
    return {name: value for name, value in ours.items() if value != default[name]}


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _own_fields(config_class: type[PreTrainedConfig]) -> set[str]:
    """Return the fields of a configuration class that not every configuration has."""
    of_all = inspect.signature(_transformers().PreTrainedConfig).parameters
    return {name for name in inspect.signature(config_class).parameters if name not in of_all and name[0] != "_"}


def _default_preprocessing(architecture: _Architecture, config: PreTrainedConfig) -> Preprocessing:
    stated = getattr(config, "image_size", None) or 224
    sides = stated if isinstance(stated, (list, tuple)) else (stated, stated)
    size: Any = tuple(min(side, architecture.largest or side) for side in sides)
    mean, std = architecture.colors if getattr(config, "num_channels", 3) == 3 else (None, None)
    return Preprocessing(mean=mean, std=std, size=size, interpolation=architecture.interpolation)


def _processor(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor saved in a folder; none if there is none."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        try:
            values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is damaged: {error}.") from error
        if isinstance(values, dict):  # of a model with text, the image processor is one entry among others
            values = values.get("image_processor", values)
        if not isinstance(values, dict):
            raise CheckpointError(f"{file} is damaged: it holds a {type(values).__name__}, not settings by name.")
        if "image_mean" in values:
            return values
    return {}


def _stated_preprocessing(stated: dict[str, Any], default: Preprocessing) -> Preprocessing:
    """Return the preprocessing that an image processor states. Its crop becomes part of the resize."""
    size: Any = (stated.get("crop_size") if stated.get("do_center_crop", True) else None) or stated.get("size")
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = (size.get("height", side), size.get("width", side))
    elif isinstance(size, int):
        size = (size, size)
    plain = stated.get("do_normalize") is False
    return Preprocessing(
        mean=None if plain else stated.get("image_mean", default.mean),
        std=None if plain else stated.get("image_std", default.std),
        size=size or default.size,
        interpolation=_RESAMPLING.get(stated.get("resample"), default.interpolation),
    )


def _hub_id(config: Any) -> str:
    """Return where a model was loaded from, if that is a repository of the Hub."""
    name = str(config.name_or_path or "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return ""
    return name if name.count("/") == 1 and not Path(name).exists() else ""


def _class(name: str) -> Any:
    return getattr(_transformers(), _ARCHITECTURES[name].model)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            "transformers is not installed. Install it with: pip install 'zepad[transformers]'."
        ) from error
    return transformers
