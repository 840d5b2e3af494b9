"""Transforms of the transfer literature: off they are nothing, on they are what the papers write."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from strategies import images, laws, radii, seeds
from tiny import TinyEncoder, toy_data
from zepad.attacks import PGD, FeaturePGD, attack_features, cosine_distance
from zepad.attacks.transforms import diversify, gaussian_kernel, scaled, smooth
from zepad.errors import ConfigError

EPS = 8 / 255
few = settings(laws, max_examples=20)
ON = {"momentum": 1.0, "diversity": 1.0, "translation": 5, "scales": 3}


def seeded(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def toy():
    return toy_data(12, size=8)[0]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TinyEncoder().eval()


def slope(encoder, points, clean, transform=lambda x: x):
    """The gradient of the cosine distance of transformed points, by autograd on one graph."""
    points = points.clone().requires_grad_()
    cosine_distance(encoder(transform(points)), encoder(clean).detach()).sum().backward()
    return points.grad


def start_of(clean, eps=EPS):
    delta = (torch.rand(clean.shape, generator=seeded()) * 2 - 1) * eps
    return (clean + delta).clamp(0, 1) - clean


def ascend(clean, gradient_at, *, steps, step_size, momentum=0.0):
    """MI-FGSM as the paper writes it, with the L1 norm, from the attack's random start."""
    delta, velocity = start_of(clean), torch.zeros_like(clean)
    for _ in range(steps):
        gradient = gradient_at(clean + delta)
        if momentum:
            norm = gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
            velocity = momentum * velocity + gradient / norm
            gradient = velocity
        delta = (delta + step_size * gradient.sign()).clamp(-EPS, EPS)
        delta = (clean + delta).clamp(0, 1) - clean
    return clean + delta


# the attack -------------------------------------------------------------------------------------------------------


def test_without_any_option_the_attack_is_plain_projected_gradient_ascent(encoder, toy):
    expected = ascend(toy, lambda x: slope(encoder, x, toy), steps=4, step_size=2.5 * EPS / 4)
    assert torch.equal(FeaturePGD(eps=EPS, steps=4)(encoder, toy, generator=seeded()), expected)


def test_momentum_accumulates_as_the_paper_writes_it(encoder, toy):
    attack = FeaturePGD(eps=EPS, steps=4, step_size=EPS / 4, momentum=1.0)
    expected = ascend(toy, lambda x: slope(encoder, x, toy), steps=4, step_size=EPS / 4, momentum=1.0)
    torch.testing.assert_close(attack(encoder, toy, generator=seeded()), expected, rtol=0, atol=1e-6)


def test_scale_invariance_follows_the_mean_gradient_of_the_copies(encoder, toy):
    def mean(x):
        return sum(slope(encoder, x, toy, lambda y, i=i: y / 2**i) for i in range(3)) / 3

    expected = ascend(toy, mean, steps=2, step_size=EPS / 2)
    attack = FeaturePGD(eps=EPS, steps=2, step_size=EPS / 2, scales=3)
    assert torch.equal(attack(encoder, toy, generator=seeded()), expected)


def test_translation_invariance_follows_the_smoothed_gradient(encoder, toy):
    expected = ascend(toy, lambda x: naive_smooth(slope(encoder, x, toy), gaussian_kernel(5)), steps=1, step_size=EPS)
    attack = FeaturePGD(eps=EPS, steps=1, step_size=EPS, translation=5)
    attacked = attack(encoder, toy, generator=seeded())
    assert (attacked != expected).float().mean() < 1e-3  # where rounding decides the sign of a gradient of zero


def test_diversity_follows_the_gradient_through_the_transform(encoder, toy):
    generator = seeded()
    start_of_attack = torch.rand(toy.shape, generator=generator)  # drawn before the transform
    assert start_of_attack.shape == toy.shape
    expected = ascend(
        toy,
        lambda x: slope(encoder, x, toy, lambda y: diversify(y, 1.0, generator=generator)),
        steps=1,
        step_size=EPS,
    )
    attack = FeaturePGD(eps=EPS, steps=1, step_size=EPS, diversity=1.0)
    assert torch.equal(attack(encoder, toy, generator=seeded()), expected)


@few
@given(images(), radii, st.sampled_from(("linf", "l2")), seeds)
def test_with_every_option_attacked_images_lie_in_the_ball_and_in_range(clean, eps, norm, seed):
    attack = FeaturePGD(eps=eps, steps=2, norm=norm, restarts=2, **ON)
    attacked = attack([TinyEncoder(4), TinyEncoder(6)], clean, generator=seeded(seed))
    rows = (attacked - clean).flatten(1)
    lengths = rows.abs().amax(dim=1) if norm == "linf" else rows.norm(dim=1)
    assert attacked.shape == clean.shape
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (lengths <= eps + 1e-6).all()


@pytest.mark.parametrize("option", [*ON, "all"])
def test_every_option_changes_the_result_and_the_seed_repeats_it(encoder, toy, option):
    changes = ON if option == "all" else {option: ON[option]}
    plain = FeaturePGD(eps=EPS, steps=3)
    attack = replace(plain, **changes)
    attacked = attack(encoder, toy, generator=seeded())
    assert torch.equal(attack(encoder, toy, generator=seeded()), attacked)
    assert not torch.equal(plain(encoder, toy, generator=seeded()), attacked)
    assert not attacked.requires_grad


def test_parameters_get_no_gradient(toy):
    model = TinyEncoder()
    FeaturePGD(eps=EPS, steps=2, **ON)(model, toy)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training


def test_restarts_are_judged_on_the_images_as_they_are(encoder, toy):
    """Not on a random transform of them: of two starts the better one is kept for each image."""
    one, both = (FeaturePGD(eps=EPS, steps=2, restarts=r, **ON) for r in (1, 2))

    def reached(x):
        return cosine_distance(encoder(x), encoder(toy))

    assert (reached(both(encoder, toy, generator=seeded())) >= reached(one(encoder, toy, generator=seeded()))).all()


