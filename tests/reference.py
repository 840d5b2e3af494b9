"""The equations of the method written naively in float64: loops, no shortcuts, no import of the library."""

import math
from fractions import Fraction

import numpy as np

LOW, HIGH = 1e-7, 2 - 1e-7  # the clamp of the relative distances


def softmax(row):
    powers = np.exp(row - row.max())
    return powers / powers.sum()


def _certainty(row, rule, k):
    p = softmax(row)
    if rule == "rfdm":
        return p.max() * math.exp(k * (p.max() - 0.5))
    if rule == "entropy":
        return math.exp(sum(x * math.log(x) for x in p if x > 0))
    return 1.0


def confidence(logits, k=3.0):
    return np.array([[_certainty(row, "rfdm", k) for row in branch] for branch in logits])


def weights(logits, rule="rfdm", k=3.0):
    certainties = np.array([[_certainty(row, rule, k) for row in branch] for branch in logits])
    return certainties / certainties.sum(axis=0)


def fuse(logits, rule="rfdm", k=3.0):
    w = weights(logits, rule, k)
    fused = np.zeros(logits.shape[1:])
    for branch, image in np.ndindex(w.shape):
        fused[image] += w[branch, image] * logits[branch, image]
    return fused


def detection_score(logits):
    largest = np.array([[softmax(row).max() for row in branch] for branch in logits])
    return largest[:-1].mean(axis=0) - largest[-1]


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
