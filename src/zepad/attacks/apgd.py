"""Auto-PGD: projected gradient ascent whose step size looks after itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..config import check_budget, require
from ..errors import InputError
from ..functional.precision import accurate
from ..functional.projection import BALLS, Ball, project_pixels
from ..inputs import check_labels
from ..modes import evaluating
from ..types import ImageModel
from .pgd import AttackObjective, cross_entropy, margin

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps points `(n, C, H, W)` and the indices of their images `(n,)` to a loss and a verdict each, both `(n,)`.

The verdict is true where the attack has won and needs no better point.
"""

_MOMENTUM = 0.75  # the paper's alpha
_RISES = 0.75  # the paper's rho: the share of steps that must raise the loss


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Auto-PGD, an untargeted attack on a classifier without a step size to choose.

    The step starts at `2 * eps`. At given checkpoints it is halved, and the search goes on from the best point so far,
    where too few steps raised the objective or no better point was found. Images that are misclassified already are
    returned as they are, and an image is no longer shown to the model once its label is wrong. For any other image the
    result is the point with the highest objective, the image itself included.

    APGD-CE is `APGD(objective=cross_entropy)`, APGD-DLR is `APGD(objective=dlr)`.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `8 / 255`.
        steps: Number of gradient steps of each restart.
        restarts: Random starts for images that still hold.
        norm: `"linf"` or `"l2"`.
        objective: What the attack maximises: `cross_entropy`, `dlr`, `margin` or any function like them.

    Examples:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
        >>> attacked = APGD(eps=8 / 255, steps=5)(model, images, labels)
        >>> bool((attacked - images).abs().max() <= 8 / 255 + 1e-6)
        True

    References:
        Croce, Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
        ICML 2020, arXiv 2003.01690, algorithm 1.
    """

    eps: float
    steps: int = 100
    restarts: int = 1
    norm: str = "linf"
    objective: AttackObjective = cross_entropy

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        check_ascent(self.eps, self.norm, self.steps, self.restarts)

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch.

        Args:
            model: Any map from images to logits `(N, K)`.
            images: `(N, C, H, W)` in [0, 1].
            targets: Labels `(N,)`.
            generator: Of the random starts, on the device of the images; None uses torch's own.

        Returns:
            Attacked images in the ball and in [0, 1], detached.

        Raises:
            InputError: If the labels do not fit, or the objective needs more classes.
        """
        labels = check_labels(targets, count=len(images))

        def evaluate(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            outputs = accurate(model(points))
            return self.objective(outputs, labels[rows]), outputs.argmax(dim=1) != labels[rows]

        with evaluating(model):
            return ascend(
                evaluate,
                images,
                eps=self.eps,
                norm=self.norm,
                steps=self.steps,
                restarts=self.restarts,
                generator=generator,
            )


def targeted_dlr(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio of each image, `(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)`.

    Args:
        outputs: Logits `(N, K)` of at least four classes.
        targets: Label `y` and target class `t` of each image, `(N, 2)`.

    Returns:
        `(N,)`, larger where the target class is nearer to winning.

    Raises:
        InputError: If there are fewer than four classes.

    References:
        As `APGD`, equation 7.
    """
    classes = outputs.shape[1]
    if classes < 4:
        raise InputError(
            f"the targeted difference of logits ratio compares the first, third and fourth logit and needs at least 4 "
            f"classes; got {classes}. Use APGD with objective=dlr or cross_entropy."
        )
    highest = outputs.topk(4, dim=1).values
    right, aim = outputs.gather(1, targets).unbind(dim=1)
    return (aim - right) / (highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2).clamp_min(1e-12)


@dataclass(frozen=True, kw_only=True)
class TargetedAPGD:
    """Auto-PGD with the targeted difference of logits ratio, towards the likeliest wrong classes one after another.

    The result of an image whose label holds is the point with the largest margin. Otherwise as `APGD`.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units.
        steps: Number of gradient steps for each target class.
        classes: Number of target classes, those with the largest logits on the clean image; at most all wrong ones.
        norm: `"linf"` or `"l2"`.

    References:
        As `APGD`, section 5 (APGD-T).
    """

    eps: float
    steps: int = 100
    classes: int = 9
    norm: str = "linf"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        check_ascent(self.eps, self.norm, self.steps, 1)
        require(self.classes >= 1, "classes", self.classes, "at least 1")

    def __call__(
        self, model: ImageModel, images: Tensor, targets: Tensor, *, generator: Generator | None = None
    ) -> Tensor:
        """Attack a batch. Arguments, result and errors as in `APGD`; at least four classes are needed."""
        labels = check_labels(targets, count=len(images))
        images = images.detach()

        def attempt(aim: Tensor, left: Tensor) -> Tensor:
            return self._aim(model, images[left], labels[left], aim[left], generator)

        with evaluating(model):
            with torch.no_grad():
                outputs = accurate(model(images))
            aims = likeliest_wrong(outputs, labels, self.classes)
            return strongest(model, images, labels, outputs, [partial(attempt, aim) for aim in aims])

    def _aim(
        self, model: ImageModel, images: Tensor, labels: Tensor, aim: Tensor, generator: Generator | None
    ) -> Tensor:
        pairs = torch.stack([labels, aim], dim=1)

        def evaluate(points: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            outputs = accurate(model(points))
            return targeted_dlr(outputs, pairs[rows]), outputs.argmax(dim=1) != labels[rows]

        return ascend(evaluate, images, eps=self.eps, norm=self.norm, steps=self.steps, generator=generator)


def likeliest_wrong(outputs: Tensor, labels: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return the wrong classes with the largest logits as target classes `(N,)`, the likeliest first.

    Args:
        outputs: Logits `(N, K)`.
        labels: `(N,)`.
        count: Number of target classes; at most all wrong ones.
    """
    wrong = outputs.scatter(1, labels[:, None], -torch.inf)
    return wrong.topk(min(count, outputs.shape[1] - 1), dim=1).indices.unbind(dim=1)


def strongest(
    model: ImageModel,
    images: Tensor,
    labels: Tensor,
    outputs: Tensor,
    attempts: Iterable[Callable[[Tensor], Tensor]],
) -> Tensor:
    """Attack one way after another the images that still hold, and keep what does most harm.

    Args:
        model: Images to logits `(N, K)`; it judges every attempt.
        images: `(N, C, H, W)`.
        labels: `(N,)`.
        outputs: What the model says of the images as they are.
        attempts: Map the indices of images that hold `(n,)` to attacked images.

    Returns:
        For each image the attempt that changed the label, or else the one with the largest margin, the image included.
    """
    worst = images.clone()
    highest, won = margin(outputs, labels), outputs.argmax(dim=1) != labels
    for attempt in attempts:
        left = (~won).nonzero().flatten()
        if not len(left):
            break
        attacked = attempt(left)
        with torch.no_grad():
            outputs = accurate(model(attacked))
        reached, fooled = margin(outputs, labels[left]), outputs.argmax(dim=1) != labels[left]
        better = fooled | (reached > highest[left])
        worst[left[better]], highest[left[better]] = attacked[better], reached[better]
        won[left] = fooled
    return worst


def check_ascent(eps: float, norm: str, steps: int, restarts: int) -> None:
    """Refuse settings that `ascend` cannot work with.

    Raises:
        ConfigError: Naming the field, the value and what was expected.
    """
    require(norm in BALLS, "norm", norm, f"one of {sorted(BALLS)}")
    check_budget(eps, norm)
    require(steps >= 1, "steps", steps, "at least 1")
    require(restarts >= 1, "restarts", restarts, "at least 1")


def ascend(
    evaluate: Evaluate,
    images: Tensor,
    *,
    eps: float,
    norm: str,
    steps: int,
    restarts: int = 1,
    generator: Generator | None = None,
) -> Tensor:
    """Maximise a loss in the ball around each image with the schedule of Auto-PGD, until the verdict is true.

    Args:
        evaluate: Loss and verdict of points. It is asked for each image `1 + restarts * (steps + 1)` times at most, and
            no more once the verdict was true.
        images: `(N, C, H, W)` in [0, 1].
        eps: Radius of the ball in [0, 1] pixel units.
        norm: `"linf"` or `"l2"`.
        steps: Gradient steps of each restart.
        restarts: Random starts for images without a true verdict.
        generator: Of the random starts, on the device of the images; None uses torch's own.

    Returns:
        For each image the point whose verdict was true, or else that with the highest loss, the image included.
    """
    images = images.detach()
    best = images.clone()
    rows = torch.arange(len(images), device=images.device)
    with torch.no_grad():
        highest, won = evaluate(images, rows)
    for _ in range(restarts):
        left = rows[~won]
        if not len(left):
            break
        start = BALLS[norm].random(images[left], eps, generator)
        points, losses, verdicts = _climb(evaluate, images[left], left, start, BALLS[norm], eps, steps)
        better = verdicts | (losses > highest[left])
        best[left[better]], highest[left[better]] = points[better], losses[better]
        won[left] = verdicts
    return best


class _Climb(NamedTuple):
    """One row per image still under attack; `at` says which of the images it is."""

    at: Tensor
    delta: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    best_at_checkpoint: Tensor
    step: Tensor
    rises: Tensor
    halved: Tensor

    def keep(self, rows: Tensor) -> _Climb:
        return _Climb(*(field[rows] for field in self))


def _climb(
    evaluate: Evaluate, images: Tensor, rows: Tensor, start: Tensor, ball: Ball, eps: float, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    checkpoints = _checkpoints(steps)

    def differentiate(at: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            points = (images[at] + delta).clamp(0, 1).requires_grad_()
            loss, won = evaluate(points, rows[at])
            (gradient,) = torch.autograd.grad(loss.sum(), points)
        return loss.detach(), won, gradient

    def project(base: Tensor, delta: Tensor) -> Tensor:
        return project_pixels(base, ball.project(delta, eps))

    def settle(climb: _Climb, won: Tensor) -> _Climb:
        """Take the winners out of the climb."""
        if not won.any():
            return climb
        winners = climb.keep(won)
        points[winners.at] = images[winners.at] + winners.delta
        losses[winners.at], verdicts[winners.at] = winners.loss, True
        return climb.keep(~won)

    at = torch.arange(len(images), device=images.device)
    delta = project_pixels(images, start)
    loss, won, gradient = differentiate(at, delta)
    points, losses, verdicts = images.clone(), loss.clone(), won.clone()
    step = images.new_full((len(images), *[1] * (images.ndim - 1)), 2 * eps)
    climb = _Climb(
        at=at,
        delta=delta,
        previous=delta,
        gradient=gradient,
        loss=loss,
        best=delta,
        best_gradient=gradient,
        best_loss=loss,
        best_at_checkpoint=loss,
        step=step,
        rises=torch.zeros_like(at),
        halved=torch.zeros_like(won),
    )
    climb = settle(climb, won)
    last_checkpoint = 0
    for count in range(1, steps + 1):
        if not len(climb.at):
            break
        base, momentum = images[climb.at], _MOMENTUM if count > 1 else 1.0
        target = project(base, climb.delta + climb.step * ball.steepest(climb.gradient))
        moved = momentum * (target - climb.delta) + (1 - momentum) * (climb.delta - climb.previous)
        delta = project(base, climb.delta + moved)
        loss, won, gradient = differentiate(climb.at, delta)
        better = loss > climb.best_loss
        climb = climb._replace(
            delta=delta,
            previous=climb.delta,
            gradient=gradient,
            loss=loss,
            best=_where(better, delta, climb.best),
            best_gradient=_where(better, gradient, climb.best_gradient),
            best_loss=torch.where(better, loss, climb.best_loss),
            rises=climb.rises + (loss > climb.loss),
        )
        climb = settle(climb, won)
        if count in checkpoints:
            climb = _check_progress(climb, count - last_checkpoint)
            last_checkpoint = count
    points[climb.at] = (images[climb.at] + climb.best).clamp(0, 1)
    losses[climb.at] = climb.best_loss
    return points.clamp(0, 1), losses, verdicts


def _check_progress(climb: _Climb, window: int) -> _Climb:
    """Halve the step and go back to the best point where the paper's condition 1 or 2 holds."""
    stalled = ~climb.halved & (climb.best_loss <= climb.best_at_checkpoint)
    stuck = (climb.rises < _RISES * window) | stalled
    return climb._replace(
        delta=_where(stuck, climb.best, climb.delta),
        gradient=_where(stuck, climb.best_gradient, climb.gradient),
        loss=torch.where(stuck, climb.best_loss, climb.loss),
        step=_where(stuck, climb.step / 2, climb.step),
        best_at_checkpoint=climb.best_loss,
        rises=torch.zeros_like(climb.rises),
        halved=stuck,
    )


def _checkpoints(steps: int) -> set[int]:
    """Return the steps after which progress is looked at: at 22 % of all, then gaps that shrink by 3 % down to 6 %."""
    share, gap = 22, 22
    shares = [share]
    while share < 100:
        gap = max(gap - 3, 6)
        share += gap
        shares.append(share)
    return {-(-share * steps // 100) for share in shares}  # whole numbers: 0.41 * 100 exceeds 41


def _where(rows: Tensor, this: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (this.ndim - 1)), this, other)
