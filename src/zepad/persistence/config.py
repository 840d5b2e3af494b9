"""A model on disk: a strict, versioned config.json and safetensors files that it vouches for by digest.

Nothing is pickled and no name from the config is ever imported.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from .._version import __version__
from ..config import DetectorConfig, FusionConfig, _JSONConfig, is_hub_id, require
from ..encoders import Encoder, EncoderSpec, Preprocessing, build_encoder, wrap_module
from ..errors import CheckpointError, ConfigError
from ..modules import Detector, MLPHead
from ..types import ENCODER_ROLES, HARDENED_ROLES, ROLES, SENTINEL, Role, Stage
from ..zero_shot import ZeroShotHead

_Record = TypeVar("_Record", bound=_JSONConfig)

FORMAT = 3  # 1 and 2 never left this repository
CONFIG_FILE = "config.json"
HEADS_FILE = "heads.safetensors"
DETECTOR_FILE = "detector.safetensors"
_HEADS: dict[str, type[nn.Module]] = {"mlp": MLPHead, "zero_shot": ZeroShotHead}

_MAX_CONFIG_BYTES = 10 * 2**20
_MAX_WIDTH = 2**24  # of features and classes: beyond it a head cannot even be laid out


@dataclass(frozen=True, kw_only=True)
class EncoderRecord(_JSONConfig):
    """How one encoder is rebuilt.

    Attributes:
        spec: Source, name, arguments, preprocessing and pooling.
        features: Width of the output.
        architecture_of: Another role whose module serves as the architecture of a custom encoder, or None.
    """

    spec: EncoderSpec
    features: int
    architecture_of: str | None = None


@dataclass(frozen=True, kw_only=True)
class SavedFile(_JSONConfig):
    """Digest and size of a weight file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Base(_JSONConfig):
    """Where the encoders of a model are published that adds heads alone.

    Attributes:
        repo_id: `"user/name"` on the Hub.
        revision: The commit, 40 hexadecimal digits.
    """

    repo_id: str
    revision: str

    def __post_init__(self) -> None:
        """Check both: they end up in requests to the Hub.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        named = is_hub_id(self.repo_id) and "/" in self.repo_id
        require(named, "base.repo_id", self.repo_id, 'a Hub id such as "user/name"')
        pinned = isinstance(self.revision, str) and re.fullmatch(r"[0-9a-f]{40}", self.revision)
        require(bool(pinned), "base.revision", self.revision, "a commit of 40 hexadecimal digits")


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
        heads: The kind of each head, `"mlp"` or `"zero_shot"`, by role.
        fusion: Rule and parameters.
        detector: What scores images.
        threshold: Of the detection score, or None before there is one.
        provenance: Recipes, data sizes and results of training.
        files: Weight files by name.
        base: Where the encoders' files are, if not beside this config.
    """

    format: int
    library: str
    library_version: str
    stage: Stage
    channels: int
    num_classes: int | None
    class_names: tuple[str, ...] | None
    encoders: dict[str, EncoderRecord]
    heads: dict[str, str]
    fusion: FusionConfig
    detector: DetectorConfig
    threshold: float | None
    provenance: dict[str, Any]
    files: dict[str, SavedFile]
    base: Base | None = None


def encoder_file(role: str) -> str:
    """Return the weight file of a role."""
    return f"{role}.safetensors"


ENCODER_FILES = tuple(map(encoder_file, ENCODER_ROLES))
WEIGHT_FILES = (*ENCODER_FILES, HEADS_FILE, DETECTOR_FILE)
"""Every weight file that a saved model may have."""


# writing --------------------------------------------------------------------------------------------------------


def describe_model(
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
    detector: DetectorConfig,
    threshold: float | None,
    provenance: dict[str, Any],
) -> SavedConfig:
    """Return the config of a model, with no files yet."""
    return SavedConfig(
        format=FORMAT,
        library="zepad",
        library_version=__version__,
        stage=stage,
        channels=channels,
        num_classes=num_classes,
        class_names=class_names,
        encoders={
            role: EncoderRecord(
                spec=encoder.spec, features=features[role], architecture_of=shared_architecture.get(role)
            )
            for role, encoder in encoders.items()
        },
        heads={role: _kind(head) for role, head in heads.items()},
        fusion=fusion,
        detector=detector,
        threshold=None if threshold is None else float(threshold),
        provenance=provenance,
        files={},
    )


