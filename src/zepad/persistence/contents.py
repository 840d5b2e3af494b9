"""The contents of a saved model, as they are written and read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._version import __version__
from ..detectors import FittedDetector
from ..encoders import Encoder
from ..errors import CheckpointError
from ..fusion import FusionRule
from ..modules import MLPHead
from ..types import Role, Stage
from ..zero_shot import ZeroShotHead
from .config import FORMAT, Base, EncoderRecord, HeadKind, SavedConfig, SavedFile


@dataclass(frozen=True, kw_only=True)
class Home:
    """The commit on the Hub that holds the encoders of a model.

    Attributes:
        base: Repository and commit.
        files: Digest and size of each weight file of the commit, by name.
    """

    base: Base
    files: Mapping[str, SavedFile]


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The contents of a saved model.

    Attributes:
        config: Description of the model. Its files are listed once they are written.
        encoders: Encoders by role.
        heads: Heads by role.
        detector: Detector, fitted or not.
        home: Commit that holds the encoders, or None if they are not on the Hub.
    """

    config: SavedConfig
    encoders: Mapping[str, Encoder]
    heads: Mapping[str, nn.Module]
    detector: FittedDetector
    home: Home | None

    @property
    def fusion(self) -> FusionRule:
        """The fusion rule that the config names."""
        return self.config.fusion_rule


def describe_model(
    *,
    stage: Stage,
    channels: int,
    num_classes: int | None,
    class_names: tuple[str, ...] | None,
    encoders: Mapping[str, Encoder],
    features: Mapping[str, int],
    shared_architecture: Mapping[str, Role],
    heads: Mapping[str, nn.Module],
    fusion: FusionRule,
    detector: FittedDetector,
    threshold: float | None,
    abstain_above: float | None,
    provenance: dict[str, Any],
    home: Home | None,
) -> SavedModel:
    """Return the contents of a model for `save_model`, with a config that lists no files yet.

    Args:
        stage: Stage of the model.
        channels: Number of image channels.
        num_classes: Number of classes, or None before there is a task.
        class_names: One name per class, or None.
        encoders: Encoders by role.
        features: Width of each encoder's output, by role.
        shared_architecture: For each custom encoder that is a copy of another, the role of that other encoder.
        heads: Heads by role.
        fusion: Fusion rule with its settings.
        detector: Detector, fitted or not.
        threshold: Threshold of the detection score, or None.
        abstain_above: Restoration gap above which the benign branch abstains, or None.
        provenance: Recipes, data sizes and results of training, by step.
        home: Commit that holds the encoders, or None if they are not on the Hub.

    Raises:
        CheckpointError: If a head is neither an `MLPHead` nor a `ZeroShotHead`.
    """
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
                spec=encoder.spec, features=features[role], architecture_of=shared_architecture.get(role)
            )
            for role, encoder in encoders.items()
        },
        heads={role: _kind(head) for role, head in heads.items()},
        fusion=fusion.record(),
        detector=detector.rule.record(),
        threshold=None if threshold is None else float(threshold),
        abstain_above=None if abstain_above is None else float(abstain_above),
        provenance=provenance,
        files={},
    )
    return SavedModel(config=config, encoders=encoders, heads=heads, detector=detector, home=home)


def _kind(head: nn.Module) -> HeadKind:
    if isinstance(head, MLPHead):
        return "mlp"
    if isinstance(head, ZeroShotHead):
        return "zero_shot"
    raise CheckpointError(f"a head must be an MLPHead or a ZeroShotHead to be saved; got {type(head).__name__}.")
