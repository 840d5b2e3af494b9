"""Encoders: the wrapper that owns preprocessing, and the sources encoders come from."""

from .encoder import Encoder, probe
from .preprocessing import Preprocessing
from .small_resnet import SmallResNet
from .sources import build_encoder, wrap_module
from .sources.lightly import load_lightly
from .sources.solo import load_solo, load_solo_probe
from .spec import EncoderSpec, Pooling

__all__ = [
    "Encoder",
    "EncoderSpec",
    "Pooling",
    "Preprocessing",
    "SmallResNet",
    "build_encoder",
    "load_lightly",
    "load_solo",
    "load_solo_probe",
    "probe",
    "wrap_module",
]