def _kind(head: nn.Module) -> str:
    for kind, cls in _HEADS.items():
        if isinstance(head, cls):
            return kind
    raise CheckpointError(f"a head must be an MLPHead or a ZeroShotHead to be saved; got {type(head).__name__}.")


def save_model(
    folder: Path,
    config: SavedConfig,
    *,
    encoders: Mapping[str, Encoder],
    heads: Mapping[str, nn.Module],
    detector: nn.Module,
    published: Mapping[str, SavedFile] | None = None,
) -> SavedConfig:
    """Write weights first and config.json last, so that an interrupted save is never mistaken for a whole one.

    Args:
        folder: Created if need be. Weight files of an earlier save that this one has not are removed.
        config: What `describe_model` says. One that names a base leaves the encoders' files out.
        encoders: By role.
        heads: By role.
        detector: Written where it holds tensors.
        published: The files of the base.

    Returns:
        The config as written, files included.

    Raises:
        CheckpointError: If the folder cannot be written, something in the model cannot be stored, or the encoders are
            no longer those that are published.
    """
    files = {encoder_file(role): _tensors(role, encoder.backbone) for role, encoder in encoders.items()}
    if heads:
        files[HEADS_FILE] = {f"{r}.{key}": t for r, head in heads.items() for key, t in _tensors(r, head).items()}
    fitted = _tensors("detector", detector)
    if fitted:
        files[DETECTOR_FILE] = fitted
    blobs = {name: save(tensors) for name, tensors in files.items()}
    records = {
        name: SavedFile(sha256=hashlib.sha256(blob).hexdigest(), bytes=len(blob)) for name, blob in blobs.items()
    }
    if config.base is not None:
        theirs = published or {}
        changed = [name for name in records if name in ENCODER_FILES and records[name] != theirs.get(name)]
        if changed:
            raise CheckpointError(
                f"{', '.join(changed)} changed since the encoders were published as {config.base.repo_id}, so heads "
                "alone would not fit them. Save or push the whole model: heads_only=False."
            )
        blobs = {name: blob for name, blob in blobs.items() if name not in ENCODER_FILES}
    config = dataclasses.replace(config, files=records)
    try:
        text = json.dumps(config.to_dict(), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"config.json cannot hold this model: {error}. Keep threshold finite and provenance plain JSON."
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        for stale in WEIGHT_FILES:
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
    if version < FORMAT:
        raise CheckpointError(f"{origin} has format {version}, older than zepad's first release. Save the model again.")
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
                    role: _complete(EncoderRecord, {**record, "spec": _complete_spec(record["spec"])})
                    for role, record in values["encoders"].items()
                },
                "fusion": _complete(FusionConfig, values["fusion"]),
                "detector": _complete(DetectorConfig, values["detector"]),
                "class_names": None if values["class_names"] is None else tuple(values["class_names"]),
                "files": {name: _complete(SavedFile, record) for name, record in values["files"].items()},
                "base": None if values["base"] is None else _complete(Base, values["base"]),
            },
        )
        _check_config(config)
        json.dumps(config.to_dict(), indent=2)  # what is too deep to be written again is too deep to be kept
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is damaged: {type(error).__name__}: {error}.") from error
    return config


def _complete(cls: type[_Record], values: Any) -> _Record:
    """Build a record of which no field is left to its default."""
    missing = sorted({field.name for field in dataclasses.fields(cls)} - set(values))
    if missing:
        raise ConfigError(f"{cls.__name__} lacks {', '.join(missing)}")
    return cls.from_dict(values)


