"""Each sanity check fails on a model built to show its fault, and none on an ordinary one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from zepad.attacks import PGD
from zepad.errors import EvaluationWarning
from zepad.evaluation import Attacker, AttackResult, Cost, Rate, RobustRates, evaluate, sanity
from zepad.evaluation.sanity import check_model, check_results

EPS = 16 / 255
RANDOM, LOGITS, GRADIENTS = "outputs are not random", "outputs are logits", "gradients are not zero"
STEPS, LARGE, SQUARE = (
    "more steps do not do worse",
    "a large budget breaks it",
    "a gradient attack beats a gradient-free one",
)
KNOWING = "knowing more does not do worse"


def shades(count=24, classes=3):
    """Images whose class is the brightest colour channel, by more or less."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    images = torch.full((count, 3, 8, 8), 0.4) + 0.02 * torch.rand(count, 3, 8, 8, generator=generator)
    images[torch.arange(count), labels] += torch.linspace(0.03, 0.25, count)[:, None, None]
    return images, labels


def brightness(images):
    return images.mean((2, 3)) * 20


class Noisy(nn.Module):
    """Adds fresh noise to its logits."""

    def forward(self, images):
        return brightness(images) + torch.rand(3) * 0.05


class Constant(nn.Module):
    """Has weights, and ignores the images."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

    def forward(self, images):
        return self.bias.expand(len(images), 3)


def misleading(images):
    """The right logits with gradients turned round: ascent on the loss descends."""
    return 2 * brightness(images).detach() - brightness(images)


def saturated(images):
    return brightness(images).double() * 1e4


def quantised(images):
    return (brightness(images) * 4).round()


def failed(model, images=None, labels=None):
    images, labels = shades() if images is None else (images, labels)
    return {check.name for check in check_model(model, images, labels, eps=EPS) if not check.passed}


def test_an_ordinary_model_passes():
    checks = list(check_model(brightness, *shades(), eps=EPS))
    assert [check.name for check in checks] == [RANDOM, LOGITS, GRADIENTS, STEPS, LARGE, SQUARE]
    assert all(check.passed for check in checks)


@pytest.mark.parametrize(
    ("model", "faults"),
    [
        (Noisy(), {RANDOM}),
        (lambda x: brightness(x).softmax(1), {LOGITS}),
        pytest.param(lambda x: brightness(x).softmax(1).half().float(), {LOGITS}, marks=pytest.mark.slow),
        (quantised, {GRADIENTS, LARGE, SQUARE}),
        (lambda x: brightness(x).detach(), {GRADIENTS, LARGE, SQUARE}),
        pytest.param(torch.no_grad()(brightness), {GRADIENTS, LARGE, SQUARE}, marks=pytest.mark.slow),
        pytest.param(saturated, {GRADIENTS, LARGE, SQUARE}, marks=pytest.mark.slow),
        (misleading, {LARGE, SQUARE}),
    ],
    ids=["noisy", "probabilities", "half", "quantised", "detached", "no_grad", "saturated", "misleading"],
)
def test_a_fault_is_found(model, faults):
    assert failed(model) == faults if model.__class__ is Noisy else failed(model) >= faults


@pytest.mark.parametrize("model", [Constant(), lambda x: torch.tensor([1.0, 0, 0]).expand(len(x), 3)])
def test_a_model_that_ignores_its_input_fails_and_does_not_break_the_evaluation(model):
    images, _ = shades()
    assert {GRADIENTS, LARGE} <= failed(model, images, torch.zeros(len(images), dtype=torch.int64))


def test_more_steps_must_not_do_worse():
    """A gradient that turns round once an image has moved: five steps fool what forty steps bring back."""

    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, images):
            logits = brightness(images)
            self.calls += torch.is_grad_enabled()
            return logits if self.calls <= 20 else 2 * logits.detach() - logits

    few = failed(Turning())
    assert STEPS in few


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_square_is_asked_no_more_than_the_verdict_needs(withstood):
    """The verdict is that of both attacks on all images, and Square begins with those that withstood the other one."""
    apgd, square = torch.tensor(withstood).unbind(1)
    asked = []

    def survivors(model, attack, images, labels, seed):
        asked.append(images.tolist())
        return square[images]

    numbers = torch.arange(len(withstood))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanity, "_survivors", survivors)
        check = sanity._gradient_free(None, numbers, numbers, apgd, eps=EPS, seed=0)
    shares = [float(each.float().mean()) for each in (apgd, square)]
    assert check.passed == (shares[0] <= shares[1] + 0.02)
    assert asked in ([], [numbers[apgd].tolist()], [numbers[apgd].tolist(), numbers[~apgd].tolist()])
    if not check.passed:
        assert f"{shares[1]:.1%} under Square" in check.detail
    if not apgd.any() or bool(square[apgd].all()):
        assert len(asked) <= 1


@pytest.mark.parametrize("value", [-torch.inf, -1e30])
def test_a_masked_class_is_no_randomness(value):
    model = lambda x: torch.cat([brightness(x), torch.full((len(x), 1), value)], 1)  # noqa: E731
    assert failed(model) == set()


def test_two_classes_and_half_precision_pass():
    images, labels = shades(classes=2)
    assert failed(lambda x: brightness(x)[:, :2].half(), images, labels) == set()


def test_one_image_is_enough():
    images, labels = shades()
    assert failed(brightness, images[:1], labels[:1]) == set()


def test_equal_seeds_give_equal_checks_and_the_global_random_state_is_untouched():
    random = torch.get_rng_state()
    first, second = (list(check_model(brightness, *shades(), eps=EPS, seed=3)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), random)


# across the groups ------------------------------------------------------------------------------------------------


def result(threat_model, hits, eps=EPS, norm="linf"):
    rate = Rate(hits, 100)
    rates = RobustRates(robust_accuracy=rate, fooling_rate=rate, attack_success_rate=rate, branches={})
    return AttackResult(
        name=f"{threat_model} {hits}",
        threat_model=threat_model,
        eps=eps,
        norm=norm,
        settings={},
        rates=rates,
        detection=None,
        cost=Cost(seconds=0, forwards=0, gradients=0),
        confidences={},
    )


@pytest.mark.parametrize(
    ("results", "verdict"),
    [
        ([("white-box", 10), ("semi-black-box", 40)], True),
        ([("white-box", 40), ("semi-black-box", 40)], True),
        ([("white-box", 50), ("semi-black-box", 40)], False),
        ([("white-box", 50), ("semi-black-box+", 40)], False),
        ([("white-box", 50), ("white-box", 10), ("semi-black-box", 40)], True),
        ([("white-box", 50), ("semi-black-box", 60), ("semi-black-box", 40)], False),
        ([("white-box", 50), ("semi-black-box", 40, 2 * EPS)], None),
        ([("white-box", 50, 2 * EPS), ("semi-black-box", 40)], False),
        ([("white-box", 50), ("semi-black-box", 40, 0.1, "patch")], None),
        ([("white-box", 50, 1.0, "l2"), ("semi-black-box", 40, 1.0, "l2")], False),
        ([("white-box", 50)], None),
        ([("semi-black-box", 50)], None),
        ([], None),
    ],
)
def test_the_one_who_knows_more_must_not_do_worse_at_no_smaller_budget(results, verdict):
    checks = list(check_results([result(*values) for values in results]))
    assert [check.passed for check in checks] == ([] if verdict is None else [verdict])
    assert all(check.name == KNOWING for check in checks)


# within an evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [quantised, Noisy()])
def test_a_failed_check_is_a_warning_and_in_the_report(model):
    with pytest.warns(EvaluationWarning) as caught:
        report = evaluate(model, [shades()], [], name="mine", samples=0, progress=False)
    assert report.warnings == tuple(check for check in report.checks if not check.passed)
    assert [str(warning.message) for warning in caught] == [f"mine: {c.name}: {c.detail}" for c in report.warnings]
    assert caught[0].filename == __file__


def test_weak_white_box_attacks_are_a_warning():
    images, labels = shades()

    def attacker(name, threat_model, steps, **changes):
        return Attacker(name=name, threat_model=threat_model, attack=PGD(eps=EPS, steps=steps, **changes))

    crowd = [attacker("weak", "white-box", 0), attacker("strong", "semi-black-box", 5)]
    with pytest.warns(EvaluationWarning, match=KNOWING) as caught:
        report = evaluate(brightness, [(images, labels)], crowd, samples=0, progress=False)
    assert len(caught) == 1
    assert report.checks[-1].name == KNOWING


def test_without_sanity_nothing_is_checked():
    assert evaluate(quantised, [shades()], [], samples=0, sanity=False, progress=False).checks == ()


def test_images_that_are_classified_wrong_are_not_probed():
    """A model that is wrong on half of the images is no worse a model to attack."""
    images, labels = shades()
    labels = torch.where(torch.arange(len(labels)) % 2 == 0, labels, (labels + 1) % 3)
    report = evaluate(brightness, [(images[:10], labels[:10]), (images[10:], labels[10:])], [], progress=False)
    assert report.benign_accuracy == Rate(12, 24)
    assert all(check.passed for check in report.checks)
    assert "on 12 images" in next(check.detail for check in report.checks if check.name == STEPS)
