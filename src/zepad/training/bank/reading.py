"""The images behind a loader, by index and always the same; and batches with what a bank has for them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    default_collate,
)

from ...digests import digest_tensor
from ...inputs import check_images, images_of
from ...seeding import seeded
from ...types import Loader

_BATCH = 256
_SAMPLE = 64  # images that are fetched twice


class Images:
    """The images of an indexable data set, all of one shape, as the user's loader makes batches of them.

    Attributes:
        shape: Shape `(C, H, W)` of every image.
        digest: SHA-256 of all images in their order.

    Args:
        loader: The user's loader.
        shape: Shape of every image.
        digest: SHA-256 of all images.
    """

    def __init__(self, loader: DataLoader[Any], shape: tuple[int, int, int], digest: str) -> None:
        self._loader, self.shape, self.digest = loader, shape, digest

    def __len__(self) -> int:
        return len(self._loader.dataset)  # type: ignore[arg-type]

    def read(self, batches: Sequence[Sequence[int]]) -> Iterable[Any]:
        """Read what the loader makes of the given rows, batch by batch."""
        return _reader(self._loader, batches)

    @classmethod
    def behind(cls, loader: Loader) -> Images | None:
        """Return the images behind a loader, after one pass over them.

        Returns:
            The images; None where they cannot be read by index, a sampler of the user's own chooses among them, they
            differ in shape, or come out otherwise when they are fetched again, as after random augmentation.

        Raises:
            InputError: If images are not float `(N, C, H, W)` in [0, 1].
        """
        if not isinstance(loader, DataLoader) or not _is_indexed(loader) or not _is_constant(loader):
            return None
        shapes: set[tuple[int, int, int]] = set()
        total = hashlib.sha256()
        rows = torch.arange(len(loader.dataset)).split(_BATCH)  # type: ignore[arg-type]
        with seeded(0):
            for batch in _reader(loader, [chunk.tolist() for chunk in rows]):
                images = check_images(images_of(batch))
                _, *shape = images.shape
                shapes.add((shape[0], shape[1], shape[2]))
                if len(shapes) > 1:
                    return None
                total.update(digest_tensor(images).encode())
        return cls(loader, shapes.pop(), total.hexdigest())


def _is_indexed(loader: DataLoader[Any]) -> bool:
    """Return whether a loader reads all of an indexable data set: other samplers may leave images out on purpose."""
    return (
        not isinstance(loader.dataset, IterableDataset)
        and loader.batch_size is not None
        and type(loader.sampler) in (RandomSampler, SequentialSampler, WeightedRandomSampler)
        and len(loader.dataset) > 0  # type: ignore[arg-type]
    )


def _is_constant(loader: DataLoader[Any]) -> bool:
    """Return whether a sample of the images comes out the same when it is fetched twice."""
    count = len(loader.dataset)  # type: ignore[arg-type]
    rows = torch.linspace(0, count - 1, min(count, _SAMPLE)).long().tolist()
    fetched = []
    for seed in (0, 1):
        with seeded(seed):
            try:
                fetched += [images_of(batch) for batch in _reader(loader, [rows])]
            except (RuntimeError, ValueError):  # images of different shapes cannot be made a batch
                return False
    return isinstance(fetched[0], Tensor) and torch.equal(*fetched)


def _reader(loader: DataLoader[Any], batches: Sequence[Sequence[int]]) -> DataLoader[Any]:
    workers = loader.num_workers
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=loader.collate_fn,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor if workers else None,
    )


class _Aligned(Dataset[tuple[Any, Tensor]]):
    """Pairs of a data set's item and the residual that a bank has for it."""

    def __init__(self, dataset: Dataset[Any], bank: Any) -> None:
        self._dataset, self._bank = dataset, bank

    def __len__(self) -> int:
        return len(self._bank)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self._dataset[index], self._bank[index]


class _Collate:
    """Makes batches of items as the user's loader does, and stacks their residuals."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate or default_collate

    def __call__(self, pairs: list[tuple[Any, Tensor]]) -> tuple[Any, Tensor]:
        items, residuals = zip(*pairs, strict=True)
        return self._collate(list(items)), torch.stack(residuals)


def align(loader: DataLoader[Any], bank: Any) -> DataLoader[Any]:
    """Return a loader that yields what the user's yields, in the same order, with the residuals of the same images.

    Args:
        loader: The user's loader.
        bank: Bank of the data set of the loader, or anything else that has one residual for each index.
    """
    workers = loader.num_workers
    return DataLoader(
        _Aligned(loader.dataset, bank),
        batch_size=loader.batch_size,
        sampler=loader.sampler,
        drop_last=loader.drop_last,
        num_workers=workers,
        collate_fn=_Collate(loader.collate_fn),
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor if workers else None,
        persistent_workers=loader.persistent_workers,
    )
