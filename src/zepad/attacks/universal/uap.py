"""Universal adversarial perturbation (UAP): add up the DeepFool steps of one image after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ...config import check_budget, require
from ...functional.precision import accurate
from ...functional.projection import project_linf
from ...types import ImageModel, Loader
from .crafting import AttackerImages, Encoders, _UniversalAttack, as_encoders, crafting, perturbed
from .perturbation import UniversalPerturbation
from .probe import attacker_logits, check_head

_BEYOND = 1e-4  # added to the distance, so that a step on the boundary itself still crosses it


def deepfool(
    model: ImageModel,
    images: Tensor,
    labels: Tensor,
    *,
    overshoot: float = 0.02,
    steps: int = 10,
    classes: int = 10,
) -> Tensor:
    """Return for each image a short step, in L2, that takes it over the nearest class boundary.

    Each iteration linearises the model and steps onto the nearest boundary; an image stops as soon as its prediction
    is no longer its label.

    Args:
        model: Images to logits `(N, K)`, each row of the image alone.
        images: `(N, C, H, W)`; the result is not clamped.
        labels: The predictions to get away from, integer `(N,)`.
        overshoot: Share by which the sum of the steps is lengthened.
        steps: Most iterations.
        classes: Boundaries to the most likely classes that are looked at.

    Returns:
        Steps `(N, C, H, W)`, detached; zero where the prediction is another already.

    References:
        Moosavi-Dezfooli et al., DeepFool, CVPR 2016, arXiv 1511.04599, algorithm 2.
    """
    total = torch.zeros_like(images)
    active = torch.arange(len(images), device=images.device)
    for _ in range(steps):
        with torch.enable_grad():
            points = (images[active] + (1 + overshoot) * total[active]).detach().requires_grad_()
            logits = model(points)
            left = logits.argmax(dim=1) == labels[active]
            if not left.any():
                break
            own = logits.gather(1, labels[active, None])
            rivals = logits.detach().scatter(1, labels[active, None], -torch.inf)
            chosen = rivals.topk(min(classes, logits.shape[1]) - 1, dim=1).indices
            gaps = own - logits.gather(1, chosen)
            slopes = [torch.autograd.grad(gap.sum(), points, retain_graph=True)[0] for gap in gaps.unbind(dim=1)]
        normals = torch.stack(slopes, dim=1)
        lengths = normals.flatten(2).norm(dim=2).clamp_min(torch.finfo(normals.dtype).tiny)
        distances = (gaps.detach() + _BEYOND) / lengths
        nearest = distances.argmin(dim=1)
        rows = torch.arange(len(active), device=images.device)
        scale = (distances / lengths)[rows, nearest].view(-1, 1, 1, 1)
        step = -scale * normals[rows, nearest]
        active, step = active[left], step[left]
        total[active] += step
    return (1 + overshoot) * total


@dataclass(frozen=True, kw_only=True)
class UAP(_UniversalAttack):
    """One L-infinity perturbation that changes the prediction of most images, made of DeepFool steps.

    For the images of a group whose prediction still stands under the perturbation, the DeepFool steps are added to it
    and the sum is projected onto the ball. A group of one is the published algorithm; larger groups share the forward
    passes.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        epochs: Most passes over the attacker's images; None takes 10. It ends earlier once enough are fooled.
        seed: Of the loader's order; the perturbation starts at zero.
        fooling_rate: Share of the attacker's images whose prediction must change, in (0, 1].
        overshoot: Of the DeepFool steps.
        steps: Most DeepFool iterations per image.
        classes: Most likely classes whose boundaries DeepFool looks at.
        group: Images whose DeepFool steps are computed at the same perturbation.
        head: Maps features to logits, of several encoders their features side by side; `torch.nn.Identity()` for a
            classifier. None fits a linear probe on the attacker's labelled images.

    References:
        Moosavi-Dezfooli et al., Universal Adversarial Perturbations, CVPR 2017, arXiv 1610.08401, algorithm 1.
    """

    eps: float
    fooling_rate: float = 0.8
    overshoot: float = 0.02
    steps: int = 10
    classes: int = 10
    group: int = 16
    head: nn.Module | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: Naming the field, the value and what was expected.
        """
        super().__post_init__()
        check_budget(self.eps)
        require(0 < self.fooling_rate <= 1, "fooling_rate", self.fooling_rate, "in (0, 1]")
        require(0 <= self.overshoot <= 1, "overshoot", self.overshoot, "in [0, 1]")
        for name, least in (("steps", 1), ("classes", 2), ("group", 1)):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= least, name, value, f"at least {least}")
        check_head(self.head)

    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on an encoder, or on several at once.

        Args:
            encoder: Images to features `(N, D)`, or a sequence of such; left as found.
            images: A loader of `(images, labels)` batches of one size; with a `head` one tensor `(N, C, H, W)` in
                [0, 1] or a loader with or without labels, which are ignored.
            progress: Show a bar.

        Returns:
            The perturbation, on the device of the encoder. Its provenance states the fooling rate on the attacker's
            images and the number of passes.

        Raises:
            InputError: If images do not fit or differ in size, or labels are needed and there are none.
        """
        encoders = as_encoders(encoder)
        attacker = AttackerImages(images, encoders)
        with crafting((*encoders, self.head), self.seed):
            logits, origin = attacker_logits(encoders, attacker, self.head)
            delta, passes, fooled = self._craft(logits, attacker, progress)
        provenance = self._provenance(encoders, attacker, logits=origin, passes=passes, fooled=fooled)
        return UniversalPerturbation(delta=delta, eps=self.eps, provenance=provenance)

    def _craft(self, model: ImageModel, attacker: AttackerImages, progress: bool) -> tuple[Tensor, int, float]:
        delta = torch.empty(0)
        most = self.epochs or 10
        with tqdm(desc=type(self).__name__, unit="pass", total=most, disable=not progress) as bar:
            done, fooled = 0, 0.0
            while done < most and fooled < self.fooling_rate:
                for batch in attacker.one_pass():
                    if not delta.numel():
                        delta = torch.zeros_like(accurate(batch[:1]))
                    for images in batch.split(self.group):
                        delta = self._step(model, images, delta)
                fooled = self._fooled(model, attacker, delta)
                done += 1
                bar.update()
                bar.set_postfix(fooled=f"{fooled:.2f}")
        return delta, done, fooled

    def _step(self, model: ImageModel, images: Tensor, delta: Tensor) -> Tensor:
        with torch.no_grad():
            predicted = model(images).argmax(dim=1)
            stands = model(perturbed(images, delta)).argmax(dim=1) == predicted
        if not stands.any():
            return delta
        found = deepfool(
            lambda points: model(points.to(images.dtype)),
            accurate(perturbed(images[stands], delta)),
            predicted[stands],
            overshoot=self.overshoot,
            steps=self.steps,
            classes=self.classes,
        )
        return project_linf(delta + found.sum(dim=0, keepdim=True), self.eps)

    def _fooled(self, model: ImageModel, attacker: AttackerImages, delta: Tensor) -> float:
        changed = 0
        with torch.no_grad():
            for images in attacker.one_pass():
                before, after = model(images), model(perturbed(images, delta))
                changed += int((before.argmax(dim=1) != after.argmax(dim=1)).sum())
        return changed / attacker.count
