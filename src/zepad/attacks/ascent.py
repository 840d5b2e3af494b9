"""The search of Auto-PGD: projected gradient ascent that adapts its step size, on any loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..config import check_budget, require
from ..functional.projection import BALLS, Ball, project_pixels

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""A map from points `(n, C, H, W)` and the indices `(n,)` of their images to a loss and a verdict, both `(n,)`.

The verdict is true where the attack has succeeded and needs no better point.
"""

_MOMENTUM = 0.75  # alpha of the paper: the weight of the new step
_RISES = 0.75  # rho of the paper: the share of steps that must raise the loss


def check_ascent(eps: float, norm: str, steps: int, restarts: int) -> None:
    """Check the settings of `ascend`.

    Raises:
        ConfigError: If a setting is out of range.
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
    """Maximise a loss in the ball around each image with the step size schedule of Auto-PGD.

    Args:
        evaluate: Function that returns the loss and the verdict of points. It is called at most
            `1 + restarts * (steps + 1)` times for each image, and no more once the verdict of the image was true.
        images: Clean images `(N, C, H, W)` in [0, 1].
        eps: Radius of the ball in [0, 1] pixel units.
        norm: Norm of the ball, `"linf"` or `"l2"`.
        steps: Number of gradient steps of each restart.
        restarts: Number of random starts for images without a true verdict.
        generator: Random number generator on the device of the images; None uses the global one of torch.

    Returns:
        For each image the point whose verdict was true, or else the point with the largest loss, where the clean image
        is one of the candidates.

    References:
        Croce, Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
        ICML 2020, arXiv 2003.01690, algorithm 1.
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
        points, losses, verdicts = _Search(evaluate, images[left], left, BALLS[norm], eps).run(start, steps)
        better = verdicts | (losses > highest[left])
        best[left[better]], highest[left[better]] = points[better], losses[better]
        won[left] = verdicts
    return best


class _Climb(NamedTuple):
    """State of the search, one row per image that is still under attack; `at` holds the indices of the images."""

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


class _Search:
    """One restart: the best points `(n, C, H, W)` so far with their losses and verdicts, both `(n,)`."""

    def __init__(self, evaluate: Evaluate, images: Tensor, rows: Tensor, ball: Ball, eps: float) -> None:
        self.evaluate, self.images, self.rows, self.ball, self.eps = evaluate, images, rows, ball, eps
        self.points = images.clone()
        self.losses = images.new_zeros(len(images))
        self.verdicts = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def run(self, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        checkpoints, last_checkpoint = _checkpoints(steps), 0
        climb = self._begin(start)
        for count in range(1, steps + 1):
            if not len(climb.at):
                break
            climb = self._advance(climb, _MOMENTUM if count > 1 else 1.0)
            if count in checkpoints:
                climb = _check_progress(climb, count - last_checkpoint)
                last_checkpoint = count
        self.points[climb.at] = self.images[climb.at] + climb.best
        self.losses[climb.at] = climb.best_loss
        return self.points.clamp(0, 1), self.losses, self.verdicts

    def _begin(self, start: Tensor) -> _Climb:
        images = self.images
        at = torch.arange(len(images), device=images.device)
        delta = project_pixels(images, start)
        loss, won, gradient = self._differentiate(at, delta)
        self.losses = loss.clone()
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
            step=images.new_full((len(images), *[1] * (images.ndim - 1)), 2 * self.eps),
            rises=torch.zeros_like(at),
            halved=torch.zeros_like(won),
        )
        return self._settle(climb, won)

    def _advance(self, climb: _Climb, momentum: float) -> _Climb:
        base = self.images[climb.at]
        target = self._project(base, climb.delta + climb.step * self.ball.steepest(climb.gradient))
        moved = momentum * (target - climb.delta) + (1 - momentum) * (climb.delta - climb.previous)
        delta = self._project(base, climb.delta + moved)
        loss, won, gradient = self._differentiate(climb.at, delta)
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
        return self._settle(climb, won)

    def _differentiate(self, at: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            points = (self.images[at] + delta).clamp(0, 1).requires_grad_()
            loss, won = self.evaluate(points, self.rows[at])
            (gradient,) = torch.autograd.grad(loss.sum(), points)
        return loss.detach(), won, gradient

    def _project(self, base: Tensor, delta: Tensor) -> Tensor:
        return project_pixels(base, self.ball.project(delta, self.eps))

    def _settle(self, climb: _Climb, won: Tensor) -> _Climb:
        """Record the images whose verdict is true, and drop them from the search."""
        if not won.any():
            return climb
        winners = climb.keep(won)
        self.points[winners.at] = self.images[winners.at] + winners.delta
        self.losses[winners.at], self.verdicts[winners.at] = winners.loss, True
        return climb.keep(~won)


def _check_progress(climb: _Climb, window: int) -> _Climb:
    """Halve the step and return to the best point where condition 1 or 2 of the paper holds."""
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
    """Return the checkpoints: 22 % of the steps, then gaps that shrink by 3 % of the steps down to 6 %."""
    share, gap = 22, 22
    shares = [share]
    while share < 100:
        gap = max(gap - 3, 6)
        share += gap
        shares.append(share)
    return {-(-share * steps // 100) for share in shares}  # integers, because 0.41 * 100 exceeds 41


def _where(rows: Tensor, this: Tensor, other: Tensor) -> Tensor:
    return torch.where(rows.view(-1, *[1] * (this.ndim - 1)), this, other)
