"""Checks at the border: every image and label that enters the library passes through here once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .escaping import clean
from .normalisation import how_to_leave_out
from .types import Loader

Labeller = Callable[[Tensor], Tensor]
"""A map from images `(N, C, H, W)` to labels, int64 `(N,)`."""

IMAGE_COLUMNS = ("pixel_values", "images", "image")
LABEL_COLUMNS = ("labels", "label")
"""Keys under which dicts hold images and labels; the first that is there counts."""

_TOLERANCE = 1e-6  # rounding may leave a pixel this far outside [0, 1]
_SHOWN = 10  # number of columns that a message lists


def check_form(images: object, *, channels: int | None = None) -> Tensor:
    """Return the images if they are float, `(N, C, H, W)`. Their values are not read, so a model can be compiled.

    Args:
        images: The object that the caller passed.
        channels: Number of channels that the encoders take, where known.

    Raises:
        InputError: If they are not; the message says what was got, what was expected and what to do.
    """
    if not isinstance(images, Tensor):
        raise InputError(
            f"images must be a torch.Tensor of shape (N, C, H, W) in [0, 1]; got {type(images).__name__}. "
            "Use torchvision.transforms.functional.to_tensor on a PIL image or an array; predict, detect and inspect "
            "also take images, arrays and paths, in a list where there are several."
        )
    if not images.is_floating_point():
        raise InputError(
            f"images must be floating point in [0, 1]; got dtype {images.dtype}. Convert with images.float() / 255."
        )
    if images.ndim != 4:
        hint = " Add the batch dimension with images[None]." if images.ndim == 3 else ""
        raise InputError(f"images must have shape (N, C, H, W); got {tuple(images.shape)}.{hint}")
    if channels is not None and images.shape[1] != channels:
        if images.shape[3] == channels:
            raise InputError(
                f"images must have shape (N, {channels}, H, W); got {tuple(images.shape)}, which looks like "
                "(N, H, W, C). Use images.permute(0, 3, 1, 2)."
            )
        raise InputError(
            f"images must have {channels} channels, shape (N, {channels}, H, W); got {images.shape[1]} in "
            f"{tuple(images.shape)}."
            + (" Repeat the grey channel with images.expand(-1, 3, -1, -1)." if images.shape[1] == 1 else "")
        )
    return images


def check_images(images: object, *, channels: int | None = None, source: object = None) -> Tensor:
    """Return the images if they are float, `(N, C, H, W)`, finite and in [0, 1].

    Args:
        images: The object that the caller passed.
        channels: Number of channels that the encoders take, where known.
        source: Loader that yielded them, in whose transforms a message looks for a normalisation.

    Raises:
        InputError: If they are not; the message says what was got, what was expected and what to do.
    """
    images = check_form(images, channels=channels)
    if images.numel() == 0:
        raise InputError(f"images must not be empty; got shape {tuple(images.shape)}.")
    low, high = (value.item() for value in images.detach().aminmax())
    if low != low or high != high or not torch.isfinite(images).all():
        raise InputError("images must be finite; got NaN or infinity. Check the data pipeline.")
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        if low < 0:
            hint = (
                " (looks normalised). Pass raw pixels: ZePAD normalises inside each encoder. "
                f"{how_to_leave_out(source)}"
            )
        else:
            hint = " (looks like 0..255). Divide by 255."
        raise InputError(f"images must lie in [0, 1]; got min {low:.2f}, max {high:.2f}{hint}")
    return images


def check_labels(labels: object, *, count: int, num_classes: int | None = None) -> Tensor:
    """Return the labels as int64 if they are integers of shape `(N,)` in [0, num_classes).

    Args:
        labels: The object that the loader yielded.
        count: Number of images that the labels belong to.
        num_classes: Upper bound of the labels, where known.

    Raises:
        InputError: If they do not; the message says what was got, what was expected and what to do.
    """
    if not isinstance(labels, Tensor):
        raise InputError(f"labels must be a torch.Tensor of integers; got {type(labels).__name__}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(
            f"labels must be integer class indices; got dtype {labels.dtype}. Use labels.long() for indices, "
            "labels.argmax(1) for one-hot rows."
        )
    if labels.shape != (count,) or not count:
        raise InputError(f"labels must have shape ({count},), one per image; got {tuple(labels.shape)}.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        bound = "num_classes" if num_classes is None else str(num_classes)
        raise InputError(
            f"labels must lie in [0, {bound}); got min {low}, max {high}. Set num_classes, or map the labels to "
            "0, 1, ..."
        )
    return labels.long()


def scaled(images: Any) -> Any:
    """Return a uint8 tensor as float32 in [0, 1], and anything else as it is.

    Eight bits per pixel can only mean 0 to 255. A float beyond 1 can mean several things, so nothing is guessed of it.
    """
    return images.float() / 255 if isinstance(images, Tensor) and images.dtype == torch.uint8 else images


def has_labels(batch: Any) -> bool:
    """Return whether a loader yielded labels with its images: the second of a pair, or a column of a dict."""
    if isinstance(batch, Mapping):
        return _column(batch, LABEL_COLUMNS) is not None
    return isinstance(batch, (tuple, list)) and len(batch) >= 2


def images_of(batch: Any) -> Any:
    """Return the images of what a loader yielded, with or without labels; those of uint8 in [0, 1].

    Raises:
        InputError: If the batch is a dict without a column of images.
    """
    if isinstance(batch, Mapping):
        column = _column(batch, IMAGE_COLUMNS)
        if column is None:
            raise InputError(
                f"the loader must yield images; got {described(batch)}, none of them {_joined(IMAGE_COLUMNS)}. "
                f"{_NAME_THEM}"
            )
        return scaled(batch[column])
    return scaled(batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch)


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Return `(images, labels)` of what a loader yielded; images of uint8 in [0, 1].

    Raises:
        InputError: If the batch carries no labels, or is a dict without a column of images.
    """
    if has_labels(batch):
        return images_of(batch), batch[_column(batch, LABEL_COLUMNS)] if isinstance(batch, Mapping) else batch[1]
    named = f" {_NAME_THEM}" if isinstance(batch, Mapping) else ""
    raise InputError(
        f"the loader must yield (images, labels); got {described(batch)}.{named} Training needs the label of every "
        "image; only harden does without, with an objective that uses none, such as restoration() or fare(), or with "
        "zero_shot= heads made from class names."
    )


