"""Attacks on a deployed ensemble by somebody who knows all of it: surrogates, a detector evader, the worst of several.

The plainest adaptive attack needs nothing from here: any attack on the ensemble itself, which maps images to fused
logits, differentiates through the fusion. What this module adds are callables that give an attacker better gradients
than the fusion does, an attack that keeps the detector silent, and attacks run one after another on what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..config import require
from ..errors import InputError
from ..functional import detection_score, hardened_log_probabilities
from ..functional.precision import accurate
from ..inputs import check_labels
from ..modes import evaluating
from ..types import ImageModel
from .apgd import APGD, ascend, check_ascent, likeliest_wrong, strongest
from .pgd import Attack, AttackObjective, cross_entropy, dlr, margin
from .square import Square

BranchLogits = Callable[[Tensor], Tensor]
"""Maps images to the stacked logits `(B, N, K)` of the branches, as `ZePAD.branch_logits`."""


class _OfBranches(nn.Module):
    """Images to a function of the branches' logits. Holds the module behind a bound method, so that modes reach it."""

    def __init__(self, branch_logits: BranchLogits, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        if isinstance(branch_logits, MethodType) and isinstance(branch_logits.__self__, nn.Module):
            self.owner = branch_logits.__self__
        self.branch_logits = branch_logits
        self.reduce = reduce

    def forward(self, images: Tensor) -> Tensor:
        return self.reduce(self.branch_logits(images))


def mean_logits(branch_logits: BranchLogits) -> nn.Module:
    """Return the ensemble with equal weights: a surrogate whose gradients the confidence weights do not shape.

    Robust accuracy should be quoted as the worse of this attack and one on the fused logits: either may do more harm.

    Args:
        branch_logits: Images to `(B, N, K)`, a module or a method of one, such as `defense.branch_logits`.

    Returns:
        A module from images to logits `(N, K)`.

    Examples:
        >>> import torch
        >>> mean_logits(lambda images: torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]]]))(torch.zeros(1, 3, 2, 2))
        tensor([[2., 2.]])
    """
    return _OfBranches(branch_logits, lambda logits: logits.mean(dim=0))


def one_branch(branch_logits: BranchLogits, index: int) -> nn.Module:
    """Return one branch of the ensemble as a surrogate: hardened branches first, -1 is the benign one.

    Args:
        branch_logits: As in `mean_logits`.
        index: Of the branch.

    Returns:
        A module from images to logits `(N, K)`.
    """
    return _OfBranches(branch_logits, lambda logits: logits[index])


def gap_score(branch_logits: BranchLogits) -> nn.Module:
    """Return `zepad.functional.detection_score` as a differentiable function of images, for `DetectorEvading`.

    Args:
        branch_logits: As in `mean_logits`.

    Returns:
        A module from images to scores `(N,)`, larger is more suspicious.
    """
    return _OfBranches(branch_logits, detection_score)


def hardened_branches(branch_logits: BranchLogits) -> nn.Module:
    """Return what the hardened branches say together: the logarithm of their mean probability.

    Args:
        branch_logits: As in `mean_logits`, of two branches or more, the benign one last.

    Returns:
        A module from images to logits `(N, K)`.
    """
    return _OfBranches(branch_logits, hardened_log_probabilities)


def fused_by(branch_logits: BranchLogits, fuse: Any) -> nn.Module:
    """Return the ensemble under another rule than its own: attacks transfer between rules.

    Args:
        branch_logits: As in `mean_logits`.
        rule: One of `zepad.functional.FUSION_RULES`.
        **parameters: Of the rule.

    Returns:
        A module from images to logits `(N, K)`.
    """
    return _OfBranches(branch_logits, fuse)


@dataclass(frozen=True, kw_only=True)
class JointAPGD:
    """Make the hardened branches and the benign branch wrong about the same class, at once.

    Rules that bound the benign branch's vote hide its gradient: a vote of probability one has none. This attack climbs
    branch by branch instead, towards one wrong class after another: for target `t` and label `y` it maximises
    `log p_H(t) - log p_H(y) + min(z_B(t) - z_B(y), cap)`, with the hardened branches' mean probability `p_H` and the
    benign logits `z_B`. Once the benign branch is lost by `cap`, all that is left of the budget goes to the others.
    An image is won when the fused decision is wrong; for any other the result is the point with the largest fused
    margin that the targets led to.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `8 / 255`.
        branch_logits: Images to `(B, N, K)`, such as `defense.branch_logits`, hardened branches first.
        fuse: Stacked logits to fused ones, such as `defense.fusion`.
        steps: Number of gradient steps for each target class.
        classes: Number of target classes, those likeliest to the hardened branches; at most all wrong ones.
        cap: Lead of the target in the benign logits beyond which nothing is gained.
        norm: `"linf"` or `"l2"`.

    References:
        Tramer, Carlini, Brendel, Madry, On Adaptive Attacks to Adversarial Example Defenses, NeurIPS 2020, arXiv
        2002.08347 (a loss that is consistent with the goal, in place of one that the defense hides).
    """

    eps: float
    branch_logits: BranchLogits
    fuse: Callable[[Tensor], Tensor]
    steps: int = 100
    classes: int = 3
    cap: float = 5.0
    norm: str = "linf"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        check_ascent(self.eps, self.norm, self.steps, 1)
        require(self.classes >= 1, "classes", self.classes, "at least 1")
        require(self.cap > 0, "cap", self.cap, "a positive number")

    def __call__(
        self,
        model: ImageModel,
        images: Tensor,
        targets: Tensor,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Attack a batch. Arguments, result and errors as in `APGD`; `model` is what the branches belong to."""
        labels = check_labels(targets, count=len(images))
        images = images.detach()

        def attempt(aim: Tensor, left: Tensor) -> Tensor:
            return self._aim(images[left], labels[left], aim[left], generator)

        def fused(points: Tensor) -> Tensor:
            return self.fuse(accurate(self.branch_logits(points)))

        with evaluating(model), evaluating(getattr(self.branch_logits, "__self__", None)):
            with torch.no_grad():
                logits = accurate(self.branch_logits(images))
            aims = likeliest_wrong(hardened_log_probabilities(logits), labels, self.classes)
            return strongest(fused, images, labels, self.fuse(logits), [partial(attempt, aim) for aim in aims])

    def _aim(self, images: Tensor, labels: Tensor, aim: Tensor, generator: Generator | None) -> Tensor:
        def evaluate(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            logits = accurate(self.branch_logits(points))
            pair = torch.stack([aim[rows], labels[rows]], dim=1)
            hardened, benign = (
                outputs.gather(1, pair) @ outputs.new_tensor([1.0, -1.0])
                for outputs in (hardened_log_probabilities(logits), logits[-1])
            )
            return hardened + benign.clamp_max(self.cap), self.fuse(logits).argmax(dim=1) != labels[rows]

        return ascend(evaluate, images, eps=self.eps, norm=self.norm, steps=self.steps, generator=generator)


@dataclass(frozen=True, kw_only=True)
class DetectorEvading:
    """Change the decision and keep the detector silent: two goals in one ascent.

    Maximises `objective(model(x), y) - weight * max(0, score(x) - threshold)` with the steps of `APGD`. An image counts
    as won when its label is wrong and its score does not exceed the threshold; then it is shown to the model no more.
    For any other image the result is the point where that sum was highest.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `8 / 255`.
        score: Images to scores `(N,)`, differentiable and larger where suspicious, such as
            `defense.score`.
        threshold: An image is flagged when its score exceeds this.
        weight: Of the excess of the score over the threshold.
        steps: Number of gradient steps of each restart.
        restarts: Random starts for images not yet won.
        norm: `"linf"` or `"l2"`.
        objective: What harms the decision: `margin`, `cross_entropy`, `dlr` or any function like them.

    References:
        Carlini, Wagner, Adversarial Examples Are Not Easily Detected: Bypassing Ten Detection Methods, AISec 2017,
        arXiv 1705.07263 (a detector's loss beside the classifier's).
    """

    eps: float
    score: Callable[[Tensor], Tensor]
    threshold: float
    weight: float = 1.0
    steps: int = 100
    restarts: int = 1
    norm: str = "linf"
    objective: AttackObjective = margin

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        check_ascent(self.eps, self.norm, self.steps, self.restarts)
        require(self.threshold == self.threshold, "threshold", self.threshold, "a number")
        require(0 <= self.weight < float("inf"), "weight", self.weight, "a number of zero or more")

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Any map from images to logits `(N, K)`: the fused logits of the ensemble, or a surrogate.
            images: `(N, C, H, W)` in [0, 1].
            targets: Labels `(N,)`.
            generator: Of the random starts, on the device of the images; None uses torch's own.

        Returns:
            Attacked images in the ball and in [0, 1], detached.

        Raises:
            InputError: If the labels do not fit, or the score is not `(N,)` or has no gradient.
        """
        labels = check_labels(targets, count=len(images))

        def evaluate(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            outputs, scores = accurate(model(points)), accurate(self.score(points))
            _check_scores(scores, points)
            excess = (scores - self.threshold).clamp_min(0)
            loss = self.objective(outputs, labels[rows]) - self.weight * excess
            return loss, (outputs.argmax(dim=1) != labels[rows]) & (scores <= self.threshold)

        with evaluating(model), evaluating(self.score):
            return ascend(
                evaluate,
                images,
                eps=self.eps,
                norm=self.norm,
                steps=self.steps,
                restarts=self.restarts,
                generator=generator,
            )


def _check_scores(scores: Tensor, images: Tensor) -> None:
    if scores.shape != images.shape[:1]:
        raise InputError(f"score must return shape ({len(images)},), one per image; got {tuple(scores.shape)}.")
    if images.requires_grad and not scores.requires_grad:
        raise InputError(
            "score must be differentiable with respect to the images; it returned a tensor without a gradient. "
            "Use defense.score instead of defense.detection_score."
        )


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """An attack crafted on a surrogate, whatever model it is used on.

    In `WorstOf` it lets one attack differentiate through the ensemble, another through `mean_logits` of its branches
    and a third through one branch, each judged by what it does to the ensemble.

    Attributes:
        attack: How it is crafted.
        surrogate: What it is crafted on; left as found.
    """

    attack: Attack
    surrogate: ImageModel

    @property
    def eps(self) -> float:
        """Radius of the ball in [0, 1] pixel units."""
        return self.attack.eps

    @property
    def norm(self) -> str:
        """Norm of the ball."""
        return self.attack.norm

    def __call__(
        self,
        model: ImageModel,  # noqa: ARG002 - every attack has one call form
        images: Tensor,
        targets: Tensor,
        *,
        generator: Generator | None = None,
    ) -> Tensor:
        """Attack a batch. Arguments and result as in `PGD`; `model` is not asked."""
        return self.attack(self.surrogate, images, targets, generator=generator)


@dataclass(frozen=True, kw_only=True)
class WorstOf:
    """Attacks run one after another, each on the images that are still classified correctly.

    An image is right only if it is right under every attack, which is how robust accuracy should be quoted. Its result
    is the attacked image that changed the label, or else the one with the largest margin among all, the clean image
    included. Images that are misclassified already are returned as they are.

    Attributes:
        attacks: At least one, all of one norm and radius.

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
            ConfigError: If there is none, or their budgets differ.
        """
        object.__setattr__(self, "attacks", tuple(self.attacks))
        require(len(self.attacks) > 0, "attacks", self.attacks, "at least one attack")
        budgets = sorted({(attack.norm, attack.eps) for attack in self.attacks})
        require(len(budgets) == 1, "attacks", budgets, "attacks of one norm and eps")

    @property
    def eps(self) -> float:
        """Radius of the ball in [0, 1] pixel units."""
        return self.attacks[0].eps

    @property
    def norm(self) -> str:
        """Norm of the ball."""
        return self.attacks[0].norm

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Any map from images to logits `(N, K)`; it judges every attack.
            images: `(N, C, H, W)` in [0, 1].
            targets: Labels `(N,)`.
            generator: Shared by all attacks, on the device of the images; None uses torch's own.

        Returns:
            Attacked images in the ball and in [0, 1], detached.

        Raises:
            InputError: If the labels do not fit, and as the attacks do.
        """
        labels = check_labels(targets, count=len(images))
        images = images.detach()

        def attempt(attack: Attack, left: Tensor) -> Tensor:
            return attack(model, images[left], labels[left], generator=generator)

        with evaluating(model):
            with torch.no_grad():
                outputs = accurate(model(images))
            return strongest(model, images, labels, outputs, [partial(attempt, attack) for attack in self.attacks])


def apgd_square_ensemble(
    eps: float, *, norm: str = "linf", steps: int = 100, restarts: int = 1, queries: int = 5000
) -> WorstOf:
    """Return APGD-CE, APGD-DLR and, for L-infinity, Square, one after another on what is left.

    It is built like AutoAttack's standard version but is not AutoAttack, which has targeted APGD-T in place of APGD-DLR
    and FAB-T beside them: do not quote its numbers as AutoAttack's.

    Args:
        eps: Radius of the ball in [0, 1] pixel units.
        norm: `"linf"`.
        steps: Of each APGD.
        restarts: Of each APGD.
        queries: Of Square.

    Returns:
        One attack on classifiers of at least three classes.

    Raises:
        ConfigError: If a setting is out of range.

    References:
        Croce, Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
        ICML 2020, arXiv 2003.01690.
    """
    return WorstOf(
        attacks=(
            APGD(eps=eps, norm=norm, steps=steps, restarts=restarts, objective=cross_entropy),
            APGD(eps=eps, norm=norm, steps=steps, restarts=restarts, objective=dlr),
            Square(eps=eps, norm=norm, queries=queries),
        )
    )
