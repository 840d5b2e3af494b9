"""Images, devices and models, as commands name them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

    from ..model import ZePAD

BATCH = 128

DATA = typer.Option(
    metavar="SOURCE",
    help="digits, cifar10, stl10, gtsrb, svhn, animals10, imagenet20, folder:PATH or a .npz file.",
)
ROOT = typer.Option(metavar="FOLDER", help="Folder of the named data sets.")
DOWNLOAD = typer.Option("--download", help="Fetch a named data set that is missing.")
SIZE = typer.Option(min=1, metavar="PIXELS", help="Stretch images to this height and width.")
BATCH_SIZE = typer.Option(min=1, metavar="NUMBER", help="Number of images in a batch.")
WORKERS = typer.Option(min=0, metavar="NUMBER", help="Number of processes that read images; 0 reads in this one.")
DEVICE = typer.Option(
    metavar="DEVICE", help="cpu, cuda, cuda:1, mps, ...; by default a GPU where there is one.", show_default=False
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """How the images of a command are read.

    Attributes:
        size: Height and width that images are stretched to; None keeps their own.
        root: Folder of the named data sets; None is the default one.
        download: Whether to fetch a named data set that is missing.
        seed: Seed of random subsets.
        workers: Number of processes that read.
        batch_size: Number of images in a batch.
    """

    size: int | None = None
    root: Path | None = None
    download: bool = False
    seed: int = 0
    workers: int = 0
    batch_size: int = BATCH

    def split(
        self, data: str, split: Literal["train", "test", "all"], *, limit: int | None = None, shuffle: bool = False
    ) -> DataLoader[Any]:
        """Return the loader of a split of a data set."""
        from ..data import load_data

        return self._loader(load_data(data, split, limit=limit, **self._place()), shuffle)

    def part(
        self,
        data: str,
        part: Literal["train", "validation", "test", "all"],
        *,
        limit: int | None = None,
        shuffle: bool = False,
    ) -> DataLoader[Any]:
        """Return the loader of a part of a data set, where the train split has a part for validation."""
        from ..data import load_part

        return self._loader(load_part(data, part, limit=limit, **self._place()), shuffle)

    def _place(self) -> dict[str, Any]:
        return {"size": self.size, "root": self.root, "download": self.download, "seed": self.seed}

    def _loader(self, data: Any, shuffle: bool) -> DataLoader[Any]:
        from torch.utils.data import DataLoader

        return DataLoader(data, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.workers)


def find_device(name: str | None) -> torch.device:
    """Return the device that a command computes on: the one it was given, or else the one that training uses.

    Raises:
        ConfigError: If this machine has no such device.
    """
    from ..training import training_device, use_device

    return training_device() if name is None else use_device(name)


def load_model(folder: Path, device: str | None) -> ZePAD:
    """Return the model of a folder, on the device that a command computes on.

    Raises:
        CheckpointError: If the folder holds no model, or a damaged one.
        ConfigError: If this machine has no such device.
    """
    from ..model import ZePAD

    return ZePAD.from_pretrained(folder, device=find_device(device))
