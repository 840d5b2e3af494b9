"""Accuracy of any callable on any loader, with counts that add up exactly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from ..functional import Count, correct_count
from ..inputs import check_images, check_labels, split_batch
from ..modes import evaluating
from ..types import ImageModel, Loader


def accuracy(model: ImageModel, loader: Loader, *, attack: Callable[[Tensor, Tensor], Tensor] | None = None) -> Count:
    """Count the images a classifier gets right, as they are or after an attack.

    Args:
        model: Images to logits `(N, K)`, such as an undefended classifier or a `ZePAD`; scored in evaluation mode.
        loader: Yields `(images, labels)`.
        attack: Maps `(images, labels)` to attacked images; None gives the benign accuracy.

    Returns:
        Hits and total; `.rate` is the accuracy in [0, 1].

    Raises:
        InputError: If a batch does not fit or there is none.
    """
    count = Count(0, 0)
    with evaluating(model):
        for batch in loader:
            images, labels = split_batch(batch)
            images = check_images(images, source=loader)
            labels = check_labels(labels, count=len(images))
            if attack is not None:
                images = attack(images, labels)
            with torch.no_grad():
                count += correct_count(model(images).argmax(dim=1), labels)
    if not count.total:
        raise InputError("the loader is empty: it yielded no batch. Pass at least one labelled image.")
    return count
