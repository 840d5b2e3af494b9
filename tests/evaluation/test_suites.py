"""The white-box suite: its attackers, which include every branch and the fusion."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zepad.ensemble import BranchEnsemble
from zepad.evaluation import evaluate, white_box
from zepad.fusion import Bounded

CLASSES = 5


def branch(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))


def ensemble(**settings) -> BranchEnsemble:
    return BranchEnsemble({"victim": branch(0), "auxiliary": branch(1), "benign": branch(2)}, **settings).eval()


def names(model, classes: int = CLASSES) -> set[str]:
    return {attacker.name for attacker in white_box(model, eps=8 / 255, num_classes=classes, steps=3, queries=3)}


def test_a_plain_classifier_is_attacked_through_itself_alone():
    assert names(branch(0)) == {"APGD-CE-3", "APGD-DLR-3", "Square-3"}


def test_an_ensemble_is_attacked_through_surrogates_jointly_and_past_its_detector():
    through = {"APGD-CE-3", "APGD-DLR-3", "Square-3", "APGD-T-3"}
    surrogates = {"APGD-CE-3 on mean logits", "APGD-DLR-3 on mean logits", "APGD-CE-3 on RFDM"}
    surrogates |= {f"APGD-CE-3 on the {name} branch" for name in ("victim", "auxiliary", "benign")}
    hardened = {"APGD-CE-3 on the hardened branches", "joint APGD-3"}
    assert names(ensemble()) == through | surrogates | hardened
    assert names(ensemble(threshold=0.1)) - names(ensemble()) == {"detector-evading APGD-3"}


def test_two_classes_leave_out_what_compares_more():
    assert not any("-T-" in name or "DLR" in name for name in names(ensemble(), 2))


@pytest.mark.parametrize(
    "rule", ["bounded", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("rfdm", "mixed"))]
)
def test_every_attacker_stays_in_its_ball_whatever_the_fusion(rule):
    model = ensemble(fusion=rule, threshold=0.1)
    images = torch.rand(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = model(images).argmax(1)
    attackers = white_box(model, eps=64 / 255, num_classes=CLASSES, steps=3, queries=3)
    report = evaluate(model, [(images, labels)], attackers, sanity=False, progress=False)  # checks the ball itself
    assert report.benign_accuracy.value == 1
    assert report.worst["white-box"].robust_accuracy.value < 1


def test_the_joint_attack_is_on_the_model_that_is_evaluated():
    first, second = ensemble(), ensemble(fusion=Bounded(vote=0.0))
    joint = {
        m: next(a for a in white_box(m, eps=0.1, num_classes=CLASSES) if "joint" in a.name) for m in (first, second)
    }
    z = torch.randn(3, 4, CLASSES, generator=torch.Generator().manual_seed(0))
    assert torch.equal(joint[first].attack.fuse(z), first.fuse(z))
    assert torch.equal(joint[second].attack.fuse(z), second.fuse(z))
    assert not torch.equal(first.fuse(z), second.fuse(z))
