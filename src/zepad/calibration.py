"""Calibration on validation images: the parameters of the fusion, the detector and its threshold."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .attacks import PGD, hardened_branches, margin
from .config import DetectorConfig, FusionConfig, is_number, require
from .errors import CalibrationWarning, InputError
from .functional import Evidence, conformal_threshold, correct_count, robust_transform
from .inputs import check_images, check_labels, has_labels, images_of, iter_batches
from .modules import Detector, Fusion
from .types import Loader

_CHUNK = 256  # images that are looked at at a time
_ATTACKED = 1024  # images that are attacked, at most: an attack costs forty times a look
_STRENGTHS = (0.0, *(2.0 ** (i / 8) for i in range(-56, 57)))  # of a vote or a depth, from 0 over 1/128 to 128
_SCALES, _POWERS, _BIASES = (1.0, 3.0, 0.3, 10.0, 0.1), (2.0, 3.0, 1.0, 4.0, 6.0), (-1.0, -0.5, -1.5, 0.0, -2.0)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What calibration found.

    Attributes:
        fusion: The rule, with the parameters that were chosen.
        detector: Fitted.
        threshold: Of its score.
        record: What was asked for and reached, JSON-ready.
    """

    fusion: FusionConfig
    detector: Detector
    threshold: float
    record: dict[str, Any]


def calibrate(
    look: Callable[[Tensor], Evidence],
    loader: Loader | Tensor,
    *,
    branch_logits: Callable[[Tensor], Tensor],
    fit_loader: Loader | Tensor | None,
    fusion: FusionConfig,
    detector: DetectorConfig,
    fpr: float,
    benign_floor: float | None,
    eps: float,
    channels: int,
    num_classes: int | None,
    device: torch.device,
) -> Calibrated:
    """Choose the fusion's parameters where there are labels to choose them by, fit the detector, set its threshold.

    Args:
        look: Images `(N, C, H, W)` to evidence, in evaluation mode.
        loader: As in `ZePAD.calibrate`.
        branch_logits: Images to the logits of that evidence alone; differentiable. An attack asks for no more.
        fit_loader: As in `ZePAD.calibrate`.
        fusion: The rule, and the parameters that stay if there is nothing to choose.
        detector: Which.
        fpr: As in `ZePAD.calibrate`.
        benign_floor: As in `ZePAD.calibrate`.
        eps: As in `ZePAD.calibrate`.
        channels: Of the images.
        num_classes: Bound of the labels, where known.
        device: Where images go.

    Raises:
        ConfigError: If `benign_floor` is out of range.
        InputError: As `ZePAD.calibrate`.

    Warns:
        CalibrationWarning: As `ZePAD.calibrate`.
    """
    in_range = benign_floor is None or (is_number(benign_floor) and 0 <= benign_floor <= 1)
    require(in_range, "benign_floor", benign_floor, "an accuracy in [0, 1], or None")
    attack = partial(_attack_hardened, branch_logits, eps) if fusion.rule == "mixed" else None
    evidence, labels, attacked = _observe(look, loader, attack, channels, num_classes, device)
    scores = Detector(detector).eval()
    others = None
    if fit_loader is not None and not scores.is_fitted:
        others, _, _ = _observe(look, fit_loader, None, channels, num_classes, device)
    record: dict[str, Any] = {"fpr": fpr, "images": evidence.logits.shape[1]}
    if labels is not None and fusion.rule in _CHOOSERS:
        observed = Observed(evidence.logits, labels, attacked)
        if benign_floor is None:
            stand_in = evidence.logits[-1] if evidence.undefended is None else evidence.undefended
            benign_floor = _accuracy(stand_in, labels)
        # What just reaches the floor here misses it on fresh images every other time.
        spare = (benign_floor * (1 - benign_floor) / len(labels)) ** 0.5
        fusion = calibrate_fusion(fusion, observed, benign_floor=benign_floor + spare)
        reached = _accuracy(Fusion(fusion)(evidence.logits), labels)
        if reached < benign_floor and fusion.rule != "calibrated":  # which knows no floor
            warnings.warn(
                f'the rule "{fusion.rule}" reaches a benign accuracy of {reached:.1%} on these images, not the '
                f"{benign_floor:.1%} asked for. Train the branches longer, or ask for less: benign_floor=...",
                CalibrationWarning,
                stacklevel=3,
            )
        record["fusion"] = {**fusion.to_dict(), "benign_floor": benign_floor, "benign_accuracy": reached}
    threshold = _fit_detector(scores, others, evidence, fpr)
    return Calibrated(fusion=fusion, detector=scores.to(device), threshold=threshold, record=record)


