"""Projected gradient descent stays in the ball, leaves the model unchanged, and lowers its accuracy."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from strategies import MODERATE, images, laws, logits, radii, seeds
from tiny import TinyEncoder, norms, seeded, toy_data
from zepad.attacks import (
    APGD,
    PGD,
    DetectorEvading,
    FeaturePGD,
    Square,
    Transfer,
    UniversalFeatureAttack,
    WorstOf,
    attack_features,
    cosine_distance,
    cross_entropy,
    dlr,
    margin,
)
from zepad.errors import ConfigError, InputError

NORMS = ("linf", "l2")
EPS = 8 / 255
few = settings(laws, max_examples=20)  # each example runs an attack

# Every attack of the package with one signature: what holds for one model holds for all of them.
ATTACKS = {
    "linf": lambda model, x, y: PGD(eps=EPS, steps=2)(model, x, y),
    "l2": lambda model, x, y: PGD(eps=EPS, steps=2, norm="l2", loss_fn=margin)(model, x, y),
    "momentum": lambda model, x, y: PGD(eps=EPS, steps=2, momentum=1.0, restarts=2)(model, x, y),
    "apgd": lambda model, x, y: APGD(eps=EPS, steps=2)(model, x, y),
    "apgd-dlr": lambda model, x, y: APGD(eps=EPS, steps=2, restarts=2, norm="l2", loss_fn=dlr)(model, x, y),
    "square": lambda model, x, y: Square(eps=EPS, queries=4)(model, x, y),
    "evading": lambda model, x, y: DetectorEvading(eps=EPS, steps=2, score=lambda x: model(x)[:, 0], threshold=0)(
        model, x, y
    ),
    "worst": lambda model, x, y: WorstOf(attacks=(PGD(eps=EPS, steps=2), Square(eps=EPS, queries=4)))(model, x, y),
    "transfer": lambda model, x, y: Transfer(attack=APGD(eps=EPS, steps=2), surrogate=model)(forbidden, x, y),
    "feature-pgd": lambda model, x, y: FeaturePGD(eps=EPS, steps=2)([model, model], x, y),
    "features": lambda model, x, _: attack_features(PGD(eps=EPS, steps=2), model, x),
    "universal": lambda model, x, _: UniversalFeatureAttack(eps=EPS, epochs=2).fit(model, x).delta,
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())


def forbidden(images):
    raise AssertionError("a transferred attack asks its surrogate alone")


def classifier(classes=3):
    return nn.Sequential(TinyEncoder(), nn.Linear(8, classes))


def linear(classes, pixels):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()


@few
@given(images(), radii, st.sampled_from(NORMS), st.integers(0, 3), st.booleans(), seeds)
def test_attacked_images_lie_in_the_ball_and_in_range(clean, eps, norm, steps, random_start, seed):
    attack = PGD(eps=eps, steps=steps, step_size=eps, norm=norm, random_start=random_start)
    labels = torch.arange(len(clean)) % 3
    attacked = attack(classifier(), clean, labels, generator=seeded(seed))
    assert attacked.shape == clean.shape
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (norms(attacked - clean, norm) <= eps + 1e-6).all()


@pytest.mark.parametrize("norm", NORMS)
def test_without_steps_and_random_start_nothing_moves(toy, norm):
    assert torch.equal(PGD(eps=EPS, steps=0, norm=norm, random_start=False)(classifier(), *toy), toy[0])


@pytest.mark.parametrize("norm", NORMS)
def test_without_steps_a_random_start_is_noise(toy, norm):
    assert not torch.equal(PGD(eps=EPS, steps=0, norm=norm)(classifier(), *toy), toy[0])


def noticeable(model):
    """Everything about a module that its owner could find changed."""
    return (
        [part.training for part in model.modules()],
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
    )


def used_classifier():
    """Half-way through somebody's training: mixed training flags, gradients pending, a part frozen."""
    model = classifier().train()
    model[0].norm.eval()
    model[0].conv2.requires_grad_(False)
    for parameter in model[1].parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


@every_attack
def test_the_model_is_left_as_found(toy, attack):
    model = used_classifier()
    before = noticeable(model)
    attacked = attack(model, *toy)
    assert noticeable(model) == before
    assert not attacked.requires_grad


