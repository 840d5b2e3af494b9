"""What a backbone expects of its input, as a value that is saved with the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from ..config import _JSONConfig, require
from ..functional.precision import accurate

Interpolation = Literal["nearest", "bilinear", "bicubic"]

_MAX_SIDE = 2**12
_MAX_FLOAT32 = 3.4e38


@dataclass(frozen=True, kw_only=True)
class Preprocessing(_JSONConfig):
    """Resize and normalisation that turn images in [0, 1] into what a backbone was trained on.

    Attributes:
        mean: Mean of each channel in [0, 1] pixel units; None leaves the pixels as they are.
        std: Standard deviation of each channel, positive; given together with `mean`.
        size: Height and width that images are resized to, or None to keep their own.
        interpolation: Interpolation of the resize, antialiased except for `"nearest"`.

    Examples:
        >>> Preprocessing.imagenet(size=(224, 224)).mean
        (0.485, 0.456, 0.406)
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        """Check every field and turn lists, which JSON has in place of tuples, into tuples.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        for name in ("mean", "std", "size"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name in ("mean", "std"):
            value = getattr(self, name)
            numbers = isinstance(value, tuple) and bool(value) and all(map(_is_number, value))
            require(value is None or numbers, name, value, "a tuple of finite numbers, one per channel, or None")
            if value is not None:
                object.__setattr__(self, name, tuple(map(float, value)))
        mean, std, size = self.mean, self.std, self.size
        together = (mean is None) == (std is None) and (mean is None or std is None or len(mean) == len(std))
        require(together, "mean and std", (mean, std), "both None or both of one length")
        require(std is None or all(s > 0 for s in std), "std", std, "positive")
        pair = isinstance(size, tuple) and len(size) == 2 and all(_is_side(s) for s in size)
        require(size is None or pair, "size", size, "a pair of positive integers (height, width), or None")
        modes = ("nearest", "bilinear", "bicubic")
        require(self.interpolation in modes, "interpolation", self.interpolation, f"one of {modes}")

    @classmethod
    def imagenet(cls, *, size: tuple[int, int] | None = None, **changes: Any) -> Preprocessing:
        """Return the ImageNet mean and std, the default of most public encoders.

        Args:
            size: Height and width that images are resized to, or None to keep their own.
            **changes: Values of other fields.
        """
        return cls(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), size=size, **changes)

    def resize(self, images: Tensor) -> Tensor:
        """Return images `(N, C, H, W)` in [0, 1] in the size that is stated, or as they are where there is none."""
        size, mode = self.size, self.interpolation
        if size is None or images.shape[-2:] == size:
            return images
        if mode == "nearest":
            return F.interpolate(images, size, mode=mode)
        # The CPU cannot resize half precision. Bicubic overshoots.
        return F.interpolate(accurate(images), size, mode=mode, align_corners=False, antialias=True).clamp(0, 1)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MAX_FLOAT32


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_SIDE