def _observe(
    look: Callable[[Tensor], Evidence],
    loader: Loader | Tensor,
    attack: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None,
    channels: int,
    num_classes: int | None,
    device: torch.device,
) -> tuple[Evidence, Tensor | None, Tensor | None]:
    """Evidence on the CPU; labels if every batch has them; and what the attack, if any, gives for the first images."""
    found: list[Evidence] = []
    labels: list[Tensor] = []
    attacked: list[Tensor] = []
    generator = torch.Generator(device).manual_seed(0)
    for batch in iter_batches(loader):
        images = check_images(images_of(batch), channels=channels)
        targets = check_labels(batch[1], count=len(images), num_classes=num_classes) if has_labels(batch) else None
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK].to(device)
            with torch.no_grad():
                logits, *others = look(chunk)
            kept = (None if part is None else part.float().cpu() for part in others)
            found.append(Evidence(logits.float().cpu(), *kept))
            if targets is None:
                continue
            aims = targets[start : start + _CHUNK].to(device)
            labels.append(aims.cpu())
            if attack is not None and sum(seen.shape[1] for seen in attacked) < _ATTACKED:
                attacked.append(attack(chunk, aims, generator))
    evidence = _join(found)
    if sum(map(len, labels)) < evidence.logits.shape[1]:
        return evidence, None, None
    return evidence, torch.cat(labels), torch.cat(attacked, dim=1) if attacked else None


def _attack_hardened(
    branch_logits: Callable[[Tensor], Tensor], eps: float, images: Tensor, labels: Tensor, generator: torch.Generator
) -> Tensor:
    """The branches' logits on the CPU, of images attacked through the hardened ones."""
    attack = PGD(eps=eps, steps=20, step_size=eps / 8)
    points = attack(hardened_branches(branch_logits), images, labels, generator=generator)
    with torch.no_grad():
        return branch_logits(points).float().cpu()


def _join(parts: Sequence[Evidence]) -> Evidence:
    def joined(which: int, dim: int) -> Tensor | None:
        pieces = [piece for part in parts if (piece := part[which]) is not None]
        return torch.cat(pieces, dim=dim) if pieces else None

    logits = torch.cat([part.logits for part in parts], dim=1)
    return Evidence(logits, *(joined(which, 0) for which in range(1, len(Evidence._fields))))


def _every_other(evidence: Evidence, start: int) -> Evidence:
    logits, *others = evidence
    return Evidence(logits[:, start::2], *(None if part is None else part[start::2] for part in others))


def _fit_detector(detector: Detector, others: Evidence | None, evidence: Evidence, fpr: float) -> float:
    left = evidence
    try:
        if not detector.is_fitted:
            if others is None:  # alternately, so that images sorted by class are halved class by class
                others, left = _every_other(evidence, 0), _every_other(evidence, 1)
            detector.fit(others)
        with torch.no_grad():
            return conformal_threshold(detector(left), fpr=fpr)
    except ValueError as error:
        halved = "" if left is evidence else f" Of the images {left.logits.shape[1]} were left for the threshold."
        raise InputError(f"{error}{halved}") from error


class Observed(NamedTuple):
    """What the branches say of validation images.

    Attributes:
        logits: `(B, N, K)`.
        labels: `(N,)`.
        attacked: Of the first M of these images, attacked through the hardened branches `(B, M, K)`; for `"mixed"`
            alone.
    """

    logits: Tensor
    labels: Tensor
    attacked: Tensor | None = None


