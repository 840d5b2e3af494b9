"""Data sets by name. Images are float32 `(3, H, W)` in [0, 1], not normalised."""

from .embedded import digits
from .images import ImageDataset, LabelledImages, Pictures, read_image
from .load import NAMES, Split, load_data

__all__ = [
    "NAMES",
    "ImageDataset",
    "LabelledImages",
    "Pictures",
    "Split",
    "digits",
    "load_data",
    "read_image",
]
