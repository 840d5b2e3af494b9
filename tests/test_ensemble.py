"""`BranchEnsemble`, and what an evaluation takes for a model of several branches."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

from tiny import toy_data
from zepad.ensemble import BranchEnsemble
from zepad.errors import ConfigError, StageError
from zepad.functional import detection_score
from zepad.fusion import RFDM, Bounded, Mean, fuse_logits
from zepad.modules import Branch
from zepad.types import Branched


def linear(classes=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes))


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("rfdm", {}),
        (Mean(), {"rule": "mean"}),
        (RFDM(sharpness=1.0), {"sharpness": 1.0}),
        (Bounded(vote=2.0), {"rule": "bounded", "vote": 2.0}),
    ],
)
def test_an_ensemble_fuses_what_its_branches_say(rule, settings):
    branches = {"one": linear(), "two": linear(), "three": linear()}
    images, model = torch.rand(4, 3, 2, 2), BranchEnsemble(branches, fusion=rule)
    logits = torch.stack([branch(images) for branch in branches.values()])
    assert torch.equal(model.branch_logits(images), logits)
    assert torch.equal(model(images), fuse_logits(logits, **settings))
    assert torch.equal(model.fuse(logits), model(images))
    assert torch.equal(model.score(images), detection_score(logits))
    assert model.branch_names == ("one", "two", "three")


def test_an_ensemble_of_the_branches_of_a_defense_is_the_defense_bit_for_bit(fitted):
    images, _ = toy_data(12)
    twin = BranchEnsemble(
        {name: fitted.branch(name) for name in fitted.branch_names},
        fusion=fitted.fusion,
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
    model = BranchEnsemble({"one": branch, "again": branch})
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
        {"branches": {"one": linear()}, "fusion": "votes"},
        {"branches": {"one": linear()}, "detector": "votes"},
    ],
)
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError):
        BranchEnsemble(**settings)


def test_models_of_several_branches_are_known_by_their_members(fitted):
    for model in (fitted, BranchEnsemble({"one": linear()})):
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


def test_an_ensemble_predicts_detects_and_explains_itself():
    images = torch.rand(5, 3, 2, 2)
    model = BranchEnsemble({"one": linear(), "two": linear(), "clean": linear()}, threshold=0.0).eval()
    with torch.no_grad():
        fused, scores = model(images), model.score(images)
    assert torch.equal(model.predict(images), fused.argmax(dim=1))
    assert torch.equal(model.predict_proba([images[:2], images[2:]]), fused.softmax(dim=1))
    assert torch.equal(model.detect(images), scores > 0)
    report = model.inspect(images)
    assert report.names == ("one", "two", "clean")
    assert "clean" in str(report)
    with pytest.raises(StageError, match="has no threshold yet"):
        BranchEnsemble({"one": linear(), "two": linear()}).detect(images)


def test_a_branch_without_a_head_says_so():
    branch = Branch(nn.Flatten())
    assert not branch.has_head
    with pytest.raises(StageError, match="has no head yet"):
        branch(torch.rand(1, 3, 2, 2))
    assert Branch(nn.Flatten(), nn.Linear(12, 2)).has_head
