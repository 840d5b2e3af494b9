"""RFDM after temperature scaling, so that the confidences of the branches are comparable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..config import is_number, require
from ..functional import confidence, log_confidence
from .base import AveragingRule, ValidationLogits, weighted_average


@dataclass(frozen=True, kw_only=True)
class Temperature(AveragingRule):
    """Divide each branch's logits by its temperature, then fuse by RFDM.

    `calibrate` fits the temperature of each branch separately by maximum likelihood and ignores the benign floor.

    Attributes:
        temperatures: One positive number per branch; an empty tuple leaves the logits as they are.
        sharpness: Exponent `k` of the confidence; the paper uses 3.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599 (temperature scaling).
    """

    holds_floor: ClassVar[bool] = False

    temperatures: tuple[float, ...] = ()
    sharpness: float = 3.0

    def __post_init__(self) -> None:
        """Check both settings.

        Raises:
            ConfigError: If a setting is out of range.
        """
        given, k = self.temperatures, self.sharpness
        listed = isinstance(given, (list, tuple)) and all(is_number(t) and 1e-6 <= t <= 1e6 for t in given)
        require(listed, "temperatures", given, "positive numbers, one per branch, or none")
        object.__setattr__(self, "temperatures", tuple(float(t) for t in given))
        require(is_number(k) and 0 <= k < 1e38, "sharpness", k, "a number of zero or more")

    def fuse(self, logits: Tensor) -> Tensor:
        """Return the average of the scaled logits, `(N, K)`.

        Raises:
            ValueError: If the numbers of temperatures and branches differ.
        """
        return weighted_average(self._scaled(logits), self.log_weights(logits))

    def log_weights(self, logits: Tensor) -> Tensor:
        """Return the log-confidence of each branch after scaling, `(B, N)`."""
        return log_confidence(self._scaled(logits), self.sharpness)

    def confidence(self, logits: Tensor) -> Tensor:
        """Return the confidence of each branch with this sharpness, before scaling, `(B, N)`."""
        return confidence(logits, sharpness=self.sharpness)

    def check_branches(self, count: int) -> None:
        """Check that there is one temperature per branch, or none.

        Args:
            count: Number of branches.

        Raises:
            ConfigError: If the numbers of temperatures and branches differ.
        """
        super().check_branches(count)
        given = self.temperatures
        require(len(given) in (0, count), "temperatures", given, f"one per branch, {count}, or none")

    def calibrate(self, validation: ValidationLogits, *, benign_floor: float) -> Temperature:  # noqa: ARG002
        """Return the rule with the maximum-likelihood temperature of each branch; `benign_floor` is not used."""
        found = tuple(fit_temperature(rows, validation.labels) for rows in validation.logits)
        return replace(self, temperatures=found)

    def _scaled(self, logits: Tensor) -> Tensor:
        if not self.temperatures:
            return logits
        if len(self.temperatures) != logits.shape[0]:
            raise ValueError(f"temperatures must be one per branch, {logits.shape[0]}; got {len(self.temperatures)}.")
        return logits / logits.new_tensor(self.temperatures)[:, None, None]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature in [0.01, 100] that maximises the likelihood of the labels.

    Args:
        logits: Logits of one branch `(N, K)`.
        labels: Labels, int64 `(N,)`.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599.
    """
    from scipy.optimize import minimize_scalar  # slow to import

    rows = logits.double()

    def loss(exponent: float) -> float:
        return float(F.cross_entropy(rows / 10.0**exponent, labels))

    return float(10 ** minimize_scalar(loss, bounds=(-2, 2), method="bounded").x)
