"""Losses of adversarial training: structure losses preserve the geometry of a batch, the others its predictions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import accurate

_MARGIN = 1e-7


def _check_pair(adversarial: Tensor, benign: Tensor) -> None:
    if adversarial.shape != benign.shape or adversarial.ndim != 2:
        raise ValueError(
            "adversarial and benign must be (N, D) tensors of the same shape; "
            f"got {tuple(adversarial.shape)} and {tuple(benign.shape)}."
        )


def _relative_distances(rows: Tensor) -> Tensor:
    """Return cosine distances minus the distance to the nearest other row, zero on the diagonal, clamped."""
    unit = F.normalize(rows, dim=1)
    distances = 1 - unit @ unit.T
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    nearest = distances.masked_fill(itself, torch.inf).amin(dim=1, keepdim=True)
    return (distances - nearest).masked_fill(itself, 0).clamp(_MARGIN, 2 - _MARGIN)


def _neighbourhoods(distances: Tensor) -> Tensor:
    similarities = 1 - distances / 2
    return similarities / similarities.sum(dim=1, keepdim=True)


def _binary_divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum()


def structure_loss(*, adversarial: Tensor, benign: Tensor) -> Tensor:
    """Return the paper's feature-structure loss `L_f`, which pulls the adversarial structure towards the benign one.

    Rows are L2-normalised. `D_ij = (1 - cos_ij) - min_{k != i} (1 - cos_ik)` for i != j, `D_ii = 0`, clamped
    to [1e-7, 2 - 1e-7]; `S = 1 - D / 2`, each row divided by its sum, gives `P` (benign) and `Q` (adversarial);
    `L_f = sum_ij [P log(P / Q) + (1 - P) log((1 - P) / (1 - Q))]`.

    The loss is a sum over the batch and grows with the batch size; divide it by N for a weight that does not depend on
    the batch size.

    Args:
        adversarial: Features of the attacked images, `(N, D)`, any float dtype.
        benign: Features of the same images before the attack, `(N, D)`. Detach them to make them a fixed target.

    Returns:
        A non-negative scalar; zero for equal inputs and for a single row. Half precision is computed in float32.

    Raises:
        ValueError: If the two are not `(N, D)` tensors of the same shape.

    Examples:
        >>> import torch
        >>> features = torch.eye(3)
        >>> structure_loss(adversarial=features, benign=features)
        tensor(0.)

    References:
        ZePAD (ICLR 2026, arXiv 2602.11204), equation of `L_f`.
    """
    _check_pair(adversarial, benign)
    if len(benign) < 2:  # one row has no neighbours, hence no structure
        return (adversarial.sum() + benign.sum()) * 0
    p = _neighbourhoods(_relative_distances(accurate(benign)))
    q = _neighbourhoods(_relative_distances(accurate(adversarial)))
    return _binary_divergence(p, q)


def genetic_regularization(*, adversarial: Tensor, benign: Tensor, labels: Tensor) -> Tensor:
    """Return Gen-AF's genetic regularization, the form of `L_f` in the paper's public code.

    It works on logits and adjusts the target structure by label and difficulty: with `s_i = CE(benign_i, y_i)`,
    `W_ij = tanh((s_i + s_j) / 32)` and `M_ij = +1` where the labels differ, else -1, the target distances become
    `clamp((1 - W) D + 2 M W)`. All other steps are those of `structure_loss`.

    Args:
        adversarial: Logits of the attacked images, `(N, K)`, any float dtype.
        benign: Logits of the same images before the attack, `(N, K)`.
        labels: Class of each image, int64 `(N,)`.

    Returns:
        A non-negative scalar summed over the batch; zero for a single row. Half precision is computed in float32.

    Raises:
        ValueError: If the logits are not `(N, K)` tensors of the same shape, or the labels are not `(N,)`.

    Examples:
        >>> import torch
        >>> logits = torch.eye(3)
        >>> genetic_regularization(adversarial=logits, benign=logits, labels=torch.arange(3)) > 0
        tensor(True)

    References:
        Gen-AF (IEEE S&P 2024, arXiv 2403.10801); the public code of ZePAD.
    """
    _check_pair(adversarial, benign)
    if labels.shape != benign.shape[:1]:
        raise ValueError(f"labels must have shape ({len(benign)},); got {tuple(labels.shape)}.")
    if len(benign) < 2:
        return (adversarial.sum() + benign.sum()) * 0
    benign, adversarial = accurate(benign), accurate(adversarial)
    difficulty = F.cross_entropy(benign, labels, reduction="none")
    weight = torch.tanh((difficulty[:, None] + difficulty[None, :]) / 32)
    sign = (labels[:, None] != labels[None, :]).to(weight.dtype) * 2 - 1
    target = (1 - weight) * _relative_distances(benign) + 2 * sign * weight
    p = _neighbourhoods(target.clamp(_MARGIN, 2 - _MARGIN))
    q = _neighbourhoods(_relative_distances(adversarial))
    return _binary_divergence(p, q)


def kl_divergence(*, logits: Tensor, target: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence `KL(softmax(target) || softmax(logits))` of each row.

    Args:
        logits: Logits of the approximating distribution, `(N, K)`, any float dtype.
        target: Logits of the target distribution, `(N, K)`. Gradients flow into both arguments.

    Returns:
        Divergences `(N,)`, non-negative up to rounding; zero where the two differ by a constant. Half precision is
        computed in float32.

    Raises:
        ValueError: If the two are not `(N, K)` tensors of the same shape.

    Examples:
        >>> import torch
        >>> kl_divergence(logits=torch.tensor([[1.0, 2.0]]), target=torch.tensor([[1.0, 2.0]]))
        tensor([0.])

    References:
        TRADES (ICML 2019, arXiv 1901.08573), equation (5), with the multi-class loss of section 5.
    """
    if logits.shape != target.shape or logits.ndim != 2:
        raise ValueError(
            "logits and target must be (N, K) tensors of the same shape; "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}."
        )
    log_q, log_p = accurate(logits).log_softmax(dim=1), accurate(target).log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def boosted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return MART's boosted cross-entropy `-log p_y - log(1 - max_{k != y} p_k)` of each row, `p = softmax(logits)`.

    The second term rewards a margin over the best wrong class. It is computed from the logits of the other classes
    without cancellation.

    Args:
        logits: Logits `(N, K)` of any float dtype, with K at least 2.
        labels: Class of each row, int64 `(N,)`.

    Returns:
        Non-negative losses `(N,)`. Half precision is computed in float32.

    Raises:
        ValueError: If `logits` is not `(N, K)` with K at least 2, or the labels are not `(N,)`.

    Examples:
        >>> import torch
        >>> boosted_cross_entropy(torch.zeros(1, 2), torch.tensor([0]))  # log 2, twice
        tensor([1.3863])

    References:
        MART (Wang et al., ICLR 2020), equation (10).
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            "logits must be (N, K) with K at least 2, and labels (N,); "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    logits = accurate(logits)
    wrong = logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1, keepdim=True)
    rest = logits.scatter(1, wrong, -torch.inf).logsumexp(dim=1) - logits.logsumexp(dim=1)
    return F.cross_entropy(logits, labels, reduction="none") - rest
