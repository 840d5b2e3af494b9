"""Data sets by name. Images are float in [0, 1], `(C, H, W)`, un-normalised."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from .config import require
from .errors import InputError


class LabelledImages(TensorDataset):
    """Images and labels in memory, with class names.

    Attributes:
        images: `(N, C, H, W)` in [0, 1].
        labels: int64 `(N,)`.
        classes: One name per class.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> None:
        super().__init__(images, labels)
        self.images, self.labels, self.classes = images, labels, classes


def digits(split: Literal["train", "test"], *, size: int = 32) -> LabelledImages:
    """Return scikit-learn's handwritten digits, enlarged from 8x8 grey to `size` x `size` x 3; nothing is downloaded.

    Args:
        split: `"train"` (1,300 images) or `"test"` (497), a fixed random split.
        size: Height and width; enlarged bilinearly.

    Raises:
        ConfigError: If the split is unknown.

    Examples:
        >>> from zepad.data import digits
        >>> digits("test").images.shape
        torch.Size([497, 3, 32, 32])
    """
    from sklearn.datasets import load_digits

    require(split in ("train", "test"), "split", split, '"train" or "test"')
    bunch: Any = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False).clamp(0, 1).repeat(1, 3, 1, 1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:1300] if split == "train" else order[1300:]
    return LabelledImages(images[chosen], labels[chosen], [str(digit) for digit in range(10)])


def read_image(path: Path, *, channels: int = 3) -> torch.Tensor:
    """Read an image file as float `(channels, H, W)` in [0, 1].

    Args:
        path: Any format Pillow reads.
        channels: 3 for colour, 1 for grey.

    Raises:
        InputError: If the file is no image, or no image has that many channels.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    if channels not in (1, 3):
        raise InputError(f"image files have 1 or 3 channels; this model takes {channels}. Call predict on tensors.")
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"{path} is no image that can be read: {error}.") from error
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1)
