"""The attackers that can be tried on a model, and why others cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Generator, Tensor

from ..attacks import APGD, FeaturePGD, JointAPGD, WorstOf
from ..encoders import Encoder
from ..errors import StageError, ZePADError
from ..model import ZePAD
from ..protocols import public_encoder
from ..types import HARDENED_ROLES, Role

STEPS = 20  # of every attack: enough to break an undefended classifier, and a matter of seconds on a laptop

Craft = Callable[[Tensor, Tensor, float, Generator], Tensor]
"""A map from images `(N, C, H, W)`, the labels to be changed, a budget and a generator to attacked images."""


@dataclass(frozen=True, kw_only=True)
class Attacker:
    """An attacker with a fixed number of steps, whose budget is chosen for each image.

    Attributes:
        name: Name by which the attacker is chosen.
        knows: What the attacker knows and does, in a sentence.
        craft: Function that makes the attacked images.
    """

    name: str
    knows: str
    craft: Craft


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What there is to choose from for one model.

    Attributes:
        attackers: Attackers by name, the weakest first.
        missing: Reason why an attacker is not among them, by the attacker's name.
    """

    attackers: dict[str, Attacker]
    missing: dict[str, str]


def attackers_for(defense: ZePAD) -> Choice:
    """Return the attackers that can be tried on a model.

    Public encoders are those that the model keeps or whose source can provide them again, which may download them.

    Args:
        defense: A fitted model.

    Returns:
        The attackers, and the reasons why others are missing.

    Raises:
        StageError: If the model is not fitted.
    """
    if defense.stage != "fitted":
        raise StageError(
            f"the app shows decisions, and this model is only {defense.stage}. Fit it with fit_benign first."
        )
    found = {role: _public(defense, role) for role in HARDENED_ROLES}
    public = {role: encoder for role, encoder in found.items() if isinstance(encoder, Encoder)}
    unknown = {role: reason for role, reason in found.items() if isinstance(reason, str)}
    hardened = [defense.encoder(role) for role in HARDENED_ROLES]
    attackers = {
        "no attack": Attacker(
            name="no attack", knows="The classifiers are shown the image as it is.", craft=_unchanged
        ),
        "public victim": Attacker(
            name="public victim",
            knows="The attacker knows the public victim encoder alone, and no label (semi-black-box): "
            f"{STEPS} steps of feature PGD.",
            craft=partial(_move_features, [public[role] for role in public if role == "victim"]),
        ),
        "both public encoders": Attacker(
            name="both public encoders",
            knows="The attacker knows both public encoders, and no label (semi-black-box+): "
            f"{STEPS} steps of feature PGD on both.",
            craft=partial(_move_features, list(public.values())),
        ),
        "hardened encoders": Attacker(
            name="hardened encoders",
            knows="The attacker has the hardened encoders, as the Hub would publish them, but no head and no benign "
            f"branch (published): {STEPS} steps of feature PGD on both.",
            craft=partial(_move_features, hardened),
        ),
        "white box": Attacker(
            name="white box",
            knows=f"The attacker knows everything: {STEPS} steps of APGD through the fusion and, if that fails, "
            f"{STEPS} steps of joint APGD on all branches towards each of two wrong classes. "
            "The detector is not evaded.",
            craft=partial(_break_fusion, defense),
        ),
    }
    missing = {"public victim": unknown["victim"]} if "victim" in unknown else {}
    if unknown:
        missing["both public encoders"] = " ".join(unknown.values())
    return Choice(
        attackers={name: attacker for name, attacker in attackers.items() if name not in missing}, missing=missing
    )


def _public(defense: ZePAD, role: Role) -> Encoder | str:
    """Return a public encoder, or the reason why there is none."""
    try:
        return public_encoder(defense, role).to(defense.device)
    except ZePADError as error:
        return f"the public {role} encoder is not known. {error}"


def _unchanged(images: Tensor, labels: Tensor, eps: float, generator: Generator) -> Tensor:
    del labels, eps, generator
    return images.clone()


def _move_features(
    encoders: Sequence[Encoder], images: Tensor, labels: Tensor, eps: float, generator: Generator
) -> Tensor:
    return FeaturePGD(eps=eps, steps=STEPS)(encoders, images, labels, generator=generator)


def _break_fusion(defense: ZePAD, images: Tensor, labels: Tensor, eps: float, generator: Generator) -> Tensor:
    through = APGD(eps=eps, steps=STEPS)
    joint = JointAPGD(eps=eps, branch_logits=defense.branch_logits, fuse=defense.fuse, steps=STEPS, classes=2)
    return WorstOf(attacks=(through, joint))(defense, images, labels, generator=generator)
