"""The identity of an attacker: its settings are JSON-ready, and different attackers have different settings."""

import copy
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from zepad.attacks import (
    APGD,
    PGD,
    DetectorEvading,
    FeaturePGD,
    Square,
    Transfer,
    UniversalPerturbation,
    WorstOf,
    cross_entropy,
    dlr,
    margin,
    mean_logits,
    one_branch,
)
from zepad.digests import digest_tensor
from zepad.ensemble import BranchEnsemble
from zepad.errors import ConfigError
from zepad.evaluation import Attacker, against, universal_attacker
from zepad.evaluation.identity import describe, digest
from zepad.fusion import RFDM

EPS = 8 / 255


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))


def ensemble(**changes):
    return BranchEnsemble({"one": linear(0), "two": linear(1)}, **changes)


def attacker(attack, **changes):
    return Attacker(name="same", threat_model="white-box", attack=attack, **changes)


def perturbation(**changes):
    values = {"delta": torch.full((1, 3, 2, 2), 0.1), "eps": 0.2, "provenance": {"attack": "SSP", "seed": 0}}
    return UniversalPerturbation(**values | changes)


def scaled(factor):
    return lambda outputs, targets: factor * cross_entropy(outputs, targets)


def branch(index):
    return lambda model: one_branch(model.branch_logits, index)


class Plain:
    """An attack that is no dataclass."""

    def __init__(self, strength=1.0):
        self.eps, self.norm, self.strength = EPS, "linf", strength

    def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002
        return images


def one_bit_off(model):
    twin = copy.deepcopy(model)
    weight = next(twin.parameters()).data
    weight.view(torch.int32).flatten()[3:4].bitwise_xor_(1)
    return twin


PGD3 = PGD(eps=EPS, steps=3)
FUNCTION = lambda model: model  # noqa: E731
MASK = torch.zeros(1, 1, 2, 2)
MASK[..., 0, 0] = 1
OTHER_MASK = MASK.flip(-1)
DIFFERENT = [
    attacker(PGD3),
    attacker(replace(PGD3, steps=4)),
    attacker(replace(PGD3, eps=9 / 255)),
    attacker(replace(PGD3, norm="l2")),
    attacker(replace(PGD3, step_size=0.01)),
    attacker(replace(PGD3, random_start=False)),
    attacker(replace(PGD3, momentum=1.0)),
    attacker(replace(PGD3, restarts=2)),
    attacker(replace(PGD3, loss_fn=dlr)),
    attacker(replace(PGD3, loss_fn=margin)),
    attacker(replace(PGD3, loss_fn=lambda o, t: margin(o, t))),
    attacker(replace(PGD3, loss_fn=lambda o, t: dlr(o, t))),
    attacker(replace(PGD3, loss_fn=lambda o, t: 2 * margin(o, t))),
    attacker(replace(PGD3, loss_fn=lambda o, t: 3 * margin(o, t))),
    attacker(replace(PGD3, loss_fn=scaled(2.0))),
    attacker(replace(PGD3, loss_fn=scaled(3.0))),
    attacker(replace(PGD3, loss_fn=scaled(torch.tensor(3.0)))),
    attacker(replace(PGD3, loss_fn=partial(nn.functional.cross_entropy, reduction="none"))),
    attacker(replace(PGD3, loss_fn=partial(nn.functional.nll_loss, reduction="none"))),
    attacker(PGD3, notes={"steps": 4}),
    attacker(PGD3, notes={"steps": 5}),
    attacker(PGD3, target=lambda model: mean_logits(model.branch_logits)),
    attacker(PGD3, target=branch(0)),
    attacker(PGD3, target=branch(1)),
    attacker(PGD3, target=FUNCTION),
    attacker(PGD3, target=against(linear(0))),
    attacker(PGD3, target=against(linear(1))),
    attacker(PGD3, target=against(one_bit_off(linear(0)))),
    attacker(PGD3, target=against(linear(0), linear(1))),
    attacker(PGD3, target=against(linear(1), linear(0))),
    attacker(PGD3, target=against(mean_logits(ensemble().branch_logits))),
    attacker(PGD3, target=against(one_branch(ensemble().branch_logits, 0))),
    attacker(PGD3, target=against(one_branch(ensemble().branch_logits, 1))),
    attacker(PGD3, target=against(ensemble())),
    attacker(PGD3, target=against(ensemble(fusion="mean"))),
    attacker(PGD3, target=against(ensemble(fusion=RFDM(sharpness=3.0000001)))),
    attacker(PGD3, target=against(ensemble(threshold=0.2))),
    attacker(APGD(eps=EPS, steps=3)),
    attacker(Square(eps=EPS, queries=3)),
    attacker(FeaturePGD(eps=EPS, steps=3)),
    attacker(Transfer(attack=PGD3, surrogate=linear(0))),
    attacker(Transfer(attack=PGD3, surrogate=linear(1))),
    attacker(WorstOf(attacks=(PGD3, APGD(eps=EPS, steps=3)))),
    attacker(WorstOf(attacks=(PGD3, APGD(eps=EPS, steps=4)))),
    attacker(DetectorEvading(eps=EPS, score=mean_logits(ensemble().branch_logits), threshold=0.1)),
    attacker(DetectorEvading(eps=EPS, score=mean_logits(ensemble().branch_logits), threshold=0.2)),
    attacker(DetectorEvading(eps=EPS, score=one_branch(ensemble().branch_logits, 0), threshold=0.1)),
    attacker(Plain()),
    attacker(Plain(strength=2.0)),
    *[
        universal_attacker(held, name="same")
        for held in (
            perturbation(),
            perturbation(delta=torch.full((1, 3, 2, 2), 0.1 + 1e-8)),
            perturbation(delta=torch.full((1, 3, 2, 2), 0.1).double()),
            perturbation(eps=0.3),
            perturbation(norm="l2", eps=1.0),
            perturbation(provenance={"attack": "SSP", "seed": 1}),
            perturbation(delta=0 * MASK.expand(1, 3, 2, 2), mask=MASK, norm="patch", eps=0.25),
            perturbation(delta=0 * MASK.expand(1, 3, 2, 2), mask=OTHER_MASK, norm="patch", eps=0.25),
        )
    ],
]


