"""Losses that attacks maximise, each from model outputs and targets to one value per image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..inputs import check_labels


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each image.

    Args:
        outputs: Logits `(N, K)`.
        targets: Labels, integer `(N,)`.

    Returns:
        Loss of each image, `(N,)`.

    Raises:
        InputError: If the labels do not fit the logits.
    """
    targets = check_labels(targets, count=len(outputs), num_classes=outputs.shape[1])
    return F.cross_entropy(outputs, targets, reduction="none")


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the largest wrong logit minus the right logit of each image.

    Args:
        outputs: Logits `(N, K)`.
        targets: Labels, integer `(N,)`.

    Returns:
        Margin of each image `(N,)`, positive where the image is misclassified.

    Raises:
        InputError: If the labels do not fit the logits.
    """
    targets = check_labels(targets, count=len(outputs), num_classes=outputs.shape[1])
    right = outputs.gather(1, targets[:, None]).squeeze(1)
    wrong = outputs.scatter(1, targets[:, None], -torch.inf).amax(dim=1)
    return wrong - right


def dlr(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the difference of logits ratio (DLR) of each image.

    The ratio is `(max_{i != y} z_i - z_y) / (z_(1) - z_(3))` with the sorted logits `z_(1) >= z_(2) >= ...`. Unlike the
    cross-entropy it does not change when logits are shifted or scaled, so a model cannot hide its gradient behind large
    logits.

    Args:
        outputs: Logits `(N, K)` of at least three classes.
        targets: Labels, integer `(N,)`.

    Returns:
        Ratio of each image `(N,)`, positive where the image is misclassified; it lies in [-1, 1] while the right class
        is among the two largest logits.

    Raises:
        InputError: If there are fewer than three classes.

    Examples:
        >>> import torch
        >>> dlr(torch.tensor([[4.0, 3.0, 2.0]]), torch.tensor([0]))
        tensor([-0.5000])

    References:
        Croce, Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
        ICML 2020, arXiv 2003.01690, equation 6.
    """
    classes = outputs.shape[1]
    if classes < 3:
        raise InputError(
            f"the difference of logits ratio compares the first and third logit and needs at least 3 classes; "
            f"got {classes}. Use loss_fn=margin or cross_entropy."
        )
    highest = outputs.topk(3, dim=1).values
    return margin(outputs, targets) / (highest[:, 0] - highest[:, 2]).clamp_min(1e-12)


def targeted_dlr(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio of each image.

    The ratio is `(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)` with the sorted logits `z_(1) >= z_(2) >= ...`.

    Args:
        outputs: Logits `(N, K)` of at least four classes.
        targets: Label `y` and target class `t` of each image, integer `(N, 2)`.

    Returns:
        Ratio of each image `(N,)`, larger where the target class is closer to being predicted.

    Raises:
        InputError: If there are fewer than four classes.

    References:
        Croce, Hein, Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks,
        ICML 2020, arXiv 2003.01690, equation 7.
    """
    classes = outputs.shape[1]
    if classes < 4:
        raise InputError(
            f"the targeted difference of logits ratio compares the first, third and fourth logit and needs at least "
            f"4 classes; got {classes}. Use APGD with loss_fn=dlr or cross_entropy."
        )
    highest = outputs.topk(4, dim=1).values
    right, aim = outputs.gather(1, targets).unbind(dim=1)
    return (aim - right) / (highest[:, 0] - (highest[:, 2] + highest[:, 3]) / 2).clamp_min(1e-12)


def cosine_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return one minus the cosine similarity of features and target features of each image.

    Args:
        outputs: Features `(N, D)`.
        targets: Target features `(N, D)`.

    Returns:
        Distance of each image `(N,)`, in [0, 2].
    """
    return 1 - F.cosine_similarity(outputs, targets, dim=1)


def l2_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the Euclidean distance of features and target features of each image.

    Args:
        outputs: Features `(N, D)`.
        targets: Target features `(N, D)`.

    Returns:
        Distance of each image `(N,)`, zero or more.
    """
    distance: Tensor = torch.linalg.vector_norm(outputs - targets, dim=1)
    return distance