def _complete_spec(values: Any) -> EncoderSpec:
    return _complete(EncoderSpec, {**values, "preprocessing": _complete(Preprocessing, values["preprocessing"])})


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
    names = config.class_names
    check(
        names is None or (len(names) == config.num_classes and all(isinstance(n, str) for n in names)),
        "class_names",
        names,
    )
    wanted = ENCODER_ROLES if config.detector.sentinel or SENTINEL in config.encoders else ROLES
    check(set(config.encoders) == set(wanted), "encoders", sorted(config.encoders))
    check(isinstance(config.heads, dict), "heads", config.heads)
    heads_at: dict[Stage, list[set[str]]] = {
        "built": [set()],
        "hardened": [set(HARDENED_ROLES), set()],  # hardening without labels leaves no heads
        "fitted": [set(config.encoders)],
    }
    check(set(config.heads) in heads_at[config.stage], "heads", config.heads)
    check(all(isinstance(k, str) and k in _HEADS for k in config.heads.values()), "heads", config.heads)
    check(not config.heads or config.num_classes is not None, "num_classes", config.num_classes)
    threshold = config.threshold
    check(threshold is None or (isinstance(threshold, float) and math.isfinite(threshold)), "threshold", threshold)
    steps = config.provenance.values() if isinstance(config.provenance, dict) else [None]
    check(all(isinstance(step, dict) for step in steps), "provenance", config.provenance)
    expected = {encoder_file(role) for role in config.encoders} | ({HEADS_FILE} if config.heads else set())
    if config.threshold is not None and config.detector.fitted:
        expected.add(DETECTOR_FILE)  # a threshold is one of a fitted detector
    check(set(config.files) == expected, "files", sorted(config.files))
    check(len(config.fusion.temperatures) in (0, len(ROLES)), "fusion temperatures", config.fusion.temperatures)
    for name, file in config.files.items():
        check(isinstance(file.sha256, str) and len(file.sha256) == 64, f"sha256 of {name}", file.sha256)
        check(whole(file.bytes, 1), f"bytes of {name}", file.bytes)
    for role, record in config.encoders.items():
        mean = record.spec.preprocessing.mean if record.spec.preprocessing else None
        check(mean is None or len(mean) == config.channels, f"mean of {role}", mean)
        check(not record.spec.weights, f"weights of {role}", record.spec.weights)  # a path or an address
        check(whole(record.features, 1, _MAX_WIDTH), f"features of {role}", record.features)
        check(record.architecture_of in (None, *ROLES), f"architecture_of of {role}", record.architecture_of)


def check_weights(path: Path, record: SavedFile) -> bytes:
    """Return the content of a weight file whose size and digest are those the config vouches for.

    Raises:
        CheckpointError: If the file is missing, or of another size or content.
    """
    try:
        size = path.stat().st_size
        if size != record.bytes:  # before a byte is read: the file may be anything
            kind = "truncated" if size < record.bytes else "not the file that was saved"
            raise CheckpointError(
                f"{path} has {size} bytes, expected {record.bytes}: it is {kind}. Save or download it again."
            )
        blob = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Save or download the model again.") from error
    digest = hashlib.sha256(blob).hexdigest()
    if digest != record.sha256:
        raise CheckpointError(
            f"{path} has sha256 {digest}, expected {record.sha256}: its content was changed. Save or download it again."
        )
    return blob