def test_the_short_form_takes_the_options_too(encoder, toy):
    options = {name: value for name, value in ON.items() if name != "momentum"}
    short = attack_features(PGD(eps=EPS, momentum=1.0), encoder, toy, generator=seeded(), **options)
    assert torch.equal(FeaturePGD(eps=EPS, **ON)(encoder, toy, generator=seeded()), short)


@pytest.mark.parametrize(
    ("name", "value"),
    [("diversity", -0.1), ("diversity", 1.1), ("diversity", float("nan")), ("translation", 4), ("translation", 0),
     ("translation", 3.0), ("scales", 0), ("scales", 1.5)],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        FeaturePGD(eps=EPS, **{name: value})


# the transforms ---------------------------------------------------------------------------------------------------


@few
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), seeds)
def test_diversity_keeps_shape_and_range(count, height, width, probability, seed):
    clean = torch.rand(count, 3, height, width, generator=seeded(seed))
    changed = diversify(clean, probability, generator=seeded(seed))
    assert changed.shape == clean.shape
    assert changed.min() >= 0
    assert changed.max() <= clean.max() + 1e-6


def test_diversity_is_a_shrunken_image_in_a_black_frame():
    white = torch.ones(1, 1, 40, 40)
    generator, seen = seeded(), set()
    for _ in range(200):
        changed = diversify(white, 1.0, generator=generator)[0, 0]
        rows, columns = changed.nonzero().unbind(dim=1)
        assert changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].allclose(torch.ones(()))
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert height == width
        seen.add((height, int(rows.min())))
    assert {height for height, _ in seen} == {36, 37, 38, 39, 40}
    assert {top for height, top in seen if height == 36} == {0, 1, 2, 3, 4}


def test_diversity_happens_with_its_probability():
    white, generator = torch.ones(1, 1, 64, 64), seeded()
    changed = sum(bool((diversify(white, 0.3, generator=generator) == 0).any()) for _ in range(400))
    assert 0.3 * 400 * 0.7 < changed < 0.3 * 400 * 1.2  # one size in eight is that of the image itself


def test_diversity_of_probability_zero_draws_nothing():
    clean, generator = torch.rand(2, 3, 8, 8), seeded()
    before = generator.get_state()
    assert diversify(clean, 0.0, generator=generator) is clean
    assert torch.equal(generator.get_state(), before)


def test_diversity_is_differentiable():
    clean = torch.rand(1, 2, 10, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: diversify(x, 1.0, generator=seeded(3)), clean)


@pytest.mark.parametrize("size", [1, 3, 5, 7, 15])
def test_the_kernel_is_a_gaussian_of_sum_one(size):
    kernel = gaussian_kernel(size)
    assert kernel.shape == (size, size)
    assert (kernel > 0).all()
    torch.testing.assert_close(kernel.sum(), torch.ones(()))
    assert torch.equal(kernel, kernel.T)
    torch.testing.assert_close(kernel, kernel.flip(0))
    if size > 1:  # the standard deviation is a third of the radius
        centre, edge = kernel[size // 2, size // 2], kernel[size // 2, 0]
        torch.testing.assert_close((edge / centre).log(), torch.tensor(-4.5), rtol=1e-4, atol=0)


def naive_smooth(gradient, kernel):
    radius = len(kernel) // 2
    padded = F.pad(gradient, (radius,) * 4)
    height, width = gradient.shape[2:]
    return sum(
        kernel[i, j] * padded[:, :, i : i + height, j : j + width]
        for i in range(len(kernel))
        for j in range(len(kernel))
    )


@pytest.mark.parametrize(("size", "side"), [(3, 8), (5, 8), (15, 8)])
def test_smoothing_is_the_weighted_sum_of_shifts_of_each_channel(size, side):
    gradient, kernel = torch.randn(2, 3, side, side), gaussian_kernel(size)
    torch.testing.assert_close(smooth(gradient, kernel), naive_smooth(gradient, kernel))


def test_a_kernel_of_one_leaves_the_gradient():
    gradient = torch.randn(2, 3, 8, 8)
    assert torch.equal(smooth(gradient, gaussian_kernel(1)), gradient)


def test_smoothing_is_the_gradient_over_shifted_images_of_a_linear_model():
    """For a linear model this holds exactly, where the shifted images have black borders."""
    weight = torch.randn(1, 1, 8, 8)
    kernel = gaussian_kernel(3)
    x = torch.rand(1, 1, 8, 8, requires_grad=True)
    padded = F.pad(x, (1,) * 4)
    shifts = [(kernel[i, j], padded[:, :, i : i + 8, j : j + 8]) for i in range(3) for j in range(3)]
    sum(share * (weight * shifted).sum() for share, shifted in shifts).backward()
    torch.testing.assert_close(x.grad, smooth(weight, kernel))


def test_one_scale_is_the_image_itself():
    clean = torch.rand(2, 3, 4, 4)
    assert scaled(clean, 0) is clean
    assert torch.equal(scaled(clean, 3), clean / 8)


def test_one_scale_is_the_plain_gradient(encoder, toy):
    plain = FeaturePGD(eps=EPS, steps=3)
    assert torch.equal(
        replace(plain, scales=1, translation=None, diversity=0.0)(encoder, toy, generator=seeded()),
        plain(encoder, toy, generator=seeded()),
    )


def test_input_diversity_reaches_encoders_of_one_size_only():
    sized = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    assert FeaturePGD(eps=EPS, steps=2, **ON)(sized, torch.rand(2, 3, 8, 8)).shape == (2, 3, 8, 8)
