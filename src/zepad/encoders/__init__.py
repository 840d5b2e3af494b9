"""Encoders: the wrapper that owns preprocessing, and the sources that encoders come from."""

from .encoder import Encoder, probe
from .given import EncoderLike, as_encoder, probe_role
from .preprocessing import Preprocessing
from .small_resnet import SmallResNet
from .sources import build_encoder, is_registered, register_source, wrap_module
from .sources.lightly import load_lightly
from .sources.solo import load_solo, load_solo_probe
from .spec import EncoderSpec, Pooling

__all__ = [
    "Encoder",
    "EncoderLike",
    "EncoderSpec",
    "Pooling",
    "Preprocessing",
    "SmallResNet",
    "as_encoder",
    "build_encoder",
    "is_registered",
    "load_lightly",
    "load_solo",
    "load_solo_probe",
    "probe",
    "probe_role",
    "register_source",
    "wrap_module",
]
