"""Checkpoints of lightly: ResNets that its benchmarks and examples pre-trained."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ...errors import CheckpointError, ConfigError
from ..checkpoints import read_checkpoint
from ..encoder import Encoder
from ..preprocessing import Preprocessing
from ..spec import EncoderSpec
from .resnet import build_resnet, check_name, check_request, groups_of, load_resnet

_AVERAGES: tuple[str, ...] = ("teacher_backbone", "key_backbone", "backbone_momentum")


def build(spec: EncoderSpec, *, pretrained: bool) -> Encoder:
    """Build the ResNet that a file holds, or the one that the spec names."""
    check_request(spec, pretrained=pretrained)
    if spec.arguments:
        raise ConfigError(f"a lightly encoder takes no arguments; got {spec.arguments}.")
    if pretrained:
        encoder = load_lightly(spec.weights)
        check_name(spec, encoder.spec.name)
        return encoder
    return _encoder(spec.name, build_resnet(spec.name))


def load_lightly(path: str | Path, *, ema: bool = False) -> Encoder:
    """Load the encoder of a lightly checkpoint: ResNet-18, -34 or -50, every key of it.

    Args:
        path: Path of the checkpoint file; nothing in it is executed.
        ema: Load the exponential moving average of the trained weights: the teacher of BYOL and DINO, the key encoder
            of MoCo. lightly itself evaluates the teacher for DINO and the trained encoder for every other method.

    Raises:
        CheckpointError: If the file cannot be read, holds no such encoder, or one whose keys or shapes do not match.
    """
    state = read_checkpoint(path)
    groups = groups_of(state)
    trained, averages = "backbone", _AVERAGES
    if "student_backbone" in groups:  # DINO, whose teacher is the plain backbone in lightly's benchmarks
        trained, averages = "student_backbone", (*_AVERAGES, "backbone")
    group = next((average for average in averages if average in groups), None) if ema else trained
    if group not in groups:
        wanted = f"moving average ({', '.join(averages)}). Load it with ema=False" if ema else "backbone.* of lightly"
        raise CheckpointError(f"{path} holds the parts {', '.join(groups)}, and no {wanted}.")
    name, model = load_resnet(path, state, group, stem="torchvision")
    return _encoder(name, model)


def _encoder(name: str, model: nn.Module) -> Encoder:
    spec = EncoderSpec(source="lightly", name=name)
    return Encoder(model, preprocessing=Preprocessing.imagenet(size=(224, 224)), spec=spec)
