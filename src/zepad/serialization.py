"""A model on disk: a strict, versioned config.json and safetensors files that it vouches for by digest.

Nothing is pickled and no name from the config is ever imported.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ._version import __version__
from .config import FusionConfig, _JSONConfig
from .encoders import Encoder, EncoderSpec, Preprocessing, build_encoder, wrap_module
from .errors import CheckpointError, ConfigError
from .modules import MLPHead
from .types import HARDENED_ROLES, ROLES, Role, Stage

_Record = TypeVar("_Record", bound=_JSONConfig)

FORMAT = 1
CONFIG_FILE = "config.json"
HEADS_FILE = "heads.safetensors"
HEADS_AT: dict[Stage, tuple[Role, ...]] = {"built": (), "hardened": HARDENED_ROLES, "fitted": ROLES}
"""Which branches have a head at each stage."""

_MAX_CONFIG_BYTES = 10 * 2**20
_MAX_WIDTH = 2**24  # of features and classes: beyond it a head cannot even be laid out


@dataclass(frozen=True, kw_only=True)
class EncoderRecord(_JSONConfig):
    """How one encoder is rebuilt.

    Attributes:
        spec: Source, name and arguments.
        preprocessing: Resize and normalisation.
        pooling: Of token sequences, or None.
        features: Width of the output.
        architecture_of: Another role whose module serves as the architecture of a custom encoder, or None.
    """

    spec: EncoderSpec
    preprocessing: Preprocessing
    pooling: str | None
    features: int
    architecture_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class SavedFile(_JSONConfig):
    """Digest and size of a weight file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class SavedConfig(_JSONConfig):
    """Everything in config.json.

    Attributes:
        format: Version of this layout.
        library: Always `"zepad"`.
        library_version: Version that wrote it.
        stage: How far the model has come.
        channels: Of the images.
        num_classes: Of the present task, or None before there is one.
        class_names: One per class, or None.
        encoders: By role.
        fusion: Rule and sharpness.
        threshold: Of the detection score.
        provenance: Recipes, data sizes and results of training.
        files: Weight files by name.
    """

    format: int
    library: str
    library_version: str
    stage: Stage
    channels: int
    num_classes: int | None
    class_names: tuple[str, ...] | None
    encoders: dict[str, EncoderRecord]
    fusion: FusionConfig
    threshold: float
    provenance: dict[str, Any]
    files: dict[str, SavedFile]


def encoder_file(role: str) -> str:
    """Return the weight file of a role."""
    return f"{role}.safetensors"


# writing --------------------------------------------------------------------------------------------------------


def save_model(
    folder: Path,
    *,
    stage: Stage,
    channels: int,
    num_classes: int | None,
    class_names: tuple[str, ...] | None,
    encoders: Mapping[str, Encoder],
    features: Mapping[str, int],
    shared_architecture: Mapping[str, str],
    heads: Mapping[str, nn.Module],
    fusion: FusionConfig,
    threshold: float,
    provenance: dict[str, Any],
) -> SavedConfig:
    """Write weights first and config.json last, so that an interrupted save is never mistaken for a whole one.

    Raises:
        CheckpointError: If the folder cannot be written or an encoder has state that is no tensor.
    """
    files = {encoder_file(role): _tensors(role, encoder.backbone) for role, encoder in encoders.items()}
    if heads:
        files[HEADS_FILE] = {f"{r}.{key}": t for r, head in heads.items() for key, t in _tensors(r, head).items()}
    blobs = {name: save(tensors) for name, tensors in files.items()}
    config = SavedConfig(
        format=FORMAT,
        library="zepad",
        library_version=__version__,
        stage=stage,
        channels=channels,
        num_classes=num_classes,
        class_names=class_names,
        encoders={
            role: EncoderRecord(
                spec=encoder.spec,
                preprocessing=encoder.preprocessing,
                pooling=encoder.pooling,
                features=features[role],
                architecture_of=shared_architecture.get(role),
            )
            for role, encoder in encoders.items()
        },
        fusion=fusion,
        threshold=float(threshold),
        provenance=provenance,
        files={
            name: SavedFile(sha256=hashlib.sha256(blob).hexdigest(), bytes=len(blob)) for name, blob in blobs.items()
        },
    )
    try:
        text = json.dumps(config.to_dict(), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"config.json cannot hold this model: {error}. Keep threshold finite and provenance plain JSON."
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for stale in {encoder_file(role) for role in ROLES} | {HEADS_FILE}:
            if stale not in blobs:
                (folder / stale).unlink(missing_ok=True)
        for name, blob in blobs.items():
            (folder / name).write_bytes(blob)
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror}. Choose a writable folder.") from error
    return config


