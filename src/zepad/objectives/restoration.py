"""Restoration: an encoder keeps the features of its public self, on clean images and on attacked ones. No label."""

from __future__ import annotations

import torch

from ..arguments import checked
from ..modules import Branch
from .augmentation import Augmentation
from .base import Batch, Inner, ObjectiveOutput, Rates, Recipe, check_own, encoder_of, public_features, squared_distance
from .mixture import DAEMixture


@checked
def restoration(
    *,
    static: DAEMixture = DAEMixture(),
    own_eps: float | None = None,
    own_steps: int = 2,
    augmentation: Augmentation | None = None,
) -> Recipe:
    """Return the recipe that restores the features of a public encoder `E` under attacks on public encoders.

    A copy `E'` of the encoder minimises `||E'(x + delta) - E(x)||^2 + ||E'(x) - E(x)||^2`, summed over features and
    averaged over images, where `delta` is a static DAE of public encoders. No label is used, and heads fitted to `E`
    stay valid for `E'`. Attackers who craft on the public encoders are met with what they craft; those who repeat this
    training, or hold its weights, are not. `own_eps` trains against these too, and costs benign accuracy:
    feature PGD on `E'` itself, whose images add `||E'(x') - E(x)||^2`, as in FARE.

    All parts pass BatchNorm in one batch. The last epoch is kept, and `epochs=None` provides for 450 updates and at
    least 6 passes.

    Args:
        static: Mixture of attacks on the public encoders.
        own_eps: Radius of the attack on the encoder in training, in [0, 1] pixel units; None does without.
        own_steps: Number of steps of the attack on the encoder in training, where `HardenConfig` states none.
        augmentation: Random change of the images, the same for clean and attacked ones, such as `FlipCrop()`; None
            leaves them as they are.

    Raises:
        ConfigError: If a setting is out of range.

    References:
        Sitawarin et al., PubDef: Defending Against Transfer Attacks From Public Models, ICLR 2024, arXiv 2310.17645
        (static attacks from public models); Schlarmann et al., Robust CLIP, ICML 2024, arXiv 2402.12336, equation (3)
        (the distance of features).
    """
    check_own(own_eps, own_steps)
    own = None
    if own_eps is not None:
        own = Inner(loss=squared_distance, model=encoder_of, targets=public_features, eps=own_eps, steps=own_steps)
    return Recipe(
        name=f"restoration(static={static}, own_eps={own_eps}, own_steps={own_steps}, augmentation={augmentation})",
        objective=_restored_distance,
        inner=own,
        trained=("encoder",),
        choose_epoch=False,
        min_updates=450,
        min_epochs=6,
        rates=Rates(lr=1e-3, head_lr=1e-3, weight_decay=0.0, schedule="onecycle"),
        static=static,
        needs_public_features=own is None,
        augmentation=augmentation,
    )


def _restored_distance(branch: Branch, batch: Batch) -> ObjectiveOutput:
    # The attack on the branch itself moves away from the same public features.
    own = batch.public_features is None
    target = batch.targets if own else batch.public_features
    assert target is not None
    assert batch.static is not None
    parts = [batch.images, batch.static, *([batch.adversarial] if own else [])]
    features = branch.encoder(torch.cat(parts)).float()
    distances = squared_distance(features, target.repeat(len(parts), 1))
    return ObjectiveOutput(len(parts) * distances.mean())
