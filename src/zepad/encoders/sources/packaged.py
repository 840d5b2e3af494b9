"""Encoders shipped inside this package."""

from __future__ import annotations

from importlib import resources

from safetensors.torch import load
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ..encoder import Encoder
from ..preprocessing import Preprocessing
from ..small_resnet import SmallResNet
from ..spec import EncoderSpec

_NAMES = ("digits-barlow-twins", "digits-simclr")


def build(spec: EncoderSpec, *, pretrained: bool) -> Encoder:
    """Build one of the digits encoders."""
    if spec.name not in _NAMES or spec.arguments:
        raise ConfigError(f"zepad ships the encoders {', '.join(_NAMES)} (no arguments); got {str(spec)!r}.")
    model = SmallResNet(width=16)
    if pretrained:
        model.load_state_dict(_weights(spec.name))
    return Encoder(model, preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3, size=(32, 32)), spec=spec)


def _weights(name: str) -> dict[str, Tensor]:
    path = resources.files("zepad.encoders") / "weights" / f"{name}.safetensors"
    try:
        stored = load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} is missing from the installed package. Reinstall zepad.") from error
    # Stored in half precision to keep the package small.
    return {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}
