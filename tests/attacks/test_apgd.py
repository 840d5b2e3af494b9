"""Auto-PGD keeps the best point, follows the paper's schedule, and makes no unnecessary forward passes."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from strategies import images, laws, radii, seeds
from tiny import TinyEncoder, norms, seeded, toy_data
from zepad.attacks import APGD, PGD, TargetedAPGD, cross_entropy, dlr, margin
from zepad.attacks.ascent import _checkpoints, ascend
from zepad.attacks.losses import targeted_dlr
from zepad.errors import ConfigError, InputError
from zepad.functional.projection import BALLS

NORMS = ("linf", "l2")
EPS = 8 / 255
few = settings(laws, max_examples=20)  # each example runs an attack


def classifier(classes=3):
    return nn.Sequential(TinyEncoder(), nn.Linear(8, classes)).eval()


@few
@given(images(), radii, st.sampled_from(NORMS), st.sampled_from((cross_entropy, margin, dlr)), st.integers(1, 8), seeds)
def test_attacked_images_lie_in_the_ball_and_in_range(clean, eps, norm, loss_fn, steps, seed):
    attack = APGD(eps=eps, steps=steps, norm=norm, loss_fn=loss_fn)
    labels = torch.arange(len(clean)) % 3
    attacked = attack(classifier(), clean, labels, generator=seeded(seed))
    assert attacked.shape == clean.shape
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert (norms(attacked - clean, norm) <= eps + 1e-6).all()


def misplaced(points, rows):
    """A loss without meaning and no verdict: `ascend` sees a function, not a classifier."""
    waves = (torch.sin(9 * points) + points).flatten(1).sum(dim=1) * (1 + rows)
    return waves, torch.zeros_like(rows, dtype=torch.bool)


@few
@given(images(), radii, st.sampled_from(NORMS), st.integers(1, 12), st.integers(1, 3), seeds)
def test_the_result_is_the_best_point_that_was_looked_at(clean, eps, norm, steps, restarts, seed):
    """The image itself is one of them. Written out: remember everything, take the maximum."""
    points, losses = [], []

    def spy(x, rows):
        loss, verdict = misplaced(x, rows)
        points.append(x.detach().clone())
        losses.append(loss.detach())
        return loss, verdict

    found = ascend(spy, clean, eps=eps, norm=norm, steps=steps, restarts=restarts, generator=seeded(seed))
    assert len(losses) == 1 + restarts * (steps + 1)
    assert torch.equal(points[0], clean)
    best = torch.stack(losses).max(dim=0).values
    torch.testing.assert_close(misplaced(found, torch.arange(len(clean)))[0], best, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("steps", "restarts"), [(1, 1), (5, 1), (20, 3)])
def test_restarts_and_the_random_start_never_lower_the_loss(toy, steps, restarts):
    model, (clean, labels) = classifier(), toy
    labels = model(clean).argmax(1)  # all are right, so all are attacked
    once = APGD(eps=EPS / 8, steps=steps)
    first = cross_entropy(model(once(model, clean, labels, generator=seeded())), labels)
    again = cross_entropy(model(replace(once, restarts=restarts)(model, clean, labels, generator=seeded())), labels)
    start = PGD(eps=EPS / 8, steps=0)(model, clean, labels, generator=seeded())
    fell = model(once(model, clean, labels, generator=seeded())).argmax(1) != labels
    assert ((first >= cross_entropy(model(start), labels)) | fell).all()
    assert ((again >= first) | fell).all()


def test_agrees_with_the_algorithm_written_out():
    """One image at a time, in the words of algorithm 1, on a loss with many hills."""
    eps, steps, rho, alpha = 0.3, 40, 0.75, 0.75
    clean = torch.rand(3, 1, 2, 3, dtype=torch.float64)
    slopes = 10 * torch.randn(3, 1, 2, 3, dtype=torch.float64)

    def f(x, row):
        return (torch.sin(slopes[row] * x) + 0.3 * torch.cos(3 * slopes[row] * x)).sum()

    def gradient(x, row):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x, row), x)[0]

    def batched(points, rows):
        losses = torch.stack([f(x, row) for x, row in zip(points, rows, strict=True)])
        return losses, torch.zeros_like(rows, dtype=torch.bool)

    found = ascend(batched, clean, eps=eps, norm="linf", steps=steps, generator=seeded())
    starts = (torch.rand(clean.shape, generator=seeded(), dtype=torch.float64) * 2 - 1) * eps + clean
    halvings = 0
    for row, (image, x) in enumerate(zip(clean, starts.clamp(0, 1), strict=True)):

        def project(point, image=image):
            return point.clamp(image - eps, image + eps).clamp(0, 1)

        before, best = x, x
        values, highest, etas, last = [f(x, row)], [f(x, row)], [2 * eps], 0
        eta = 2 * eps
        for k in range(1, steps + 1):
            z = project(x + eta * gradient(x, row).sign())
            a = alpha if k > 1 else 1.0
            x, before = project(x + a * (z - x) + (1 - a) * (x - before)), x
            values.append(f(x, row))
            best = x if values[-1] > highest[-1] else best
            highest.append(f(best, row))
            etas.append(eta)
            if k in _checkpoints(steps):
                rises = sum(values[i + 1] > values[i] for i in range(last, k))
                if rises < rho * (k - last) or (etas[last] == etas[k] and highest[last] == highest[k]):
                    eta, x, values[-1] = eta / 2, best, highest[-1]
                    halvings += 1
                last = k
        best = image if f(image, row) > highest[-1] else best
        torch.testing.assert_close(found[row], best, rtol=0, atol=1e-9)
    assert halvings > 3


def test_steps_that_rise_without_a_new_best_point_are_halved_too():
    """Condition 2: the loss falls at once and then rises at every step, yet never to where it was."""
    clean, eps, script, points = torch.full((1, 1, 1, 1), 0.5), 0.1, iter([-2.0, 100.0, *range(100)]), []

    def scripted(x, rows):
        points.append(x.detach().clone() - clean)
        slope = (x - x.detach()).flatten(1).sum(dim=1)  # always uphill
        return slope + next(script), torch.zeros_like(rows, dtype=torch.bool)

    ascend(scripted, clean, eps=eps, norm="linf", steps=100, generator=seeded(3))
    _, start, *visited = points
    assert start < 0
    torch.testing.assert_close(visited[21], torch.full_like(clean, eps))  # step 22, the first checkpoint
    # Back at the start with a step of eps: three quarters of it, and a quarter of the way from the last point.
    torch.testing.assert_close(visited[22], start + 0.75 * eps + 0.25 * (start - eps))


def test_the_checkpoints_are_the_papers():
    """Section 3.2: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), rounded up."""
    assert sorted(w for w in _checkpoints(100) if w <= 100) == [22, 41, 57, 70, 80, 87, 93, 99]


@pytest.mark.parametrize("loss_fn", [cross_entropy, dlr])
def test_no_weaker_than_pgd_with_as_many_steps(trained, loss_fn):
    """Over several seeds, on a classifier and a budget at which some images hold."""
    clean, labels = toy_data(96, size=8, seed=3)
    eps, steps = 40 / 255, 10

    def survivors(attack):
        runs = [attack(trained, clean, labels, generator=seeded(seed)) for seed in range(2)]
        return sum(int((trained(x).argmax(1) == labels).sum()) for x in runs)

    ours = survivors(APGD(eps=eps, steps=steps, loss_fn=loss_fn))
    plain = survivors(PGD(eps=eps, steps=steps, step_size=eps / 4, loss_fn=loss_fn))
    assert 0 < ours <= plain < 2 * 96


def asked(model):
    """Count how many images the model is shown."""
    counts = []
    model.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    return counts


def test_misclassified_images_are_returned_as_they_are_and_looked_at_once(toy):
    model, clean = classifier(), toy[0]
    wrong = (model(clean).argmax(1) + 1) % 3
    counts = asked(model)
    assert torch.equal(APGD(eps=0.1, steps=5, restarts=3)(model, clean, wrong), clean)
    assert counts == [len(clean)]


def test_a_fallen_image_is_no_longer_shown(trained):
    clean, labels = toy_data(24, size=8)
    eps, steps = 40 / 255, 20
    counts = asked(trained)
    attacked = APGD(eps=eps, steps=steps, restarts=2)(trained, clean, labels, generator=seeded())
    spent = list(counts)
    fallen = trained(attacked).argmax(1) != labels
    assert 0 < fallen.sum() < len(clean)
    standing = int((~fallen).sum())
    assert spent == sorted(spent, reverse=True)
    assert spent[-1] == standing
    assert len(spent) == 1 + 2 * (steps + 1)


def test_an_image_does_not_depend_on_the_others_in_its_batch(trained, monkeypatch):
    """Even while others fall and leave the batch. Without the random start, so that each has the same one alone."""
    still = BALLS["linf"]._replace(random=lambda images, *_: torch.zeros_like(images))
    monkeypatch.setitem(BALLS, "linf", still)
    model, (clean, labels) = copy.deepcopy(trained).double(), toy_data(24, size=8)
    attack, clean = APGD(eps=40 / 255, steps=20), clean.double()
    together = attack(model, clean, labels)
    alone = torch.cat([attack(model, clean[row : row + 1], labels[row : row + 1]) for row in range(24)])
    assert 0 < (model(together).argmax(1) != labels).sum() < 24
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l1"}, r"norm must be one of \['l2', 'linf'\]; got 'l1'"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"restarts": 0}, "restarts must be at least 1; got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        APGD(eps=EPS, **settings)


@pytest.mark.parametrize("attack", [APGD(eps=EPS), TargetedAPGD(eps=EPS)])
def test_labels_that_do_not_fit_are_refused(toy, attack):
    with pytest.raises(InputError, match=r"labels must have shape \(24,\), one per image; got \(24, 1\)"):
        attack(classifier(4), toy[0], toy[1][:, None])


def test_targeted_dlr_agrees_with_each_row_written_out():
    outputs = torch.randn(20, 6, dtype=torch.float64)
    pairs = torch.stack([torch.randperm(6)[:2] for _ in range(20)])
    for row, (label, aim), got in zip(outputs, pairs.tolist(), targeted_dlr(outputs, pairs), strict=True):
        z = row.sort(descending=True).values
        torch.testing.assert_close(got, (row[aim] - row[label]) / (z[0] - (z[2] + z[3]) / 2))


def test_targeted_attacks_reach_what_untargeted_ones_do(toy):
    """Each class in turn: the label falls wherever APGD-DLR makes it fall, and no point is worse than the image."""
    model, clean, eps = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), toy[0], 8 / 255
    labels = model(clean).argmax(1)
    targeted = TargetedAPGD(eps=eps, steps=10)(model, clean, labels, generator=seeded())
    plain = APGD(eps=eps, steps=10, loss_fn=dlr)(model, clean, labels, generator=seeded())
    holds = [(model(x).argmax(1) == labels) for x in (targeted, plain)]
    assert 0 < holds[0].sum() <= holds[1].sum() < len(clean)
    assert (margin(model(targeted), labels) >= margin(model(clean), labels)).all()
    assert (norms(targeted - clean, "linf") <= eps + 1e-6).all()


def test_targeted_dlr_refuses_three_classes(toy):
    model = classifier(3)
    with pytest.raises(InputError, match="at least 4 classes; got 3"):
        TargetedAPGD(eps=EPS)(model, toy[0], model(toy[0]).argmax(1))
