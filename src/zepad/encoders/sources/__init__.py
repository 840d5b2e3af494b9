"""The sources encoders come from, one file each, and the one line that registers it.

A source has a function `build(spec, *, pretrained)`, which makes an encoder from a spec, and may have one
`wrap(module)`, which copies a module that is the source's own into an encoder. Building never touches the network
unless pre-trained weights are asked for, and no name of a spec is ever imported.
"""

from . import lightly, open_clip, packaged, solo, timm, torchvision, transformers
from .registry import build_encoder, register_source

register_source("timm", timm.build, wrap=timm.wrap)
register_source("torchvision", torchvision.build, wrap=torchvision.wrap, weights="tag")
register_source("open_clip", open_clip.build, wrap=open_clip.wrap, weights="tag")
register_source("transformers", transformers.build, wrap=transformers.wrap, weights="repository")
register_source("solo", solo.build, weights="file")
register_source("lightly", lightly.build, weights="file")
register_source("zepad", packaged.build)

__all__ = ["build_encoder", "register_source"]
