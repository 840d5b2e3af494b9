"""The suites of attackers: who is in each group; the white box includes every branch and the fusion."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zepad.attacks import FeaturePGD, UniversalPerturbation
from zepad.ensemble import BranchEnsemble
from zepad.errors import InputError
from zepad.evaluation import (
    evaluate,
    published,
    replica,
    replica_with_labels,
    semi_black_box,
    semi_black_box_plus,
    white_box,
)
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


def test_attacks_on_features_run_in_bfloat16_where_it_is_native_and_attacks_on_decisions_never_do():
    encoders = {"victim": branch(3), "auxiliary": branch(4)}
    common = {"eps": 8 / 255, "steps": 2}
    features = [
        *semi_black_box(encoders["victim"], torch.rand(4, 3, 2, 2), universal={}, **common),
        *semi_black_box_plus(*encoders.values(), torch.rand(4, 3, 2, 2), universal={}, **common),
        *replica(encoders, {}, torch.rand(4, 3, 2, 2), universal={}, **common),
        *published(encoders, **common),
    ]
    decisions = [*white_box(ensemble(), num_classes=CLASSES, **common), *replica_with_labels(encoders, **common)]
    assert {attacker.precision for attacker in features} == {"auto"}
    assert {attacker.precision for attacker in decisions} == {"fp32"}


def test_few_attackers_of_the_white_box_attack_every_image_and_square_comes_last():
    attackers = white_box(ensemble(threshold=0.1), eps=8 / 255, num_classes=CLASSES, steps=3, queries=3)
    everything = {attacker.name for attacker in attackers if not attacker.remaining}
    branches = {f"APGD-CE-3 on the {name} branch" for name in ("victim", "auxiliary", "benign")}
    assert everything == {"APGD-CE-3", "detector-evading APGD-3"} | branches
    assert [attacker.name for attacker in attackers[:2]] == ["APGD-CE-3", "APGD-DLR-3"]
    assert attackers[-1].name == "Square-3"


def test_who_attacks_public_encoders_along_with_copies_goes_on_with_what_these_attacks_leave():
    """Moving the public encoders too takes budget away from the copies, so that these attacks are dear and weak."""
    settings = {"eps": 8 / 255, "steps": 2, "progress": False}
    for attackers in (
        replica(COPIES, PUBLIC, IMAGES, universal={}, **settings),
        published(COPIES, public=PUBLIC, **settings),
    ):
        assert [a.remaining for a in attackers] == [a.name.endswith("public encoders)") for a in attackers]
        assert attackers[-1].remaining
    assert not any(attacker.remaining for attacker in published(COPIES, **settings))


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


# the ladder below the white box ---------------------------------------------------------------------------------


class Recorded:
    """A universal attack that remembers what it was fitted on."""

    def __init__(self) -> None:
        self.fitted: list[tuple] = []

    def fit(self, encoder, images, *, progress=True) -> UniversalPerturbation:  # noqa: ARG002
        self.fitted.append(tuple(encoder))
        return UniversalPerturbation(delta=torch.full((1, 3, 2, 2), 1 / 255), eps=8 / 255)


def encoders(*seeds: int) -> dict[str, nn.Module]:
    return {name: branch(seed) for name, seed in zip(("victim", "auxiliary"), seeds, strict=False)}


def targets(attackers) -> dict[str, tuple]:
    """Return what each per-image attacker attacks."""
    found = {a.name: a.target(None) for a in attackers if isinstance(a.attack, FeaturePGD)}
    return {name: target if isinstance(target, tuple) else (target,) for name, target in found.items()}


PUBLIC, COPIES, IMAGES = encoders(0, 1), encoders(3, 4), torch.rand(4, 3, 2, 2)
LABELS = torch.tensor([0, 1, 2, 3])
QUIET = {"eps": 8 / 255, "progress": False}


def test_the_six_attackers_of_the_paper_come_first_and_momentum_with_diversity_after_them():
    names = [a.name for a in semi_black_box(PUBLIC["victim"], IMAGES, universal={"one": Recorded()}, **QUIET)]
    assert names == ["one", "feature PGD-20", "feature MI-DI-30"]
    attackers = semi_black_box_plus(*PUBLIC.values(), IMAGES, universal={"one": Recorded()}, **QUIET)
    both = " (both encoders)"
    assert [a.name for a in attackers] == [f"one{both}", f"feature PGD-20{both}", f"feature MI-DI-30{both}"]
    plain, transferable = (a.attack for a in attackers[1:])
    assert plain == FeaturePGD(eps=8 / 255, steps=20)
    assert transferable == FeaturePGD(eps=8 / 255, steps=30, momentum=1.0, diversity=0.5)
    assert {a.threat_model for a in attackers} == {"semi-black-box+"}


def test_further_public_encoders_have_attackers_of_their_own():
    other = branch(7)
    settings = {"universal": {}, **QUIET}
    attackers = semi_black_box(PUBLIC["victim"], IMAGES, others={"resnet44": other}, **settings)
    before = semi_black_box(PUBLIC["victim"], IMAGES, **settings)
    assert [(a.name, a.settings) for a in attackers[:2]] == [(a.name, a.settings) for a in before]
    aimed = targets(attackers[2:])
    assert aimed == {"feature PGD-20 (resnet44)": (other,), "feature MI-DI-30 (resnet44)": (other,)}
    assert {a.threat_model for a in attackers} == {"semi-black-box"}


def test_a_replica_attacks_the_copies_and_all_it_has():
    universal, everything = Recorded(), (*COPIES.values(), *PUBLIC.values())
    attackers = replica(COPIES, PUBLIC, IMAGES, universal={"one": universal}, **QUIET)
    assert universal.fitted == [tuple(COPIES.values())]
    assert targets(attackers) == {
        **{f"feature PGD-20 (copy of {role})": (copy,) for role, copy in COPIES.items()},
        "feature PGD-20 (copies)": tuple(COPIES.values()),
        "feature PGD-20 (copies and public encoders)": everything,
        "feature MI-DI-30 (copies and public encoders)": everything,
    }
    assert attackers[0].name == "one (copies)"
    assert {a.threat_model for a in attackers} == {"replica"}


def test_a_replica_of_the_benign_branch_does_not_hide_the_hardened_copies():
    """Attacks that aim at all copies at once need not be the strongest on a fused model."""
    hardened, copies = tuple(COPIES.values()), {**COPIES, "benign": branch(5)}
    found = targets(replica(copies, PUBLIC, IMAGES, universal={}, **QUIET))
    assert found["feature PGD-20 (hardened copies)"] == hardened
    assert found["feature PGD-20 (copies)"] == (*hardened, copies["benign"])
    assert len(found) == 3 + 2 + 2
    everything, alone = replica_with_labels(copies, eps=8 / 255)
    assert "hardened" in alone.name
    torch.testing.assert_close(alone.target(None)(IMAGES), sum(copy(IMAGES) for copy in hardened) / 2)
    torch.testing.assert_close(everything.target(None)(IMAGES), sum(copy(IMAGES) for copy in copies.values()) / 3)
    single = {"victim": COPIES["victim"]}
    assert list(targets(replica(single, {}, IMAGES, universal={}, **QUIET))) == [
        "feature PGD-20 (copies)", "feature PGD-20 (all copies)", "feature MI-DI-30 (all copies)"
    ]  # fmt: skip


def test_a_replica_fits_a_universal_feature_attack_by_itself():
    fitted = replica(COPIES, PUBLIC, IMAGES, **QUIET)[0]
    assert fitted.name == "universal feature attack (copies)"
    assert fitted.settings["attack"] == "UniversalFeatureAttack"


def test_a_replica_with_labels_differentiates_the_mean_of_its_logits():
    (attacker,) = replica_with_labels(COPIES, eps=8 / 255, steps=3)
    assert attacker.threat_model == "replica"
    mean = sum(copy(IMAGES) for copy in COPIES.values()) / 2
    surrogate = attacker.target(None)
    torch.testing.assert_close(surrogate(IMAGES), mean)
    labels = mean.argmax(1)  # APGD leaves images alone that are wrong already
    attacked = attacker.attack(surrogate, IMAGES, labels)
    loss = nn.functional.cross_entropy
    assert loss(surrogate(attacked), labels) > loss(mean, labels)


def test_copies_with_heads_are_attacked_in_evaluation_mode():
    dropped = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(12, CLASSES)).train()
    (attacker,) = replica_with_labels({"one": dropped}, eps=8 / 255, steps=2)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    first, second = (attacker.attack(attacker.target(None), IMAGES, LABELS, generator=g) for g in generators)
    assert torch.equal(first, second)
    assert all(part.training for part in dropped)


def test_whoever_has_the_published_encoders_attacks_each_and_all():
    everything = (*COPIES.values(), *PUBLIC.values())
    attackers = published(COPIES, public=PUBLIC, **QUIET)
    assert targets(attackers) == {
        "feature PGD-20 (hardened victim)": (COPIES["victim"],),
        "feature PGD-20 (hardened auxiliary)": (COPIES["auxiliary"],),
        "feature PGD-20 (hardened encoders)": tuple(COPIES.values()),
        "feature PGD-20 (hardened and public encoders)": everything,
        "feature MI-DI-30 (hardened and public encoders)": everything,
    }
    assert {a.threat_model for a in attackers} == {"published"}
    alone = targets(published(COPIES, **QUIET))
    assert len(alone) == 4
    assert alone["feature MI-DI-30 (hardened encoders)"] == tuple(COPIES.values())


def test_published_encoders_are_attacked_universally_if_asked():
    universal = Recorded()
    attackers = published(COPIES, IMAGES, universal={"one": universal}, **QUIET)
    assert universal.fitted == [tuple(COPIES.values())]
    assert attackers[0].name == "one (hardened encoders)"
    with pytest.raises(InputError, match="Pass the attacker's loader"):
        published(COPIES, universal={"one": universal}, **QUIET)


@pytest.mark.parametrize("suite", [lambda: replica({}, PUBLIC, IMAGES, **QUIET), lambda: published({}, **QUIET),
                                   lambda: replica_with_labels({}, eps=0.1)])  # fmt: skip
def test_a_suite_without_its_encoders_is_refused(suite):
    with pytest.raises(InputError, match="is empty"):
        suite()


def test_an_image_counts_under_a_group_only_if_it_survives_all_of_its_attackers():
    model = ensemble()
    with torch.no_grad():
        labels = model(IMAGES).argmax(1)
    settings = {"eps": 64 / 255, "progress": False}
    attackers = [*replica(COPIES, PUBLIC, IMAGES, **settings), *published(COPIES, public=PUBLIC, **settings)]
    report = evaluate(model, [(IMAGES, labels)], attackers, sanity=False, progress=False)
    assert report.groups == ("replica", "published")
    for group in report.groups:
        least = min(result.rates.robust_accuracy.value for result in report.group(group))
        assert report.worst[group].robust_accuracy.value <= least
