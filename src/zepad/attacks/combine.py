"""Attacks that combine other attacks: crafted on a surrogate, or run one after another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from ..arguments import check_fields, checked
from ..config import require
from ..functional.precision import accurate
from ..inputs import check_images, check_labels
from ..modes import evaluating
from ..types import ImageModel
from .apgd import APGD
from .base import Attack, strongest
from .losses import cross_entropy, dlr
from .square import Square


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Attack that is crafted on a surrogate instead of the attacked model.

    Inside `WorstOf`, one attack can differentiate through the ensemble, another through `mean_logits` of its branches
    and a third through one branch, while all are judged by their effect on the ensemble.

    Attributes:
        attack: Attack that is run on the surrogate.
        surrogate: Model on which the attacked images are crafted; it is left unchanged.
    """

    attack: Attack
    surrogate: ImageModel

    def __post_init__(self) -> None:
        """Check the type of every field.

        Raises:
            ConfigError: If a field is of another type.
        """
        check_fields(self)

    @property
    def eps(self) -> float:
        """Radius of the ball in [0, 1] pixel units."""
        return self.attack.eps

    @property
    def norm(self) -> str:
        """Norm of the ball, `"linf"` or `"l2"`."""
        return self.attack.norm

    @checked
    def __call__(
        self,
        model: ImageModel,  # noqa: ARG002 - the call of every attack
        images: Tensor,
        targets: Tensor,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Attacked model, which is not called.
            images: Clean images `(N, C, H, W)` in [0, 1].
            targets: Labels `(N,)`, or the targets that the attack takes.
            generator: Random number generator on the device of the images; None uses the global one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.
        """
        return self.attack(self.surrogate, images, targets, generator=generator)


@dataclass(frozen=True, kw_only=True)
class WorstOf:
    """Attacks run one after another, each on the images that are still classified correctly.

    An image counts as correct only if it is correct under every attack, which is how robust accuracy should be quoted.
    The result of an image is the attacked image that changed its label, or else the candidate with the largest margin
    among all attacks and the clean image. Images that are already misclassified are returned unchanged.

    Attributes:
        attacks: Attacks in the order in which they run, at least one, all of the same norm and radius.

    Examples:
        >>> import torch
        >>> from zepad.attacks import APGD, Square
        >>> attack = WorstOf(attacks=(APGD(eps=8 / 255, steps=5), Square(eps=8 / 255, queries=5)))
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> attack(model, torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])).shape
        torch.Size([4, 3, 2, 2])
    """

    attacks: tuple[Attack, ...]

    def __post_init__(self) -> None:
        """Check the attacks.

        Raises:
            ConfigError: If there is no attack, or the budgets of the attacks differ.
        """
        check_fields(self)
        object.__setattr__(self, "attacks", tuple(self.attacks))  # a list could be changed
        require(len(self.attacks) > 0, "attacks", self.attacks, "at least one attack")
        budgets = sorted({(attack.norm, attack.eps) for attack in self.attacks})
        require(len(budgets) == 1, "attacks", budgets, "attacks of one norm and eps")

    @property
    def eps(self) -> float:
        """Radius of the ball in [0, 1] pixel units."""
        return self.attacks[0].eps

    @property
    def norm(self) -> str:
        """Norm of the ball, `"linf"` or `"l2"`."""
        return self.attacks[0].norm

    @checked
    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Map from images to logits `(N, K)`, which is attacked and judges every attack.
            images: Clean images `(N, C, H, W)` in [0, 1].
            targets: Labels, integer `(N,)`.
            generator: Random number generator on the device of the images, shared by all attacks; None uses the global
                one of torch.

        Returns:
            Attacked images `(N, C, H, W)`, inside the ball and in [0, 1], detached.

        Raises:
            InputError: If the labels do not fit the images, or an attack raises it.
        """
        check_images(images)
        labels = check_labels(targets, count=len(images))
        images = images.detach()

        def attempt(attack: Attack, left: Tensor) -> Tensor:
            return attack(model, images[left], labels[left], generator=generator)

        with evaluating(model):
            with torch.no_grad():
                outputs = accurate(model(images))
            return strongest(model, images, labels, outputs, [partial(attempt, attack) for attack in self.attacks])


@checked
def apgd_square_ensemble(
    eps: float, *, norm: str = "linf", steps: int = 100, restarts: int = 1, queries: int = 5000
) -> WorstOf:
    """Return APGD-CE, APGD-DLR and Square as one attack, each run on the images that are still classified correctly.

    The ensemble resembles the standard version of AutoAttack but is not AutoAttack, which has APGD-T in place of
    APGD-DLR and also FAB-T. Its numbers must not be quoted as those of AutoAttack.

    Args:
        eps: Radius of the ball in [0, 1] pixel units.
        norm: Norm of the ball, `"linf"`.
        steps: Number of gradient steps of each restart of APGD.
        restarts: Number of random starts of APGD.
        queries: Largest number of queries of Square for each image.

    Returns:
        An attack on classifiers of at least three classes.

    Raises:
        ConfigError: If a setting is out of range.

    References:
        Croce, Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
        ICML 2020, arXiv 2003.01690.
    """
    return WorstOf(
        attacks=(
            APGD(eps=eps, norm=norm, steps=steps, restarts=restarts, loss_fn=cross_entropy),
            APGD(eps=eps, norm=norm, steps=steps, restarts=restarts, loss_fn=dlr),
            Square(eps=eps, norm=norm, queries=queries),
        )
    )
