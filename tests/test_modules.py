"""`Ensemble`, and what an evaluation takes for a model of several branches."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

from tiny import toy_data
from zepad.config import FusionConfig
from zepad.errors import ConfigError
from zepad.functional import detection_score, fuse_logits
from zepad.modules import Ensemble
from zepad.types import Branched


def linear(classes=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (None, {}),
        (FusionConfig(rule="mean"), {"rule": "mean"}),
        (FusionConfig(sharpness=1.0), {"sharpness": 1.0}),
        (FusionConfig(rule="bounded", vote=2.0, sharpness=1.0), {"rule": "bounded", "vote": 2.0}),
    ],
)
def test_an_ensemble_fuses_what_its_branches_say(config, settings):
    branches = {"one": linear(), "two": linear(), "three": linear()}
    images, model = torch.rand(4, 3, 2, 2), Ensemble(branches, fusion=config)
    logits = torch.stack([branch(images) for branch in branches.values()])
    assert torch.equal(model.branch_logits(images), logits)
    assert torch.equal(model(images), fuse_logits(logits, **settings))
    assert torch.equal(model.fuse(logits), model(images))
    assert torch.equal(model.score(images), detection_score(logits))
    assert model.branch_names == ("one", "two", "three")


def test_an_ensemble_of_the_branches_of_a_defense_is_the_defense_bit_for_bit(fitted):
    images, _ = toy_data(12)
    twin = Ensemble(
        {name: fitted.branch(name) for name in fitted.branch_names},
        fusion=fitted.fusion.config,
        threshold=fitted.threshold,
    ).eval()
    assert torch.equal(twin.branch_logits(images), fitted.branch_logits(images))
    assert torch.equal(twin(images), fitted(images))
    gradients = []
    for model in (fitted, twin):
        given = images.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(given).square().sum(), given)[0])
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_branches_are_held_not_copied():
    branch = linear()
    model = Ensemble({"one": branch, "again": branch})
    assert len(list(model.parameters())) == 2
    with torch.no_grad():
        branch[1].weight.zero_()
    assert not model.branches["again"][1].weight.any()
    assert copy.deepcopy(model).state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "settings",
    [
        {"branches": {}},
        {"branches": {"one": linear()}, "threshold": 0.1},
        {"branches": {"one": linear(), "two": linear()}, "threshold": math.inf},
        {"branches": {"one": linear(), "two": linear()}, "threshold": math.nan},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        Ensemble(**settings)


def test_models_of_several_branches_are_known_by_their_members(fitted):
    for model in (fitted, Ensemble({"one": linear()})):
        assert isinstance(model, Branched)
        for member in Branched.__protocol_attrs__ if hasattr(Branched, "__protocol_attrs__") else ():
            inspect.getattr_static(model, member)  # how Python 3.12 and later look, blind to nn.Module's attributes
        for member in ("branch_names", "threshold", "settings", "branch_logits", "fuse", "score", "__call__"):
            inspect.getattr_static(model, member)
    for other in (linear(), lambda images: images, nn.ModuleDict(), None):
        assert not isinstance(other, Branched)


def test_the_protocol_asks_for_no_submodule():
    assert {name for name in vars(Branched) if not name.startswith("_")} == {
        "branch_names",
        "threshold",
        "settings",
        "branch_logits",
        "fuse",
        "score",
    }
