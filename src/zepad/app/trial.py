"""One attack on one image: what an undefended classifier, the defense and each of its branches make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ..config import check_budget
from ..data.images import resize
from ..encoders import Encoder
from ..inputs import check_images
from ..model import ZePAD
from ..types import REFERENCE
from .attackers import Attacker

_SHOWN = 3  # classes per classifier, the likeliest first
_LARGEST = 512  # pixels of the longer side where no encoder states a size; more would only take longer


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A class and its probability.

    Attributes:
        label: Name of the class, or its number as text.
        probability: Probability in [0, 1].
    """

    label: str
    probability: float


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What one classifier makes of the image before and after the attack.

    Attributes:
        clean: Likeliest classes of the clean image, the likeliest first; none where the branch abstains.
        attacked: Likeliest classes of the attacked image, the likeliest first; none where the branch abstains.
        weight: Weight of a branch in the decision on the attacked image, in [0, 1]; None for what is no branch, or
            where the fusion does not average.
    """

    clean: tuple[Guess, ...]
    attacked: tuple[Guess, ...]
    weight: float | None = None

    @property
    def changed(self) -> bool:
        """Whether the attack changed the decision."""
        before, after = ([guess.label for guess in said[:1]] for said in (self.clean, self.attacked))
        return before != after


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One attack on one image.

    Attributes:
        attacker: Name of the attacker.
        knows: What the attacker knows and does, in a sentence.
        eps: L-infinity budget in [0, 1] pixel units.
        clean: The clean image `(C, H, W)` in [0, 1], on the CPU.
        attacked: The attacked image, like `clean`.
        undefended: Opinion of the undefended victim with a head, or None where the model does not keep it.
        defended: Opinion of the defense.
        branches: Opinion of each branch by name.
        scores: Detection scores of the clean and the attacked image; None before the detector is calibrated.
        threshold: Threshold of the detection score, or None.
    """

    attacker: str
    knows: str
    eps: float
    clean: Tensor
    attacked: Tensor
    undefended: Opinion | None
    defended: Opinion
    branches: dict[str, Opinion]
    scores: tuple[float, float] | None
    threshold: float | None

    @property
    def flagged(self) -> bool | None:
        """Whether the attacked image is flagged; None before the detector is calibrated."""
        if self.scores is None or self.threshold is None:
            return None
        return self.scores[1] > self.threshold

    @property
    def largest_change(self) -> float:
        """Largest change of a pixel, in [0, 1]."""
        return float((self.attacked - self.clean).abs().max())


def try_attack(defense: ZePAD, attacker: Attacker, image: Tensor, *, eps: float, seed: int = 0) -> Trial:
    """Attack one image and ask every classifier about it.

    An attacker who needs a label takes the class that the defense gives to the clean image. An image larger than the
    encoders take is first resized to their size.

    Args:
        defense: A fitted model.
        attacker: One of `attackers_for(defense)`.
        image: Image `(C, H, W)` in [0, 1].
        eps: L-infinity budget in [0, 1] pixel units, written `8 / 255`.
        seed: Seed of the attack.

    Raises:
        ConfigError: If the budget is out of range.
        InputError: If the image does not fit, or a logit or score is not finite.

    Examples:
        >>> from torch.utils.data import DataLoader, Subset
        >>> from zepad import BenignConfig, HardenConfig, ZePAD
        >>> from zepad.app import attackers_for, try_attack
        >>> from zepad.data import digits
        >>> loader = DataLoader(Subset(digits("train"), range(260)), batch_size=130, shuffle=True)
        >>> defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
        >>> defense = defense.harden(loader, HardenConfig(epochs=1), progress=False)
        >>> defense = defense.fit_benign(loader, BenignConfig(epochs=1), progress=False)
        >>> attacker = attackers_for(defense).attackers["public victim"]
        >>> trial = try_attack(defense, attacker, digits("test").images[0], eps=16 / 255)
        >>> list(trial.branches), trial.largest_change <= 16 / 255 + 1e-6
        (['victim', 'auxiliary', 'benign'], True)
    """
    check_budget(eps)
    clean = _sized(check_images(image[None], channels=defense.channels)[0], defense).to(defense.device)
    generator = Generator(defense.device).manual_seed(seed)
    labels = defense.predict(clean[None])
    attacked = attacker.craft(clean[None], labels, eps, generator)[0]
    both = torch.stack([clean, attacked])
    report = defense.inspect(both)
    names = report.class_names
    with torch.inference_mode():
        branches = defense.branch_logits(both).softmax(dim=-1)
        plain = None
        if defense.reference is not None and defense.reference.has_head:
            plain = defense.branch(REFERENCE)(both).softmax(dim=-1)
    return Trial(
        attacker=attacker.name,
        knows=attacker.knows,
        eps=eps,
        clean=clean.cpu(),
        attacked=attacked.cpu(),
        undefended=None if plain is None else _opinion(plain, names),
        defended=_opinion(defense.predict_proba(both), names),
        branches={
            name: _opinion(
                branches[b],
                names,
                None if report.weights is None else float(report.weights[b, 1]),
                silent=report.abstains.tolist() if name == report.names[-1] else (False, False),
            )
            for b, name in enumerate(report.names)
        },
        scores=None if report.scores is None else (float(report.scores[0]), float(report.scores[1])),
        threshold=report.threshold,
    )


def _opinion(
    probabilities: Tensor,
    names: tuple[str, ...] | None,
    weight: float | None = None,
    *,
    silent: Sequence[bool] = (False, False),
) -> Opinion:
    """Return the opinion of a classifier by its probabilities `(2, K)` for the clean and the attacked image."""
    clean, attacked = (() if none else _guesses(row, names) for row, none in zip(probabilities, silent, strict=True))
    return Opinion(clean=clean, attacked=attacked, weight=weight)


def _guesses(probabilities: Tensor, names: tuple[str, ...] | None) -> tuple[Guess, ...]:
    top = probabilities.topk(min(_SHOWN, len(probabilities)))
    return tuple(
        Guess(label=names[label] if names else str(label), probability=value)
        for label, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    )


def _sized(image: Tensor, defense: ZePAD) -> Tensor:
    """Return the image at the largest size that an encoder takes, or as it is where it is smaller."""
    sizes = [size for part in defense.modules() if isinstance(part, Encoder) and (size := part.preprocessing.size)]
    height, width = image.shape[1:]
    if sizes:
        largest = max(sizes)
        return resize(image, largest) if height > largest[0] or width > largest[1] else image
    scale = _LARGEST / max(height, width)
    return image if scale >= 1 else resize(image, (max(1, round(height * scale)), max(1, round(width * scale))))
