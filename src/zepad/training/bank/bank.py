"""The bank: residuals of DAEs for every image of a data set, in a memory-mapped file that is found by its digest."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import CheckpointError, InputError
from ...files import make_writable, write_text, writing
from ...inputs import check_images, images_of
from ...progress import stage
from ...schema import STRICT, parse_json, read_bounded
from ...seeding import derive_seed, seeded
from .crafting import Crafter, digest_json, level
from .reading import Images

_FORMAT = 2
_RECORD_BYTES = 1 << 12
_CHUNK = 128  # images that are attacked at once

logger = logging.getLogger(__name__)


class DAEBank:
    """DAEs of the images of one data set: `bank[index]` is the residual of image `index`, float32 `(C, H, W)`.

    The clean image plus its residual lies in the ball of the attack that the image was given; clamped to [0, 1], it
    lies in the box too. A bank is opened with `DAEBank.build`.

    Args:
        file: File of int8 residuals `(N, per_image, C, H, W)`.
        members: Index of the attack of each residual, int64 `(N, per_image)`.
        radii: Radius of each attack in [0, 1] pixel units, `(M,)`.
        shape: Shape `(C, H, W)` of an image.
        digest: Digest of encoders, images and settings.
    """

    def __init__(self, file: Path, *, members: Tensor, radii: Tensor, shape: tuple[int, int, int], digest: str) -> None:
        self.file, self.members, self.radii, self.shape, self.digest = file, members, radii, shape, digest
        self._table: np.memmap[Any, np.dtype[np.int8]] | None = None

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Tensor:
        """Return a residual of an image; where it has several, one drawn from torch's global generator."""
        slots = self.members.shape[1]
        slot = 0 if slots == 1 else int(torch.randint(slots, ()))
        unit = level(float(self.radii[self.members[index, slot]]))
        return torch.from_numpy(np.array(self._rows()[index, slot])).float() * unit

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}  # each worker maps the file itself

    def _rows(self) -> np.memmap[Any, np.dtype[np.int8]]:
        if self._table is None:
            self._table = np.memmap(self.file, np.int8, "r", shape=(*self.members.shape, *self.shape))
        return self._table

    @classmethod
    def build(
        cls, crafter: Crafter, images: Images, folder: Path, *, per_image: int = 1, seed: int = 0, progress: bool = True
    ) -> DAEBank:
        """Open the bank of a data set in a folder, after crafting what is missing of it.

        Each image is given `per_image` different attacks of the mixture, drawn uniformly by the seed. A process that
        is killed while it crafts leaves a part of the bank, and the next one goes on from there to the same bytes.

        Args:
            crafter: Public encoders and attacks.
            images: Images of the data set, all of one shape.
            folder: Folder of banks, one folder for each digest.
            per_image: Number of DAEs for each image.
            seed: Seed of the draw of attacks, and of their random starts.
            progress: Whether to show a progress bar.

        Raises:
            InputError: If the folder cannot be written, or images are not float `(N, C, H, W)` in [0, 1].
        """
        per_image = min(per_image, len(crafter.members))
        settings = {**crafter.describe(), "images": images.digest, "per_image": per_image, "seed": seed}
        digest = digest_json({**settings, "format": _FORMAT, "chunk": _CHUNK})
        members = draw_members(len(images), len(crafter.members), per_image, seed)
        home = folder / digest[:32]
        with _written(home):
            make_writable(home)
        bank = cls(home / "residuals.int8", members=members, radii=crafter.radii, shape=images.shape, digest=digest)
        _fill(bank, crafter, images, _Record(home / "bank.json", digest), seed, progress)
        return bank


def draw_members(images: int, members: int, per_image: int, seed: int) -> Tensor:
    """Draw the attacks of each image uniformly and without repetition, int64 `(images, per_image)`."""
    generator = torch.Generator().manual_seed(derive_seed(seed))
    return torch.rand(images, members, generator=generator).argsort(dim=1)[:, :per_image].contiguous()


