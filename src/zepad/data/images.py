"""Images and their labels, in memory or read from disk one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from ..errors import InputError
from ..files import open_regular


class LabelledImages(TensorDataset):
    """Images and labels in memory, with class names.

    Attributes:
        images: Images `(N, C, H, W)` in [0, 1].
        labels: Labels, int64 `(N,)`.
        classes: Name of each class.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str]) -> None:
        super().__init__(images, labels)
        self.images, self.labels, self.classes = images, labels, classes


class Pictures(Protocol):
    """Images in a fixed order: a tensor `(N, 3, H, W)` in [0, 1], or an object that reads one image at a time."""

    def __len__(self) -> int:
        """Return the number of images."""

    def __getitem__(self, index: int, /) -> Tensor:
        """Return one image, float32 `(3, H, W)` in [0, 1]."""


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """A map-style data set of `(image, label)`: a float32 `(3, H, W)` in [0, 1] and an int.

    Images are read when they are asked for. Labels are known without reading any image.

    Attributes:
        pictures: All images of the source.
        indices: Indices of the images that this data set holds, int64 `(N,)`.
        labels: Labels of these images, int64 `(N,)`.
        classes: Name of each class.
        size: Height and width that every image is resized to, or None for the images' own.

    Examples:
        >>> import torch
        >>> data = ImageDataset(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), ["cat", "dog"], size=(16, 16))
        >>> image, label = data[1]
        >>> image.shape, data.classes[label], len(data.select(torch.tensor([0, 3])))
        (torch.Size([3, 16, 16]), 'dog', 2)
    """

    def __init__(
        self,
        pictures: Pictures,
        labels: Tensor,
        classes: Sequence[str],
        *,
        size: tuple[int, int] | None = None,
        indices: Tensor | None = None,
    ) -> None:
        self.pictures, self.classes, self.size = pictures, list(classes), size
        self.indices = torch.arange(len(pictures)) if indices is None else indices
        self.labels = labels

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pictures[int(self.indices[index])]
        if self.size is not None:
            image = resize(image, self.size)
        return image, int(self.labels[index])

    def select(self, positions: Tensor) -> ImageDataset:
        """Return the data set of the images at `positions`, int64, in that order."""
        return ImageDataset(
            self.pictures, self.labels[positions], self.classes, size=self.size, indices=self.indices[positions]
        )


def check_names(origin: Path, names: list[str]) -> list[str]:
    """Return the names of classes if they are text that can be written in UTF-8.

    Raises:
        InputError: Naming the first that is not.
    """
    for name in names:
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # how Python holds bytes that are no UTF-8
            raise InputError(f"the class name {name!a} in {origin} is no text in UTF-8. Rename the class.")
    return names


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Stretch one image `(C, H, W)` in [0, 1] to height and width `size`, bilinearly with antialiasing."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


def read_image(path: Path, *, channels: int = 3) -> Tensor:
    """Read an image file as float `(channels, H, W)` in [0, 1].

    Args:
        path: Path of a BMP, JPEG, PNG, PPM, TIFF or WebP file with 8 bits per channel. It is turned as its EXIF
            orientation says. Transparency is dropped, and of several frames the first is taken.
        channels: Number of channels: 3 for colour, 1 for grey.

    Raises:
        InputError: If the file is no such image, is damaged or has more than 89,478,485 pixels, or no image has that
            many channels.
    """
    return decode_image(path, str(path), channels)


def from_pil(image: Image.Image, *, channels: int = 3) -> Tensor:
    """Turn a PIL image into what `read_image` makes of its file: float `(channels, H, W)` in [0, 1].

    Args:
        image: Image with 8 bits per channel. It is not changed.
        channels: Number of channels: 3 for colour, 1 for grey.

    Raises:
        InputError: If its file is damaged, it has more bits per channel or more than 89,478,485 pixels, or no image has
            that many channels.
    """
    with _readable("the PIL image"):
        _check_header(image, "the PIL image")
        return _pixels(ImageOps.exif_transpose(image), channels)


