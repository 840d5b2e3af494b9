"""The third stage: heads on frozen encoders, whose features are computed once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from ..config import HeadConfig
from ..encoders import Encoder
from ..errors import InputError, TrainingError
from ..inputs import check_reiterable, labelled_batches, num_batches
from ..modes import autocast, evaluating
from ..modules import MLPHead
from ..progress import stage
from ..seeding import derive_seed, seeded
from ..types import Loader
from .accelerator import make_accelerator, prepare_loader
from .features import FeatureCache, shuffled_batches

_MIN_EPOCHS, _MIN_UPDATES = 20, 200


def fit_heads(
    encoders: Mapping[str, Encoder],
    loader: Loader,
    config: HeadConfig,
    *,
    channels: int,
    num_classes: int,
    progress: bool = True,
) -> dict[str, MLPHead]:
    """Fit a fresh head to each frozen encoder on clean images, with one pass of the images through the encoders.

    Every process fits the same heads on the features gathered from all of them, so the heads need no synchronisation.

    Args:
        encoders: Encoders by name; they are moved to the training device and otherwise left as found.
        loader: Loader that yields `(images, labels)`, images float `(N, C, H, W)` in [0, 1]; it is read once.
        config: Rates, length and limit of the feature cache.
        channels: Number of channels of the images.
        num_classes: Number of classes.
        progress: Whether to show a progress bar.

    Returns:
        One head for each name, in evaluation mode.

    Raises:
        InputError: If a batch does not fit or there is none.
        TrainingError: If a loss is not finite.
    """
    check_reiterable(loader)
    accelerator = make_accelerator(config.seed)
    with ExitStack() as stack:
        caches = {name: stack.enter_context(FeatureCache(config.cache_bytes)) for name in encoders}
        labels = _extract(encoders, caches, loader, config, accelerator, channels, num_classes, progress)
        heads = {}
        for index, (name, cache) in enumerate(caches.items()):
            with seeded(derive_seed(config.seed, index)):
                heads[name] = _fit_head(cache.rows(), labels, num_classes, config, accelerator.device)
    return heads


def _extract(
    encoders: Mapping[str, Encoder],
    caches: Mapping[str, FeatureCache],
    loader: Loader,
    config: HeadConfig,
    accelerator: Accelerator,
    channels: int,
    num_classes: int,
    progress: bool,
) -> Tensor:
    device = accelerator.device
    prepared = prepare_loader(accelerator, loader)
    batches = labelled_batches(prepared, device, channels=channels, num_classes=num_classes)
    labels: list[Tensor] = []
    with ExitStack() as stack:
        shown = progress and accelerator.is_main_process
        bar = stack.enter_context(stage("features", total=num_batches(prepared), shown=shown))
        for encoder in encoders.values():
            encoder.to(device)
            stack.enter_context(evaluating(encoder))
        stack.enter_context(seeded(derive_seed(config.seed)))
        stack.enter_context(torch.no_grad())
        for images, targets in batches:
            for name, encoder in encoders.items():
                with autocast(device, config.precision):
                    features = encoder(images)
                caches[name].append(accelerator.gather_for_metrics(features.float()))
            labels.append(accelerator.gather_for_metrics(targets).cpu())
            bar.advance()
    if not labels:
        raise InputError("the loader is empty: it yielded no batch. Pass at least one labelled image.")
    return torch.cat(labels)


def _fit_head(features: Tensor, labels: Tensor, num_classes: int, config: HeadConfig, device: torch.device) -> MLPHead:
    head = MLPHead(features.shape[1], num_classes).to(device)
    optimizer = torch.optim.Adam(head.parameters(), lr=config.head_lr, weight_decay=config.weight_decay)
    batches = math.ceil(len(labels) / config.batch_size)
    epochs = config.epochs or max(_MIN_EPOCHS, math.ceil(_MIN_UPDATES / batches))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for epoch in range(epochs):
        for rows, targets in shuffled_batches(features, labels, config.batch_size):
            loss = F.cross_entropy(head(rows.to(device)), targets.to(device))
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"fitting a head: the loss is {loss.item()} at epoch {epoch + 1}. Lower head_lr (now "
                    f"{config.head_lr:g}) or check that the encoder's features are finite."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval()
