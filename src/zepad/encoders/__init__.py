"""Encoders: the wrapper that owns preprocessing, and the sources that encoders come from."""

from .encoder import Encoder, probe
from .given import EncoderLike
from .preprocessing import Preprocessing
from .small_resnet import SmallResNet
from .sources import build_encoder, register_source
from .sources.lightly import load_lightly
from .sources.solo import load_solo, load_solo_probe
from .spec import EncoderSpec

__all__ = [
    "Encoder",
    "EncoderLike",
    "EncoderSpec",
    "Preprocessing",
    "SmallResNet",
    "build_encoder",
    "load_lightly",
    "load_solo",
    "load_solo_probe",
    "probe",
    "register_source",
]
