"""Universal adversarial perturbation (UAP), the sum of DeepFool steps over the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...arguments import checked
from ...config import check_budget, require
from ...functional.precision import accurate
from ...functional.projection import project_linf
from ...progress import stage
from ...types import ImageModel, Loader
from .crafting import AttackerImages, Encoders, _UniversalAttack, as_encoders, crafting, perturbed
from .perturbation import UniversalPerturbation
from .probe import attacker_logits

_BEYOND = 1e-4  # added to the distance, so that a point on the boundary is also moved across it


def deepfool(
    model: ImageModel,
    images: Tensor,
    labels: Tensor,
    *,
    overshoot: float = 0.02,
    steps: int = 10,
    classes: int = 10,
) -> Tensor:
    """Return for each image a perturbation of small L2 norm that changes its prediction.

    Each iteration linearises the model and moves the image to the nearest class boundary. An image is finished once its
    prediction differs from its label.

    Args:
        model: Map from images to logits `(N, K)`, where each row depends on its own image alone.
        images: Images `(N, C, H, W)`. The perturbed images are not clamped.
        labels: Predictions to move away from, integer `(N,)`.
        overshoot: Fraction by which the sum of the steps is lengthened.
        steps: Largest number of iterations.
        classes: Number of most likely classes whose boundaries are considered.

    Returns:
        Perturbations `(N, C, H, W)`, detached; zero where the prediction already differs from the label.

    References:
        Moosavi-Dezfooli et al., DeepFool, CVPR 2016, arXiv 1511.04599, algorithm 2.
    """
    total = torch.zeros_like(images)
    active = torch.arange(len(images), device=images.device)
    for _ in range(steps):
        points = (images[active] + (1 + overshoot) * total[active]).detach()
        with torch.no_grad():  # a gradient for each rival costs far more than a pass that finds who needs none
            left = model(points).argmax(dim=1) == labels[active]
        if not left.any():
            break
        active, points = active[left], points[left].requires_grad_()
        with torch.enable_grad():
            logits = model(points)
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
        total[active] -= scale * normals[rows, nearest]
    return (1 + overshoot) * total


@dataclass(frozen=True, kw_only=True)
class UAP(_UniversalAttack):
    """One L-infinity perturbation that changes the prediction of most images, a sum of DeepFool steps.

    The DeepFool steps of all images in a group whose prediction is unchanged under the perturbation are added to the
    perturbation, which is then projected onto the ball. Groups of one image give the published algorithm; larger groups
    are faster because their images share forward passes.

    Attributes:
        eps: Radius of the ball in [0, 1] pixel units, written `10 / 255`.
        epochs: Largest number of passes over the attacker's images; None takes 10. The attack ends earlier once
            `fooling_rate` is reached.
        seed: Seed of the order in which the loader yields images. The perturbation starts at zero.
        precision: Precision of the forward passes while the perturbation is fitted: `"fp32"`, `"bf16"`, or `"auto"` for
            bfloat16 where the hardware computes in it.
        fooling_rate: Share of the attacker's images whose prediction must change, in (0, 1].
        overshoot: Fraction by which the DeepFool steps are lengthened, in [0, 1].
        steps: Largest number of DeepFool iterations per image.
        classes: Number of most likely classes whose boundaries DeepFool considers.
        group: Number of images whose DeepFool steps are computed at the same perturbation.
        head: Module that maps features to logits, where the features of several encoders are concatenated;
            `torch.nn.Identity()` for a classifier. None fits a linear probe on the attacker's labelled images.

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
            ConfigError: If a field is out of range.
        """
        super().__post_init__()
        check_budget(self.eps)
        require(0 < self.fooling_rate <= 1, "fooling_rate", self.fooling_rate, "in (0, 1]")
        require(0 <= self.overshoot <= 1, "overshoot", self.overshoot, "in [0, 1]")
        for name, least in (("steps", 1), ("classes", 2), ("group", 1)):
            value = getattr(self, name)
            require(value >= least, name, value, f"at least {least}")

    @checked
    def fit(self, encoder: Encoders, images: Tensor | Loader, *, progress: bool = True) -> UniversalPerturbation:
        """Craft the perturbation on one or several encoders.

        Args:
            encoder: Encoder that maps images to features `(N, D)`, or a sequence of encoders. They are left unchanged.
            images: Loader of `(images, labels)` batches of one image size. With a `head`, also images `(N, C, H, W)` in
                [0, 1] or a loader without labels; labels are then ignored.
            progress: Whether to show a progress bar.

        Returns:
            Perturbation on the device of the encoder. Its provenance contains the fooling rate on the attacker's images
            and the number of passes.

        Raises:
            InputError: If images are invalid or differ in size, or labels are needed and missing.
        """
        encoders = as_encoders(encoder)
        attacker = AttackerImages(images, encoders)
        with crafting(self, (*encoders, self.head), attacker):
            logits, origin = attacker_logits(encoders, attacker, self.head)
            delta, passes, fooled = self._craft(logits, attacker, progress)
        provenance = self._provenance(encoders, attacker, logits=origin, passes=passes, fooled=fooled)
        return UniversalPerturbation(delta=delta, eps=self.eps, provenance=provenance)

    def _craft(self, model: ImageModel, attacker: AttackerImages, progress: bool) -> tuple[Tensor, int, float]:
        delta = torch.empty(0)
        most = self.epochs or 10
        with stage(type(self).__name__, total=most, shown=progress) as bar:
            done, fooled = 0, 0.0
            while done < most and fooled < self.fooling_rate:
                for batch in attacker.one_pass():
                    if not delta.numel():
                        delta = torch.zeros_like(accurate(batch[:1]))
                    for images in batch.split(self.group):
                        delta = self._step(model, images, delta)
                fooled = self._fooled(model, attacker, delta)
                done += 1
                bar.advance({"fooled": f"{fooled:.0%}"})
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