def test_settings_differ_where_attackers_differ():
    described = [json.dumps(one.settings, sort_keys=True, allow_nan=False) for one in DIFFERENT]
    twice = {text for text in described if described.count(text) > 1}
    assert not twice


def test_settings_do_not_depend_on_where_or_when_an_attacker_is_made():
    """Two processes make equal settings: nothing in them is an address or a name of a file."""

    def make():
        return [
            attacker(replace(PGD3, loss_fn=scaled(2.0)), target=branch(1), notes={"why": ("x", {3, 1, 2})}),
            attacker(DetectorEvading(eps=EPS, score=mean_logits(ensemble().branch_logits), threshold=0.1)),
            attacker(PGD3, target=against(linear(4), linear(5))),
            attacker(Plain()),
            universal_attacker(perturbation()),
        ]

    assert [one.settings for one in make()] == [one.settings for one in make()]


def test_settings_survive_json_as_they_are():
    for one in DIFFERENT:
        assert json.loads(json.dumps(one.settings, allow_nan=False)) == one.settings


def test_settings_are_readable_where_they_can_be():
    settings = attacker(PGD3).settings
    assert settings == {
        "attack": "PGD",
        "eps": EPS,
        "steps": 3,
        "step_size": None,
        "norm": "linf",
        "random_start": True,
        "momentum": 0.0,
        "restarts": 1,
        "loss_fn": "cross_entropy",
    }
    assert universal_attacker(perturbation()).settings["attack"] == "SSP"
    assert universal_attacker(perturbation()).name == "SSP"


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_numbers_that_json_has_no_word_for_are_words(value):
    text = json.dumps(attacker(PGD3, notes={"value": value}).settings, allow_nan=False)
    assert json.loads(text)["notes"] == {"value": str(value)}


def test_a_value_that_holds_itself_is_described():
    module = linear()
    module.me = [module]
    own: list = []
    own.append(own)
    assert describe(own) == ["itself"]
    assert describe(module) == describe(copy.deepcopy(module))


def test_the_digest_of_a_module_sees_weights_buffers_and_settings_but_neither_mode_nor_gradients():
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.1))
    same = copy.deepcopy(module).eval()
    same(torch.rand(2, 3, 4, 4)).sum().backward()
    assert digest(module) == digest(same)
    buffer, setting, weight = (copy.deepcopy(module) for _ in range(3))
    buffer[1].running_mean += 1
    setting[2].p = 0.2
    weight = one_bit_off(weight)
    assert len({digest(one) for one in (module, buffer, setting, weight)}) == 4


@pytest.mark.parametrize(
    "others",
    [
        (torch.zeros(2), torch.zeros(1, 2), torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, -0.0])),
        (torch.tensor(1), torch.tensor([1]), torch.tensor(1.0), torch.tensor(True)),
        (torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0)),
        (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16)),
    ],
)
def test_the_digest_of_a_tensor_sees_shape_type_and_bits(others):
    assert len({digest_tensor(tensor) for tensor in others}) == len(others)


def test_the_digest_of_a_tensor_does_not_see_its_strides():
    tensor = torch.rand(3, 4)
    assert digest_tensor(tensor) == digest_tensor(tensor.t().contiguous().t()) == digest_tensor(tensor.requires_grad_())


@pytest.mark.parametrize("name", ["\udce9", 3, None])
def test_a_name_that_no_file_can_hold_is_refused(name):
    with pytest.raises(ConfigError, match="name must be (text in Unicode|a string)"):
        Attacker(name=name, threat_model="white-box", attack=PGD(eps=0.1, steps=1))


def test_a_group_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match='threat_model must be "semi-black-box", .* or "white-box"; got'):
        Attacker(name="x", threat_model="black-box", attack=PGD3)


def test_against_gives_one_surrogate_or_several():
    one, two = linear(0), linear(1)
    assert against(one)("any model") is one
    assert against(one, two)("any model") == (one, two)


def test_a_universal_attacker_applies_its_perturbation_and_nothing_else():
    images = torch.rand(4, 3, 2, 2)
    attack = universal_attacker(perturbation(), threat_model="semi-black-box+").attack
    assert torch.equal(attack(None, images, None), perturbation().apply(images))
    assert (attack.eps, attack.norm) == (0.2, "linf")