def calibrate_fusion(config: FusionConfig, observed: Observed, *, benign_floor: float) -> FusionConfig:
    """Choose a rule's parameters: as robust as they can be with the benign accuracy that is asked for.

    * `"bounded"`, `"candidates"`: the smallest vote or depth that reaches the floor, for a smaller one lets the benign
      branch overturn less. If none does, the smallest of the most accurate.
    * `"mixed"`: of a grid of transforms, each with the smallest weight of the benign branch that reaches the floor, the
      one under which most attacked images lead by more than that weight can overturn.
    * `"calibrated"`: the temperature of each branch that makes its probabilities likeliest; it knows no floor.
    * any other rule has nothing to choose.

    Args:
        config: The rule, and parameters that stay if there is nothing to choose.
        observed: Of images that no training has seen.
        benign_floor: Accuracy in [0, 1] on these images.

    References:
        `"mixed"`: Bai et al., MixedNUTS, TMLR 2024, arXiv 2402.02263, section 4, with the roles of the two accuracies
        exchanged: there robustness is asked for and benign accuracy made as large as it can be.
        `"calibrated"`: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599.
    """
    chooser = _CHOOSERS.get(config.rule)
    return config if chooser is None else chooser(config, observed, benign_floor)


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return correct_count(outputs.argmax(dim=-1), labels).rate


def _smallest(field: str) -> Callable[[FusionConfig, Observed, float], FusionConfig]:
    def choose(config: FusionConfig, observed: Observed, benign_floor: float) -> FusionConfig:
        settings = [replace(config, **{field: strength}) for strength in _STRENGTHS]
        accuracies = [_accuracy(Fusion(setting)(observed.logits), observed.labels) for setting in settings]
        wanted = min(benign_floor, max(accuracies))
        return next(s for s, accuracy in zip(settings, accuracies, strict=True) if accuracy >= wanted)

    return choose


def _temperatures(config: FusionConfig, observed: Observed, benign_floor: float) -> FusionConfig:  # noqa: ARG001
    return replace(config, temperatures=tuple(fit_temperature(rows, observed.labels) for rows in observed.logits))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature in [0.01, 100] that makes the labels likeliest, logits `(N, K)` and labels `(N,)`.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599.
    """
    from scipy.optimize import minimize_scalar  # slow to import

    rows = logits.double()

    def loss(exponent: float) -> float:
        return float(F.cross_entropy(rows / 10.0**exponent, labels))

    return float(10 ** minimize_scalar(loss, bounds=(-2, 2), method="bounded").x)


def _mixed(config: FusionConfig, observed: Observed, benign_floor: float) -> FusionConfig:
    assert observed.attacked is not None
    benign, labels = observed.logits[-1].argmax(dim=-1), observed.labels
    clean, attacked = (logits[:-1].mean(dim=0).double() for logits in (observed.logits, observed.attacked))
    best: tuple[tuple[float, float], FusionConfig] | None = None
    for scale, power, bias in itertools.product(_SCALES, _POWERS, _BIASES):

        def transform(rows: Tensor, s: float = scale, p: float = power, b: float = bias) -> Tensor:
            return robust_transform(rows, scale=s, power=p, bias=b).softmax(dim=-1)

        lead, accuracy = _smallest_lead(transform(clean), benign, labels, benign_floor)
        survives = margin(transform(attacked), labels[: len(attacked)]) < -lead
        value = (min(accuracy, benign_floor), float(survives.double().mean()))
        if best is None or value > best[0]:
            # The decision is the benign branch's where it lacks less than a / (1 - a): above the lead found, by more
            # than rounding.
            weight = min((lead + 1e-5) / (1 + lead), 0.5)
            found = replace(config, scale=scale, power=power, bias=bias, benign_weight=weight)
            best = (value, found)
    assert best is not None
    return best[1]


def _smallest_lead(robust: Tensor, benign: Tensor, labels: Tensor, floor: float) -> tuple[float, float]:
    """The smallest lead that the benign branch must overturn for the floor, and the accuracy there."""
    top, says = robust.max(dim=-1)
    lacks = top - robust.gather(1, benign[:, None]).squeeze(1)  # zero where both agree
    candidates, order = lacks.sort()
    # With the k smallest overturned: right are those among them where the benign branch is, and the others' own.
    gained = (benign == labels)[order].double().cumsum(dim=0)
    kept = (says == labels)[order].double()
    accuracy = torch.cat([kept.sum()[None], gained + kept.sum() - kept.cumsum(dim=0)]) / len(labels)
    leads = torch.cat([candidates.new_zeros(1), candidates])
    wanted = min(floor, float(accuracy.max()))
    first = int((accuracy >= wanted).nonzero()[0])
    return float(leads[first]), float(accuracy[first])


_CHOOSERS: dict[str, Callable[[FusionConfig, Observed, float], FusionConfig]] = {
    "bounded": _smallest("vote"),
    "candidates": _smallest("depth"),
    "calibrated": _temperatures,
    "mixed": _mixed,
}
