"""The feature attack and `apply`. What holds for every universal attack is tested in `test_universal_attacks`."""

import pytest
import torch
from hypothesis import given, settings
from torch.utils.data import DataLoader, TensorDataset

from strategies import images, laws, radii, seeds
from tiny import TinyEncoder
from zepad._version import __version__
from zepad.attacks import UniversalFeatureAttack, UniversalPerturbation, cosine_distance
from zepad.errors import ConfigError, InputError

EPS = 10 / 255
few = settings(laws, max_examples=20)  # each example runs an attack


@few
@given(images(), radii, seeds)
def test_the_perturbation_is_one_image_in_the_ball(clean, eps, seed):
    perturbation = UniversalFeatureAttack(eps=eps, step_size=eps, epochs=2, seed=seed).fit(TinyEncoder(), clean)
    assert perturbation.delta.shape == (1, *clean.shape[1:])
    assert perturbation.delta.abs().max() <= eps + 1e-6
    assert perturbation.eps == eps
    attacked = perturbation.apply(clean)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (attacked - clean).abs().max() <= eps + 1e-6


def test_apply_adds_and_clamps():
    perturbation = UniversalPerturbation(delta=torch.full((1, 1, 1, 2), 0.25), eps=0.25)
    clean = torch.tensor([[[[0.5, 1.0]]], [[[0.0, 0.875]]]])
    assert perturbation.apply(clean).flatten().tolist() == [0.75, 1.0, 0.25, 1.0]
    assert perturbation.apply(clean.double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (3, 16, 16)])
def test_apply_refuses_images_of_another_size(shape):
    perturbation = UniversalPerturbation(delta=torch.zeros(1, 3, 16, 16), eps=EPS)
    with pytest.raises(InputError, match=r"made for images of shape \(3, 16, 16\); got \(.*Resize the images or fit"):
        perturbation.apply(torch.zeros(shape))


def test_the_seed_decides_the_result(tiny, toy):
    first, again, other = (
        UniversalFeatureAttack(eps=EPS, epochs=3, seed=seed).fit(tiny, toy[0]).delta for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tensors_and_loaders_with_or_without_labels_give_the_same(tiny, toy):
    attack = UniversalFeatureAttack(eps=EPS, epochs=3)
    expected = attack.fit(tiny, toy[0])
    for data in (DataLoader(TensorDataset(*toy), batch_size=24), DataLoader(TensorDataset(toy[0]), 24), [toy[0]]):
        made = attack.fit(tiny, data)
        assert torch.equal(made.delta, expected.delta)
        assert made.provenance == expected.provenance


def test_the_provenance_tells_how_it_was_made(tiny, loader):
    made = UniversalFeatureAttack(eps=EPS, epochs=2, seed=7).fit(tiny, loader)
    assert made.norm == "linf"
    assert made.provenance == {
        "attack": "UniversalFeatureAttack",
        "eps": EPS,
        "step_size": None,
        "epochs": 2,
        "seed": 7,
        "precision": "fp32",
        "images": 24,
        "encoders": ["TinyEncoder"],
        "zepad": __version__,
    }


def test_features_move_more_than_under_noise_of_the_same_budget(tiny, toy):
    """Also on images the attacker has not seen."""
    seen, fresh = toy[0][:12], toy[0][12:]
    encoder = tiny.eval()

    def moved(perturbation, clean):
        return cosine_distance(encoder(perturbation.apply(clean)), encoder(clean)).mean().item()

    made = UniversalFeatureAttack(eps=EPS).fit(encoder, seen)
    noise = [UniversalPerturbation(delta=EPS * torch.randn_like(made.delta).sign(), eps=EPS) for _ in range(10)]
    for clean in (seen, fresh):
        assert moved(made, clean) > 2 * max(moved(one, clean) for one in noise)


def test_images_of_several_sizes_are_refused(tiny):
    batches = [torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 8, 8)]
    with pytest.raises(InputError, match=r"images of one size; got \(3, 16, 16\) and \(3, 8, 8\)\. Resize them"):
        UniversalFeatureAttack(eps=EPS).fit(tiny, batches)


def test_an_empty_loader_is_refused(tiny):
    with pytest.raises(InputError, match="the loader is empty: it yielded no batch"):
        UniversalFeatureAttack(eps=EPS).fit(tiny, [])


def test_a_one_shot_iterator_is_refused_by_name(tiny, toy):
    with pytest.raises(InputError, match="iterable more than once"):
        UniversalFeatureAttack(eps=EPS).fit(tiny, iter([toy[0]]))


def test_images_out_of_range_are_refused(tiny):
    with pytest.raises(InputError, match=r"looks like 0\.\.255"):
        UniversalFeatureAttack(eps=EPS).fit(tiny, torch.full((2, 3, 16, 16), 255.0))


def test_no_epochs_are_refused():
    with pytest.raises(ConfigError, match="epochs must be at least 1, or None; got 0"):
        UniversalFeatureAttack(eps=EPS, epochs=0)
