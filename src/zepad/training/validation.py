"""The accuracies that the epoch is chosen by."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from ..errors import InputError
from ..functional import Count, correct_count
from ..modes import autocast
from ..modules import Branch
from ..types import Loader
from .run import Run


def validate(branch: Branch, run: Run, loader: Loader, accelerator: Accelerator, *, seed: int) -> dict[str, float]:
    """Return the accuracy on validation images, and on attacked ones where the run has an attack.

    Args:
        branch: The branch, which comes back in evaluation mode.
        run: The run that trains it.
        loader: Validation images, prepared by the accelerator.
        accelerator: Gathers the predictions of all processes.
        seed: Seed of the attack's random start.

    Returns:
        Rates in [0, 1], `"val_benign_accuracy"` and, under an attack, `"val_adversarial_accuracy"`.

    Raises:
        InputError: If the loader is empty or a batch does not fit.
    """
    device, attack = accelerator.device, run.attack
    generator = torch.Generator(device).manual_seed(seed)
    benign, adversarial = Count(0, 0), Count(0, 0)
    branch.eval()
    for images, labels in run.batches(loader, device):
        with autocast(device, run.config.precision):
            benign += _count(branch, images, labels, accelerator)
            if attack is not None:
                attacked = attack(branch, images, labels, generator=generator)
                adversarial += _count(branch, attacked, labels, accelerator)
    if not benign.total:
        raise InputError("val_loader is empty: it yielded no batch. Pass at least one labelled image, or None.")
    rates = {"val_benign_accuracy": benign.rate}
    if attack is not None:
        rates["val_adversarial_accuracy"] = adversarial.rate
    return rates


def _count(branch: Branch, images: Tensor, labels: Tensor, accelerator: Accelerator) -> Count:
    with torch.no_grad():
        predictions = branch(images).argmax(1)
    return correct_count(*accelerator.gather_for_metrics((predictions, labels)))
