"""Data sets by name. Images are float in [0, 1], `(3, H, W)`, un-normalised."""

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
