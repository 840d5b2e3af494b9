"""What the sources share: the proof that a spec rebuilds a module, and the error for a spec that cannot be built."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from ...errors import ConfigError, HubError
from ..encoder import Encoder, probe
from ..preprocessing import Preprocessing
from ..spec import EncoderSpec

logger = logging.getLogger(__name__)


def same_function(built: Encoder, backbone: nn.Module, preprocessing: Preprocessing) -> bool:
    """Whether a freshly built encoder has the keys and shapes of a module and, with its weights, the same features.

    Args:
        built: The encoder that the spec builds; its weights are overwritten.
        backbone: The module that the spec should stand for; it is not changed.
        preprocessing: Preprocessing of that module.
    """
    try:
        rebuilt = built.backbone
        rebuilt.load_state_dict(backbone.state_dict())
        ours = Encoder(copy.deepcopy(backbone).eval(), preprocessing=preprocessing, pooling=built.pooling)
        channels, _ = probe(ours)
        image = torch.rand(1, channels, *(preprocessing.size or (64, 64)), generator=torch.Generator().manual_seed(0))
        reference = next(backbone.parameters(), image)
        image = image.to(reference.device, reference.dtype)
        rebuilt = rebuilt.to(reference.device, reference.dtype)
        theirs = Encoder(rebuilt.eval(), preprocessing=preprocessing, pooling=built.pooling)
        with torch.no_grad():
            return torch.equal(ours(image), theirs(image))
    except Exception as error:  # any failure to rebuild means only that the caller must pass the module again
        logger.info("%s does not rebuild from %s: %s", type(backbone).__name__, built.spec, error)
        return False


def building_error(spec: EncoderSpec, pretrained: bool, error: Exception) -> Exception:
    """Return the error to raise for a source that could not build a spec."""
    if pretrained and not isinstance(error, TypeError):
        return HubError(
            f"the pre-trained weights of {spec} could not be loaded: {type(error).__name__}: {error}. "
            "Check the connection, or build the model yourself and pass the module."
        )
    return ConfigError(f"{spec} could not be built with {spec.arguments}: {type(error).__name__}: {error}.")
