"""Budgets of the attacks and settings of training of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..arguments import check_fields
from ..config import BenignConfig, HardenConfig, HeadConfig, check_budget, require
from ..evaluation import UniversalAttack


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a defense is trained and attacked in an experiment.

    Attributes:
        eps: L-infinity budget of every attack, in [0, 1] pixel units; the paper's is 10/255.
        harden: Settings of hardening.
        benign: Settings of fitting the benign branch.
        heads: Settings of fitting the heads.
        steps: Number of steps of the per-image attacks.
        queries: Number of queries of Square.
        universal: Universal attacks on the public victim by name; None takes the five defaults at `eps`. Unless there
            are none, both public encoders at once, copies and hardened encoders are attacked by
            `UniversalFeatureAttack`.
        plus: Attack both public encoders at once too (semi-black-box+).
        published: Attack the hardened encoders of each `ZePAD` too (published).
        seed: Seed of the attacks and the evaluation; the training settings have seeds of their own.
        progress: Show progress bars.
    """

    eps: float = 10 / 255
    harden: HardenConfig = field(default_factory=HardenConfig)
    benign: BenignConfig = field(default_factory=BenignConfig)
    heads: HeadConfig = field(default_factory=HeadConfig)
    steps: int = 50
    queries: int = 1000
    universal: Mapping[str, UniversalAttack] | None = None
    plus: bool = True
    published: bool = True
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        check_fields(self)
        check_budget(self.eps)
        require(self.steps >= 1, "steps", self.steps, "at least 1")
        require(self.queries >= 1, "queries", self.queries, "at least 1")
