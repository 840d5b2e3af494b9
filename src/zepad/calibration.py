"""Calibration on validation images. Rules and detectors choose their own settings from what is computed here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attacks import PGD, hardened_branches
from .config import is_number, require
from .detectors import Detector, DetectorInputs, FittedDetector
from .errors import CalibrationWarning, InputError
from .finite import check_finite
from .functional import conformal_threshold, correct_count, restoration_gap
from .fusion import FusionRule, ValidationLogits
from .inputs import check_images, check_labels, has_labels, images_of, iter_batches, split_batch
from .modules import Branch
from .seeding import seeded
from .types import REFERENCE, ImageModel, Loader

_CHUNK = 256  # number of images per forward pass
_ATTACKED = 1024  # largest number of attacked images: an attack costs about forty forward passes
_COMPARED = 2048  # largest number of images on which restored and public features are compared
_ABSTAINING = 0.01  # share of benign images on which the benign branch abstains
_UNRELATED = 1.0  # restoration gap from which on two encoders have nothing in common: that of features at right angles
_CLEARLY = 0.05  # by which the benign branch must be better than the victim to set the floor
_MODELS: dict[str, str] = {"benign": "the benign branch alone", REFERENCE: "the undefended victim"}
"""Names in messages of the models that no hardening has cost accuracy."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The result of calibration.

    Attributes:
        fusion: The rule with the settings that were chosen.
        detector: The fitted detector.
        threshold: Threshold of the detection score.
        record: Requested and reached values, JSON-ready.
    """

    fusion: FusionRule
    detector: FittedDetector
    threshold: float
    record: dict[str, Any]


def choose_abstention(
    restored: ImageModel, public: ImageModel, loader: Loader | Tensor, *, device: torch.device
) -> float | None:
    """Return the restoration gap above which a benign branch should abstain.

    It is exceeded on one per cent of the benign images; no more than 2,048 images are looked at.

    Args:
        restored: Map from images to the features of the hardened encoder.
        public: Map from images to the features of the benign encoder.
        loader: Benign images, with labels or without, which the hardened encoder should not have been trained on.
        device: Device that images are moved to.

    Returns:
        The gap, or None where the features do not agree on benign images, so that a gap says nothing: other widths, or
        a gap of one or more.
    """
    gaps: list[Tensor] = []
    with seeded(0):  # a loader may shuffle
        for images, _ in _compared_images(loader, device):
            with torch.no_grad():
                sides = restored(images), public(images)
            if sides[0].shape != sides[1].shape:
                return None
            gaps.append(restoration_gap(*sides).float().cpu())
    return _rarely_exceeded(gaps)


def choose_recall(benign: Branch, memory: Branch, loader: Loader | Tensor, *, device: torch.device) -> float:
    """Return the restoration gap above which a memory should abstain.

    It is exceeded on one per cent of the benign images, as in `choose_abstention`. It is zero, so that the memory never
    speaks, where the features do not agree on benign images, or labels say that the memory is no better than the
    branch.

    Args:
        benign: Benign branch, which was trained to resist adversarial examples.
        memory: Its encoder as it was public, with a head.
        loader: Benign images, with labels or without, which the benign encoder should not have been trained on.
        device: Device that images are moved to.
    """
    branches, gaps, right = (benign, memory), [], []
    with seeded(0):
        for images, labels in _compared_images(loader, device):
            with torch.no_grad():
                features = [branch.encoder(images) for branch in branches]
                if features[0].shape != features[1].shape:
                    return 0.0
                gaps.append(restoration_gap(*features).float().cpu())
                if labels is not None:
                    said = [branch.head(each).argmax(dim=1) for branch, each in zip(branches, features, strict=True)]
                    right.append([int((each == labels).sum()) for each in said])
    if right:
        of_branch, of_memory = map(sum, zip(*right, strict=True))
        if of_memory <= of_branch:
            return 0.0
    return _rarely_exceeded(gaps) or 0.0


def _compared_images(loader: Loader | Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the first images of a loader in chunks on a device, with their labels where it has any."""
    left = _COMPARED
    for batch in iter_batches(loader):
        images = check_images(images_of(batch), source=loader)
        labels = check_labels(split_batch(batch)[1], count=len(images)) if has_labels(batch) else None
        for rows in torch.arange(min(left, len(images))).split(_CHUNK):
            yield images[rows].to(device), None if labels is None else labels[rows].to(device)
        left -= len(images)
        if left <= 0:
            return


