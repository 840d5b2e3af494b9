"""Data sets by name. Images are float32 `(3, H, W)` in [0, 1], not normalised."""

from .columns import columns
from .embedded import digits
from .images import ImageDataset, LabelledImages, read_image
from .load import load_data

__all__ = [
    "ImageDataset",
    "LabelledImages",
    "columns",
    "digits",
    "load_data",
    "read_image",
]
