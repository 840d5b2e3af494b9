"""What hardening reached on held-out images, beside what the public encoder had: logged, recorded, warned of."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attacks.universal.probe import fit_probe
from ..encoders import Encoder
from ..errors import HardeningWarning
from ..functional import correct_count
from ..modes import autocast
from ..modules import Branch
from ..seeding import derive_seed, seeded
from ..types import Loader
from .accelerator import make_accelerator, prepare_loader
from .labels import unlabelled
from .loaders import random_part
from .run import Run
from .validation import validate

_PROBE_IMAGES = 10_000  # images that the probe is fitted to, at most
_ENOUGH = 50  # held-out images below which a difference of accuracies says little
_FAR = 0.1  # benign accuracy below that of the public encoder that deserves a warning

logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """Accuracies in [0, 1] on the images that training held out.

    Attributes:
        images: Number of held-out images.
        benign_accuracy: Accuracy of the hardened branch.
        adversarial_accuracy: Its accuracy under the attack of its own training; None for a recipe without one.
        public_accuracy: Accuracy of the public encoder, with a linear probe fitted to the training images or with the
            head that was given; None where the training images are of one class.
    """

    images: int
    benign_accuracy: float
    adversarial_accuracy: float | None
    public_accuracy: float | None

    def is_far_below_public(self) -> bool:
        """Return whether the branch lost far more than chance explains."""
        public = self.public_accuracy
        return public is not None and self.images >= _ENOUGH and self.benign_accuracy < public - _FAR

    def summary(self) -> str:
        """Return the accuracies in one line."""
        under = "" if self.adversarial_accuracy is None else f", {self.adversarial_accuracy:.1%} under its own attack"
        public = "" if self.public_accuracy is None else f"; the public encoder has {self.public_accuracy:.1%}"
        return f"benign accuracy {self.benign_accuracy:.1%}{under} on {self.images} held-out images{public}"


def tell_outcome(
    public: Encoder, branch: Branch, run: Run, loader: Loader, val_loader: Loader | None
) -> dict[str, Any] | None:
    """Measure a hardened branch on held-out images, log what was found and return it for the provenance.

    Neither the branch nor any random state of the caller changes.

    Args:
        public: The encoder as it was before hardening.
        branch: The hardened branch.
        run: The run that hardened it.
        loader: Images that it was trained on; at most 10,000 are used for the probe.
        val_loader: Held-out images; None where nothing was held out.

    Returns:
        The fields of `Outcome`, or None where nothing was held out or there are no labels.

    Warns:
        HardeningWarning: If the benign accuracy is more than ten points below that of the public encoder, on at least
            50 images.
    """
    if val_loader is None or run.num_classes is None or run.labeller is unlabelled:
        return None
    with seeded(derive_seed(run.config.seed, run.index)):
        outcome = _measure(public, branch, run, loader, val_loader)
    if make_accelerator(run.config.seed).is_main_process:
        logger.info("%s: %s.", run.name, outcome.summary())
        if outcome.is_far_below_public():
            warnings.warn(
                f"{run.name}: the hardened branch has a benign accuracy of {outcome.benign_accuracy:.1%} on "
                f"{outcome.images} held-out images, where the public encoder has {outcome.public_accuracy:.1%}. Train "
                "for more epochs, raise lr, lower eps, or take an objective of zepad.objectives that costs less.",
                HardeningWarning,
                stacklevel=5,
            )
    return outcome._asdict()


def _measure(public: Encoder, branch: Branch, run: Run, loader: Loader, val_loader: Loader) -> Outcome:
    accelerator = make_accelerator(run.config.seed)
    seed = derive_seed(run.config.seed, run.index)
    rates = validate(branch, run, prepare_loader(accelerator, val_loader), accelerator, seed=seed)
    encoder = copy.deepcopy(public).to(accelerator.device).eval()
    # Every process reads the same images from here on, so the loaders are not shared out.
    features, labels = _features(encoder, run, val_loader, accelerator.device)
    predictions = _public_predictions(encoder, run, loader, features, accelerator.device)
    return Outcome(
        images=len(labels),
        benign_accuracy=rates["val_benign_accuracy"],
        adversarial_accuracy=rates.get("val_adversarial_accuracy"),
        public_accuracy=None if predictions is None else correct_count(predictions, labels).rate,
    )


def _public_predictions(
    encoder: Encoder, run: Run, loader: Loader, features: Tensor, device: torch.device
) -> Tensor | None:
    """Return the classes of features, by the head that was given or by a linear probe."""
    if run.head is not None:
        head = copy.deepcopy(run.head).to(device).eval()
        with torch.no_grad():
            said: Tensor = head(features)
        return said.argmax(dim=-1)
    part = random_part(loader, _PROBE_IMAGES, derive_seed(run.config.seed, run.index))
    known, labels = _features(encoder, run, part, device, limit=_PROBE_IMAGES)
    classes: Tensor = labels.unique()
    if len(classes) < 2:
        return None
    with torch.no_grad():
        logits: Tensor = fit_probe(known, labels)(features)
    return classes[logits.argmax(dim=-1)]


def _features(
    encoder: Encoder, run: Run, loader: Loader, device: torch.device, *, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return features and labels of the images of a loader, of the first `limit` ones or a few more."""
    rows, labels, seen = [], [], 0
    for images, targets in run.batches(loader, device):
        with torch.no_grad(), autocast(device, run.config.precision):
            rows.append(encoder(images).float())
        labels.append(targets)
        seen += len(targets)
        if limit is not None and seen >= limit:
            break
    return torch.cat(rows), torch.cat(labels)
