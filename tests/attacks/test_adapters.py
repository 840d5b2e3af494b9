"""Attacks of ART and Foolbox run on models of zepad and leave them unchanged."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from tiny import TinyEncoder, toy_data
from zepad.attacks import art_classifier, cross_entropy, foolbox_model
from zepad.errors import ConfigError

EPS = 64 / 255

# What these packages warn of when they are imported or used is theirs, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def toy():
    return toy_data(12)


def used_classifier():
    """Half-way through somebody's training: mixed training flags, gradients pending, a part frozen."""
    model = nn.Sequential(TinyEncoder(), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    model[0].norm.eval()
    model[0].conv2.requires_grad_(False)
    for parameter in model[2].parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def noticeable(model):
    return (
        [part.training for part in model.modules()],
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
    )


def run_art(model, images, labels):
    from art.attacks.evasion import ProjectedGradientDescent

    classifier = art_classifier(model, num_classes=3, image_shape=tuple(images.shape[1:]))
    attack = ProjectedGradientDescent(classifier, eps=EPS, eps_step=EPS / 4, max_iter=8, verbose=False)
    return torch.from_numpy(attack.generate(images.numpy(), labels.numpy()))


def run_foolbox(model, images, labels):
    from foolbox.attacks import LinfPGD

    (attacked,), _, _ = LinfPGD(steps=8)(foolbox_model(model), images, labels, epsilons=[EPS])
    return attacked


every_adapter = pytest.mark.parametrize("attack", [run_art, run_foolbox])


@every_adapter
def test_a_fitted_defense_is_harmed_and_left_as_found(fitted, toy, attack):
    images, labels = toy
    before = noticeable(fitted)
    attacked = attack(fitted, images, labels)
    assert noticeable(fitted) == before
    assert (attacked - images).abs().max() <= EPS + 1e-6
    assert 0 <= attacked.min() <= attacked.max() <= 1
    with torch.no_grad():
        losses = [cross_entropy(fitted(x), labels) for x in (images, attacked)]
    assert (losses[1] > losses[0]).all()


@every_adapter
def test_a_model_in_training_is_left_as_found(toy, attack):
    model = used_classifier()
    before = noticeable(model)
    attack(model, *toy)
    assert noticeable(model) == before


@every_adapter
def test_a_model_is_left_as_found_when_it_raises(toy, attack):
    model = used_classifier()
    before = noticeable(model)
    seen = []

    def fail(*_):
        seen.append(None)
        if len(seen) > 2:
            raise RuntimeError("out of memory")

    hook = model[2].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        attack(model, *toy)
    hook.remove()
    assert noticeable(model) == before


@every_adapter
def test_the_model_is_attacked_in_evaluation_mode(toy, attack):
    model, modes = used_classifier(), set()
    model[2].register_forward_hook(lambda *_: modes.update(part.training for part in model.modules()))
    attack(model, *toy)
    assert modes == {False}


@every_adapter
def test_any_function_can_be_attacked(toy, attack):
    model = used_classifier().eval()
    attacked = attack(lambda images: model(images), *toy)
    assert attacked.shape == toy[0].shape


def test_art_predicts_what_the_model_does_and_its_gradient_is_the_models(toy):
    model, (images, labels) = used_classifier().eval(), toy
    classifier = art_classifier(model, num_classes=3, image_shape=(3, 16, 16))
    np.testing.assert_allclose(classifier.predict(images.numpy()), model(images).detach().numpy(), atol=1e-6)
    images = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels, reduction="sum"), images)
    theirs = torch.from_numpy(classifier.loss_gradient(images.detach().numpy(), np.eye(3)[labels.numpy()]))
    scale = (theirs.norm() / gradient.norm()).item()  # ART takes the mean over the batch
    torch.testing.assert_close(theirs, gradient * scale, rtol=1e-4, atol=1e-7)
    assert tuple(classifier.clip_values) == (0.0, 1.0)


def test_arts_auto_attack_runs(fitted, toy):
    """With short versions of its parts, on few images."""
    from art.attacks.evasion import AutoAttack, AutoProjectedGradientDescent, SquareAttack

    images, labels = toy[0][:4], np.eye(3, dtype=np.float32)[toy[1][:4]]
    classifier = art_classifier(fitted, num_classes=3, image_shape=(3, 16, 16))
    apgd = {"eps": EPS, "eps_step": EPS, "max_iter": 5, "nb_random_init": 1, "verbose": False}
    parts = [
        AutoProjectedGradientDescent(classifier, loss_type=loss, **apgd)
        for loss in ("cross_entropy", "difference_logits_ratio")
    ]
    parts.append(SquareAttack(classifier, eps=EPS, max_iter=5, verbose=False))
    attacked = AutoAttack(classifier, eps=EPS, eps_step=EPS, attacks=parts).generate(images.numpy(), labels)
    assert np.abs(attacked - images.numpy()).max() <= EPS + 1e-6


@pytest.mark.parametrize(
    ("package", "call", "extra"),
    [
        ("art", lambda model: art_classifier(model, num_classes=3, image_shape=(3, 16, 16)), r"zepad\[art\]"),
        ("foolbox", foolbox_model, r"zepad\[foolbox\]"),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, package, call, extra):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"not installed. Install it with: pip install '{extra}'"):
        call(used_classifier())


def test_shapes_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="num_classes must be at least 2; got 1"):
        art_classifier(used_classifier(), num_classes=1, image_shape=(3, 16, 16))
    with pytest.raises(
        ConfigError,
        match=r"image_shape must be a tuple \(an integer, an integer, an integer\); got the tuple \(16, 16\)",
    ):
        art_classifier(used_classifier(), num_classes=3, image_shape=(16, 16))
