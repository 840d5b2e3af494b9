"""What training needs to know of a loader: its length, its classes, and a part of it held out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from ..errors import InputError
from ..inputs import check_images, check_labels, split_batch
from ..types import Loader


def batches_in(loader: Loader) -> int | None:
    """Return the number of batches, or None where the loader does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def images_in(loader: Loader) -> int | None:
    """Return the number of images of a map-style data set behind the loader, or None."""
    try:
        return len(loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None


def class_names(loader: Loader) -> tuple[str, ...] | None:
    """Return the class names of a data set in torchvision's manner (`dataset.classes`), looking through subsets."""
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return tuple(str(name) for name in names) if names else None


def count_classes(loader: Loader) -> int:
    """Return the number of classes: from the data set's `classes`, else by one pass over the labels.

    Raises:
        InputError: If the loader is empty or its labels are no class indices.
    """
    names = class_names(loader)
    if names:
        return len(names)
    largest = -1
    with seeded(0):  # iterating draws from the caller's generator
        for batch in loader:
            images, labels = split_batch(batch)
            largest = max(largest, int(check_labels(labels, count=len(check_images(images))).max()))
    if largest < 0:
        raise InputError("the loader is empty: it yielded no batch. Pass at least one labelled image.")
    return largest + 1


def hold_out(loader: Loader, fraction: float, seed: int) -> tuple[Loader, Loader | None]:
    """Split the data set behind a DataLoader at random into a training and a validation loader.

    Only a map-style data set read in plain or shuffled order can be split; for every other loader the second value is
    None and training keeps its last epoch.

    Args:
        loader: The user's loader; not modified.
        fraction: Share of the images held out; zero holds out nothing.
        seed: Of the split.
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


def random_part(loader: Loader, count: int, seed: int) -> Loader:
    """Return a loader over `count` images drawn at random, always the same for a seed.

    A loader that cannot be split, as in `hold_out`, comes back as it is: read as many images as needed.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or loader.batch_size is None:
        return loader
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    return _like(loader, Subset(loader.dataset, order[:count].tolist()), False)


def _like(loader: DataLoader[Any], dataset: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
    """A loader over another data set with the settings of the user's."""
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


def derive_seed(*parts: int) -> int:
    """Return a seed that depends on every part, such as run, stage, epoch and process."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch for a while and give the caller's generators back as they were.

    Training is seeded per epoch, so that a run resumed at an epoch sees what an undisturbed run sees.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - transforms use the global one
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002