def _tensors(owner: str, module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    foreign = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise CheckpointError(
            f"{owner} has state that is no tensor ({', '.join(foreign)}), which a weight file cannot "
            f"hold. Drop it from the "
            "module's state_dict."
        )
    # Cloned one by one: safetensors refuses tensors that share memory.
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


# reading --------------------------------------------------------------------------------------------------------


def read_config(path: Path) -> SavedConfig:
    """Read config.json strictly: every field present, of its type, none unknown.

    Raises:
        CheckpointError: Saying what is wrong with the file.
    """
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_CONFIG_BYTES} bytes; that is no zepad config.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} holds no {path.name}: it is not a saved ZePAD, or saving was interrupted. Save it again."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no readable JSON: {error}.") from error
    return parse_config(values, str(path))


def parse_config(values: object, origin: str) -> SavedConfig:
    """Turn parsed JSON into a `SavedConfig`.

    Raises:
        CheckpointError: Naming the field that is missing, unknown, of another type or out of range.
    """
    if not isinstance(values, dict) or values.get("library") != "zepad":
        raise CheckpointError(f"{origin} was not written by zepad: it does not say library: zepad.")
    version = values.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{origin}: format must be a positive integer; got {version!r}.")
    if version > FORMAT:
        raise CheckpointError(
            f"{origin} has format {version}, written by zepad {values.get('library_version')}; this is "
            f"zepad {__version__}, "
            f"which reads formats up to {FORMAT}. Upgrade with: pip install -U zepad."
        )
    try:
        if not isinstance(values["class_names"], (list, type(None))):
            raise ConfigError(f"class_names is {values['class_names']!r}")
        config = _complete(
            SavedConfig,
            {
                **values,
                "encoders": {
                    role: _complete(
                        EncoderRecord,
                        {
                            **record,
                            "spec": _complete(EncoderSpec, record["spec"]),
                            "preprocessing": _complete(Preprocessing, record["preprocessing"]),
                        },
                    )
                    for role, record in values["encoders"].items()
                },
                "fusion": _complete(FusionConfig, values["fusion"]),
                "class_names": None if values["class_names"] is None else tuple(values["class_names"]),
                "files": {name: _complete(SavedFile, record) for name, record in values["files"].items()},
            },
        )
        _check_config(config)
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{origin} is damaged: {type(error).__name__}: {error}.") from error
    return config


def _complete(cls: type[_Record], values: Any) -> _Record:
    """Build a record of which no field is left to its default."""
    missing = sorted({field.name for field in dataclasses.fields(cls)} - set(values))
    if missing:
        raise ConfigError(f"{cls.__name__} lacks {', '.join(missing)}")
    return cls.from_dict(values)


def _check_config(config: SavedConfig) -> None:
    def check(condition: bool, field: str, value: object) -> None:
        if not condition:
            raise ConfigError(f"{field} is {value!r}")

    def whole(value: object, least: int, most: float = math.inf) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    check(config.stage in ("built", "hardened", "fitted"), "stage", config.stage)
    check(whole(config.channels, 1), "channels", config.channels)
    check(isinstance(config.library_version, str), "library_version", config.library_version)
    check(config.num_classes is None or whole(config.num_classes, 1, _MAX_WIDTH), "num_classes", config.num_classes)
    check(config.stage == "built" or config.num_classes is not None, "num_classes", config.num_classes)
    names = config.class_names
    check(
        names is None or (len(names) == config.num_classes and all(isinstance(n, str) for n in names)),
        "class_names",
        names,
    )
    check(set(config.encoders) == set(ROLES), "encoders", sorted(config.encoders))
    check(isinstance(config.threshold, float) and math.isfinite(config.threshold), "threshold", config.threshold)
    steps = config.provenance.values() if isinstance(config.provenance, dict) else [None]
    check(all(isinstance(step, dict) for step in steps), "provenance", config.provenance)
    expected = {encoder_file(role) for role in ROLES} | ({HEADS_FILE} if config.stage != "built" else set())
    check(set(config.files) == expected, "files", sorted(config.files))
    for name, file in config.files.items():
        check(isinstance(file.sha256, str) and len(file.sha256) == 64, f"sha256 of {name}", file.sha256)
        check(whole(file.bytes, 1), f"bytes of {name}", file.bytes)
    for role, record in config.encoders.items():
        mean = record.preprocessing.mean
        check(mean is None or len(mean) == config.channels, f"mean of {role}", mean)
        check(whole(record.features, 1, _MAX_WIDTH), f"features of {role}", record.features)
        check(record.pooling in (None, "class_token", "mean"), f"pooling of {role}", record.pooling)
        check(record.architecture_of in (None, *ROLES), f"architecture_of of {role}", record.architecture_of)


