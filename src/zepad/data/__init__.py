"""Data sets by name. Images are float32 `(3, H, W)` in [0, 1], not normalised."""

from .columns import columns
from .embedded import digits
from .images import ImageDataset, LabelledImages, read_image
from .listing import ImageList, list_images
from .load import load_data, load_part

__all__ = [
    "ImageDataset",
    "ImageList",
    "LabelledImages",
    "columns",
    "digits",
    "list_images",
    "load_data",
    "load_part",
    "read_image",
]