def _rarely_exceeded(gaps: list[Tensor]) -> float | None:
    """Return the gap that one benign image in a hundred exceeds; None where features have nothing in common."""
    above = float(torch.cat(gaps).quantile(1 - _ABSTAINING))
    return above if above < _UNRELATED else None  # also where it is NaN


class Floor(NamedTuple):
    """The benign accuracy that a fusion must keep.

    Attributes:
        accuracy: The floor in [0, 1].
        owner: Role of the unhardened model whose accuracy it is, `"benign"` or `"reference"`; None where the caller
            asked for it.
        clean_accuracies: Benign accuracy of every unhardened model at hand on the same images, by role.
    """

    accuracy: float
    owner: str | None
    clean_accuracies: Mapping[str, float]

    def record(self, reached: float) -> dict[str, Any]:
        """Return what is kept in the provenance, with the benign accuracy that the fusion reached."""
        return {
            "benign_floor": self.accuracy,
            "benign_accuracy": reached,
            "floor_of": self.owner or "caller",
            "clean_accuracies": dict(self.clean_accuracies),
        }


def calibrate(
    look: Callable[[Tensor], DetectorInputs],
    loader: Loader | Tensor,
    *,
    branch_logits: Callable[[Tensor], Tensor],
    fit_loader: Loader | Tensor | None,
    fusion: FusionRule,
    detector: Detector,
    fpr: float,
    benign_floor: float | None,
    eps: float,
    channels: int | None,
    num_classes: int | None,
    device: torch.device,
    reference: ImageModel | None = None,
) -> Calibrated:
    """Choose the fusion's settings where there are labels to choose them by, fit the detector, set its threshold.

    Args:
        look: Function from images `(N, C, H, W)` to the inputs of the detector, in evaluation mode.
        loader: Benign validation images as a tensor or a loader, with labels or without.
        branch_logits: Differentiable function from images to the stacked logits `(B, N, K)`, which the attack uses.
        fit_loader: Other benign images for fitting the detector; None fits on every other image of `loader`.
        fusion: The rule, with the settings that stay if there is nothing to choose.
        detector: The detector.
        fpr: Tolerated false positive rate in (0, 1).
        benign_floor: Benign accuracy in [0, 1] that the fusion must keep; None asks for that of the undefended victim
            where it was kept, or of the benign branch where that is clearly better (`choose_floor`).
        eps: L-infinity budget of the attack for rules that need attacked images, in [0, 1] pixel units.
        channels: Number of channels of the images, or None.
        num_classes: Number of classes that bounds the labels, or None.
        device: Device that images are moved to.
        reference: Map from images to the logits of the undefended victim; None where it was not kept. It is called only
            where the floor needs it and the detector does not look at it.

    Raises:
        ConfigError: If `benign_floor` is out of range.
        InputError: If images or labels do not fit, logits or scores are not finite, `fpr` is out of range, or there
            are too few images for it.

    Warns:
        CalibrationWarning: If no settings reach the floor; the most accurate are taken then.
    """
    in_range = benign_floor is None or (is_number(benign_floor) and 0 <= benign_floor <= 1)
    require(in_range, "benign_floor", benign_floor, "an accuracy in [0, 1], or None")
    attack = partial(_attack_hardened, branch_logits, eps) if fusion.needs_attacked else None
    needed = reference if fusion.has_choice() else None
    inputs, labels, attacked, undefended = _observe(look, loader, attack, needed, channels, num_classes, device)
    fitted = FittedDetector(detector).eval()
    others = None
    if fit_loader is not None and not fitted.is_fitted:
        others = _observe(look, fit_loader, None, None, channels, num_classes, device).inputs
    record: dict[str, Any] = {"fpr": fpr, "images": inputs.logits.shape[1]}
    if labels is not None and fusion.has_choice():
        validation = ValidationLogits(inputs.logits, labels, attacked)
        floor = choose_floor(validation, undefended, benign_floor=benign_floor)
        fusion, reached = choose_settings(fusion, validation, floor)
        record["fusion"] = {**asdict(fusion.record()), **floor.record(reached)}
    threshold = _fit_detector(fitted, others, inputs, fpr)
    return Calibrated(fusion=fusion, detector=fitted.to(device), threshold=threshold, record=record)