@every_attack
def test_the_model_is_left_as_found_when_it_raises(toy, attack):
    model = used_classifier()
    before = noticeable(model)

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = model[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        attack(model, *toy)
    hook.remove()
    assert noticeable(model) == before


@every_attack
def test_the_model_is_attacked_in_evaluation_mode(toy, attack):
    model = used_classifier()
    modes = set()
    model[1].register_forward_hook(lambda *_: modes.update(part.training for part in model.modules()))
    attack(model, *toy)
    assert modes == {False}


@every_attack
def test_the_model_sees_images_in_range_alone(attack):
    model, ranges = classifier(), []
    model.register_forward_pre_hook(lambda _, inputs: ranges.extend(inputs[0].aminmax()))
    attack(model, torch.eye(4).expand(2, 3, -1, -1), torch.tensor([0, 1]))
    assert -1e-6 <= min(ranges) <= max(ranges) <= 1 + 1e-6


@every_attack
def test_images_and_their_graph_are_left_as_found(toy, attack):
    images = toy[0].clone().requires_grad_()
    attacked = attack(classifier(), images, toy[1])
    assert torch.equal(images, toy[0])
    assert images.grad is None
    assert not attacked.requires_grad


@every_attack
def test_attacks_work_where_gradients_are_off(toy, attack):
    model = classifier()
    torch.manual_seed(3)
    expected = attack(model, *toy)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(attack(model, *toy), expected)


@every_attack
def test_any_callable_can_be_attacked(toy, attack):
    model = classifier().eval()
    torch.manual_seed(3)
    expected = attack(model, *toy)
    torch.manual_seed(3)
    assert torch.equal(attack(lambda x: model(x), *toy), expected)


@pytest.mark.parametrize(
    "attack",
    [
        PGD(eps=EPS, steps=2),
        PGD(eps=EPS, steps=2, norm="l2"),
        APGD(eps=EPS, steps=4),
        APGD(eps=1.0, steps=4, norm="l2", loss_fn=dlr),
        Square(eps=EPS, queries=10),
    ],
)
def test_the_generator_decides_the_result(toy, attack):
    model = classifier().eval()
    labels = model(toy[0]).argmax(1)
    first, again, other = (attack(model, toy[0], labels, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attack", [PGD(eps=EPS, steps=4), APGD(eps=EPS, steps=4), Square(eps=EPS, queries=5)])
def test_other_precisions_are_attacked_in_kind(toy, attack, dtype):
    model, clean = classifier().eval().to(dtype), toy[0].to(dtype)
    attacked = attack(model, clean, model(clean).argmax(1))
    assert attacked.dtype == dtype
    assert 0 <= attacked.min() <= attacked.max() <= 1
    assert (attacked - clean).abs().max() <= EPS + 4e-3  # half precision rounds pixels


def test_agrees_with_a_loop_written_out(toy):
    model, (clean, labels), eps, step = classifier().double().eval(), toy, 0.1, 0.03
    clean = clean.double().round()  # black and white pixels, so that the pixel range matters
    x = clean.clone()
    for _ in range(6):
        x = x.detach().requires_grad_()
        F.cross_entropy(model(x), labels, reduction="sum").backward()
        x = (x + step * x.grad.sign()).clamp(clean - eps, clean + eps).clamp(0, 1)
    attacked = PGD(eps=eps, steps=6, step_size=step, random_start=False)(model, clean, labels)
    torch.testing.assert_close(attacked, x.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_momentum_agrees_with_a_loop_written_out(toy, norm):
    model, (clean, labels), eps, step, decay = classifier().double().eval(), toy, 0.1, 0.03, 0.7
    clean = clean.double()
    x, velocity = clean.clone(), torch.zeros_like(clean)
    for _ in range(6):
        x = x.detach().requires_grad_()
        F.cross_entropy(model(x), labels, reduction="sum").backward()
        velocity = decay * velocity + x.grad / x.grad.abs().sum(dim=(1, 2, 3), keepdim=True)
        if norm == "linf":
            x = (x + step * velocity.sign()).clamp(clean - eps, clean + eps)
        else:
            moved = x + step * velocity / velocity.flatten(1).norm(dim=1)[:, None, None, None] - clean
            x = clean + moved * (eps / moved.flatten(1).norm(dim=1).clamp_min(eps))[:, None, None, None]
        x = x.clamp(0, 1)
    attack = PGD(eps=eps, steps=6, step_size=step, norm=norm, random_start=False, momentum=decay)
    torch.testing.assert_close(attack(model, clean, labels), x.detach(), rtol=0, atol=1e-6)
    assert not torch.equal(attack(model, clean, labels), replace(attack, momentum=0.0)(model, clean, labels))


@few
@given(st.sampled_from(NORMS), st.integers(2, 4), st.sampled_from((cross_entropy, margin, dlr)), seeds)
def test_restarts_never_lower_the_loss_of_any_image(norm, restarts, loss_fn, seed):
    model, (clean, labels) = classifier().eval(), toy_data(6, size=8)
    once = PGD(eps=0.2, steps=1, norm=norm, loss_fn=loss_fn)

    def reached(attack):
        return loss_fn(model(attack(model, clean, labels, generator=seeded(seed))), labels)

    assert (reached(replace(once, restarts=restarts)) >= reached(once)).all()


def test_restarts_keep_the_best_of_independent_runs(toy):
    model, once = classifier().eval(), PGD(eps=0.2, steps=1)
    generator = seeded(4)
    runs = torch.stack([once(model, *toy, generator=generator) for _ in range(5)])
    losses = torch.stack([cross_entropy(model(run), toy[1]) for run in runs])
    best = runs[losses.argmax(dim=0), torch.arange(len(toy[1]))]
    assert losses.argmax(dim=0).unique().numel() > 1
    assert torch.equal(replace(once, restarts=5)(model, *toy, generator=seeded(4)), best)


def test_the_default_step_crosses_the_ball_in_the_given_steps(toy):
    model = classifier()
    given = PGD(eps=EPS, steps=5, step_size=EPS / 2, random_start=False)
    assert torch.equal(PGD(eps=EPS, steps=5, random_start=False)(model, *toy), given(model, *toy))


@few
@given(st.sampled_from(NORMS), st.sampled_from((cross_entropy, margin)), seeds)
def test_each_step_raises_a_convex_loss(norm, loss_fn, seed):
    """A projected gradient step never lowers a convex function, however long it is."""
    generator = seeded(seed)
    model = linear(4, 12)
    clean = 0.4 + 0.2 * torch.rand(5, 3, 2, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (5,), generator=generator)
    attack = {"eps": 0.2, "step_size": 0.07, "norm": norm, "random_start": False, "loss_fn": loss_fn}
    attacked = [PGD(steps=steps, **attack)(model, clean, labels) for steps in range(4)]
    losses = torch.stack([loss_fn(model(x), labels) for x in attacked])
    assert (losses.diff(dim=0) >= -1e-9).all()
    assert (losses[-1] > losses[0]).all()


@pytest.mark.parametrize("loss_fn", [cross_entropy, margin])
def test_the_optimum_of_a_linear_model_is_hit_exactly(loss_fn):
    model, eps = linear(2, 12), 0.3
    clean = torch.rand(8, 3, 2, 2, dtype=torch.float64)
    labels = torch.arange(8) % 2
    weight = model[1].weight.detach().view(2, 3, 2, 2)
    best = (clean + eps * (weight[1 - labels] - weight[labels]).sign()).clamp(0, 1)
    attacked = PGD(eps=eps, steps=10, loss_fn=loss_fn)(model, clean, labels)
    torch.testing.assert_close(attacked, best, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 64 / 255), ("l2", 4.0)])
@pytest.mark.parametrize("loss_fn", [cross_entropy, margin])
def test_a_trained_classifier_loses_its_accuracy(trained, toy, norm, eps, loss_fn):
    def accuracy(x):
        return (trained(x).argmax(dim=1) == toy[1]).float().mean().item()

    attack = PGD(eps=eps, steps=10, norm=norm, loss_fn=loss_fn)
    assert accuracy(toy[0]) == 1
    assert accuracy(PGD(eps=eps, steps=0, norm=norm)(trained, *toy)) > 0.9  # noise of that size is harmless
    assert accuracy(attack(trained, *toy)) < 0.2


def test_losses_agree_with_their_definitions():
    outputs = torch.randn(20, 5, dtype=torch.float64)
    labels, targets = torch.randint(5, (20,)), torch.randn(20, 5, dtype=torch.float64)
    naive_margin = [
        max(z for k, z in enumerate(row) if k != y) - row[y] for row, y in zip(outputs, labels, strict=True)
    ]
    naive_cosine = [1 - (a @ b) / (a @ a).sqrt() / (b @ b).sqrt() for a, b in zip(outputs, targets, strict=True)]
    naive_entropy = [-(z.exp() / z.exp().sum())[y].log() for z, y in zip(outputs, labels, strict=True)]
    torch.testing.assert_close(margin(outputs, labels), torch.stack(naive_margin))
    torch.testing.assert_close(cosine_distance(outputs, targets), torch.stack(naive_cosine))
    torch.testing.assert_close(cross_entropy(outputs, labels), torch.stack(naive_entropy))


@laws
@given(logits(branches=st.just(1), scales=MODERATE), seeds)
def test_dlr_agrees_with_each_row_written_out(stacked, seed):
    rows = stacked[0]
    assume(rows.shape[1] >= 3)
    labels = torch.randint(rows.shape[1], rows.shape[:1], generator=seeded(seed))
    for row, label, got in zip(rows.tolist(), labels.tolist(), dlr(rows, labels).tolist(), strict=True):
        first, _, third, *_ = sorted(row, reverse=True)
        best_wrong = max(z for k, z in enumerate(row) if k != label)
        if first - third > 1e-9:  # a three-way tie has no ratio
            assert got == pytest.approx((best_wrong - row[label]) / (first - third), abs=1e-9)
        assert got == got


@laws
@given(st.integers(3, 8), st.floats(-100, 100), st.floats(1e-3, 1e3), seeds)
def test_dlr_ignores_shift_and_scale_of_the_logits(classes, shift, scale, seed):
    generator = seeded(seed)
    outputs = torch.randn(5, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (5,), generator=generator)
    torch.testing.assert_close(dlr(scale * outputs + shift, labels), dlr(outputs, labels), rtol=1e-6, atol=1e-6)


def test_dlr_has_a_slope_where_the_cross_entropy_has_none():
    outputs, labels = torch.tensor([[300.0, 100.0, 0.0]], requires_grad=True), torch.tensor([0])
    slopes = [torch.autograd.grad(loss(outputs, labels).sum(), outputs)[0].abs().max() for loss in (cross_entropy, dlr)]
    assert slopes[0] == 0
    assert slopes[1] > 0


@pytest.mark.parametrize("attack", [PGD(eps=EPS, loss_fn=dlr), APGD(eps=EPS, loss_fn=dlr)])
def test_dlr_refuses_two_classes(toy, attack):
    with pytest.raises(InputError, match="at least 3 classes; got 2. Use loss_fn=margin or cross_entropy"):
        attack(classifier(2), toy[0], toy[1].clamp_max(1))


def test_margin_is_positive_where_the_attack_has_won():
    outputs = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
    assert margin(outputs, torch.arange(3)).tolist() == [-1, 1, 2]


@pytest.mark.parametrize("attack", [PGD, APGD, Square, FeaturePGD, UniversalFeatureAttack])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8}, r"looks like 0\.\.255 units\. Write 8 / 255\."),
        ({"eps": 0}, r"eps must be a positive number in \[0, 1\] pixel units; got 0\."),
        ({"eps": -0.1}, "got -0.1"),
        ({"eps": float("nan")}, "got nan"),
        ({"eps": float("inf")}, "got inf"),
    ],
)
def test_budgets_out_of_range_are_refused(attack, settings, message):
    with pytest.raises(ConfigError, match=message):
        attack(**settings)


@pytest.mark.parametrize("attack", [PGD, FeaturePGD, UniversalFeatureAttack])
def test_a_step_of_no_length_is_refused(attack):
    with pytest.raises(ConfigError, match="step_size must be positive, or None; got 0"):
        attack(eps=EPS, step_size=0)


def test_an_l2_budget_may_exceed_one():
    assert PGD(eps=3.0, norm="l2").eps == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l1"}, r"norm must be one of \['l2', 'linf'\]; got 'l1'"),
        ({"steps": -1}, "steps must be zero or more; got -1"),
        ({"momentum": -0.5}, "momentum must be zero or more; got -0.5"),
        ({"momentum": float("nan")}, "momentum must be a number; got nan"),
        ({"restarts": 0}, "restarts must be at least 1; got 0"),
        ({"restarts": 2, "random_start": False}, "restarts must be 1 without a random start; got 2"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        PGD(**{"eps": EPS, **settings})
