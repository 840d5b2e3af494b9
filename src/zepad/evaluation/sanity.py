"""Sanity checks of an evaluation: the signs that gradients are masked or attacks are too weak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..arguments import checked
from ..attacks import APGD, PGD, Square, cross_entropy
from ..modes import evaluating
from ..types import ImageModel
from .report import AttackResult, Check

_SLACK = 0.02  # share of the images by which two robust accuracies may differ by chance
_LARGE_EPS = 0.5


@checked
def check_model(model: ImageModel, images: Tensor, labels: Tensor, *, eps: float, seed: int = 0) -> Iterator[Check]:
    """Look for the signs that attacks on a model measure too little.

    Args:
        model: Images to logits `(N, K)`.
        images: `(N, C, H, W)` in [0, 1], classified right.
        labels: int64 `(N,)`.
        eps: L-infinity budget in [0, 1] pixel units.
        seed: Seed of the attacks.

    Yields:
        One result per check: random outputs, probabilities in place of logits, zero gradients, more steps doing worse,
        a large budget leaving anything, and a gradient-free attack (Square) beating a gradient attack (APGD).

    References:
        Athalye et al., Obfuscated Gradients Give a False Sense of Security, ICML 2018, arXiv 1802.00420; Carlini et
        al., On Evaluating Adversarial Robustness, arXiv 1902.06705; Croce and Hein, ICML 2020, arXiv 2003.01690.
    """
    with evaluating(model):
        yield _same_twice(model, images)
        yield _logits(model, images)
        gradient = _input_gradient(model, images, labels)
        yield _gradients(gradient, len(labels))

        def withstood(attack: PGD | APGD) -> Tensor:
            if gradient is None:
                return torch.ones_like(labels, dtype=torch.bool)
            return _survivors(model, attack, images, labels, seed)

        few, many = (_share(withstood(PGD(eps=eps, steps=n, step_size=eps / 4))) for n in (5, 40))
        yield Check(
            name="more steps do not do worse",
            passed=many <= few + _SLACK,
            detail=f"robust accuracy {few:.1%} under 5 steps of PGD, {many:.1%} under 40, on {len(labels)} images"
            + ("" if many <= few + _SLACK else ": the gradients mislead, so gradient attacks overstate robustness."),
        )
        large = _share(withstood(APGD(eps=_LARGE_EPS, steps=40)))
        classes = len(labels.unique())
        bound = max(1 / max(classes, 2), 0.1) + _SLACK
        yield Check(
            name="a large budget breaks it",
            passed=large <= bound,
            detail=f"robust accuracy {large:.1%} under APGD-CE (40 steps) at eps {_LARGE_EPS:g}"
            + ("" if large <= bound else ": no model can withstand that, so the gradients must be masked."),
        )
        yield _gradient_free(model, images, labels, withstood(APGD(eps=eps, steps=50)), eps, seed)


def check_results(results: Sequence[AttackResult]) -> Iterator[Check]:
    """Compare the threat models of one evaluation: whoever knows more can do all that one who knows less can.

    Args:
        results: The results of all attackers of one evaluation.

    Yields:
        One check, if there is a white-box attacker and another attacker of no larger budget.
    """
    white = [r for r in results if r.threat_model == "white-box"]
    pairs = []
    for other in (r for r in results if r.threat_model != "white-box"):
        able = [_robust(w) for w in white if w.norm == other.norm and w.eps >= other.eps]
        if able:
            pairs.append((min(able), _robust(other), other.name))
    if not pairs:
        return
    best, value, name = max(pairs, key=lambda pair: pair[0] - pair[1])
    passed = best <= value + _SLACK
    yield Check(
        name="knowing more does not do worse",
        passed=passed,
        detail=f"robust accuracy {best:.1%} under the best white-box attack, {value:.1%} under {name}"
        + ("" if passed else ": the white-box attacks are too weak, so read the lower number."),
    )


def _robust(result: AttackResult) -> float:
    return result.rates.robust_accuracy.value


def _same_twice(model: ImageModel, images: Tensor) -> Check:
    with torch.no_grad():
        first, second = model(images).double(), model(images).double()
    same = bool(torch.isclose(first, second, rtol=1e-4, atol=1e-4).all())
    difference = float(torch.where(first == second, 0, (first - second).abs()).max())  # infinities can be equal
    return Check(
        name="outputs are not random",
        passed=same,
        detail=f"two passes of the same images differ by up to {difference:.2g}"
        + ("" if same else ": attack the expectation over the randomness (EOT)."),
    )


def _logits(model: ImageModel, images: Tensor) -> Check:
    with torch.no_grad():
        outputs = model(images).float()
    probabilities = bool((outputs >= 0).all()) and bool((outputs.sum(dim=1) - 1).abs().max() < 1e-2)
    return Check(
        name="outputs are logits",
        passed=not probabilities,
        detail="the rows look like probabilities: their gradients vanish where the model is sure. Return logits."
        if probabilities
        else "the rows are no probabilities",
    )


def _input_gradient(model: ImageModel, images: Tensor, labels: Tensor) -> Tensor | None:
    """Return the gradient of the cross-entropy, or None where the outputs do not depend on the images for autograd."""
    with torch.enable_grad():
        given = images.detach().clone().requires_grad_()
        outputs = model(given)
        if not outputs.requires_grad:
            return None
        return torch.autograd.grad(cross_entropy(outputs.float(), labels).sum(), given, allow_unused=True)[0]


def _gradients(gradient: Tensor | None, count: int) -> Check:
    zero = 1.0 if gradient is None else float((gradient.flatten(1).abs().amax(dim=1) == 0).float().mean())
    return Check(
        name="gradients are not zero",
        passed=zero <= 0.05,
        detail=f"{zero:.1%} of {count} images have a cross-entropy gradient of exactly zero"
        + ("" if zero <= 0.05 else ": gradient attacks cannot move them. Use a margin loss and Square."),
    )


def _gradient_free(
    model: ImageModel, images: Tensor, labels: Tensor, withstood: Tensor, eps: float, seed: int
) -> Check:
    """Compare Square with a gradient attack, on the images that withstood this one, and on the others if need be."""
    square, ascent = Square(eps=eps, queries=300), _share(withstood)
    free = torch.zeros_like(withstood)
    beaten = ascent > _SLACK
    for rows in (withstood, ~withstood):
        if beaten and rows.any():
            free[rows] = _survivors(model, square, images[rows], labels[rows], seed)
            beaten = ascent > _share(free) + _SLACK
    found = f"robust accuracy {ascent:.1%} under APGD-CE (50 steps), "
    masked = f"{_share(free):.1%} under Square (300 queries): gradients are masked; trust the gradient-free number."
    return Check(
        name="a gradient attack beats a gradient-free one",
        passed=not beaten,
        detail=found + (masked if beaten else "which Square (300 queries) does not beat"),
    )


def _survivors(model: ImageModel, attack: PGD | APGD | Square, images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Return which images are classified right after an attack, bool `(N,)`."""
    generator = torch.Generator(images.device).manual_seed(seed)
    attacked = attack(model, images, labels, generator=generator)
    with torch.no_grad():
        return model(attacked).argmax(dim=1) == labels


def _share(right: Tensor) -> float:
    return float(right.float().mean())
