"""Intervals and detection scores against closed formulas and naive counts."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strategies import seeds
from zepad.errors import InputError
from zepad.evaluation import Rate, auroc, detection, statistics
from zepad.evaluation.statistics import fpr_at_tpr

laws = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Z = 1.959963984540054  # the 97.5 % quantile of the normal distribution

levels = st.integers(-8, 8).map(lambda level: level / 8)  # few, so that ties are common


@pytest.fixture
def few_resamples(monkeypatch):
    """Where the interval is beside the point."""
    monkeypatch.setattr(statistics, "_RESAMPLES", 20)


scores = st.lists(levels, min_size=1, max_size=25)
fine_scores = st.lists(st.floats(-1, 1), min_size=1, max_size=25)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def naive_auroc(benign, attacked):
    wins = sum((a > b) + 0.5 * (a == b) for a in attacked for b in benign)
    return wins / (len(benign) * len(attacked))


def naive_fpr(benign, attacked, tpr):
    """The best of all thresholds that flag enough, where a score of at least the threshold is flagged."""
    enough = [t for t in attacked if sum(a >= t for a in attacked) >= tpr * len(attacked) - 1e-9]
    return min(sum(b >= t for b in benign) / len(benign) for t in enough)


@laws
@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_interval_is_wilsons(counts):
    hits, total = counts
    share, spread = hits / total, Z**2 / total
    center = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    low, high = Rate(hits, total).interval
    assert (low, high) == pytest.approx((max(center - half, 0), min(center + half, 1)), abs=1e-9)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


def test_a_rate_of_nothing_is_nan():
    assert all(math.isnan(value) for value in (Rate(0, 0).value, *Rate(0, 0).interval))


@laws
@given(scores, scores)
def test_auroc_is_the_share_of_pairs_in_order(benign, attacked):
    area = auroc(benign=tensor(benign), attacked=tensor(attacked))
    assert area == pytest.approx(naive_auroc(benign, attacked), abs=1e-12)
    assert auroc(benign=tensor(attacked), attacked=tensor(benign)) == pytest.approx(1 - area, abs=1e-12)
    warped = [torch.exp(3 * tensor(side)) - 7 for side in (benign, attacked)]
    assert auroc(benign=warped[0], attacked=warped[1]) == pytest.approx(area, abs=1e-12)


@laws
@given(fine_scores, fine_scores)
def test_auroc_does_not_round_scores_to_ties(benign, attacked):
    assert auroc(benign=tensor(benign), attacked=tensor(attacked)) == pytest.approx(naive_auroc(benign, attacked))


@laws
@given(scores, scores, st.sampled_from((0.05, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)))
def test_fpr_at_tpr_is_the_best_of_all_thresholds(benign, attacked, tpr):
    got = fpr_at_tpr(benign=tensor(benign), attacked=tensor(attacked), tpr=tpr)
    assert got == pytest.approx(naive_fpr(benign, attacked, tpr))


@pytest.mark.parametrize(("count", "missed"), [(20, 1), (100, 5), (19, 0), (40, 2)])
def test_95_per_cent_are_not_one_more_than_95_per_cent(count, missed):
    """Of `count` attacked images `missed` may score lowest of all and go unflagged at no false positive."""
    attacked = torch.ones(count)
    attacked[:missed] = -1
    assert fpr_at_tpr(benign=torch.zeros(7), attacked=attacked) == 0
    attacked[missed] = -1
    assert fpr_at_tpr(benign=torch.zeros(7), attacked=attacked) == 1


triples = st.lists(st.tuples(levels, levels, st.booleans()), min_size=1, max_size=20)


@laws
@given(triples, levels, seeds)
def test_detection_agrees_with_counting_one_by_one(few_resamples, rows, threshold, seed):
    benign, attacked, wrong = zip(*rows, strict=True)
    sides = {"benign": tensor(benign), "attacked": tensor(attacked)}
    found = detection(**sides, fooled=torch.tensor(wrong), threshold=threshold, seed=seed)
    count = len(rows)
    flagged = sum(a > threshold for a in attacked)
    passed = sum(b <= threshold for b in benign)
    assert found.flagged == Rate(flagged, count)
    assert found.evading == Rate(sum(w and a <= threshold for a, w in zip(attacked, wrong, strict=True)), count)
    assert found.accuracy == pytest.approx((flagged / count + passed / count) / 2)
    assert found.auroc == pytest.approx(naive_auroc(benign, attacked))
    assert found.fpr_at_95_tpr == pytest.approx(naive_fpr(benign, attacked, 0.95))
    assert found.fooling_images == sum(wrong)
    fooling = [a for a, w in zip(attacked, wrong, strict=True) if w]
    assert (found.auroc_fooling is None) == (not fooling)
    if fooling:
        assert found.auroc_fooling == pytest.approx(naive_auroc(benign, fooling))
    low, high = found.auroc_interval
    assert 0 <= low <= high <= 1
    assert found == detection(**sides, fooled=torch.tensor(wrong), threshold=threshold, seed=seed)


@pytest.mark.parametrize("shift", [0.0, 0.5, 2.0])
def test_the_bootstrap_interval_holds_the_area_and_shrinks_with_the_images(shift):
    def interval(count):
        generator = torch.Generator().manual_seed(count)
        benign, attacked = (torch.randn(count, generator=generator) for _ in range(2))
        attacked += shift
        found = detection(benign=benign, attacked=attacked, fooled=attacked > 9, threshold=0.5)
        low, high = found.auroc_interval
        assert low < found.auroc < high
        return high - low

    assert interval(1000) < 0.5 * interval(50)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """Normal scores one apart have an area of Phi(1/sqrt 2) = 0.7602: of 20 intervals of 95 % few may miss it."""
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for seed in range(20):
        benign, attacked = torch.randn(60, generator=generator), torch.randn(60, generator=generator) + 1
        low, high = detection(
            benign=benign, attacked=attacked, fooled=attacked > 9, threshold=0.5, seed=seed
        ).auroc_interval
        missed += not low <= 0.76025 <= high
    assert missed <= 4  # a fair 95 % interval misses more than that once in 390


def test_other_seeds_give_other_resamples():
    sides = {"benign": torch.randn(30), "attacked": torch.randn(30)}
    wrong = torch.ones(30, dtype=torch.bool)
    found = [detection(**sides, fooled=wrong, threshold=0.0, seed=seed).auroc_interval for seed in (0, 1)]
    assert found[0] != found[1]


def test_constant_scores_know_nothing():
    same = torch.full((12,), 0.25)
    found = detection(benign=same, attacked=same, fooled=same > 0, threshold=0.25)
    assert (found.auroc, found.auroc_interval, found.fpr_at_95_tpr, found.accuracy) == (0.5, (0.5, 0.5), 1.0, 0.5)
    assert found.flagged == Rate(0, 12)
    assert found.evading == Rate(12, 12)


@laws
@given(fine_scores, fine_scores)
def test_the_curve_climbs_from_corner_to_corner(few_resamples, benign, attacked):
    wrong = torch.zeros(len(attacked), dtype=torch.bool)
    curve = detection(benign=tensor(benign), attacked=tensor(attacked), fooled=wrong, threshold=0.0).curve
    assert (curve[0], curve[-1]) == ((0.0, 0.0), (1.0, 1.0))
    assert list(curve) == sorted(curve)
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(curve))
    assert area == pytest.approx(naive_auroc(benign, attacked), abs=1e-3)


def test_a_long_curve_is_thinned_and_keeps_its_area(few_resamples):
    benign, attacked = torch.randn(3000), torch.randn(3000) + 1
    found = detection(benign=benign, attacked=attacked, fooled=attacked > 0, threshold=0.0)
    assert len(found.curve) <= 100
    assert (found.curve[0], found.curve[-1]) == ((0.0, 0.0), (1.0, 1.0))
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in pairwise(found.curve))
    assert area == pytest.approx(found.auroc, abs=5e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["benign", "attacked"])
def test_scores_that_are_not_finite_are_refused(value, side):
    sides = {"benign": torch.zeros(3), "attacked": torch.zeros(3)}
    sides[side][1] = value
    with pytest.raises(InputError, match="must be finite"):
        detection(**sides, fooled=torch.zeros(3, dtype=torch.bool), threshold=0.1)
