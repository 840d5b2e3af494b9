"""Attackers: an attack together with its target and its threat model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from torch import Generator, Tensor

from ..arguments import check_fields, checked
from ..attacks import Attack, UniversalPerturbation
from ..config import require
from ..types import ImageModel, Precision
from .identity import describe

ThreatModel: TypeAlias = Literal["semi-black-box", "semi-black-box+", "replica", "published", "white-box"]
"""What an attacker knows, from the least to the most.

* `"semi-black-box"`: the public victim encoder, or another public encoder of its family.
* `"semi-black-box+"`: both public encoders.
* `"replica"`: the public encoders and this library, with which he repeats the hardening on images of his own.
* `"published"`: the hardened encoders, as `push_to_hub` publishes them before `fit_benign`, without the heads and the
  benign branch.
* `"white-box"`: the whole deployed ensemble.
"""

THREAT_MODELS: tuple[ThreatModel, ...] = get_args(ThreatModel)
NORMS = ("linf", "l2", "patch")


@dataclass(frozen=True, kw_only=True)
class ApplyPerturbation:
    """A universal perturbation as an attack: it was crafted before, and needs neither model nor labels.

    Attributes:
        perturbation: The perturbation, one for all images.
    """

    perturbation: UniversalPerturbation

    def __post_init__(self) -> None:
        """Check the type of every field.

        Raises:
            ConfigError: If a field is of another type.
        """
        check_fields(self)

    @property
    def eps(self) -> float:
        """Radius of the ball in [0, 1] pixel units."""
        return self.perturbation.eps

    @property
    def norm(self) -> str:
        """Norm of the ball."""
        return self.perturbation.norm

    def __call__(self, model: Any, images: Tensor, targets: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Return the images with the perturbation applied."""
        del model, targets, generator
        return self.perturbation.apply(images)


def the_model(model: Any) -> Any:
    """Return the evaluated model itself: the target of a white-box attack."""
    return model


@dataclass(frozen=True, kw_only=True, eq=False)
class Attacker:
    """One row of an evaluation.

    Attributes:
        name: Name shown in tables; unique within one evaluation.
        threat_model: Threat model, which says what the attacker knows.
        attack: The attack to run.
        target: Maps the evaluated model to what the attack is run on, by default the model itself. `against(encoder)`
            gives a fixed surrogate.
        notes: Further facts to record with the settings.
        precision: Precision of the forward passes while the attack runs: `"fp32"`, `"bf16"`, or `"auto"` for bfloat16
            where the hardware computes in it. What the evaluated model says of the attacked images is asked in its own
            precision.
        remaining: Whether to attack only the images that the model still classifies right under every attacker before
            this one of the same threat model, norm and budget. The others stay as the first of these left them, so that
            the rates are those of all of them together, as in AutoAttack.

    Examples:
        >>> from zepad.attacks import PGD
        >>> Attacker(name="PGD-20", threat_model="white-box", attack=PGD(eps=8 / 255, steps=20)).settings["steps"]
        20
    """

    name: str
    threat_model: ThreatModel
    attack: Attack
    target: Callable[[Any], Any] = the_model
    notes: Mapping[str, Any] = field(default_factory=dict)
    precision: Precision = "fp32"
    remaining: bool = False

    def __post_init__(self) -> None:
        """Check the name and the threat model, and that the budget can be checked.

        Raises:
            ConfigError: If the name is no Unicode text, or there is no such threat model, norm or precision.
        """
        check_fields(self)
        text = self.name.encode("utf-8", "replace").decode() == self.name
        require(text, "name", self.name, "text in Unicode")
        require(self.attack.norm in NORMS, "norm", self.attack.norm, f"one of {NORMS}")

    @property
    def settings(self) -> dict[str, Any]:
        """Name, budget, target and every other setting, JSON-ready; they differ where attackers differ."""
        described = describe(self.attack.perturbation if isinstance(self.attack, ApplyPerturbation) else self.attack)
        settings: dict[str, Any] = described if isinstance(described, dict) else {"attack": described}
        if self.target is not the_model:
            settings = {**settings, "target": describe(self.target)}
        if self.precision != "fp32":
            settings = {**settings, "precision": self.precision}
        if self.remaining:
            settings = {**settings, "remaining": True}
        return {**settings, "notes": describe(self.notes)} if self.notes else settings


def against(*surrogates: ImageModel) -> Callable[[Any], Any]:
    """Return a target that ignores the evaluated model: one surrogate, or several attacked at once."""
    chosen = surrogates[0] if len(surrogates) == 1 else tuple(surrogates)

    def target(model: Any) -> Any:
        del model
        return chosen

    return target


@checked
def universal_attacker(
    perturbation: UniversalPerturbation, *, threat_model: ThreatModel = "semi-black-box", name: str | None = None
) -> Attacker:
    """Return the attacker that applies a universal perturbation.

    Args:
        perturbation: A perturbation fitted on public encoders.
        threat_model: What one must know to have the encoders that the perturbation was fitted on.
        name: Name shown in tables; the name of the attack by default.
    """
    shown = name or str(perturbation.provenance.get("attack", "universal"))
    return Attacker(name=shown, threat_model=threat_model, attack=ApplyPerturbation(perturbation=perturbation))