def choose_floor(validation: ValidationLogits, undefended: Tensor | None, *, benign_floor: float | None) -> Floor:
    """Return the benign accuracy to keep: the caller's, or that of an unhardened model.

    That model is the undefended victim where it was kept, unless the benign branch is more than five points better, as
    on a task far from the public data. A floor at the last points of the benign branch, which a few hundred images can
    hardly tell from the victim's accuracy, would buy them with most of the robustness.

    Args:
        validation: Logits and labels of images that no training has seen.
        undefended: Logits `(N, K)` of the undefended victim on these images; None where it was not kept.
        benign_floor: Accuracy in [0, 1] that the caller asks for; None leaves it open.
    """
    clean = {"benign": validation.logits[-1]}
    if undefended is not None:
        clean[REFERENCE] = undefended
    accuracies = {role: correct_count(rows.argmax(dim=-1), validation.labels).rate for role, rows in clean.items()}
    if benign_floor is not None:
        return Floor(benign_floor, None, accuracies)
    owner = "benign"
    if undefended is not None and accuracies["benign"] <= accuracies[REFERENCE] + _CLEARLY:
        owner = REFERENCE
    return Floor(accuracies[owner], owner, accuracies)


def choose_settings(fusion: FusionRule, validation: ValidationLogits, floor: Floor) -> tuple[FusionRule, float]:
    """Let a rule choose its settings for a benign floor, and say what the choice costs.

    Args:
        fusion: The rule.
        validation: Logits and labels of images that no training has seen.
        floor: Benign accuracy to keep, with a standard error to spare on these images.

    Returns:
        The rule with its settings, and the benign accuracy it reaches on these images.

    Warns:
        CalibrationWarning: If the floor is missed by a rule that aims at it.
    """
    # What just reaches the floor here misses it on fresh images every other time.
    spare = (floor.accuracy * (1 - floor.accuracy) / len(validation.labels)) ** 0.5
    chosen = fusion.calibrate(validation, benign_floor=floor.accuracy + spare)
    reached = validation.accuracy(chosen)
    found = (
        f'the rule "{chosen.name}" reaches a benign accuracy of {reached:.1%} on these {len(validation.labels)} images'
    )
    best = max(floor.clean_accuracies, key=floor.clean_accuracies.__getitem__)
    without = f"{_MODELS[best]} has {floor.clean_accuracies[best]:.1%}"
    if reached < floor.accuracy and fusion.holds_floor:
        asked = f"asked for ({without})" if floor.owner is None else f"of {_MODELS[floor.owner]}"
        warnings.warn(
            f"{found}, not the {floor.accuracy:.1%} {asked}. Train the hardened branches longer or by another "
            "objective, or ask for less: benign_floor=...",
            CalibrationWarning,
            stacklevel=5,
        )
    elif reached < floor.clean_accuracies[best]:
        logger.info("%s; %s.", found, without)
    return chosen, reached


