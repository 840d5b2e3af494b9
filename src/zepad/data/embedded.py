"""The data set that comes with the library's dependencies."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.nn import functional as F

from ..config import require
from .images import LabelledImages


def digits(split: Literal["train", "test"], *, size: int | tuple[int, int] = 32) -> LabelledImages:
    """Return scikit-learn's handwritten digits, enlarged from 8x8 grey to `size` x `size` x 3; nothing is downloaded.

    Args:
        split: `"train"` (1,300 images) or `"test"` (497 images) of a fixed random split.
        size: Height and width of the images after bilinear interpolation, or one number for both.

    Raises:
        ConfigError: If the split is unknown.

    Examples:
        >>> from zepad.data import digits
        >>> digits("test").images.shape
        torch.Size([497, 3, 32, 32])
    """
    from sklearn.datasets import load_digits

    require(split in ("train", "test"), "split", split, '"train" or "test"')
    shape = (size, size) if isinstance(size, int) else size
    bunch: Any = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, shape, mode="bilinear", align_corners=False).clamp(0, 1).repeat(1, 3, 1, 1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:1300] if split == "train" else order[1300:]
    return LabelledImages(images[chosen], labels[chosen], [str(digit) for digit in range(10)])
