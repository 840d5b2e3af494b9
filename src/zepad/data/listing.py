"""Image files without labels, as somebody has them whose model is done: files, folders and tar archives."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..files import open_regular
from .folders import SUFFIXES, image_files
from .images import MAX_BYTES, decode_image, read_image


@dataclass(frozen=True)
class _Place:
    """Where an image lies: in a file of its own, or at an offset of an archive."""

    name: str
    path: Path
    offset: int | None = None
    bytes: int = 0


class ImageList(Dataset[Tensor]):
    """Images by name, which are read when they are asked for. Each worker of a loader opens the files itself.

    Attributes:
        names: Name of each image, unique: the path of its file, for one in an archive `ARCHIVE/MEMBER`.
        channels: Number of channels, 3 for colour or 1 for grey.
    """

    def __init__(self, places: Iterable[_Place], *, channels: int) -> None:
        self._places = list({place.name: place for place in places}.values())  # in an archive the later one counts
        self.names = [place.name for place in self._places]
        self.channels = channels

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        """Return an image, float32 `(channels, H, W)` in [0, 1].

        Raises:
            InputError: If it is no image that can be read.
        """
        place = self._places[index]
        if place.offset is None:
            return read_image(place.path, channels=self.channels)
        if place.bytes > MAX_BYTES:
            raise InputError(f"{place.name} is larger than {MAX_BYTES} bytes, which no image of ours is.")
        try:
            with open_regular(place.path) as file:
                file.seek(place.offset)
                content = file.read(place.bytes)
        except OSError as error:
            raise InputError(f"{place.name} cannot be read: {error.strerror}. Check the archive.") from error
        return decode_image(BytesIO(content), place.name, self.channels)


def list_images(sources: Iterable[str | Path], *, channels: int = 3) -> ImageList:
    """Find images: files, everything below folders, and the members of uncompressed tar archives.

    Args:
        sources: Paths of image files (taken whatever their suffix), of folders and of archives (`.tar`).
        channels: Number of channels that the images are read with, 3 for colour or 1 for grey.

    Returns:
        The images, in the order of the sources, inside a folder in order of name, inside an archive as they lie there.

    Raises:
        InputError: If a source is missing or holds no image, or an archive is damaged or compressed.
    """
    places: list[_Place] = []
    for source in map(Path, sources):
        found = list(_places(source))
        if not found:
            raise InputError(f"{source} holds no image. Expected files that end in {' '.join(SUFFIXES)}.")
        places += found
    return ImageList(places, channels=channels)


def _places(source: Path) -> Iterator[_Place]:
    if source.is_dir():
        for file in image_files(source):
            yield _Place(_text(str(file)), file)
    elif source.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise InputError(f"{source} is compressed, which would be read anew for every image. Decompress it to a .tar.")
    elif source.suffix.lower() == ".tar":
        yield from _members(source)
    elif source.exists():
        yield _Place(_text(str(source)), source)
    else:
        raise InputError(f"{source} is missing. Expected an image file, a folder or a .tar archive.")


def _members(archive: Path) -> Iterator[_Place]:
    try:
        with open_regular(archive) as file, tarfile.open(fileobj=file, mode="r:") as members:
            for member in members:
                if member.isreg() and not member.issparse() and member.name.lower().endswith(SUFFIXES):
                    yield _Place(_text(f"{archive}/{member.name}"), archive, member.offset_data, member.size)
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{archive} is no tar archive that can be read: {reason}.") from error


def _text(name: str) -> str:
    """Return a name as text that every format can hold: bytes that are no UTF-8 are spelled out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