def plan(members: Tensor) -> list[tuple[int, int, list[int]]]:
    """Return the work in order: attack, slot and up to 128 images that it is for."""
    work = []
    for member in range(int(members.max()) + 1):
        for slot in range(members.shape[1]):
            rows = (members[:, slot] == member).nonzero().flatten()
            work += [(member, slot, chunk.tolist()) for chunk in rows.split(_CHUNK) if len(chunk)]
    return work


@dataclass(frozen=True, kw_only=True)
class _Progress:
    """What the file beside a bank says."""

    __pydantic_config__: ClassVar[Any] = STRICT

    format: int
    digest: str
    chunks: int
    residuals: str


class _Record:
    """The file beside a bank: how many chunks are done, and their digest. It is written after them."""

    def __init__(self, path: Path, digest: str) -> None:
        self._path, self._digest = path, digest

    def read(self) -> tuple[int, str]:
        """Return the number of chunks that are done and their digest; none where the record is of no use."""
        try:
            progress = parse_json(_Progress, read_bounded(self._path, _RECORD_BYTES), origin=str(self._path))
        except CheckpointError:
            return 0, ""
        return (max(progress.chunks, 0), progress.residuals) if progress.digest == self._digest else (0, "")

    def write(self, chunks: int, residuals: str) -> None:
        said = {"format": _FORMAT, "digest": self._digest, "chunks": chunks, "residuals": residuals}
        with _written(self._path.parent):
            write_text(self._path, json.dumps(said))


def _fill(bank: DAEBank, crafter: Crafter, images: Images, record: _Record, seed: int, progress: bool) -> None:
    work = plan(bank.members)
    shape = (*bank.members.shape, *bank.shape)
    size = int(np.prod(shape))
    whole = bank.file.exists() and bank.file.stat().st_size == size
    done, told = record.read() if whole else (0, "")
    done = min(done, len(work))
    kept = hashlib.sha256()
    if done:
        table = np.memmap(bank.file, np.int8, "r", shape=shape)
        for _, slot, rows in work[:done]:
            kept.update(table[rows, slot].tobytes())
        if kept.hexdigest() != told:  # bit rot, or another bank's record: what can be crafted again is no error
            logger.warning("%s does not hold what was crafted; it is crafted anew.", bank.file)
            done, kept, whole = 0, hashlib.sha256(), False
    if done == len(work):
        return
    if not whole:
        _create(bank.file, size, record)
    table = np.memmap(bank.file, np.int8, "r+", shape=shape)
    todo = work[done:]
    with stage("DAEs of public encoders", total=len(work), done=done, shown=progress) as bar:
        for number, ((member, slot, rows), batch) in enumerate(_with_images(todo, images), start=done):
            generator = torch.Generator(crafter.device).manual_seed(derive_seed(seed, number))
            residual = crafter.craft(member, batch.to(crafter.device), generator).cpu().numpy()
            table[rows, slot] = residual
            table.flush()
            kept.update(residual.tobytes())
            record.write(number + 1, kept.hexdigest())
            bar.advance()


def _create(path: Path, size: int, record: _Record) -> None:
    """Start the file of a bank anew."""
    record.write(0, "")  # before the file, since what a record says of a lost file does not hold for its successor
    with _written(path.parent), path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, while writing to mapped memory kills later
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _with_images(
    todo: list[tuple[int, int, list[int]]], images: Images
) -> Iterator[tuple[tuple[int, int, list[int]], Tensor]]:
    with seeded(0):  # iterating draws from the caller's generator
        batches = images.read([rows for _, _, rows in todo])
        yield from zip(todo, (check_images(images_of(batch)).float() for batch in batches), strict=True)


def _written(folder: Path) -> AbstractContextManager[None]:
    return writing(f"bank_dir {folder}", InputError)
