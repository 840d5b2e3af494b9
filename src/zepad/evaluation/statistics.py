"""Rates with their denominators and intervals, and the quality of a detection score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import BeforeValidator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from ..functional import Count
from ..schema import STRICT

CONFIDENCE = 0.95  # level of every interval
LARGEST_COUNT = 2**53  # of images that a report may state; float64 holds every smaller one
_RESAMPLES = 1000
_RESAMPLED_AT_ONCE = 100  # resamples of the bootstrap in memory
_CURVE_POINTS = 100


@dataclass(frozen=True)
class Rate:
    """`hits` out of `total` images, with a Wilson interval of 95 % confidence.

    Attributes:
        hits: Number of images counted.
        total: Number of images in all; zero makes the value and the interval `nan`.

    Raises:
        InputError: If `hits` does not lie between zero and `total`.

    Examples:
        >>> rate = Rate(45, 50)
        >>> rate.value
        0.9
        >>> [round(bound, 3) for bound in rate.interval]
        [0.786, 0.957]

    References:
        Wilson, Probable inference, the law of succession, and statistical inference, JASA 1927.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    hits: int
    total: int

    def __post_init__(self) -> None:
        """Check the counts."""
        if not 0 <= self.hits <= self.total:
            raise InputError(f"hits must lie between 0 and total ({self.total}); got {self.hits}.")

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


def _counts_alone(written: Any) -> Any:
    """Return a rate as it is written, without what follows from its counts."""
    if not isinstance(written, dict):
        return written
    missing = sorted({"value", "interval"} - set(written))
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    counts = {name: value for name, value in written.items() if name not in ("value", "interval")}
    if any(isinstance(count, int) and count > LARGEST_COUNT for count in counts.values()):
        raise ValueError(f"a count is larger than {LARGEST_COUNT}")
    return counts


WrittenRate = Annotated[Rate, BeforeValidator(_counts_alone)]
"""A rate, which a report writes with its value and interval so that people and other programs can read them."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well a score tells attacked images from benign ones. Larger scores are more suspicious.

    Attributes:
        auroc: Probability that an attacked image scores above a benign one, ties counted half.
        auroc_interval: Bootstrap percentile interval of 95 %, benign and attacked images resampled separately.
        auroc_fooling: AUROC with only those attacked images that were right before the attack and are wrong after it;
            None if there is none.
        fooling_images: Number of those images.
        fpr_at_95_tpr: Share of benign images flagged at the highest threshold that flags 95 % of the attacked ones.
        accuracy: Mean of the share of benign images passed and the share of attacked images flagged at the fixed
            threshold.
        flagged: Share of attacked images flagged at the fixed threshold.
        evading: Share of attacked images that were right before the attack, are wrong after it and are not flagged:
            what the pair of model and detector lets pass.
        curve: ROC curve as (false positive rate, true positive rate), thinned to about 100 points.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    auroc: float
    auroc_interval: tuple[float, float]
    auroc_fooling: float | None
    fooling_images: int
    fpr_at_95_tpr: float
    accuracy: float
    flagged: WrittenRate
    evading: WrittenRate
    curve: tuple[tuple[float, float], ...]


@checked
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


@checked
def fpr_at_tpr(*, benign: Tensor, attacked: Tensor, tpr: float = 0.95) -> float:
    """Return the share of benign images flagged where at least a share `tpr` of the attacked images is flagged.

    Args:
        benign: Scores of benign images `(N,)`.
        attacked: Scores of attacked images `(M,)`.
        tpr: Share of attacked images to flag, in (0, 1].

    Examples:
        >>> import torch
        >>> fpr_at_tpr(benign=torch.tensor([0.0, 0.2]), attacked=torch.tensor([0.1, 0.3]))
        0.5
    """
    ordered = attacked.double().sort(descending=True).values
    needed = int(np.ceil(tpr * len(ordered) - 1e-9))
    return float((benign.double() >= ordered[max(needed, 1) - 1]).float().mean())


@checked
def detection(*, benign: Tensor, attacked: Tensor, fooled: Tensor, threshold: float, seed: int = 0) -> Detection:
    """Measure a detection score against one attack.

    Args:
        benign: Scores of the benign images `(N,)`.
        attacked: Scores of the attacked images `(M,)`.
        fooled: Which images are right before the attack and wrong after it, bool `(M,)`.
        threshold: Detection threshold: a score above it is flagged.
        seed: Seed of the bootstrap.

    Raises:
        InputError: If a score is not finite.
    """
    from sklearn.metrics import roc_curve

    if not (bool(torch.isfinite(benign).all()) and bool(torch.isfinite(attacked).all())):
        raise InputError("detection scores must be finite; got NaN or infinity. Check the score function.")
    flagged = attacked > threshold
    share_flagged = Rate(int(flagged.sum()), len(attacked))
    false, true, _ = roc_curve(*_truth_and_scores(benign, attacked))
    thin = np.unique(np.linspace(0, len(false) - 1, min(len(false), _CURVE_POINTS)).round().astype(int))
    return Detection(
        auroc=auroc(benign=benign, attacked=attacked),
        auroc_interval=_bootstrap_auroc(benign, attacked, seed),
        auroc_fooling=auroc(benign=benign, attacked=attacked[fooled]) if bool(fooled.any()) else None,
        fooling_images=int(fooled.sum()),
        fpr_at_95_tpr=fpr_at_tpr(benign=benign, attacked=attacked),
        accuracy=(float((benign <= threshold).float().mean()) + share_flagged.value) / 2,
        flagged=share_flagged,
        evading=Rate(int((fooled & ~flagged).sum()), len(attacked)),
        curve=tuple((round(float(false[i]), 5), round(float(true[i]), 5)) for i in thin),
    )


def _truth_and_scores(benign: Tensor, attacked: Tensor) -> tuple[np.ndarray, np.ndarray]:
    truth = np.concatenate([np.zeros(len(benign)), np.ones(len(attacked))])
    return truth, torch.cat([benign, attacked]).double().cpu().numpy()


def _bootstrap_auroc(benign: Tensor, attacked: Tensor, seed: int) -> tuple[float, float]:
    """Return the percentile interval of the AUROC, benign and attacked scores resampled separately."""
    from scipy.stats import bootstrap  # slow to import

    sides = [side.double().cpu().numpy() for side in (benign, attacked)]
    if min(map(len, sides)) < 2:  # a single score has no spread to resample
        return 0.0, 1.0
    interval = bootstrap(
        sides,
        _area,
        n_resamples=_RESAMPLES,
        batch=_RESAMPLED_AT_ONCE,
        vectorized=False,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def _area(benign: np.ndarray, attacked: np.ndarray) -> float:
    """Return the AUROC as the mean mid-rank of an attacked score among the benign ones."""
    ordered = np.sort(benign)
    below = np.searchsorted(ordered, attacked, "left") + np.searchsorted(ordered, attacked, "right")
    return float(below.mean()) / (2 * len(ordered))