def read_weights(path: Path, record: SavedFile) -> dict[str, Tensor]:
    """Read a weight file whose size and digest are those the config vouches for.

    Raises:
        CheckpointError: If the file is missing, of another size or content, or no safetensors file.
    """
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Save or download the model again.") from error
    if len(blob) != record.bytes:
        kind = "truncated" if len(blob) < record.bytes else "not the file that was saved"
        raise CheckpointError(
            f"{path} has {len(blob)} bytes, expected {record.bytes}: it is {kind}. Save or download it again."
        )
    digest = hashlib.sha256(blob).hexdigest()
    if digest != record.sha256:
        raise CheckpointError(
            f"{path} has sha256 {digest}, expected {record.sha256}: its content was changed. Save or download it again."
        )
    try:
        return load(blob)
    # Types that safetensors knows and torch does not come as a KeyError; other nonsense as the rest.
    except (SafetensorError, KeyError, ValueError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}.") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Give a module exactly these tensors: every key and shape must match.

    Raises:
        CheckpointError: Listing missing and unexpected keys and differing shapes.
    """
    own = module.state_dict(keep_vars=True)
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(own[key].shape)}"
        for key in sorted(own.keys() & tensors.keys())
        if own[key].shape != tensors[key].shape
    ]
    types = [
        f"{key} is {tensors[key].dtype}, expected {own[key].dtype}"
        for key in sorted(own.keys() & tensors.keys())
        if _number_kind(own[key]) != _number_kind(tensors[key])
    ]
    if missing or unexpected or shapes or types:
        problems = [
            f"{label}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
            for label, keys in (
                ("missing keys", missing),
                ("unexpected keys", unexpected),
                ("shapes", shapes),
                ("types", types),
            )
            if keys
        ]
        raise CheckpointError(
            f"{origin} does not fit {type(module).__name__}: {'; '.join(problems)}. Pass the module it was saved from."
        )
    # assign: the stored dtype is kept, so predictions come back bit for bit.
    module.load_state_dict(_tied_alike(own, tensors, origin), strict=True, assign=True)


def _number_kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _tied_alike(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Give keys that share a parameter in the module one parameter here, so that the tie outlives assignment."""
    parameters: dict[int, nn.Parameter] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        slot = own[key]
        if not isinstance(slot, nn.Parameter):
            state[key] = tensor
            continue
        parameter = parameters.setdefault(id(slot), nn.Parameter(tensor, requires_grad=slot.requires_grad))
        if not torch.equal(parameter, tensor):
            raise CheckpointError(f"{origin}: {key} is one with another parameter, yet their values differ.")
        state[key] = parameter
    return state


def rebuild_encoder(
    role: Role,
    config: SavedConfig,
    modules: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor],
    origin: str,
) -> Encoder:
    """Build the encoder of a role from its spec or from the caller's module, and load its weights.

    Args:
        role: Which encoder.
        config: Of the saved model.
        modules: What the caller passed, by role; copied, never modified.
        weights: Of the role's file.
        origin: Named in errors.

    Raises:
        CheckpointError: If a custom module is needed and was not passed, or the weights do not fit.
        ConfigError: If the source no longer knows the name.
    """
    record = config.encoders[role]
    owner = role if role in modules else record.architecture_of
    if owner is not None and owner in modules:
        module = modules[owner]
        backbone = copy.deepcopy(module.backbone) if isinstance(module, Encoder) else wrap_module(module).backbone
    elif record.spec.source != "custom":
        backbone = build_encoder(record.spec).backbone
    else:
        wanted = record.architecture_of or role
        raise CheckpointError(
            f"the {role} encoder is a module of the caller's, which no spec can rebuild. Pass its "
            f"architecture (weights do "
            f"not matter): from_pretrained(..., {wanted}=module)."
        )
    load_strictly(backbone, weights, origin)
    pooling: Any = record.pooling
    encoder = Encoder(backbone, preprocessing=record.preprocessing, pooling=pooling, spec=record.spec)
    return encoder.requires_grad_(False).eval()


def rebuild_heads(config: SavedConfig, weights: Mapping[str, Tensor], origin: str) -> dict[str, MLPHead]:
    """Build the heads that the stage has and load their weights.

    Raises:
        CheckpointError: If a key belongs to no head, or the weights do not fit.
    """
    stray = [key for key in weights if key.partition(".")[0] not in HEADS_AT[config.stage]]
    if stray:
        raise CheckpointError(f"{origin} holds tensors of no branch: {', '.join(sorted(stray)[:5])}.")
    heads: dict[str, MLPHead] = {}
    for role in HEADS_AT[config.stage]:
        record = config.encoders[role]
        own = {key.removeprefix(f"{role}."): t for key, t in weights.items() if key.startswith(f"{role}.")}
        with torch.device("meta"):
            head = MLPHead(record.features, config.num_classes or 0)
        load_strictly(head, own, f"{origin} ({role})")
        heads[role] = head.eval()
    return heads