class _Observed(NamedTuple):
    """What was seen, on the CPU.

    Attributes:
        inputs: What the detector looks at.
        labels: Labels `(N,)`, if every batch has them.
        attacked: Stacked logits of the first images under attack.
        undefended: Logits `(N, K)` of the undefended victim.
    """

    inputs: DetectorInputs
    labels: Tensor | None = None
    attacked: Tensor | None = None
    undefended: Tensor | None = None


def _observe(
    look: Callable[[Tensor], DetectorInputs],
    loader: Loader | Tensor,
    attack: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None,
    reference: ImageModel | None,
    channels: int | None,
    num_classes: int | None,
    device: torch.device,
) -> _Observed:
    """Look at all images; attack the first ones if they have labels, and ask the reference of those with labels."""
    found: list[DetectorInputs] = []
    labels: list[Tensor] = []
    attacked: list[Tensor] = []
    undefended: list[Tensor] = []
    generator = torch.Generator(device).manual_seed(0)
    for batch in iter_batches(loader):
        images, given = split_batch(batch) if has_labels(batch) else (images_of(batch), None)
        images = check_images(images, channels=channels, source=loader)
        targets = None if given is None else check_labels(given, count=len(images), num_classes=num_classes)
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK].to(device)
            with torch.no_grad():
                logits, *others = look(chunk)
            check_finite(logits.movedim(0, 1), "branches' logits", first=sum(part.logits.shape[1] for part in found))
            kept = (None if part is None else part.float().cpu() for part in others)
            found.append(DetectorInputs(logits.float().cpu(), *kept))
            if targets is None:
                continue
            aims = targets[start : start + _CHUNK].to(device)
            labels.append(aims.cpu())
            if reference is not None and found[-1].reference_logits is None:
                with torch.no_grad():
                    undefended.append(reference(chunk).float().cpu())
            if attack is not None and sum(seen.shape[1] for seen in attacked) < _ATTACKED:
                attacked.append(attack(chunk, aims, generator))
    inputs = _join(found)
    if sum(map(len, labels)) < inputs.logits.shape[1]:
        return _Observed(inputs)
    says = torch.cat(undefended) if undefended else inputs.reference_logits
    return _Observed(inputs, torch.cat(labels), torch.cat(attacked, dim=1) if attacked else None, says)


def _attack_hardened(
    branch_logits: Callable[[Tensor], Tensor], eps: float, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the branches' logits on the CPU, of images attacked through the hardened branches."""
    attack = PGD(eps=eps, steps=20, step_size=eps / 8)
    points = attack(hardened_branches(branch_logits), images, labels, generator=generator)
    with torch.no_grad():
        return branch_logits(points).float().cpu()


def _join(parts: Sequence[DetectorInputs]) -> DetectorInputs:
    def joined(name: str) -> Tensor | None:
        pieces = [piece for part in parts if (piece := getattr(part, name)) is not None]
        return torch.cat(pieces) if pieces else None

    logits = torch.cat([part.logits for part in parts], dim=1)
    return DetectorInputs(logits, *(joined(name) for name in DetectorInputs._fields[1:]))


def _every_other(inputs: DetectorInputs, start: int) -> DetectorInputs:
    logits, *others = inputs
    return DetectorInputs(logits[:, start::2], *(None if part is None else part[start::2] for part in others))


def _fit_detector(detector: FittedDetector, others: DetectorInputs | None, inputs: DetectorInputs, fpr: float) -> float:
    """Fit the detector if need be, and return its threshold."""
    left = inputs
    try:
        if not detector.is_fitted:
            if others is None:  # alternately, so that each class is halved even if the images are sorted by class
                others, left = _every_other(inputs, 0), _every_other(inputs, 1)
            detector.fit(others)
        with torch.no_grad():
            return conformal_threshold(detector(left), fpr=fpr)
    except ValueError as error:
        halved = "" if left is inputs else f" Of the images {left.logits.shape[1]} were left for the threshold."
        raise InputError(f"{error}{halved}") from error
