"""Attacks on a whole ensemble: surrogates, evasion of the detector, and the worst of several attacks."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strategies import images, laws, radii, seeds
from tiny import TinyEncoder, seeded, toy_data
from zepad.attacks import (
    APGD,
    PGD,
    DetectorEvading,
    FeaturePGD,
    JointAPGD,
    Square,
    Transfer,
    WorstOf,
    apgd_square_ensemble,
    cross_entropy,
    dlr,
    fused_by,
    hardened_branches,
    margin,
    mean_logits,
    one_branch,
)
from zepad.errors import ConfigError, InputError
from zepad.functional import detection_score
from zepad.fusion import RFDM, Bounded, Mean, MixedNUTS

EPS = 8 / 255
few = settings(laws, max_examples=20)  # each example runs an attack
FUSIONS = (RFDM(), Mean(), Bounded(), MixedNUTS())  # averaging and bounding rules


def gap_score(branch_logits):
    return lambda images: detection_score(branch_logits(images))


class Ensemble(nn.Module):
    """Three branches with BatchNorm and dropout, fused as in ZePAD."""

    def __init__(self, classes=3):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(TinyEncoder(), nn.Dropout(0.5), nn.Linear(8, classes)) for _ in range(3)
        )

    def branch_logits(self, images):
        return torch.stack([4 * branch(images) for branch in self.branches])

    def forward(self, images):
        return RFDM()(self.branch_logits(images))


@pytest.fixture
def ensemble():
    return Ensemble().eval()


def linear(classes=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))


def test_surrogates_are_functions_of_the_branches(ensemble, toy):
    logits = ensemble.branch_logits(toy[0])
    torch.testing.assert_close(mean_logits(ensemble.branch_logits)(toy[0]), sum(logits) / 3)
    for index in (0, 1, 2, -1):
        torch.testing.assert_close(one_branch(ensemble.branch_logits, index)(toy[0]), logits[index])
    sure = (logits[0].softmax(1) + logits[1].softmax(1)) / 2
    torch.testing.assert_close(hardened_branches(ensemble.branch_logits)(toy[0]), sure.log())


@pytest.mark.parametrize("fuse", [RFDM(), Bounded(vote=2.0), lambda logits: logits.median(dim=0).values])
def test_an_ensemble_under_another_fusion_is_that_fusion_of_its_branches(ensemble, toy, fuse):
    fused = fused_by(ensemble.branch_logits, fuse)(toy[0])
    assert torch.equal(fused, fuse(ensemble.branch_logits(toy[0])))


def test_the_benign_branch_has_no_part_in_the_hardened_branches(ensemble, toy):
    points = toy[0].clone().requires_grad_()
    hardened = hardened_branches(ensemble.branch_logits)
    before = hardened(points)
    (gradient,) = torch.autograd.grad(before[:, 0].sum(), points)
    with torch.no_grad():
        ensemble.branches[2][2].weight.mul_(-50)
    after = hardened(points)
    assert torch.equal(after, before)
    assert torch.equal(torch.autograd.grad(after[:, 0].sum(), points)[0], gradient)
    assert gradient.any()
    with torch.no_grad():
        ensemble.branches[1][2].weight.mul_(-50)
    assert not torch.equal(hardened(points), before)


@pytest.mark.parametrize(
    "surrogate",
    [
        mean_logits,
        lambda branches: one_branch(branches, 0),
        hardened_branches,
        lambda branches: fused_by(branches, Bounded()),
    ],
)
def test_surrogates_bring_the_mode_of_the_model_behind_a_method(toy, surrogate):
    """An attack on a method of a model in training would otherwise see dropout and change BatchNorm."""
    ensemble = Ensemble().train()
    ensemble.branches[1].eval()
    before = [part.training for part in ensemble.modules()], {k: v.tolist() for k, v in ensemble.state_dict().items()}
    modes = set()
    for branch in ensemble.branches:
        branch.register_forward_hook(lambda part, *_: modes.add(part.training))
    module = surrogate(ensemble.branch_logits)
    PGD(eps=EPS, steps=2, loss_fn=lambda outputs, _: outputs.sum(1))(module, *toy)
    assert modes == {False}
    after = [part.training for part in ensemble.modules()], {k: v.tolist() for k, v in ensemble.state_dict().items()}
    assert after == before


def test_any_function_of_images_has_surrogates(ensemble, toy):
    expected = mean_logits(ensemble.branch_logits)(toy[0])
    assert torch.equal(mean_logits(lambda x: ensemble.branch_logits(x))(toy[0]), expected)


# A detector-evading attack.


@few
@given(
    images(),
    radii,
    st.sampled_from(("linf", "l2")),
    st.floats(-0.5, 0.5),
    st.sampled_from((margin, cross_entropy)),
    seeds,
)
def test_attacked_images_lie_in_the_ball_and_in_range(clean, eps, norm, threshold, loss_fn, seed):
    ensemble = Ensemble()
    attack = DetectorEvading(
        eps=eps, steps=3, norm=norm, score=gap_score(ensemble.branch_logits), threshold=threshold, loss_fn=loss_fn
    )
    attacked = attack(ensemble, clean, torch.arange(len(clean)) % 3, generator=seeded(seed))
    rows = (attacked - clean).flatten(1)
    assert attacked.shape == clean.shape
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert ((rows.abs().amax(1) if norm == "linf" else rows.norm(dim=1)) <= eps + 1e-6).all()


@dataclass
class Watched:
    """Remembers, for each image told by its label, whether any point shown was a success."""

    model: nn.Module
    score: nn.Module
    threshold: float

    def __post_init__(self):
        self.points = []

    def __call__(self, images):
        self.points.append(images.detach().clone())
        return self.model(images)

    def successes(self, points, labels):
        with torch.no_grad():
            wrong = self.model(points).argmax(1) != labels
            return wrong & (self.score(points) <= self.threshold)


@pytest.fixture
def conflict(toy):
    """Images of class 0, a classifier and a detector: what moves an image to class 1 also raises its score."""
    model = linear(2).eval().requires_grad_(False)
    towards = model[1].weight[1] - model[1].weight[0]
    model[1].bias[0] += (toy[0].flatten(1) @ towards).quantile(0.8)
    clean = toy[0][model(toy[0]).argmax(1) == 0]
    score = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Flatten(0)).requires_grad_(False)
    score[1].weight.copy_(towards + torch.randn(192) * towards.std())
    return model, score, clean


def test_a_success_that_was_seen_is_returned(conflict):
    """One image at a time: the result is a success exactly when some point shown to the model was."""
    model, score, images = conflict
    labels, won = torch.zeros(1, dtype=torch.long), []
    for row in range(12):
        clean = images[row : row + 1]
        watched = Watched(model, score, float(score(clean)) + 0.02)
        attack = DetectorEvading(eps=0.04, steps=15, score=score, threshold=watched.threshold)
        attacked = attack(watched, clean, labels, generator=seeded(row))
        seen = torch.cat([watched.successes(points, labels) for points in watched.points])
        assert bool(watched.successes(attacked, labels)) == bool(seen.any())
        assert len(watched.points) == 1 + 16 or seen[-1]  # it stops with the first success
        assert not seen[:-1].any()
        won.append(bool(seen.any()))
    assert 0 < sum(won) < 12


def test_the_detector_is_kept_silent_where_a_blind_attack_wakes_it(conflict):
    model, score, clean = conflict
    labels, threshold = torch.zeros(len(clean), dtype=torch.long), float(score(clean).median())

    def wins(attack):
        attacked = attack(model, clean, labels, generator=seeded())
        return int(((model(attacked).argmax(1) != labels) & (score(attacked) <= threshold)).sum())

    evading = DetectorEvading(eps=0.08, steps=40, score=score, threshold=threshold)
    assert wins(evading) > wins(PGD(eps=0.08, steps=40, loss_fn=margin)) + 4
    assert wins(evading) > wins(replace(evading, weight=0.0)) + 4


def test_a_wrong_but_flagged_image_is_still_attacked(conflict):
    """Unlike in APGD, a wrong label alone is no success; wrong and silent is, and such an image is left alone."""
    model, score, clean = conflict
    labels, level = torch.ones(len(clean), dtype=torch.long), score(clean)  # all wrong
    threshold = float(level.median())
    attack = DetectorEvading(eps=0.05, steps=30, score=score, threshold=threshold)
    attacked = attack(model, clean, labels, generator=seeded())
    silent = level <= threshold
    assert torch.equal(attacked[silent], clean[silent])
    assert (model(attacked).argmax(1) != labels).all()
    assert (score(attacked) <= threshold).sum() > silent.sum()


def test_without_weight_and_threshold_it_is_apgd(toy, ensemble):
    labels = ensemble(toy[0]).argmax(1)
    blind = DetectorEvading(
        eps=EPS, steps=6, threshold=float("inf"), weight=0, score=gap_score(ensemble.branch_logits), loss_fn=dlr
    )
    expected = APGD(eps=EPS, steps=6, loss_fn=dlr)(ensemble, toy[0], labels, generator=seeded())
    assert torch.equal(blind(ensemble, toy[0], labels, generator=seeded()), expected)


def test_scores_without_a_gradient_are_refused_with_the_remedy(toy, fitted):
    images, labels = toy_data(6)
    attack = DetectorEvading(eps=EPS, steps=2, score=fitted.detection_score, threshold=fitted.threshold)
    with pytest.raises(InputError, match=r"score must be differentiable.*Use defense.score instead"):
        attack(fitted, images, fitted.predict(images))
    wide = DetectorEvading(eps=EPS, steps=2, score=lambda x: x.flatten(1), threshold=0.0)
    with pytest.raises(InputError, match=r"score must return shape \(6,\), one per image; got \(6, 768\)"):
        wide(fitted, images, labels)


def test_a_fitted_defense_is_attacked_through_its_public_face(fitted):
    images, labels = toy_data(12)
    before = {name: value.clone() for name, value in fitted.state_dict().items()}
    attack = DetectorEvading(
        eps=64 / 255, steps=10, score=gap_score(fitted.branch_logits), threshold=-1.0, weight=2.0
    )  # no score is below -1, so nothing is won and all is ascended

    def goal(x):
        with torch.no_grad():
            return margin(fitted(x), labels) - 2 * (fitted.detection_score(x) + 1)

    assert (goal(attack(fitted, images, labels)) > goal(images)).all()
    assert all(torch.equal(value, before[name]) for name, value in fitted.state_dict().items())


def test_a_calibrated_detector_is_evaded_through_its_own_score(fitted):
    """`score` is what `detect` compares with the threshold, and it has a gradient."""
    images, labels = toy_data(12)
    torch.testing.assert_close(fitted.score(images), fitted.detection_score(images))
    one, other = (
        DetectorEvading(eps=EPS, steps=4, score=score, threshold=0.0)
        for score in (fitted.score, gap_score(fitted.branch_logits))
    )
    results = [attack(fitted, images, labels, generator=seeded()) for attack in (one, other)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


# All branches at once.


def joint(ensemble, fuse=FUSIONS[2], eps=EPS, **settings):
    return JointAPGD(**{"eps": eps, "branch_logits": ensemble.branch_logits, "fuse": fuse, "steps": 5, **settings})


@few
@given(images(), radii, st.sampled_from(("linf", "l2")), st.sampled_from(FUSIONS), seeds)
def test_joint_attacks_stay_in_the_ball_and_never_help_the_defense(clean, eps, norm, fuse, seed):
    ensemble = Ensemble().eval()
    labels = torch.arange(len(clean)) % 3
    attack = joint(ensemble, fuse, eps, steps=3, classes=2, norm=norm)
    attacked = attack(ensemble, clean, labels, generator=seeded(seed))
    rows = (attacked - clean).flatten(1)
    assert attacked.shape == clean.shape
    assert not attacked.requires_grad
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert ((rows.abs().amax(1) if norm == "linf" else rows.norm(dim=1)) <= eps + 1e-6).all()
    with torch.no_grad():
        before, after = (fuse(ensemble.branch_logits(x)) for x in (clean, attacked))
    wrong = before.argmax(1) != labels
    assert torch.equal(attacked[wrong], clean[wrong])
    assert (margin(after, labels) >= margin(before, labels) - 1e-6).all()


class Halves(nn.Module):
    """Hardened branches that read the upper half of an image, and a benign branch that reads the lower half.

    The benign branch is so sure that its probabilities are one and zero exactly.
    """

    hardened = ((5.0, -2.0), (0.0, 0.0), (0.0, -5.0))  # slope and value at zero of each class's logit
    benign = ((4000.0, -1680.0), (0.0, 0.0), (0.0, -100.0))

    def branch_logits(self, images):
        upper, lower = images.flatten(1).chunk(2, dim=1)
        read = [
            torch.stack([slope * half.mean(dim=1) + value for slope, value in lines], dim=1)
            for half, lines in ((upper, self.hardened), (lower, self.benign))
        ]
        return torch.stack([read[0], read[0], read[1]])


@pytest.fixture
def halves():
    """Six images of class 0 to each half of which eps = 0.1 makes a difference."""
    clean = torch.full((6, 1, 16, 16), 0.5)
    clean[:, :, :8] = 0.6
    return Halves(), clean, torch.zeros(6, dtype=torch.long)


def test_what_a_saturated_vote_hides_from_the_gradient_is_found_by_attacking_all_branches(halves):
    """Lead of the hardened branches: 1 on the clean image, 0.5 at worst; with a vote of 0.8 both halves must fall."""
    model, clean, labels = halves
    fused = fused_by(model.branch_logits, Bounded(vote=0.8))
    points = clean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(fused(points), labels).sum(), points)
    assert gradient[:, :, :8].all()
    assert not gradient[:, :, 8:].any()
    for loss_fn in (cross_entropy, margin):
        blind = APGD(eps=0.1, steps=50, loss_fn=loss_fn)(fused, clean, labels, generator=seeded())
        assert (fused(blind).argmax(1) == labels).all()
    attack = joint(model, eps=0.1, steps=50, fuse=Bounded(vote=0.8))
    attacked = attack(fused, clean, labels, generator=seeded())
    assert (fused(attacked).argmax(1) == 1).all()
    safe = joint(model, eps=0.1, steps=50, fuse=Bounded(vote=0.4))
    fused = fused_by(model.branch_logits, Bounded(vote=0.4))
    assert (fused(safe(fused, clean, labels, generator=seeded())).argmax(1) == labels).all()  # the bound holds


def test_a_joint_attack_tries_the_likeliest_wrong_classes_one_after_another(halves):
    """Nothing moves the likeliest wrong class, and the second likeliest can be made to win."""
    model, clean, labels = halves
    model.hardened = ((0.0, 1.0), (0.0, 0.5), (6.0, -3.6))
    model.benign = ((0.0, 0.0), (0.0, -50.0), (100.0, -50.0))

    def wins(classes):
        attack = joint(model, eps=0.1, classes=classes, steps=30, fuse=Bounded(vote=0.8))
        fused = attack.fuse(model.branch_logits(attack(model, clean, labels, generator=seeded())))
        return int((fused.argmax(1) == 2).sum())

    assert [wins(classes) for classes in (1, 2, 3, 99)] == [0, 6, 6, 6]


def test_a_joint_attack_leaves_the_defense_as_it_was(toy):
    ensemble = Ensemble().train()
    ensemble.branches[1].eval()
    before = [part.training for part in ensemble.modules()], {k: v.tolist() for k, v in ensemble.state_dict().items()}
    joint(ensemble, steps=2)(ensemble, *toy)
    joint(ensemble, steps=2)(lambda x: x, *toy)  # the model is not asked, and its branches are found without it
    after = [part.training for part in ensemble.modules()], {k: v.tolist() for k, v in ensemble.state_dict().items()}
    assert after == before


def test_a_joint_attack_is_one_of_several_like_any_other(fitted):
    images, labels = toy_data(12)
    attack = JointAPGD(eps=EPS, branch_logits=fitted.branch_logits, fuse=fitted.fuse, steps=3)
    assert (attack.eps, attack.norm) == (EPS, "linf")
    worst = WorstOf(attacks=(PGD(eps=EPS, steps=1), attack))(fitted, images, labels, generator=seeded())
    assert (margin(fitted(worst), labels) >= margin(fitted(images), labels)).all()
    with pytest.raises(InputError, match=r"labels must have shape \(12,\)"):
        attack(fitted, images, labels[:-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, r"eps must lie in \(0, 1\]"),
        ({"eps": 0.0}, "eps must be a positive number"),
        ({"norm": "l1"}, "norm must be one of"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"classes": 0}, "classes must be at least 1; got 0"),
        ({"cap": 0.0}, "cap must be a positive number; got 0.0"),
        ({"cap": float("nan")}, "cap must be a number; got nan"),
    ],
)
def test_settings_of_a_joint_attack_out_of_range_are_refused(ensemble, settings, message):
    with pytest.raises(ConfigError, match=message):
        joint(ensemble, **settings)


# Attacks one after another.


def test_the_worst_of_two_is_worse_than_either(toy):
    """Attacks on two different surrogates fell different images; together they fell them all."""
    model, (clean, _) = linear().eval(), toy
    labels = model(clean).argmax(1)
    weak = PGD(eps=0.005, steps=1)
    attacks = (Transfer(attack=weak, surrogate=linear()), Transfer(attack=weak, surrogate=model))

    def falls(attack):
        return model(attack(model, clean, labels, generator=seeded())).argmax(1) != labels

    together = falls(WorstOf(attacks=attacks))
    assert torch.equal(together, falls(attacks[0]) | falls(attacks[1]))
    assert 0 < together.sum() < 24


def test_each_attack_is_given_what_is_left():
    def model(images):  # 0 for dark images, 1 for bright ones
        bright = images.mean(dim=(1, 2, 3))
        return torch.stack([0.5 - bright, bright - 0.5], dim=1)

    given = []

    @dataclass(frozen=True)
    class Brighten:
        rows: int
        eps: float = 1.0
        norm: str = "linf"

        def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002 - the call form of an attack
            given.append(len(images))
            return torch.cat([torch.ones_like(images[: self.rows]), images[self.rows :]])

    dark, bright = torch.zeros(5, 3, 4, 4), torch.ones(1, 3, 4, 4)
    attacked = WorstOf(attacks=(Brighten(2), Brighten(1), Brighten(0)))(
        model, torch.cat([dark, bright]), torch.zeros(6, dtype=torch.long)
    )
    assert given == [5, 3, 2]
    assert attacked.mean(dim=(1, 2, 3)).tolist() == [1, 1, 1, 0, 0, 1]
    given.clear()
    WorstOf(attacks=(Brighten(9), Brighten(1)))(model, dark, torch.zeros(5, dtype=torch.long))
    assert given == [5]  # none is left for the second


def test_of_an_image_that_holds_the_largest_margin_is_kept(toy):
    model, clean = linear().eval(), toy[0]
    labels = model(clean).argmax(1)
    eps = 1e-4
    attacks = [PGD(eps=eps, steps=steps, loss_fn=margin) for steps in (0, 3, 1)]
    generator = seeded()
    runs = [clean] + [attack(model, clean, labels, generator=generator) for attack in attacks]
    margins = torch.stack([margin(model(run), labels) for run in runs])
    assert (margins < 0).all()  # nothing falls, so that each attack is given all images
    worst = WorstOf(attacks=attacks)(model, clean, labels, generator=seeded())
    torch.testing.assert_close(margin(model(worst), labels), margins.max(dim=0).values, rtol=0, atol=0)


def test_a_feature_attack_may_be_one_of_several(toy):
    encoder = TinyEncoder().eval()
    model = nn.Sequential(encoder, nn.Linear(8, 3))
    labels = model(toy[0]).argmax(1)
    worst = WorstOf(attacks=(Transfer(attack=FeaturePGD(eps=EPS, steps=3), surrogate=encoder), PGD(eps=EPS, steps=1)))
    assert (worst(model, toy[0], labels) - toy[0]).abs().max() <= EPS + 1e-6


def test_the_ensemble_is_at_least_as_strong_as_its_parts(toy):
    model = linear().eval()
    labels = model(toy[0]).argmax(1)
    ensemble = apgd_square_ensemble(0.008, steps=5, queries=20)

    def falls(attack):
        return model(attack(model, toy[0], labels, generator=seeded())).argmax(1) != labels

    assert [type(attack) for attack in ensemble.attacks] == [APGD, APGD, Square]
    assert (falls(ensemble) >= falls(ensemble.attacks[0])).all()
    assert 0 < falls(ensemble).sum() < 24
    assert (ensemble.eps, ensemble.norm) == (0.008, "linf")


def test_budgets_that_differ_are_refused():
    with pytest.raises(ConfigError, match="attacks must be attacks of one norm and eps"):
        WorstOf(attacks=(PGD(eps=0.1), PGD(eps=0.2)))
    with pytest.raises(ConfigError, match="attacks must be attacks of one norm and eps"):
        WorstOf(attacks=(PGD(eps=0.1), PGD(eps=0.1, norm="l2")))
    with pytest.raises(ConfigError, match="at least one attack"):
        WorstOf(attacks=())
    with pytest.raises(ConfigError, match='use APGD for "l2"'):
        apgd_square_ensemble(0.5, norm="l2")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": float("nan")}, "threshold must be a number; got nan"),
        ({"weight": -1.0}, "weight must be a number of zero or more; got -1.0"),
        ({"weight": float("inf")}, "weight must be a number of zero or more; got inf"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DetectorEvading(**{"eps": EPS, "score": linear(), "threshold": 0.1, **settings})