@dataclass(frozen=True)
class ImageFiles:
    """Images in one file each."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index])

    def name(self, index: int) -> str:
        """Return the name of an image for error messages."""
        return str(self.paths[index])

    def shape(self, index: int) -> tuple[int, int]:
        """Return height and width, read from the header of the file."""
        return _shape(self.paths[index], self.name(index))


@dataclass(frozen=True)
class EncodedImages:
    """Image files joined in memory; file `i` lies from `offsets[i]` to `offsets[i + 1]`."""

    source: str
    joined: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        return decode_image(self._file(index), self.name(index), 3)

    def name(self, index: int) -> str:
        """Return the name of an image for error messages."""
        return f"image {index} of {self.source}"

    def shape(self, index: int) -> tuple[int, int]:
        """Return height and width, read from the header of the file."""
        return _shape(self._file(index), self.name(index))

    def _file(self, index: int) -> BinaryIO:
        return BytesIO(self.joined[self.offsets[index] : self.offsets[index + 1]].tobytes())


@dataclass(frozen=True)
class ArrayImages:
    """Images in one array `(N, C, H, W)`, uint8 or float in [0, 1], grey or colour."""

    pixels: NDArray[np.generic]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return from_pixels(self.pixels[index])


def from_pixels(pixels: NDArray[np.generic]) -> Tensor:
    """Turn one image `(1 or 3, H, W)`, uint8 or float in [0, 1], into float32 `(3, H, W)` in [0, 1]."""
    image = pixels.astype(np.float32)
    if pixels.dtype == np.uint8:
        image /= 255
    return torch.from_numpy(np.array(np.broadcast_to(image, (3, *image.shape[1:])), order="C"))


# Of Pillow's formats those that pictures to learn from come in. Others hand a file to a program (EPS to Ghostscript).
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_BYTES = 2**30
_MAX_PIXELS = 89_478_485  # of more Pillow warns; in three channels of float they are 1.1 GB


def decode_image(file: Path | BinaryIO, name: str, channels: int) -> Tensor:
    """Read an image as `read_image` does.

    Args:
        file: A path, or an open file.
        name: Name of the image for error messages.
        channels: Number of channels: 3 for colour, 1 for grey.

    Raises:
        InputError: If the file is no such image.
    """
    with _opened(file, name) as image:
        ImageOps.exif_transpose(image, in_place=True)  # as the photographer saw it: cameras are held on their side
        return _pixels(image, channels)


def _pixels(image: Image.Image, channels: int) -> Tensor:
    if channels not in (1, 3):
        raise InputError(f"image files have 1 or 3 channels; this model takes {channels}. Call predict on tensors.")
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    scaled = torch.from_numpy(pixels.astype(np.float32)).div_(255)
    return scaled.reshape(*pixels.shape[:2], channels).permute(2, 0, 1)


def _shape(file: Path | BinaryIO, name: str) -> tuple[int, int]:
    with _opened(file, name) as image:
        if image.height != image.width and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            ImageOps.exif_transpose(image, in_place=True)  # needs the pixels; some formats are turned already
        return image.height, image.width


@contextmanager
def _opened(file: Path | BinaryIO, name: str) -> Iterator[Image.Image]:
    """Yield an image of which the header has been read, and say of whatever fails that it cannot be read."""
    with _readable(name), ExitStack() as stack:
        if isinstance(file, (str, Path)):
            file = stack.enter_context(open_regular(Path(file), limit=MAX_BYTES))
        image = stack.enter_context(Image.open(file, formats=_FORMATS))
        _check_header(image, name)
        yield image


def _check_header(image: Image.Image, name: str) -> None:
    if image.width * image.height > _MAX_PIXELS:
        raise InputError(
            f"{name} has {image.width} x {image.height} pixels; expected at most {_MAX_PIXELS:,} in all. "
            "Make it smaller."
        )
    if image.mode.startswith(("I", "F")):  # Pillow would cut every pixel above 255 to white
        raise InputError(f"{name} has more than 8 bits per channel (mode {image.mode}). Convert it to 8 bits first.")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):  # whose text names a Python object
            reason = "it does not begin as one"
        raise InputError(f"{name} is no image that can be read: {reason}. Expected {', '.join(_FORMATS)}.") from error
