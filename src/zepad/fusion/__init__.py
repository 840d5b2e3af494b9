"""Fusion rules, which combine the logits of the branches into one decision. Each is registered under a name.

To add a rule, subclass `FusionRule` and call `register`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import ConfigError
from .base import RULES, AveragingRule, FusionRule, ValidationLogits
from .bounded import Bounded
from .mean import Mean
from .mixed import MixedNUTS
from .rfdm import RFDM
from .temperature import Temperature

register = RULES.register
"""Add a fusion rule under a name, `register(name, cls)`.

`name` has lower-case letters, digits, `-` and `_`. `cls` is a frozen dataclass that extends `FusionRule` and has a
default for every field. A `ConfigError` is raised if the name is malformed or taken, or the class is not such a
dataclass.
"""

names = RULES.names
"""Return the names of the registered fusion rules in the order of registration, a tuple of strings."""

resolve = RULES.resolve
"""Return a fusion rule, `resolve(given, argument="fusion")`.

`given` is a fusion rule, which is returned as it is, or a name, which gives that fusion rule with its default settings.
A `ConfigError`, which names the `argument`, is raised if the fusion rule is not registered.
"""

register("rfdm", RFDM)
register("mean", Mean)
register("bounded", Bounded)
register("temperature", Temperature)
register("mixed", MixedNUTS)

__all__ = [
    "RFDM",
    "AveragingRule",
    "Bounded",
    "FusionRule",
    "Mean",
    "MixedNUTS",
    "Temperature",
    "ValidationLogits",
    "fuse_logits",
    "fusion_weights",
    "names",
    "register",
    "resolve",
]


def fuse_logits(logits: Tensor, *, rule: str = "rfdm", **settings: Any) -> Tensor:
    """Fuse the logits of the branches by a registered rule.

    Args:
        logits: Logits `(B, N, K)` of any float dtype, hardened branches first, the benign branch last.
        rule: Name of the rule.
        **settings: Settings of the rule, such as `vote=0.5` for `"bounded"`.

    Returns:
        Fused logits `(N, K)` in the dtype of `logits`, differentiable with respect to every branch.

    Raises:
        ValueError: If the rule is unknown, it has no such setting, or `logits` is not `(B, N, K)` floating point.

    Examples:
        >>> import torch
        >>> fuse_logits(torch.tensor([[[2.0, 0.0]], [[4.0, 2.0]]]))
        tensor([[3., 1.]])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism, for `"rfdm"`.
    """
    return _build(rule, settings)(logits)


def fusion_weights(logits: Tensor, *, rule: str = "rfdm", **settings: Any) -> Tensor:
    """Return the weight of each branch for each image; weights are positive and sum to 1 over the branches.

    Args:
        logits: Logits `(B, N, K)` of any float dtype.
        rule: Name of a rule that averages logits.
        **settings: Settings of the rule.

    Returns:
        Weights `(B, N)` in the dtype of `logits`.

    Raises:
        ValueError: If the rule is unknown, it has no such setting, it does not average logits, or `logits` is not
            `(B, N, K)` floating point.

    Examples:
        >>> import torch
        >>> fusion_weights(torch.tensor([[[9.0, -9.0]], [[0.0, 0.0]]])).squeeze()
        tensor([0.8996, 0.1004])

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), robust federated decision mechanism, for `"rfdm"`.
    """
    weights = _build(rule, settings).weights(logits)
    if weights is None:
        raise ConfigError(f"the rule {rule!r} does not average logits, so its branches have no weights.")
    return weights


def _build(rule: str, settings: dict[str, Any]) -> FusionRule:
    cls = RULES.get(rule)
    unknown = sorted(set(settings) - set(cls.__dataclass_fields__))
    if unknown:
        has = ", ".join(cls.__dataclass_fields__) or "none"
        raise ConfigError(f"the rule {rule!r} has no setting {', '.join(unknown)}; it has {has}.")
    return cls(**settings)
