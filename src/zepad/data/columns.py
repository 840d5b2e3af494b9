"""Loaders of dicts whose columns have names of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader

from ..arguments import checked
from ..errors import InputError
from ..inputs import IMAGE_COLUMNS, LABEL_COLUMNS, described
from ..types import Loader


@checked
def columns(loader: Loader, *, image: str, label: str | None = None) -> Loader:
    """Return a loader whose dicts have the columns that this library looks for.

    It is needed where a loader's dicts hold images under another name than `pixel_values`, `images` or `image`, or
    labels under another name than `labels` or `label`.

    Args:
        loader: Loader of dicts of batches, which is not changed.
        image: Name of the column of images.
        label: Name of the column of labels; None where there are none, or none are wanted.

    Returns:
        A loader of the same batches with these two columns alone: a `DataLoader` where `loader` is one.

    Raises:
        ConfigError: If a name is no string.
        InputError: If a batch is no dict or has no such column, when it is read.

    Examples:
        >>> import torch
        >>> batches = [{"img": torch.zeros(2, 3, 8, 8), "fine_label": torch.tensor([0, 1])}]
        >>> [batch.keys() for batch in columns(batches, image="img", label="fine_label")]
        [dict_keys(['image', 'label'])]
    """
    if isinstance(loader, DataLoader):
        renamed = copy.copy(loader)  # with the sampler, the workers and all other settings
        renamed.collate_fn = _Renaming(image, label, collate_fn=loader.collate_fn)
        renamed._iterator = None  # workers that stay alive belong to the loader that started them
        return renamed
    rename = _Renaming(image, label)
    if hasattr(loader, "__next__"):
        return map(rename, loader)
    return _Renamed(loader, rename)


@dataclass(frozen=True)
class _Renaming:
    """Makes a batch, and gives its columns the names that this library looks for.

    Attributes:
        image_column: Column of the images.
        label_column: Column of the labels, by which the names of their classes are found in the data set.
        collate_fn: Function that makes a batch of items; None where batches are given.
    """

    image_column: str
    label_column: str | None
    collate_fn: Callable[[Any], Any] | None = None

    def __call__(self, items: Any) -> dict[str, Any]:
        batch = items if self.collate_fn is None else self.collate_fn(items)
        wanted = {IMAGE_COLUMNS[-1]: self.image_column, LABEL_COLUMNS[-1]: self.label_column}
        held = batch if isinstance(batch, Mapping) else {}
        missing = [column for column in wanted.values() if column is not None and column not in held]
        if missing:
            raise InputError(
                f"the loader must yield dicts with the column {missing[0]!r}; got {described(batch)}. "
                "Name columns that are there."
            )
        return {name: batch[column] for name, column in wanted.items() if column is not None}


@dataclass(frozen=True)
class _Renamed:
    """An iterable of dicts, with other names for their columns."""

    loader: Loader
    rename: _Renaming

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.rename, self.loader)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]
