"""Feature attacks harm every encoder they are given and use no labels."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strategies import images, laws, radii, seeds
from tiny import TinyEncoder, norms, seeded
from zepad.attacks import PGD, FeaturePGD, attack_features, cosine_distance
from zepad.attacks.losses import l2_distance
from zepad.errors import ConfigError

EPS = 8 / 255
few = settings(laws, max_examples=20)  # each example runs an attack
DISTANCES = (cosine_distance, l2_distance)


@few
@given(images(), radii, st.sampled_from(("linf", "l2")), st.sampled_from(DISTANCES), st.integers(1, 2), seeds)
def test_attacked_images_lie_in_the_ball_and_in_range(clean, eps, norm, distance, count, seed):
    encoders = [TinyEncoder(width) for width in (4, 6)][:count]
    attack = FeaturePGD(eps=eps, steps=2, step_size=eps, norm=norm, distance=distance)
    attacked = attack(encoders, clean, generator=seeded(seed))
    assert attacked.shape == clean.shape
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (norms(attacked - clean, norm) <= eps + 1e-6).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_features_move_more_than_under_noise(toy, distance):
    encoder, clean = TinyEncoder().eval(), toy[0]
    attacked = FeaturePGD(eps=EPS, distance=distance)(encoder, clean)
    noisy = (clean + EPS * torch.randn_like(clean).sign()).clamp(0, 1)  # at the corners, the largest noise there is

    def moved(x):
        return distance(encoder(x), encoder(clean))

    assert moved(attacked).mean() > 3 * moved(noisy).mean()
    assert (moved(attacked) > moved(noisy)).float().mean() > 0.9


def test_an_attack_on_two_encoders_harms_both(toy):
    """One on the first alone leaves the second where it was."""
    clean = toy[0]
    first, second = encoders = [TinyEncoder(8).eval(), TinyEncoder(6).eval()]
    attack = FeaturePGD(eps=EPS, steps=20)

    def moved(encoder, x):
        return cosine_distance(encoder(x), encoder(clean)).mean()

    alone, joint = attack(first, clean, generator=seeded()), attack(encoders, clean, generator=seeded())
    assert moved(second, joint) > 1.5 * moved(second, alone)
    assert moved(first, joint) > 0.3 * moved(first, alone)


def test_each_encoder_has_its_own_distance(toy):
    """Not one distance of the features laid side by side: a distance that depends on the width would show."""
    widths = []

    def spy(outputs, targets):
        assert outputs.shape == targets.shape
        widths.append(outputs.shape[1])
        return l2_distance(outputs, targets)

    FeaturePGD(eps=EPS, steps=1, distance=spy)([TinyEncoder(4), TinyEncoder(6)], toy[0])
    assert widths == [4, 6]


def test_the_gradient_is_that_of_the_mean_distance(toy):
    """One step of a joint attack agrees with the step written out."""
    clean = toy[0].double()
    encoders = [TinyEncoder(width).double().eval() for width in (4, 6)]
    attack = FeaturePGD(eps=0.1, steps=1, step_size=0.03, norm="l2", distance=l2_distance)
    start = replace(attack, steps=0)(encoders, clean, generator=seeded()).requires_grad_()
    sum((e(start) - e(clean)).norm(dim=1).sum() for e in encoders).backward()
    slope = start.grad / start.grad.flatten(1).norm(dim=1)[:, None, None, None]
    moved = start.detach() + 0.03 * slope - clean
    moved = moved * (0.1 / moved.flatten(1).norm(dim=1).clamp_min(0.1))[:, None, None, None]
    expected = (clean + moved).clamp(0, 1)
    torch.testing.assert_close(attack(encoders, clean, generator=seeded()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group", [lambda e: e, lambda e: [e], lambda e: (e,), lambda e: nn.ModuleList([e])])
def test_one_encoder_is_a_sequence_of_one(toy, group):
    encoder = TinyEncoder()
    expected = FeaturePGD(eps=EPS, steps=2)(encoder, toy[0], generator=seeded())
    assert torch.equal(FeaturePGD(eps=EPS, steps=2)(group(encoder), toy[0], generator=seeded()), expected)


def test_an_nn_sequential_is_one_encoder(toy):
    encoder = nn.Sequential(TinyEncoder(), nn.Linear(8, 4))
    assert FeaturePGD(eps=EPS, steps=1)(encoder, toy[0]).shape == toy[0].shape


def test_labels_play_no_part(toy):
    encoder, attack = TinyEncoder(), FeaturePGD(eps=EPS, steps=2)
    with_labels = attack(encoder, *toy, generator=seeded())
    assert torch.equal(attack(encoder, toy[0], generator=seeded()), with_labels)


def test_feature_maps_are_attacked_as_flat_features(toy):
    maps = nn.Conv2d(3, 2, 3)
    flat = nn.Sequential(maps, nn.Flatten())
    attack = FeaturePGD(eps=EPS, steps=2)
    assert torch.equal(attack(maps, toy[0], generator=seeded()), attack(flat, toy[0], generator=seeded()))


@pytest.mark.parametrize("changes", [{}, {"norm": "l2", "momentum": 0.9}, {"restarts": 2, "step_size": 0.01}])
def test_the_short_form_is_the_long_form(toy, changes):
    """The loss of the given attack is never called."""

    def forbidden(outputs, targets):
        raise AssertionError("a feature attack has one loss, the cosine distance")

    encoder = TinyEncoder()
    short = attack_features(PGD(eps=EPS, loss_fn=forbidden, **changes), encoder, toy[0], generator=seeded())
    assert torch.equal(FeaturePGD(eps=EPS, **changes)(encoder, toy[0], generator=seeded()), short)


def test_a_feature_attack_always_starts_at_random(toy):
    """The distance has no slope at the image itself."""
    still = PGD(eps=EPS, steps=0, random_start=False)
    assert not torch.equal(attack_features(still, TinyEncoder(), toy[0]), toy[0])


def test_l2_distance_agrees_with_its_definition():
    outputs, targets = torch.randn(6, 5), torch.randn(6, 5)
    expected = torch.stack([((a - b) ** 2).sum().sqrt() for a, b in zip(outputs, targets, strict=True)])
    torch.testing.assert_close(l2_distance(outputs, targets), expected)


@pytest.mark.parametrize("settings", [{"norm": "l1"}, {"steps": -1}, {"restarts": 0}, {"momentum": -1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        FeaturePGD(eps=EPS, **settings)
