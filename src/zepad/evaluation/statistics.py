"""Rates with their denominators and intervals, and the quality of a detection score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..functional import Count

CONFIDENCE = 0.95  # of every interval
_RESAMPLES = 1000
_CURVE_POINTS = 100


@dataclass(frozen=True)
class Rate:
    """`hits` out of `total` images, with a Wilson interval of 95 % confidence.

    Attributes:
        hits: Images counted.
        total: The denominator; zero makes every value `nan`.

    Examples:
        >>> rate = Rate(45, 50)
        >>> rate.value
        0.9
        >>> [round(bound, 3) for bound in rate.interval]
        [0.786, 0.957]

    References:
        Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """

    hits: int
    total: int

    @classmethod
    def of(cls, count: Count) -> Rate:
        """Return the rate of a count."""
        return cls(count.hits, count.total)

    @property
    def value(self) -> float:
        """Hits per total in [0, 1]."""
        return self.hits / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """The lower and upper end of the Wilson interval, in [0, 1]."""
        from scipy.stats import binomtest  # slow to import

        if not self.total:
            return float("nan"), float("nan")
        bounds = binomtest(self.hits, self.total).proportion_ci(CONFIDENCE, method="wilson")
        return float(bounds.low), float(bounds.high)


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well a score tells attacked images from benign ones. Larger scores are more suspicious.

    Attributes:
        auroc: Probability that an attacked image scores above a benign one, ties counted half.
        auroc_interval: Bootstrap percentile interval of 95 %, benign and attacked images resampled separately.
        auroc_fooling: The same over those attacked images alone that were right before and are wrong after; None if
            there is none.
        fooling_images: How many those are.
        fpr_at_95_tpr: Share of benign images flagged at the highest threshold that flags 95 % of the attacked ones.
        accuracy: At the fixed threshold, mean of the rates of benign images passed and attacked images flagged.
        flagged: Attacked images flagged at the fixed threshold.
        evading: Attacked images that were right before, are wrong after and are not flagged: what the pair of model and
            detector lets pass.
        curve: The ROC curve as (false positive rate, true positive rate), thinned to about 100 points.
    """

    auroc: float
    auroc_interval: tuple[float, float]
    auroc_fooling: float | None
    fooling_images: int
    fpr_at_95_tpr: float
    accuracy: float
    flagged: Rate
    evading: Rate
    curve: tuple[tuple[float, float], ...]


def auroc(*, benign: Tensor, attacked: Tensor) -> float:
    """Return the area under the ROC curve of a detection score, where larger means more suspicious.

    Args:
        benign: Scores of benign images `(N,)`.
        attacked: Scores of attacked images `(M,)`.

    Returns:
        The probability that an attacked image scores above a benign one, ties counted half.

    Examples:
        >>> import torch
        >>> auroc(benign=torch.tensor([0.0, 0.2]), attacked=torch.tensor([0.1, 0.3]))
        0.75
    """
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(*_truth_and_scores(benign, attacked)))


def fpr_at_tpr(*, benign: Tensor, attacked: Tensor, tpr: float = 0.95) -> float:
    """Return the share of benign images flagged where at least a share `tpr` of the attacked images is flagged.

    Args:
        benign: Scores of benign images `(N,)`.
        attacked: Scores of attacked images `(M,)`.
        tpr: Wanted share of attacked images, in (0, 1].

    Examples:
        >>> import torch
        >>> fpr_at_tpr(benign=torch.tensor([0.0, 0.2]), attacked=torch.tensor([0.1, 0.3]))
        0.5
    """
    ordered = attacked.double().sort(descending=True).values
    needed = int(np.ceil(tpr * len(ordered) - 1e-9))
    return float((benign.double() >= ordered[max(needed, 1) - 1]).float().mean())


def detection(*, benign: Tensor, attacked: Tensor, fooled: Tensor, threshold: float, seed: int = 0) -> Detection:
    """Measure a detection score against one attack.

    Args:
        benign: Scores of the benign images `(N,)`.
        attacked: Scores of the attacked images `(M,)`.
        fooled: Which images are right before the attack and wrong after it, bool `(M,)`.
        threshold: A score above it is flagged.
        seed: Of the bootstrap.

    Raises:
        InputError: If a score is not finite.
    """
    from sklearn.metrics import roc_curve

    if not (bool(torch.isfinite(benign).all()) and bool(torch.isfinite(attacked).all())):
        raise InputError("detection scores must be finite; got NaN or infinity. Check the score function.")
    flagged = attacked > threshold
    rates = Rate(int(flagged.sum()), len(attacked)), Rate(int((fooled & ~flagged).sum()), len(attacked))
    false, true, _ = roc_curve(*_truth_and_scores(benign, attacked))
    thin = np.unique(np.linspace(0, len(false) - 1, min(len(false), _CURVE_POINTS)).round().astype(int))
    return Detection(
        auroc=auroc(benign=benign, attacked=attacked),
        auroc_interval=_bootstrap_auroc(benign, attacked, seed),
        auroc_fooling=auroc(benign=benign, attacked=attacked[fooled]) if bool(fooled.any()) else None,
        fooling_images=int(fooled.sum()),
        fpr_at_95_tpr=fpr_at_tpr(benign=benign, attacked=attacked),
        accuracy=(float((benign <= threshold).float().mean()) + rates[0].value) / 2,
        flagged=rates[0],
        evading=rates[1],
        curve=tuple((round(float(false[i]), 5), round(float(true[i]), 5)) for i in thin),
    )


def _truth_and_scores(benign: Tensor, attacked: Tensor) -> tuple[np.ndarray, np.ndarray]:
    truth = np.concatenate([np.zeros(len(benign)), np.ones(len(attacked))])
    return truth, torch.cat([benign, attacked]).double().cpu().numpy()


def _bootstrap_auroc(benign: Tensor, attacked: Tensor, seed: int) -> tuple[float, float]:
    """Percentile interval from resampled ranks: AUROC is the mean mid-rank of an attacked score among benign ones."""
    generator = np.random.default_rng(seed)
    low_side, high_side = benign.double().cpu().numpy(), attacked.double().cpu().numpy()
    areas = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        reference = np.sort(generator.choice(low_side, len(low_side)))
        sample = generator.choice(high_side, len(high_side))
        below = np.searchsorted(reference, sample, "left") + np.searchsorted(reference, sample, "right")
        areas[i] = below.mean() / (2 * len(reference))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(areas, [tail, 100 - tail])
    return float(low), float(high)
