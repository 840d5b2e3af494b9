"""The schema of config.json: what it holds, how it is read strictly, and how older formats are brought up to date.

Nothing is pickled and no name from the config is ever imported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .._version import __version__
from ..config import _JSONConfig, is_hub_id, require
from ..detectors import Detector
from ..detectors.base import DETECTORS
from ..encoders import EncoderSpec
from ..errors import CheckpointError, ConfigError
from ..fusion import FusionRule
from ..fusion.base import RULES
from ..plugins import PluginRecord
from ..schema import parse_json
from ..types import ENCODER_ROLES, HARDENED_ROLES, REFERENCE, ROLES, Role, Stage

FORMAT = 7
"""Version of the layout that is written. Formats 1 and 2 were never released."""


def _from_format_3(values: dict[str, Any]) -> dict[str, Any]:
    """Rules and detectors had no settings of their own, and the reference was called sentinel."""
    fusion = values["fusion"]
    rule = {"calibrated": "temperature"}.get(fusion["rule"], fusion["rule"])
    own = {"rfdm": ("sharpness",), "temperature": ("temperatures", "sharpness"), "bounded": ("vote",)}
    own |= {"mixed": ("scale", "power", "bias", "benign_weight")}
    return {
        **values,
        "encoders": _present_roles(values["encoders"]),
        "heads": _present_roles(values["heads"]),
        "fusion": {"name": rule, "settings": {name: fusion[name] for name in own.get(rule, ())}},
        "detector": {"name": values["detector"]["name"], "settings": {}},
    }


def _present_roles(by_role: dict[str, Any]) -> dict[str, Any]:
    return {REFERENCE if role == "sentinel" else role: value for role, value in by_role.items()}


def _from_format_4(values: dict[str, Any]) -> dict[str, Any]:
    """The benign branch always spoke."""
    return {**values, "abstain_above": None}


def _from_format_5(values: dict[str, Any]) -> dict[str, Any]:
    """No model had a memory."""
    return values


def _from_format_6(values: dict[str, Any]) -> dict[str, Any]:
    """The record of a hardening had 5 steps where the recipe attacked by steps of its own, or not at all."""
    hardened = values.get("provenance", {}).get("harden", {})
    method = str(hardened.get("method", ""))
    own = re.search(r"own_steps=(\d+)", method)
    if own is None or "config" not in hardened:
        return values
    steps = None if "own_eps=None" in method else int(own[1])
    hardened = {**hardened, "config": {**hardened["config"], "steps": steps, "step_size": None}}
    return {**values, "provenance": {**values["provenance"], "harden": hardened}}


_UPGRADES: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    3: _from_format_3,
    4: _from_format_4,
    5: _from_format_5,
    6: _from_format_6,
}
"""By format, the function from the values of a config.json of that format to those of the next one."""

_FORMER_ROLES: Mapping[int, Mapping[str, str]] = {3: {REFERENCE: "sentinel"}}
"""By format, the names under which its files store the roles that were renamed since, by present name."""

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
HEADS_FILE = "heads.safetensors"
DETECTOR_FILE = "detector.safetensors"

HeadKind = Literal["mlp", "zero_shot"]

MAX_CONFIG_BYTES = 10 * 2**20
_MAX_WIDTH = 2**24  # largest number of features or classes; a larger head could not be allocated


def stored_role(role: str, version: int = FORMAT) -> str:
    """Return the name under which the files of a format store a role."""
    return _FORMER_ROLES.get(version, {}).get(role, role)


def encoder_file(role: str, version: int = FORMAT) -> str:
    """Return the name of the weight file of a role in a format."""
    return f"{stored_role(role, version)}.safetensors"


ENCODER_FILES = tuple(
    dict.fromkeys(encoder_file(role, version) for version in (*_FORMER_ROLES, FORMAT) for role in ENCODER_ROLES)
)
WEIGHT_FILES = (*ENCODER_FILES, HEADS_FILE, DETECTOR_FILE)
"""Every weight file that a saved model of any format may have."""


@dataclass(frozen=True, kw_only=True)
class EncoderRecord(_JSONConfig):
    """How one encoder is rebuilt.

    Attributes:
        spec: Source, name, arguments, preprocessing and pooling of the encoder.
        features: Width of the output.
        architecture_of: Another role whose module serves as the architecture of a custom encoder, or None.
    """

    spec: EncoderSpec
    features: int
    architecture_of: Role | None = None


@dataclass(frozen=True, kw_only=True)
class SavedFile(_JSONConfig):
    """Digest and size of a weight file.

    Attributes:
        sha256: SHA-256 of the content, 64 hexadecimal digits.
        bytes: Size of the file in bytes.
    """

    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        """Check both fields.

        Raises:
            ConfigError: If a field is malformed.
        """
        digest = re.fullmatch("[0-9a-f]{64}", self.sha256)
        require(bool(digest), "sha256", self.sha256, "a digest of 64 hexadecimal digits")
        require(self.bytes >= 1, "bytes", self.bytes, "a positive number of bytes")


@dataclass(frozen=True, kw_only=True)
class Base(_JSONConfig):
    """Repository and commit that hold the encoders of a model whose own files are its heads alone.

    Attributes:
        repo_id: Id of the repository on the Hub, `"user/name"`.
        revision: Commit, 40 hexadecimal digits.
    """

    repo_id: str
    revision: str

    def __post_init__(self) -> None:
        """Check both fields, which end up in requests to the Hub.

        Raises:
            ConfigError: If a field is malformed.
        """
        named = is_hub_id(self.repo_id) and "/" in self.repo_id
        require(named, "base.repo_id", self.repo_id, 'a Hub id such as "user/name"')
        pinned = isinstance(self.revision, str) and re.fullmatch(r"[0-9a-f]{40}", self.revision)
        require(bool(pinned), "base.revision", self.revision, "a commit of 40 hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class SavedConfig(_JSONConfig):
    """Everything in config.json.

    Attributes:
        format: Version of the file format. A config that was read keeps the version it was written with.
        library: Name of the library, always `"zepad"`.
        library_version: Version of zepad that wrote the file.
        stage: Stage of the model.
        channels: Number of image channels.
        num_classes: Number of classes of the present task, or None before there is one.
        class_names: One name per class, or None.
        encoders: How each encoder is rebuilt, by role.
        heads: Kind of each head, `"mlp"` or `"zero_shot"`, by role.
        fusion: Name and settings of the fusion rule.
        detector: Name and settings of the detector.
        threshold: Threshold of the detection score, or None before there is one.
        abstain_above: Restoration gap above which the memory, or else the benign branch, abstains, or None.
        provenance: Recipes, data sizes and results of training, by step.
        files: Digest and size of each weight file, by name.
        base: Repository and commit that hold the encoders' files, or None if they are beside this config.
    """

    format: int
    library: Literal["zepad"]
    library_version: str
    stage: Stage
    channels: int
    num_classes: int | None
    class_names: tuple[str, ...] | None
    encoders: dict[str, EncoderRecord]
    heads: dict[str, HeadKind]
    fusion: PluginRecord
    detector: PluginRecord
    threshold: float | None
    abstain_above: float | None
    provenance: dict[str, dict[str, Any]]
    files: dict[str, SavedFile]
    base: Base | None = None

    @property
    def fusion_rule(self) -> FusionRule:
        """The fusion rule that the record names.

        Raises:
            CheckpointError: If no such rule is registered here, or the settings are not its own.
        """
        return RULES.read(self.fusion, origin=CONFIG_FILE)

    @property
    def detector_rule(self) -> Detector:
        """The detector that the record names.

        Raises:
            CheckpointError: If no such detector is registered here, or the settings are not its own.
        """
        return DETECTORS.read(self.detector, origin=CONFIG_FILE)

    def encoder_file(self, role: str) -> str:
        """Return the name of the weight file of a role in this model's format."""
        return encoder_file(role, self.format)

    @property
    def own_files(self) -> tuple[str, ...]:
        """Names of the weight files that lie beside the config: without a base, all of them."""
        return tuple(name for name in self.files if self.base is None or name not in ENCODER_FILES)


