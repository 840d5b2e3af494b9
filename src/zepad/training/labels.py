"""Where the labels of a hardening come from: the loader, a zero-shot classifier, or nowhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..encoders import Encoder
from ..inputs import Labeller, check_reiterable
from ..modules import Branch
from ..objectives import Recipe
from ..types import Loader
from ..zero_shot import ZeroShotHead
from .accelerator import training_device
from .loaders import count_classes, is_labelled

UNLABELLED = -1


def plan_labels(
    loader: Loader,
    recipe: Recipe,
    *,
    num_classes: int | None = None,
    labeller: Callable[[], Labeller] | None = None,
) -> tuple[int | None, Labeller | None]:
    """Return how many classes there are and what labels the images.

    Args:
        loader: Loader that yields `(images, labels)`, or images alone.
        recipe: Recipe, which may need no labels.
        num_classes: Number of classes, where known.
        labeller: Function that makes the labeller of images without labels, where there are zero-shot heads.

    Returns:
        The number of classes, None where no label is used; and the function that labels the images of a loader without
        labels, None where the loader has them.

    Raises:
        InputError: If the loader cannot be iterated twice, is empty, or has no labels where they must be counted.
    """
    check_reiterable(loader)
    needed = recipe.trains_head and labeller is None
    if needed or is_labelled(loader):  # reading the first batch may be slow, so it is read only if needed
        return num_classes or count_classes(loader), None
    if labeller is None or not recipe.trains_head:
        return (None if labeller is None else num_classes), unlabelled
    return num_classes, labeller()


def unlabelled(images: Tensor) -> Tensor:
    """Return the label `UNLABELLED` for each image, with which a loss on labels would raise."""
    return torch.full((len(images),), UNLABELLED, device=images.device)


def zero_shot_labeller(encoders: Mapping[str, Encoder], heads: Mapping[str, ZeroShotHead]) -> Labeller:
    """Return the function that labels images by the mean logits of encoders with heads made from class names.

    Args:
        encoders: Public encoders by name; they are copied.
        heads: The head of each.
    """
    device = training_device()
    branches = [
        Branch(copy.deepcopy(encoder), copy.deepcopy(heads[name])).to(device).eval()
        for name, encoder in encoders.items()
    ]

    def label(images: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.stack([branch(images) for branch in branches]).mean(dim=0).argmax(dim=1)

    return label
