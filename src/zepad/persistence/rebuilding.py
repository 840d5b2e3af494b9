"""Encoders, heads and detector of a saved model, built again from its config and given its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..detectors import FittedDetector, Widths
from ..encoders import Encoder, build_encoder
from ..encoders.given import copied
from ..encoders.sources.registry import is_registered
from ..errors import CheckpointError, ConfigError
from ..modules import MLPHead
from ..types import ENCODER_ROLES, HARDENED_ROLES, REFERENCE, ROLES, Role
from ..zero_shot import ZeroShotHead
from .config import EncoderRecord, HeadKind, SavedConfig, stored_role
from .weights import check_fit, load_strictly


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """An encoder that is known and not built yet.

    Attributes:
        name: Name of its class, for messages.
        state: State that its file must hold, on the meta device where the source can build there; None where it cannot.
        build: Function that returns the backbone, with any weights.
    """

    name: str
    state: Mapping[str, Tensor] | None
    build: Callable[[], nn.Module]


def plan_encoder(role: Role, config: SavedConfig, modules: Mapping[str, nn.Module]) -> Blueprint:
    """Find the architecture of a role's encoder: the caller's module, or what its spec names.

    No file is read and hardly any memory is taken, so that a config from elsewhere that asks for too much costs neither
    a download nor the machine.

    Args:
        role: Role of the encoder.
        config: Config of the saved model.
        modules: Modules that the caller passed, by role. They are copied, never modified.

    Raises:
        CheckpointError: If a custom module is needed and was not passed.
        ConfigError: If the source no longer knows the name, or refuses the arguments.
        InputError: If a module of the caller's cannot be copied.
    """
    record = config.encoders[role]
    owner = role if role in modules else record.architecture_of
    if (
        owner is None and record.spec.source != "custom" and not is_registered(record.spec.source)
    ):  # the encoder is a copy of another role's, such as the reference
        owner = next((r for r in ROLES if r in modules and config.encoders[r].spec == record.spec), None)
    if owner is not None and owner in modules:
        own = copied(owner, modules[owner]).backbone
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
        record: Record of the encoder in the config.
        blueprint: Result of `plan_encoder` for its role.
        tensors: Tensors of its weight file.
        origin: Name of the file, for messages.

    Raises:
        CheckpointError: If the weights do not fit.
    """
    if blueprint.state is not None:  # checked before memory is allocated for the architecture in the config
        check_fit(blueprint.state, tensors, blueprint.name, origin)
    backbone = blueprint.build()
    load_strictly(backbone, tensors, origin)
    return Encoder(backbone, spec=record.spec).requires_grad_(False).eval()


def rebuild_heads(config: SavedConfig, weights: Mapping[str, Tensor], origin: str) -> dict[str, nn.Module]:
    """Build the heads that the config names and load their weights.

    Args:
        config: Config of the saved model.
        weights: Tensors of the heads' file.
        origin: Name of the file, for messages.

    Raises:
        CheckpointError: If a key belongs to no head, or the weights do not fit.
    """
    prefixes = {role: f"{stored_role(role, config.format)}." for role in config.heads}
    stray = [key for key in weights if not key.startswith(tuple(prefixes.values()))]
    if stray:
        raise CheckpointError(f"{origin} holds tensors of no branch: {', '.join(sorted(stray)[:5])}.")
    heads: dict[str, nn.Module] = {}
    for role in (role for role in ENCODER_ROLES if role in config.heads):
        prefix = prefixes[role]
        own = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
        head = _blank_head(config.heads[role], config.encoders[role].features, config.num_classes or 0, own)
        load_strictly(head, own, f"{origin} ({role})")
        heads[role] = head.eval()
    return heads


def rebuild_detector(config: SavedConfig, weights: Mapping[str, Tensor] | None, origin: str) -> FittedDetector:
    """Build the detector that the config names, and load what it was fitted to.

    Args:
        config: Config of the saved model.
        weights: Tensors of its weight file, or None where it has none.
        origin: Name of the file, for messages.

    Raises:
        CheckpointError: If the weights do not fit.
    """
    detector = FittedDetector(config.detector_rule)
    if weights is not None:
        widths = {role: record.features for role, record in config.encoders.items()}
        with torch.device("meta"):  # allocates no memory until the stored weights are known to fit
            hardened = sum(widths[role] for role in HARDENED_ROLES)
            detector.allocate(Widths(hardened=hardened, reference=widths.get(REFERENCE, 0)))
        load_strictly(detector, weights, origin)
    return detector.eval()


def _blank_head(kind: HeadKind, features: int, classes: int, stored: Mapping[str, Tensor]) -> nn.Module:
    """Return a head of the right shape, which takes no more memory than what is stored."""
    if kind == "mlp":
        with torch.device("meta"):
            return MLPHead(features, classes)
    fits = "weight" in stored and stored["weight"].shape == (classes, features)
    return ZeroShotHead(torch.ones(classes, features) if fits else torch.ones(1, 1))
