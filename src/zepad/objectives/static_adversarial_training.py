"""Static adversarial training: cross-entropy on clean images and on adversarial examples of public encoders."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..arguments import checked
from ..config import is_number, require
from ..modules import Branch
from .augmentation import Augmentation
from .base import Batch, Inner, ObjectiveOutput, Rates, Recipe, check_own, squared_distance
from .mixture import DAEMixture


@checked
def static_adversarial_training(
    *,
    static: DAEMixture = DAEMixture(),
    restoration_weight: float = 0.0,
    own_eps: float | None = None,
    own_steps: int = 2,
    augmentation: Augmentation | None = None,
    passes: int = 6,
) -> Recipe:
    """Return the recipe that learns a task under attacks on public encoders, as PubDef does for classifiers.

    It minimises the mean of `CE(F(E'(x)), y)` and `CE(F(E'(x + delta)), y)`, where `delta` is a static DAE of public
    encoders; `own_eps` adds a third part, attacked by PGD on the cross-entropy of the branch itself.
    `restoration_weight` adds the mean squared distance of all these features from those of the public encoder on the
    clean image, summed over features.

    All parts pass BatchNorm in one batch. The last epoch is kept, and `epochs=None` provides for 450 updates and at
    least `passes` passes.

    Args:
        static: Mixture of attacks on the public encoders.
        restoration_weight: Weight of the distance from the public features; zero leaves it out.
        own_eps: Radius of the attack on the branch in training, in [0, 1] pixel units; None does without.
        own_steps: Number of steps of the attack on the branch in training, where `HardenConfig` states none.
        augmentation: Random change of the images, the same for clean and attacked ones, such as `FlipCrop()`; None
            leaves them as they are.
        passes: Least number of passes over the images where the config states no `epochs`.

    Raises:
        ConfigError: If a setting is out of range.

    References:
        Sitawarin et al., PubDef: Defending Against Transfer Attacks From Public Models, ICLR 2024, arXiv 2310.17645.
    """
    check_own(own_eps, own_steps)
    weight = restoration_weight
    require(is_number(weight) and weight >= 0, "restoration_weight", weight, "zero or more")
    require(passes >= 1, "passes", passes, "at least 1")

    def objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
        assert batch.static is not None
        parts = [batch.images, batch.static, *([] if own_eps is None else [batch.adversarial])]
        features = branch.encoder(torch.cat(parts))
        logits = branch.head(features).float()
        loss = F.cross_entropy(logits, batch.labels.repeat(len(parts)))
        if weight:
            assert batch.public_features is not None
            target = batch.public_features.repeat(len(parts), 1)
            loss = loss + weight * squared_distance(features.float(), target).mean()
        clean, attacked, *_ = logits.detach().chunk(len(parts))
        return ObjectiveOutput(loss, attacked, clean)

    return Recipe(
        name=(
            f"static_adversarial_training(static={static}, restoration_weight={weight:g}, own_eps={own_eps}, "
            f"own_steps={own_steps}, augmentation={augmentation}, passes={passes})"
        ),
        objective=objective,
        inner=None if own_eps is None else Inner(eps=own_eps, steps=own_steps),
        choose_epoch=False,
        min_updates=450,
        min_epochs=passes,
        rates=Rates(schedule="onecycle"),
        static=static,
        needs_public_features=weight > 0,
        augmentation=augmentation,
    )
