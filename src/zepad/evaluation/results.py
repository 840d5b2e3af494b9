"""From predictions to rates: one row per attacker, the worst case of each group, and histograms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import attack_success_count, correct_count, fooling_count
from .attackers import Attacker
from .cost import cost_per_image
from .predictions import Benign, Predictions
from .report import AttackResult, Cost, RobustRates, Sample
from .statistics import Detection, Rate, detection

BINS = 20  # bins of the confidence histograms
SCORE_BINS = 40  # bins of the histograms of detection scores
_TAIL = 0.01  # share of the scores at either end that the outer bins take in, so that one outlier does not flatten all


@dataclass(frozen=True, kw_only=True)
class Run:
    """The results of one attacker.

    Attributes:
        predictions: Predictions for all attacked images.
        cost: Total cost of crafting the images.
        samples: Images to show.
        kept_seconds: Part of the cost's time that an interrupted evaluation had spent before.
    """

    predictions: Predictions
    cost: Cost
    samples: tuple[Sample, ...]
    kept_seconds: float = 0.0


def attack_result(
    benign: Benign, attacker: Attacker, run: Run, *, seed: int, score_range: tuple[float, float] | None = None
) -> AttackResult:
    """Return the row of one attacker.

    Args:
        benign: Predictions before the attack.
        attacker: Attacker that made the images.
        run: Results of the attacker.
        seed: Seed of the bootstrap.
        score_range: Ends of the histogram of detection scores; None for no histogram.
    """
    return AttackResult(
        name=attacker.name,
        threat_model=attacker.threat_model,
        eps=attacker.attack.eps,
        norm=attacker.attack.norm,
        settings=attacker.settings,
        rates=robust_rates(benign, run.predictions),
        detection=_detection(benign, run.predictions, seed),
        cost=cost_per_image(run.cost, len(benign.labels)),
        confidences=confidence_histograms(benign, run.predictions),
        scores=score_histogram(run.predictions, score_range),
    )


def worst_cases(benign: Benign, attackers: Sequence[Attacker], runs: Sequence[Run]) -> dict[str, RobustRates]:
    """Return the worst case for each image by threat model, and under `"all"` that of all attackers."""
    members: dict[str, list[Predictions]] = {}
    for attacker, run in zip(attackers, runs, strict=True):
        members.setdefault(attacker.threat_model, []).append(run.predictions)
    if members:
        members["all"] = [run.predictions for run in runs]
    return {group: worst_rates(benign, attacked) for group, attacked in members.items()}


def robust_rates(benign: Benign, attacked: Predictions) -> RobustRates:
    """Return the rates under one attacker.

    Args:
        benign: Predictions before the attack.
        attacked: Predictions after the attack.
    """
    before, after = benign.predictions.fused, attacked.fused
    success = attack_success_count(adversarial=after, benign=before, labels=benign.labels)
    return RobustRates(
        robust_accuracy=Rate.of(correct_count(after, benign.labels)),
        fooling_rate=Rate.of(fooling_count(adversarial=after, benign=before)),
        attack_success_rate=Rate.of(success),
        branches=_branch_rates(benign, attacked.predictions == benign.labels),
    )


def worst_rates(benign: Benign, attacked: Sequence[Predictions]) -> RobustRates:
    """Return the rates under several attackers: an image survives them if it survives each of them.

    Args:
        benign: Predictions before the attacks.
        attacked: Predictions after each attack, one or more.
    """
    survives = torch.stack([predictions.predictions == benign.labels for predictions in attacked]).all(dim=0)
    changed = torch.stack([predictions.fused != benign.predictions.fused for predictions in attacked]).any(dim=0)
    lost = benign.right & ~survives[-1]
    return RobustRates(
        robust_accuracy=_rate(survives[-1]),
        fooling_rate=_rate(changed),
        attack_success_rate=Rate(int(lost.sum()), int(benign.right.sum())),
        branches=_branch_rates(benign, survives),
    )


def benign_accuracy(benign: Benign) -> Rate:
    """Return the share of images that the whole model classifies right."""
    return Rate.of(correct_count(benign.predictions.fused, benign.labels))


def benign_branches(benign: Benign) -> dict[str, Rate]:
    """Return the share of images that each branch alone classifies right, by branch."""
    return _branch_rates(benign, benign.predictions.predictions == benign.labels)


def false_positive_rate(benign: Benign) -> Rate | None:
    """Return the share of benign images flagged at the threshold; None without a detector."""
    if benign.predictions.scores is None or benign.threshold is None:
        return None
    return _rate(benign.predictions.scores > benign.threshold)


def confidence_histograms(benign: Benign, predictions: Predictions) -> dict[str, tuple[int, ...]]:
    """Return counts of the confidence in equal bins of [0, 1], by branch and under `"fused"`."""
    counts = (row.float().histc(BINS, 0, 1).int().tolist() for row in predictions.confidences)
    return {name: tuple(row) for name, row in zip((*benign.branch_names, "fused"), counts, strict=True)}


def score_range(benign: Benign, runs: Sequence[Run]) -> tuple[float, float] | None:
    """Return the ends of histograms that show the detection scores of all images; None without a detector.

    They enclose the threshold and all but the outermost hundredth of the scores of benign images and of each attack.
    """
    every = [predictions.scores for predictions in (benign.predictions, *(run.predictions for run in runs))]
    scores = [held.double() for held in every if held is not None]
    if not scores or benign.threshold is None or not all(bool(held.isfinite().all()) for held in scores):
        return None
    ends = [float(held.quantile(share)) for held in scores for share in (_TAIL, 1 - _TAIL)]
    low, high = min(*ends, benign.threshold), max(*ends, benign.threshold)
    margin = (high - low) / SCORE_BINS or 1.0  # so that neither end of what is shown touches the frame
    return low - margin, high + margin


def score_histogram(predictions: Predictions, ends: tuple[float, float] | None) -> tuple[int, ...]:
    """Return counts of the detection score in equal bins between two ends; the outer bins count what lies beyond."""
    if predictions.scores is None or ends is None:
        return ()
    return tuple(predictions.scores.double().clamp(*ends).histc(SCORE_BINS, *ends).int().tolist())


def _detection(benign: Benign, attacked: Predictions, seed: int) -> Detection | None:
    if benign.predictions.scores is None or attacked.scores is None or benign.threshold is None:
        return None
    return detection(
        benign=benign.predictions.scores,
        attacked=attacked.scores,
        fooled=benign.right & (attacked.fused != benign.labels),
        threshold=benign.threshold,
        seed=seed,
    )


def _branch_rates(benign: Benign, hits: Tensor) -> dict[str, Rate]:
    """Return the rate of each row of `(B + 1, N)` that belongs to a branch, by branch."""
    return {name: _rate(row) for name, row in zip(benign.branch_names, hits[:-1], strict=True)}


def _rate(hits: Tensor) -> Rate:
    return Rate(int(hits.sum()), hits.numel())
