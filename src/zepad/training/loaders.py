"""What training needs to know of a loader: its length, its classes, and how a part of it is held out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from ..errors import InputError, InputWarning
from ..inputs import check_images, check_labels, check_reiterable, class_names_in, has_labels, split_batch
from ..seeding import seeded
from ..types import Loader

_SHOWN = 10  # number of labels that a warning lists


def num_images(loader: Loader) -> int | None:
    """Return the number of images of a map-style data set behind the loader, or None."""
    try:
        return len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None


def class_names(loader: Loader) -> tuple[str, ...] | None:
    """Return the class names of the data set behind a loader, looking through subsets; None where it states none."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return class_names_in(dataset, loader)


def is_labelled(loader: Loader) -> bool:
    """Return whether the loader yields labels with its images, from its first batch.

    Raises:
        InputError: If the loader is empty.
    """
    with seeded(0):  # iterating would draw from the global generator of the caller
        for batch in loader:
            return has_labels(batch)
    raise InputError("the loader is empty: it yielded no batch. Pass at least one image.")


def count_classes(loader: Loader) -> int:
    """Return the number of classes: from the data set's `classes`, else by one pass over the labels.

    Raises:
        InputError: If the loader is empty or a one-shot iterator, or its labels are no class indices.

    Warns:
        InputWarning: If labels below the largest one do not occur.
    """
    check_reiterable(loader)
    names = class_names(loader)
    if names:
        return len(names)
    found: set[int] = set()
    with seeded(0):  # iterating would draw from the global generator of the caller
        for batch in loader:
            images, labels = split_batch(batch)
            found.update(check_labels(labels, count=len(check_images(images, source=loader))).unique().tolist())
    if not found:
        raise InputError("the loader is empty: it yielded no batch. Pass at least one labelled image.")
    count = max(found) + 1
    if len(found) < count:
        shown = ", ".join(map(str, sorted(found)[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
        warnings.warn(
            f"the labels {shown} make {count} classes, of which {count - len(found)} have no image. Map the labels to "
            f"0, 1, ..., {len(found) - 1}, or confirm the number with num_classes={count}.",
            InputWarning,
            stacklevel=4,
        )
    return count


def hold_out(loader: Loader, fraction: float, seed: int) -> tuple[Loader, Loader | None]:
    """Split the data set behind a DataLoader at random into a training and a validation loader.

    Only a map-style data set read in plain or shuffled order can be split; for every other loader the second value is
    None and training keeps its last epoch.

    Args:
        loader: The user's loader; it is not modified.
        fraction: Share of the images that are held out; zero holds out nothing.
        seed: Seed of the split.
    """
    if (
        fraction == 0
        or not isinstance(loader, DataLoader)
        or isinstance(loader.dataset, IterableDataset)
        or type(loader.sampler) not in (RandomSampler, SequentialSampler)
        or loader.batch_size is None
    ):
        return loader, None
    count = len(loader.dataset)  # type: ignore[arg-type]
    held = round(count * fraction)
    if held < 1 or held >= count:
        return loader, None
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    train = _like(loader, Subset(loader.dataset, sorted(order[held:])), isinstance(loader.sampler, RandomSampler))
    return train, _like(loader, Subset(loader.dataset, sorted(order[:held])), False)


def split(loader: Loader, val_loader: Loader | None, fraction: float, seed: int) -> tuple[Loader, Loader | None]:
    """Return the loaders to train on and to choose the epoch by: both as given, or the second held out of the first.

    Args:
        loader: The user's loader.
        val_loader: The user's validation loader; None holds out a part of `loader` where it can be split.
        fraction: Share of the images that are held out.
        seed: Seed of the split.
    """
    return hold_out(loader, fraction, seed) if val_loader is None else (loader, val_loader)


def random_part(loader: Loader, count: int, seed: int) -> Loader:
    """Return a loader over `count` images drawn at random, the same ones for the same seed.

    A loader that cannot be split, as in `hold_out`, comes back as it is: read as many images as needed.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return _like(loader, Subset(loader.dataset, order[:count].tolist()), False)


def _like(loader: DataLoader[Any], dataset: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
    """Return a loader over another data set with the settings of the user's."""
    workers = loader.num_workers
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        shuffle=shuffle,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last and shuffle,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor if workers else None,
        persistent_workers=loader.persistent_workers,
    )
