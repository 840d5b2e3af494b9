"""Which downstream-agnostic adversarial examples (DAEs) of public encoders a recipe trains on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from torch import nn

from ..arguments import check_fields
from ..attacks import FeaturePGD, cosine_distance, l2_distance
from ..config import check_budget, is_integer, is_number, require
from ..errors import ConfigError

DISTANCES = {"cosine": cosine_distance, "l2": l2_distance}


@dataclass(frozen=True, kw_only=True)
class Member:
    """One attack of a mixture.

    Attributes:
        sources: Names of the public encoders that are attacked at once.
        attack: The attack, whose `eps` is the radius of its DAEs in [0, 1] pixel units.
    """

    sources: tuple[str, ...]
    attack: FeaturePGD

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        settings = {f.name: getattr(self.attack, f.name) for f in dataclasses.fields(self.attack)}
        return {"sources": list(self.sources), **settings, "distance": self.attack.distance.__name__}


@dataclass(frozen=True, kw_only=True)
class DAEMixture:
    """A mixture of attacks on public encoders: every combination of sources, distance, budget and variant.

    All are feature PGD in the L-infinity ball. None of the universal attacks of `zepad.attacks.universal` is part of
    it, so that they remain a test of attacks that training has not seen.

    Attributes:
        sources: Groups of names of public encoders; the encoders of a group are attacked at once. None takes each
            public encoder alone, and all of them together. `ZePAD.harden` names them `"victim"` and `"auxiliary"`,
            `zepad.training.harden_branch` calls its only one `"encoder"`.
        distances: Distances of features that the attacks maximise, `"cosine"` or `"l2"`.
        budgets: Radii of the balls as multiples of `eps`.
        steps: Number of gradient steps.
        variants: Further settings of `FeaturePGD` for each variant of an attack, such as
            `{"momentum": 1.0, "diversity": 0.5}`.
        per_image: Number of different DAEs that a bank keeps for each image; each epoch draws one of them.
        eps: Radius that `budgets` multiply, in [0, 1] pixel units, written `8 / 255`. None takes `HardenConfig.eps`.
        further: Further public encoders by name, which are attacked and never trained.

    Examples:
        >>> mixture = DAEMixture(distances=("cosine",), budgets=(1.0,))
        >>> [member.sources for member in mixture.members(("victim", "auxiliary"), eps=8 / 255)]
        [('victim',), ('auxiliary',), ('victim', 'auxiliary')]

    References:
        Sitawarin et al., PubDef: Defending Against Transfer Attacks From Public Models, ICLR 2024, arXiv 2310.17645
        (training against transfer attacks from a small set of public models).
    """

    sources: tuple[tuple[str, ...], ...] | None = None
    distances: tuple[str, ...] = ("cosine", "l2")
    budgets: tuple[float, ...] = (0.75, 1.0, 1.25)
    steps: int = 5
    variants: tuple[Mapping[str, Any], ...] = ({},)
    per_image: int = 1
    eps: float | None = None
    further: Mapping[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: If a field is out of range.
        """
        check_fields(self)
        for distance in self.distances:
            require(distance in DISTANCES, "distances", distance, f"from {sorted(DISTANCES)}")
        for budget in self.budgets:
            require(is_number(budget) and budget > 0, "budgets", budget, "positive multiples of eps")
        require(is_integer(self.steps) and self.steps >= 1, "steps", self.steps, "an integer of at least 1")
        require(is_integer(self.per_image) and self.per_image >= 1, "per_image", self.per_image, "at least 1")
        if self.eps is not None:
            check_budget(self.eps)
        names = ("sources", "distances", "budgets", "variants")
        for name in names:
            require(getattr(self, name) != (), name, (), "not empty")

    def members(self, public: Sequence[str], eps: float | None) -> list[Member]:
        """Return the attacks of the mixture.

        Args:
            public: Names of the public encoders at hand, to which those of `further` are added.
            eps: Radius where the mixture states none, in [0, 1] pixel units; None where there is no other.

        Raises:
            ConfigError: If a source is not at hand, a variant has an unknown setting, or a radius is missing or out of
                range.
        """
        radius = self.eps or eps
        if radius is None:
            raise ConfigError("the mixture needs a radius. Pass DAEMixture(eps=8 / 255).")
        names = tuple(dict.fromkeys((*public, *self.further)))
        sources = tuple(dict.fromkeys((*((name,) for name in names), names))) if self.sources is None else self.sources
        missing = sorted({name for group in sources for name in group} - set(names))
        if missing or not names:
            raise ConfigError(
                f"the mixture needs public encoders {', '.join(missing) or 'to attack'}; there are "
                f"{', '.join(names) or 'none'}. Pass others as DAEMixture(further={{name: encoder}})."
            )
        return [
            Member(sources=group, attack=self._attack(distance, budget * radius, variant))
            for group, distance, budget, variant in product(sources, self.distances, self.budgets, self.variants)
        ]

    def __str__(self) -> str:
        """Return the settings that are not the defaults, and the names of further encoders."""
        shown = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {name: value for name, value in shown.items() if value != getattr(_DEFAULT, name)}
        if self.further:
            changed["further"] = sorted(self.further)
        return f"DAEMixture({', '.join(f'{name}={value}' for name, value in changed.items())})"

    def _attack(self, distance: str, radius: float, variant: Mapping[str, Any]) -> FeaturePGD:
        settings = {"eps": radius, "steps": self.steps, "distance": DISTANCES[distance], **variant}
        try:
            attack = FeaturePGD(**settings)
        except TypeError as error:
            raise ConfigError(f"variants must hold settings of FeaturePGD; got {dict(variant)}: {error}.") from error
        require(attack.norm == "linf", "variants", dict(variant), "attacks in the L-infinity ball")
        return attack


_DEFAULT = DAEMixture()
