"""The equations of the method written naively in float64: loops, no shortcuts, no import of the library."""

import math
from fractions import Fraction

import numpy as np

LOW, HIGH = 1e-7, 2 - 1e-7  # the clamp of the relative distances


def softmax(row):
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def log_softmax(row):
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


def _certainty(row, rule, sharpness):
    p = softmax(row)
    if rule in ("rfdm", "temperature"):
        return p.max() * math.exp(sharpness * (p.max() - 0.5))
    return 1.0


def confidence(logits, sharpness=3.0):
    return np.array([[_certainty(row, "rfdm", sharpness) for row in branch] for branch in logits])


def weights(logits, rule="rfdm", sharpness=3.0, temperatures=()):
    if temperatures:
        logits = np.array([branch / temperature for branch, temperature in zip(logits, temperatures, strict=True)])
    certainties = np.array([[_certainty(row, rule, sharpness) for row in branch] for branch in logits])
    return certainties / certainties.sum(axis=0)


def fuse(logits, rule="rfdm", **parameters):
    if rule in _PER_IMAGE:
        return np.array([_PER_IMAGE[rule](image[:-1], image[-1], **parameters) for image in logits.swapaxes(0, 1)])
    w = weights(logits, rule, **parameters)
    cooled = np.array(logits)
    for branch, temperature in enumerate(parameters.get("temperatures", ())):
        cooled[branch] /= temperature
    fused = np.zeros(logits.shape[1:])
    for branch, image in np.ndindex(w.shape):
        fused[image] += w[branch, image] * cooled[branch, image]
    return fused


def hardened_log_probabilities(hardened):
    """Of one image: the rows of the hardened branches `(B - 1, K)` to `(K,)`, without underflow."""
    rows = np.array([log_softmax(row) for row in hardened])
    result = []
    for column in rows.T:
        highest = column.max()
        result.append(highest + math.log(sum(math.exp(x - highest) for x in column) / len(column)))
    return np.array(result)


def _bounded(hardened, benign, vote=0.5):
    return hardened_log_probabilities(hardened) + vote * softmax(benign)


def gelu(x):
    return x / 2 * (1 + math.erf(x / math.sqrt(2)))


def robust_log_probabilities(logits, scale=5.0, power=4.0, bias=-1.0):
    """Of one image: the mean logits of the hardened branches through the transform of MixedNUTS."""
    variance = sum((x - logits.mean()) ** 2 for x in logits) / (len(logits) - 1)
    clamped = np.array([gelu((x - logits.mean()) / math.sqrt(variance + 1e-8) + bias) for x in logits])
    return log_softmax(scale * np.sign(clamped) * np.abs(clamped) ** power)


def _mixed(hardened, benign, scale=5.0, power=4.0, bias=-1.0, benign_weight=0.3):
    mixture = math.log(1 - benign_weight) + robust_log_probabilities(hardened.mean(axis=0), scale, power, bias)
    if benign_weight > 0:
        first = [k for k in range(len(benign)) if benign[k] == max(benign)]
        for k in first:
            mixture[k] = np.logaddexp(mixture[k], math.log(benign_weight / len(first)))
    return mixture


_PER_IMAGE = {"bounded": _bounded, "mixed": _mixed}


def detection_score(logits):
    largest = np.array([[softmax(row).max() for row in branch] for branch in logits])
    return largest[:-1].mean(axis=0) - largest[-1]


def _mean_probabilities(rows):
    return sum(softmax(row) for row in rows) / len(rows)


def disagreement_score(logits):
    scores = []
    for image in logits.swapaxes(0, 1):
        pairs = zip(_mean_probabilities(image[:-1]), softmax(image[-1]), strict=True)
        scores.append(1 - sum(math.sqrt(p * q) for p, q in pairs))
    return np.array(scores)


def reference_divergence(logits, undefended):
    scores = []
    for image, row in zip(logits.swapaxes(0, 1), undefended, strict=True):
        pairs = zip(_mean_probabilities(image), log_softmax(row), strict=True)
        scores.append(sum(p * (math.log(p) - log_q) for p, log_q in pairs if p > 0))
    return np.array(scores)


def feature_fit(inputs, outputs, ridge=0.1):
    """Ridge regression as least squares with one more row per input, which asks its weight to be zero.

    Returns the mean squared error of rows, in units of that of the rows it was fitted on.
    """
    mean, scale, centre = inputs.mean(axis=0), inputs.std(axis=0, ddof=1), outputs.mean(axis=0)
    x = (inputs - mean) / scale
    pull = np.sqrt(ridge * len(x)) * np.eye(x.shape[1])
    padded = np.concatenate([outputs - centre, np.zeros((x.shape[1], outputs.shape[1]))])
    weight = np.linalg.lstsq(np.concatenate([x, pull]), padded, rcond=None)[0]
    errors = np.sqrt(((outputs - centre - x @ weight) ** 2).mean(axis=0))

    def score(rows, undefended):
        missed = (undefended - centre - (rows - mean) / scale @ weight) / errors
        return (missed**2).mean(axis=1)

    return score


def cross_entropy(row, label):
    return math.log(np.exp(row - row.max()).sum()) - (row[label] - row.max())


def relative_distances(rows):
    unit = [row / max(math.sqrt(row @ row), 1e-12) for row in rows]
    n = len(unit)
    distances = np.zeros((n, n))
    for i in range(n):
        nearest = min(1 - unit[i] @ unit[k] for k in range(n) if k != i)
        for j in range(n):
            distances[i, j] = 0 if i == j else (1 - unit[i] @ unit[j]) - nearest
    return np.clip(distances, LOW, HIGH)


def _divergence(target, distances):
    total = 0.0
    for target_row, row in zip(1 - target / 2, 1 - distances / 2, strict=True):
        for p, q in zip(target_row / target_row.sum(), row / row.sum(), strict=True):
            total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return total


def structure_loss(adversarial, benign):
    if len(benign) < 2:
        return 0.0
    return _divergence(relative_distances(benign), relative_distances(adversarial))


def genetic_regularization(adversarial, benign, labels):
    if len(benign) < 2:
        return 0.0
    difficulty = [cross_entropy(row, label) for row, label in zip(benign, labels, strict=True)]
    target = relative_distances(benign)
    for i, j in np.ndindex(target.shape):
        weight = math.tanh((difficulty[i] + difficulty[j]) / 32)
        sign = 1 if labels[i] != labels[j] else -1
        target[i, j] = (1 - weight) * target[i, j] + 2 * sign * weight
    return _divergence(np.clip(target, LOW, HIGH), relative_distances(adversarial))


def conformal_threshold(scores, fpr):
    rank = math.ceil((len(scores) + 1) * (1 - Fraction(fpr)))
    return sorted(scores)[rank - 1]
