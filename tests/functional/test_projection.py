"""Properties of norm balls: projections, random starts and directions of steepest ascent."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import deltas, images, laws, radii, seeds
from zepad.functional.projection import BALLS, project_pixels, random_l2, steepest_l2

norms = st.sampled_from(sorted(BALLS))
ROUNDING = 1e-12


def length(delta, norm):
    """Norm of each image, written out."""
    rows = delta.flatten(1)
    return rows.abs().amax(dim=1) if norm == "linf" else (rows**2).sum(dim=1).sqrt()


def inner(a, b):
    return (a * b).flatten(1).sum(dim=1)


@laws
@given(deltas(), norms, radii)
def test_projections_end_in_the_ball_and_leave_it_alone(delta, norm, eps):
    project = BALLS[norm].project
    projected = project(delta, eps)
    assert (length(projected, norm) <= eps + ROUNDING).all()
    torch.testing.assert_close(project(projected, eps), projected, rtol=ROUNDING, atol=ROUNDING)
    inside = length(delta, norm) <= eps
    assert torch.equal(projected[inside], delta[inside])


@laws
@given(deltas(), norms, radii, seeds)
def test_projections_find_the_nearest_point(delta, norm, eps, seed):
    """No other point of a convex set makes an acute angle with the way in, seen from the nearest point."""
    project, random = BALLS[norm].project, BALLS[norm].random
    projected = project(delta, eps)
    other = random(delta, eps, torch.Generator().manual_seed(seed))
    assert (inner(delta - projected, other - projected) <= 1e-9).all()


@laws
@given(deltas(), norms, radii, seeds)
def test_random_starts_lie_in_the_ball_and_repeat_with_the_generator(like, norm, eps, seed):
    random = BALLS[norm].random
    start = random(like, eps, torch.Generator().manual_seed(seed))
    assert start.shape == like.shape
    assert start.dtype == like.dtype
    assert (length(start, norm) <= eps + ROUNDING).all()
    assert torch.equal(start, random(like, eps, torch.Generator().manual_seed(seed)))
    assert not torch.equal(start, random(like, eps, torch.Generator().manual_seed(seed + 1)))


@pytest.mark.parametrize("norm", sorted(BALLS))
def test_random_starts_fill_the_ball_evenly(norm):
    """A ball of half the radius holds a share of 1 / 2**d of the volume, and all directions balance."""
    start = BALLS[norm].random(torch.empty(20_000, 1, 1, 3), 0.5, torch.Generator().manual_seed(0))
    assert (length(start, norm) <= 0.25).float().mean().item() == pytest.approx(1 / 8, abs=0.01)
    assert start.mean(dim=0).abs().max() < 0.01
    assert length(start, norm).max() > 0.49


@laws
@given(deltas(), norms, seeds)
def test_no_unit_step_climbs_more_than_the_steepest(gradient, norm, seed):
    steepest = BALLS[norm].steepest(gradient)
    other = BALLS[norm].random(gradient, 1.0, torch.Generator().manual_seed(seed))
    assert (length(steepest, norm) <= 1 + ROUNDING).all()
    assert (inner(gradient, steepest) >= inner(gradient, other) - 1e-9).all()


@pytest.mark.parametrize("norm", sorted(BALLS))
def test_a_zero_gradient_makes_no_step(norm):
    gradient = torch.zeros(2, 3, 4, 4)
    gradient[1] = 1
    step = BALLS[norm].steepest(gradient)
    assert not step[0].any()
    assert length(step, norm)[1].item() == pytest.approx(1)
    assert torch.equal(BALLS[norm].project(torch.zeros(2, 3), 0.1), torch.zeros(2, 3))


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_the_size_of_the_gradient_does_not_change_the_step(scale):
    """A confident classifier has gradients this small."""
    gradient = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(steepest_l2(scale * gradient), steepest_l2(gradient))


def test_a_random_point_of_the_l2_ball_is_one_per_image():
    start = random_l2(torch.empty(2, 3, 4, 4), 1.0)
    assert not torch.equal(start[0], start[1])


@laws
@given(images(), radii, norms, seeds)
def test_pixels_stay_in_range_and_perturbations_only_shrink(clean, eps, norm, seed):
    delta = BALLS[norm].random(clean, eps, torch.Generator().manual_seed(seed))
    kept = project_pixels(clean, delta)
    moved = clean + kept
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    assert (kept.abs() <= delta.abs() + 1e-6).all()
    assert (kept * delta >= -1e-6).all()
    free = (clean + delta >= 0) & (clean + delta <= 1)
    torch.testing.assert_close(kept[free], delta[free], rtol=0, atol=1e-6)
