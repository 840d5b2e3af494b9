"""The data of an evaluation: checked batches, the same in the same order in every pass."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..digests import digest_tensor
from ..errors import InputError
from ..inputs import check_images, check_labels, class_names_in, split_batch
from ..types import Loader

_CHANGED = (
    "the loader yielded other images, or the same in another order, the second time. "
    "Set shuffle=False and use no random transforms."
)


def checked_batches(loader: Loader, device: torch.device | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and labels of every batch on a device.

    Args:
        loader: Yields `(images, labels)`.
        device: Device that the batches are moved to; None leaves them where they are.

    Raises:
        InputError: If a batch does not fit.
    """
    for batch in loader:
        images, labels = split_batch(batch)
        checked = check_images(images, source=loader)
        targets = check_labels(labels, count=len(checked))
        yield checked.to(device), targets.to(device)


def repeated_batches(
    loader: Loader, device: torch.device | None, digests: Sequence[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of an earlier pass once more.

    Args:
        loader: Yields `(images, labels)`.
        device: Device that the batches are moved to; None leaves them where they are.
        digests: `digest_batch` of every batch of the earlier pass.

    Raises:
        InputError: If the batches are not those of the earlier pass.
    """
    count = 0
    for images, labels in checked_batches(loader, device):
        if count >= len(digests) or digest_batch(images, labels) != digests[count]:
            raise InputError(_CHANGED)
        count += 1
        yield images, labels
    if count != len(digests):
        raise InputError(_CHANGED)


def digest_batch(images: Tensor, labels: Tensor) -> str:
    """Return a text that is the same for the same images with the same labels."""
    return digest_tensor(images) + digest_tensor(labels)


def digest_batches(digests: Sequence[str]) -> str:
    """Return the SHA-256 of all data from `digest_batch` of every batch."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def class_names(loader: Loader, model: Any) -> tuple[str, ...]:
    """Return the names of the classes that the data set, or else the model, has; empty where neither has any."""
    dataset: Any = getattr(loader, "dataset", None)
    while hasattr(dataset, "dataset"):  # subsets wrap the data set they were taken from
        dataset = dataset.dataset
    names = class_names_in(dataset, loader) or getattr(model, "class_names", None) or ()
    return tuple(str(name) for name in names)