def read_weights(path: Path, record: SavedFile) -> dict[str, Tensor]:
    """Return the tensors of a weight file, as `check_weights` lets it through.

    Raises:
        CheckpointError: As `check_weights`, or if it is no safetensors file.
    """
    blob = check_weights(path, record)
    try:
        return load(blob)
    # Types that safetensors knows and torch does not come as a KeyError; other nonsense as the rest.
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, AssertionError, OverflowError) as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}.") from error


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Give a module exactly these tensors: every key and shape must match.

    Raises:
        CheckpointError: Listing missing and unexpected keys and differing shapes.
    """
    own = module.state_dict(keep_vars=True)
    check_fit(own, tensors, type(module).__name__, origin)
    # assign: the stored dtype is kept, so predictions come back bit for bit.
    module.load_state_dict(_tied_alike(own, tensors, origin), strict=True, assign=True)


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str, origin: str) -> None:
    """Refuse tensors that are not exactly the state of a module, in keys, shapes and kind of number.

    Args:
        own: State of the module, possibly without memory.
        tensors: Read from a file.
        name: Of the module, for the message.
        origin: Of the tensors, for the message.

    Raises:
        CheckpointError: Listing missing and unexpected keys and differing shapes.
    """
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
            f"{origin} does not fit {name}: {'; '.join(problems)}. Pass the module it was saved from."
        )


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


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """An encoder that is known and not built yet.

    Attributes:
        name: Of its class, for messages.
        state: What its file must hold; without memory where the source can do that, None where it cannot.
        build: Returns the backbone, with any weights.
    """

    name: str
    state: Mapping[str, Tensor] | None
    build: Callable[[], nn.Module]


def plan_encoder(role: Role, config: SavedConfig, modules: Mapping[str, nn.Module]) -> Blueprint:
    """Find the architecture of a role's encoder: the caller's module, or what its spec names.

    Nothing is read and hardly any memory taken, so that a config from elsewhere that asks for too much, or for what
    is not there, costs neither a download nor the machine.

    Args:
        role: Which encoder.
        config: Of the saved model.
        modules: What the caller passed, by role; copied, never modified.

    Raises:
        CheckpointError: If a custom module is needed and was not passed.
        ConfigError: If the source no longer knows the name, or refuses the arguments.
    """
    record = config.encoders[role]
    owner = role if role in modules else record.architecture_of
    if owner is not None and owner in modules:
        module = modules[owner]
        own = copy.deepcopy(module.backbone) if isinstance(module, Encoder) else wrap_module(module).backbone
        return Blueprint(name=type(own).__name__, state=own.state_dict(keep_vars=True), build=lambda: own)
    if record.spec.source == "custom":
        wanted = record.architecture_of or role
        raise CheckpointError(
            f"the {role} encoder is a module of the caller's, which no spec can rebuild. Pass its "
            f"architecture (weights do not matter): from_pretrained(..., {wanted}=module)."
        )

    def build() -> nn.Module:
        return build_encoder(record.spec).backbone

    try:
        with torch.device("meta"):
            planned = build()
    except ConfigError as error:
        if not isinstance(error.__cause__, NotImplementedError):  # torchvision's RegNet computes its widths in tensors
            raise
        return Blueprint(name=str(record.spec), state=None, build=build)
    return Blueprint(name=type(planned).__name__, state=planned.state_dict(), build=build)


def rebuild_encoder(record: EncoderRecord, blueprint: Blueprint, tensors: Mapping[str, Tensor], origin: str) -> Encoder:
    """Build an encoder and load its weights.

    Args:
        record: What the config says of it.
        blueprint: Of `plan_encoder`.
        tensors: Read from its file.
        origin: The file, for messages.

    Raises:
        CheckpointError: If the weights do not fit.
    """
    if blueprint.state is not None:  # before memory is taken for what the config asks for
        check_fit(blueprint.state, tensors, blueprint.name, origin)
    backbone = blueprint.build()
    load_strictly(backbone, tensors, origin)
    return Encoder(backbone, spec=record.spec).requires_grad_(False).eval()


def rebuild_heads(config: SavedConfig, weights: Mapping[str, Tensor], origin: str) -> dict[str, nn.Module]:
    """Build the heads that the config names and load their weights.

    Raises:
        CheckpointError: If a key belongs to no head, or the weights do not fit.
    """
    stray = [key for key in weights if key.partition(".")[0] not in config.heads]
    if stray:
        raise CheckpointError(f"{origin} holds tensors of no branch: {', '.join(sorted(stray)[:5])}.")
    heads: dict[str, nn.Module] = {}
    for role in (role for role in ENCODER_ROLES if role in config.heads):
        own = {key.removeprefix(f"{role}."): t for key, t in weights.items() if key.startswith(f"{role}.")}
        head = _blank_head(config.heads[role], config.encoders[role].features, config.num_classes or 0, own)
        load_strictly(head, own, f"{origin} ({role})")
        heads[role] = head.eval()
    return heads


def rebuild_detector(config: SavedConfig, weights: Mapping[str, Tensor] | None, origin: str) -> Detector:
    """Build the detector that the config names, and load what it was fitted to.

    Args:
        config: Of the saved model.
        weights: Read from its file; None where there is none.
        origin: The file, for messages.

    Raises:
        CheckpointError: If the weights do not fit.
    """
    detector = Detector(config.detector)
    if weights is not None:
        widths = {role: record.features for role, record in config.encoders.items()}
        with torch.device("meta"):  # no memory before what is stored is known to fit
            outputs = widths.get(SENTINEL, 0)
            detector.allocate(sum(widths[role] for role in HARDENED_ROLES) + outputs, outputs)
        load_strictly(detector, weights, origin)
    return detector.eval()


def _blank_head(kind: str, features: int, classes: int, stored: Mapping[str, Tensor]) -> nn.Module:
    """A head of the right shape, which takes no more memory than what is stored."""
    if kind == "mlp":
        with torch.device("meta"):
            return MLPHead(features, classes)
    fits = "weight" in stored and stored["weight"].shape == (classes, features)
    return ZeroShotHead(torch.ones(classes, features) if fits else torch.ones(1, 1))
