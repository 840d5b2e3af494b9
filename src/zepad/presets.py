"""Presets: how a defense is trained and fused where the caller says nothing else, by the attacker that is feared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .config import BenignConfig, HardenConfig
from .errors import ConfigError
from .fusion import RFDM, Bounded, FusionRule
from .objectives import DAEMixture, FlipCrop, Recipe, restoration, static_adversarial_training, zepad_recipe

_MIXTURE = DAEMixture(variants=({}, {"steps": 10, "momentum": 1.0, "diversity": 0.5}))
"""Feature PGD as it is, and as the transfer literature makes it carry over (MI-DI): the latter is the stronger one."""

_FLIP = FlipCrop(padding=0)  # a crop costs robustness: shifted over the stride, a static example loses its effect
_RESTORATION_WEIGHT = 0.1  # the squared distance is a sum over features, the cross-entropy beside it is not


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How a defense is trained and fused.

    Attributes:
        feared: The attacker that the preset is for, in words.
        objective: Function from the settings of the hardening to the recipe of victim and auxiliary.
        benign_objective: Function from the radius of the hardening, in [0, 1] pixel units, to the recipe of a benign
            branch whose encoder is trained; None trains it on clean images alone.
        fusion: Fusion rule.
        resistant_fusion: Fusion rule beside a benign branch that was trained to resist, where that is another one.
        harden: Settings of the hardening.
        benign: Settings of the benign branch.
        keeps_victim: Whether the model keeps a copy of the public victim, so that the benign branch can be trained
            against attacks on it.
        abstains: Whether the benign branch abstains where its encoder, which stays as it is public, and the encoder
            that was restored from the same public one see different things.
    """

    feared: str
    objective: Callable[[HardenConfig], Recipe]
    benign_objective: Callable[[float], Recipe] | None
    fusion: FusionRule
    resistant_fusion: FusionRule | None = None
    harden: HardenConfig = field(default_factory=HardenConfig)
    benign: BenignConfig = field(default_factory=BenignConfig)
    keeps_victim: bool = True
    abstains: bool = False

    @property
    def remembers(self) -> bool:
        """Whether the benign encoder as it was public joins the benign branch, which is always trained to resist."""
        return self.benign_objective is not None and self.benign.freeze_encoder is False


def _restored(own: float) -> Callable[[HardenConfig], Recipe]:
    """Return the function that makes `restoration()` with adversaries of the encoder's own at a share of the radius."""
    return lambda config: restoration(static=_MIXTURE, own_eps=own * config.eps, augmentation=_FLIP)


def _resistant(own: float | None, **settings: Any) -> Callable[[float], Recipe]:
    """Return the function that makes `static_adversarial_training()`; a flip could change what a label means."""
    return lambda eps: static_adversarial_training(
        static=_MIXTURE, own_eps=None if own is None else own * eps, **settings
    )


def _zepad(config: HardenConfig) -> Recipe:
    """Return the paper's recipe."""
    return zepad_recipe(structure_weight=config.structure_weight)


PRESETS = {
    "private": Preset(
        feared="has the public encoders; the hardened weights stay with you",
        objective=_restored(0.5),
        benign_objective=_resistant(None, passes=10),
        fusion=Bounded(vote=3.0),
        resistant_fusion=Bounded(vote=4.0),
        benign=BenignConfig(freeze_encoder=None),
        abstains=True,
    ),
    "published": Preset(
        feared="has the public encoders and the hardened ones, neither heads nor the benign branch",
        objective=_restored(1.0),
        benign_objective=_resistant(None, restoration_weight=_RESTORATION_WEIGHT),
        fusion=Bounded(vote=8.0),
    ),
    "cautious": Preset(
        feared="repeats the whole training on images of his own, or knows the whole model",
        objective=_restored(1.0),
        benign_objective=_resistant(0.5, restoration_weight=_RESTORATION_WEIGHT),
        fusion=Bounded(vote=4.0),
    ),
    "paper": Preset(
        feared="has the public victim alone",
        objective=_zepad,
        benign_objective=None,
        fusion=RFDM(),
        harden=HardenConfig.paper(),
        keeps_victim=False,
    ),
}
RECOMMENDED = "private"
"""What holds where no preset is named."""


def find_preset(name: str) -> Preset:
    """Return a preset by its name.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}.")
    return PRESETS[name]
