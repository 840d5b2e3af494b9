"""Counting the images that an attack passes through its target."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .report import Cost


@contextmanager
def count_passes(target: Any) -> Iterator[dict[str, int]]:
    """Count the images that pass through a module, or through several, while the context is open.

    Args:
        target: A module or a sequence of modules. A plain callable cannot be counted.

    Yields:
        The running counts: `"forwards"` of all images, `"gradients"` of those passed with gradients recorded.
    """
    counts = {"forwards": 0, "gradients": 0}

    def count(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            counts["forwards"] += len(args[0])
            counts["gradients"] += len(args[0]) if args[0].requires_grad else 0

    modules = target if isinstance(target, (tuple, list)) else (target,)
    with ExitStack() as stack:
        for module in modules:
            if isinstance(module, nn.Module):
                stack.enter_context(module.register_forward_pre_hook(count))
        yield counts


def total_cost(costs: Sequence[Cost]) -> Cost:
    """Return the sum of the costs of several batches."""
    return Cost(
        seconds=sum(cost.seconds for cost in costs),
        forwards=sum(cost.forwards for cost in costs),
        gradients=sum(cost.gradients for cost in costs),
    )


def cost_per_image(cost: Cost, images: int) -> Cost:
    """Return a cost whose passes are divided by the number of images; the time stays that of all of them."""
    return dataclasses.replace(
        cost, seconds=round(cost.seconds, 3), forwards=cost.forwards / images, gradients=cost.gradients / images
    )
