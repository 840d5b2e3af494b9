"""Counts and the conformal threshold."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import reference
from strategies import laws
from zepad.functional import Count, attack_success_count, conformal_threshold, correct_count, fooling_count

triples = st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=30)
rates = st.floats(0.02, 0.98)
distinct_scores = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=120, unique=True)


def columns(rows):
    """Labels, predictions before and predictions after the attack."""
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).unbind(dim=1)


def counts(rows):
    labels, benign, adversarial = columns(rows)
    return (
        correct_count(benign, labels),
        fooling_count(adversarial=adversarial, benign=benign),
        attack_success_count(adversarial=adversarial, benign=benign, labels=labels),
    )


@laws
@given(triples)
def test_counts_agree_with_counting_one_by_one(rows):
    right = [(label, after) for label, before, after in rows if before == label]
    assert counts(rows) == (
        (len(right), len(rows)),
        (sum(before != after for _, before, after in rows), len(rows)),
        (sum(after != label for label, after in right), len(right)),
    )


@laws
@given(triples, st.lists(st.integers(0, 30)))
def test_counts_add_up_over_any_split_into_batches(rows, cuts):
    edges = sorted([0, *(min(cut, len(rows)) for cut in cuts), len(rows)])
    batches = [counts(rows[start:stop]) for start, stop in pairwise(edges)]
    assert tuple(sum(column, Count(0, 0)) for column in zip(*batches, strict=True)) == counts(rows)


def test_denominators():
    """Of 4 images 3 are right before the attack; it changes 3 predictions, 2 of them from right to wrong."""
    labels, benign, adversarial = columns([(0, 0, 1), (1, 1, 0), (2, 2, 2), (0, 1, 2)])
    assert correct_count(benign, labels).rate == 3 / 4
    assert correct_count(adversarial, labels).rate == 1 / 4
    assert fooling_count(adversarial=adversarial, benign=benign).rate == 3 / 4
    assert attack_success_count(adversarial=adversarial, benign=benign, labels=labels).rate == 2 / 3


def test_a_rate_of_nothing_is_nan():
    assert math.isnan(Count(0, 0).rate)


@pytest.mark.parametrize("other", [1, (1, 2), None])
def test_counts_add_to_counts_alone(other):
    with pytest.raises(TypeError):
        Count(1, 2) + other


@laws
@given(distinct_scores, rates)
def test_conformal_threshold_is_the_stated_order_statistic(scores, fpr):
    exact = (len(scores) + 1) * (1 - fpr)
    assume(exact <= len(scores))
    assume(abs(exact - round(exact)) > 1e-9)  # where rounding decides between two ranks
    assert conformal_threshold(torch.tensor(scores), fpr=fpr) == reference.conformal_threshold(scores, fpr)


@pytest.mark.parametrize(("count", "fpr", "rank"), [(19, 0.05, 19), (99, 0.05, 95), (99, 0.01, 99), (3, 0.5, 2)])
def test_conformal_rank(count, fpr, rank):
    scores = torch.randperm(count) + 1.0
    assert conformal_threshold(scores, fpr=fpr) == rank


@laws
@given(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=60), rates)
def test_conformal_guarantee(scores, fpr):
    """Exchangeability says that each score is the fresh one equally often: the guarantee is this count, exactly."""
    count = len(scores)
    assume(count * (1 - fpr) <= count - 1)
    flagged = sum(
        fresh > conformal_threshold(torch.tensor(scores[:i] + scores[i + 1 :]), fpr=fpr)
        for i, fresh in enumerate(scores)
    )
    assert flagged / count <= fpr + 1e-12
    if len(set(scores)) == count:  # without ties no more is given away than one image in n + 1
        assert flagged / count >= fpr - 1 / count - 1e-12


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1, 5, math.nan])
def test_a_rate_outside_its_range_is_refused(fpr):
    with pytest.raises(ValueError, match=r"fpr must lie in \(0, 1\); got "):
        conformal_threshold(torch.arange(10.0), fpr=fpr)


@pytest.mark.parametrize(("fpr", "needed"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.03, 33), (0.01, 99)])
def test_too_few_images_say_how_many_are_needed(fpr, needed):
    with pytest.raises(ValueError, match=f"rate of {fpr:g} needs at least {needed} benign images; got {needed - 1}"):
        conformal_threshold(torch.arange(float(needed - 1)), fpr=fpr)
    assert conformal_threshold(torch.arange(float(needed)), fpr=fpr) == needed - 1