_NAME_THEM = 'Name the columns: zepad.data.columns(loader, image="...", label="...").'


def _column(batch: Mapping[Any, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in batch), None)


def _joined(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def described(batch: Any) -> str:
    """Return what a loader yielded, as errors say it."""
    if isinstance(batch, Mapping):
        return f"a dict of {', '.join(clean(str(key)) for key in list(batch)[:_SHOWN]) or 'nothing'}"
    length = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    return f"{type(batch).__name__}{length}"


def image_batches(images: Tensor | Loader, *, channels: int | None = None) -> Iterator[Tensor]:
    """Iterate over checked image batches, given a tensor, a dict or a loader with or without labels.

    Raises:
        InputError: If an image does not fit, or there is none.
    """
    for batch in iter_batches(images):
        yield check_images(images_of(batch), channels=channels, source=images)


def iter_batches(images: Tensor | Loader) -> Iterator[Any]:
    """Iterate over what a loader yields, unchecked; a tensor or a dict is one batch.

    Raises:
        InputError: If it is neither, or yields nothing.
    """
    if isinstance(images, (Tensor, Mapping)):
        yield images
        return
    if isinstance(images, bytes) or not hasattr(images, "__iter__"):
        raise InputError(
            "images must be a torch.Tensor of shape (N, C, H, W) in [0, 1] or a loader of such batches; got "
            f"{type(images).__name__}." + _remedy(images)
        )
    empty = True
    for batch in images:
        yield batch
        empty = False
    if empty:
        raise InputError("the loader is empty: it yielded no batch. Pass at least one image.")


def _remedy(images: object) -> str:
    if isinstance(images, bytes):
        return " Open the bytes of an image file with PIL.Image.open(io.BytesIO(images))."
    if hasattr(images, "__getitem__") and hasattr(images, "__len__"):
        return " Wrap a data set in torch.utils.data.DataLoader(images, batch_size=...)."
    return ""


def labelled_batches(
    loader: Loader,
    device: torch.device,
    *,
    channels: int,
    num_classes: int | None,
    labeller: Labeller | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over checked images and labels on a device.

    Args:
        loader: Loader that yields `(images, labels)`, or images alone where a `labeller` is given.
        device: Device that the batches are moved to.
        channels: Number of channels of the images.
        num_classes: Upper bound of the labels, where known.
        labeller: Function that labels the images of a loader without labels.

    Raises:
        InputError: If an image or label does not fit.
    """
    for batch in loader:
        if labeller is not None and not has_labels(batch):
            images = check_images(images_of(batch), channels=channels, source=loader).to(device)
            yield images, labeller(images)
            continue
        images, labels = split_batch(batch)
        checked = check_images(images, channels=channels, source=loader)
        targets = check_labels(labels, count=len(checked), num_classes=num_classes)
        yield checked.to(device), targets.to(device)


def check_reiterable(loader: Loader) -> None:
    """Refuse a one-shot iterator: training passes over the data many times.

    Raises:
        InputError: If the loader is not iterable or is its own iterator.
    """
    if isinstance(loader, Tensor) or not hasattr(loader, "__iter__"):
        raise InputError(
            f"a loader must be an iterable of (images, labels) batches; got {type(loader).__name__}. "
            "Wrap tensors in torch.utils.data.DataLoader(TensorDataset(images, labels), batch_size=...)."
        )
    if hasattr(loader, "__next__"):
        raise InputError(
            f"a loader must be iterable more than once; got {type(loader).__name__}, a one-shot iterator. "
            "Pass a DataLoader, a list of batches, or an object whose __iter__ starts afresh."
        )


def num_batches(loader: Loader) -> int | None:
    """Return the number of batches, or None where the loader does not know."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def class_names_in(dataset: object, loader: object) -> tuple[str, ...] | None:
    """Return the class names that a data set states, or None.

    Args:
        dataset: A data set in torchvision's manner, with `classes`, or one of Hugging Face `datasets`, whose `features`
            hold the names of the classes of a column.
        loader: Loader of that data set. `zepad.data.columns` says in it which column has the labels.
    """
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if not names and isinstance(features, Mapping):
        stated = getattr(getattr(loader, "collate_fn", None), "label_column", None)
        names = getattr(features.get(stated or _column(features, LABEL_COLUMNS)), "names", None)
    return tuple(str(name) for name in names) if names else None