def parse_config(text: str | bytes, origin: str) -> SavedConfig:
    """Return the config that a JSON text spells out, brought up to date from an older format.

    Args:
        text: JSON in UTF-8.
        origin: File that holds the text, for error messages.

    Raises:
        CheckpointError: If the text is no config of zepad or of a format that this version does not read; otherwise
            naming each field that is missing, unknown, of another type or out of range.
    """
    values = _upgraded(_values(text, origin), origin)
    try:
        # A lone surrogate, as in a folder name that is not UTF-8, is read as a question mark.
        spelled_out = json.dumps(values, ensure_ascii=False).encode(errors="replace")
        config = parse_json(SavedConfig, spelled_out, origin=origin)
        _check(config)
    except (ConfigError, RecursionError) as error:
        raise CheckpointError(f"{origin} is damaged: {error} Save or download it again.") from error
    return config


def is_config(text: bytes) -> bool:
    """Return whether a text is a config.json of zepad, in any version of the format."""
    try:
        _values(text, CONFIG_FILE)
    except CheckpointError:
        return False
    return True


def _values(text: str | bytes, origin: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{origin} is no readable JSON: {error}. Save or download it again.") from error
    if not isinstance(values, dict) or values.get("library") != "zepad":
        raise CheckpointError(f"{origin} was not written by zepad: it does not say library: zepad.")
    return values


def _upgraded(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return the values as the present format has them; the format that they state stays."""
    version = values.get("format")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{origin}: format must be a positive integer; got {version!r}.")
    if version > FORMAT:
        raise CheckpointError(
            f"{origin} has format {version}, written by zepad {values.get('library_version')}; this is zepad "
            f"{__version__}, which reads formats up to {FORMAT}. Upgrade with: pip install -U zepad."
        )
    for step in range(version, FORMAT):
        if step not in _UPGRADES:
            raise CheckpointError(
                f"{origin} has format {version}, older than zepad's first release. Save the model again."
            )
        try:
            values = _UPGRADES[step](values)
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{origin} is damaged: it is not what format {step} was ({type(error).__name__}: {error}). "
                "Save or download it again."
            ) from error
    return values


def _check(config: SavedConfig) -> None:
    """Check what the types of single fields cannot say.

    Raises:
        ConfigError: If a field is malformed.
    """
    require(config.channels >= 1, "channels", config.channels, "a positive integer")
    classes, names = config.num_classes, config.class_names
    require(classes is None or 1 <= classes <= _MAX_WIDTH, "num_classes", classes, f"from 1 to {_MAX_WIDTH}, or null")
    require(names is None or len(names) == classes, "class_names", names, "one per class, or null")
    gap = config.abstain_above
    require(gap is None or gap >= 0, "abstain_above", gap, "a number of zero or more, or null")
    _check_encoders(config)
    _check_heads(config)
    _check_files(config)
    config.fusion_rule.check_branches(len(ROLES))


def _check_encoders(config: SavedConfig) -> None:
    needed = (*ROLES, REFERENCE) if config.detector_rule.needs_reference() else ROLES
    wanted = [role for role in ENCODER_ROLES if role in needed or role in config.encoders]
    _require_exactly(config.encoders, wanted, "encoders")
    for role, record in config.encoders.items():
        at, spec = f"encoders.{role}", record.spec
        pixels = spec.preprocessing
        require(pixels is not None, f"{at}.spec.preprocessing", pixels, "what the encoder expects")
        mean = pixels.mean if pixels else None
        one_each = mean is None or len(mean) == config.channels
        require(one_each, f"{at}.spec.preprocessing.mean", mean, "one per channel, or null")
        # Paths and URLs of weights are never saved.
        require(not spec.weights, f"{at}.spec.weights", spec.weights, "empty")
        require(1 <= record.features <= _MAX_WIDTH, f"{at}.features", record.features, f"from 1 to {_MAX_WIDTH}")
        owner = record.architecture_of
        require(owner in (None, *ROLES), f"{at}.architecture_of", owner, f"one of {', '.join(ROLES)}, or null")


def _check_heads(config: SavedConfig) -> None:
    if config.stage != "hardened" or config.heads:  # hardening without labels leaves no heads
        wanted: dict[Stage, Collection[str]] = {"built": (), "hardened": HARDENED_ROLES, "fitted": config.encoders}
        _require_exactly(config.heads, wanted[config.stage], "heads")
    require(not config.heads or config.num_classes is not None, "num_classes", None, "a number, as there are heads")


def _check_files(config: SavedConfig) -> None:
    expected = [config.encoder_file(role) for role in config.encoders]
    expected += [HEADS_FILE] if config.heads else []
    # The threshold is that of a fitted detector.
    expected += [DETECTOR_FILE] if config.threshold is not None and config.detector_rule.is_fitted_on_images() else []
    _require_exactly(config.files, expected, "files")


def _require_exactly(found: Collection[str], expected: Collection[str], field: str) -> None:
    wanted = ", ".join(expected) or "none"
    require(set(found) == set(expected), field, sorted(found), f"of this stage and detector, {wanted}")
