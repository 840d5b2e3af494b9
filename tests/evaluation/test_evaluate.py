"""`evaluate` against plain loops over the images, and what it must leave alone or refuse."""

import copy
import functools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from tiny import TinyEncoder
from zepad.attacks import PGD, UniversalPerturbation
from zepad.ensemble import BranchEnsemble
from zepad.errors import ConfigError, InputError
from zepad.evaluation import Attacker, Rate, against, evaluate, universal_attacker
from zepad.evaluation.predictions import Benign, Predictions
from zepad.evaluation.results import score_histogram, score_range
from zepad.functional import confidence, detection_score

EPS = 8 / 255


def shades(count, seed=0, classes=3):
    """Images whose class is the brightest colour channel, some by far and some by little."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.rand(count, 3, 16, 16, generator=generator) * 0.55 + 0.1
    images[torch.arange(count), labels] += torch.rand(count, 1, 1, generator=generator) * 0.3
    return images, labels


@functools.cache
def _trained(seed):
    torch.manual_seed(seed)
    model, (images, labels) = nn.Sequential(TinyEncoder(), nn.Linear(8, 3)), shades(90, seed=9)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model.eval()


def classifier(seed=0):
    """A convolutional classifier that knows the toy data; a copy for each test."""
    return copy.deepcopy(_trained(seed))


def ensemble(threshold=0.01):
    branches = {name: classifier(seed) for seed, name in enumerate(("one", "two", "benign"))}
    return BranchEnsemble(branches, threshold=threshold)


def universal(seed, eps=0.3, size=16, **changes):
    generator = torch.Generator().manual_seed(seed)
    tint = torch.rand(1, 3, 1, 1, generator=generator) * 2 - 1
    delta = (tint + torch.rand(1, 3, size, size, generator=generator) - 0.5).clamp(-1, 1) * eps
    return universal_attacker(
        UniversalPerturbation(delta=delta, eps=eps),
        **{"name": f"universal {seed}", "threat_model": "semi-black-box"} | changes,
    )


@dataclass(frozen=True, kw_only=True)
class Shift:
    """An attack that adds the same to every pixel, in its ball or not."""

    eps: float = EPS
    norm: str = "linf"
    by: float = EPS

    def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002
        return images + self.by


class Watched(nn.Module):
    """A classifier that notes in which precision it is asked, with and without a gradient."""

    def __init__(self):
        super().__init__()
        self.inside = classifier()
        self.asked = {True: set(), False: set()}

    def forward(self, images):
        outputs = self.inside(images)
        self.asked[torch.is_grad_enabled()].add(outputs.dtype)
        return outputs


def batches(images, labels, size):
    return list(zip(images.split(size), labels.split(size), strict=True))


def loaded(size=12, count=30):
    return batches(*shades(count), size)


def run(model, loader, attackers, **changes):
    return evaluate(model, loader, attackers, **{"sanity": False, "progress": False, "samples": 0} | changes)


def white(attack, name="white", **changes):
    return Attacker(name=name, threat_model="white-box", attack=attack, **changes)


# numbers ----------------------------------------------------------------------------------------------------------

CROWD = [
    universal(1),
    universal(2, eps=0.1),
    universal(3, threat_model="semi-black-box+"),
    white(Shift(by=0.02), name="shift", target=against(classifier(7))),
]
CROWD[3] = replace(CROWD[3], attack=universal(4).attack)


def naive(model, branches, images, labels, attackers):
    """Predictions one image at a time: by attacker (None first), by branch and fused."""
    said = {}
    with torch.no_grad():
        for attacker in [None, *attackers]:
            shown = images if attacker is None else attacker.attack.perturbation.apply(images)
            said[attacker and attacker.name] = [
                {
                    **{name: int(branch(x[None]).argmax()) for name, branch in branches.items()},
                    "": int(model(x[None]).argmax()),
                }
                for x in shown
            ]
    return said


@pytest.mark.parametrize("kind", ["ensemble", "classifier", "function"])
def test_every_rate_is_that_of_a_plain_loop(kind):
    images, labels = shades(30)
    model = ensemble().eval() if kind == "ensemble" else classifier().eval()
    branches = dict(model.branches) if kind == "ensemble" else {}
    report = run(model if kind != "function" else lambda x: model(x), loaded(), CROWD)
    said, truth = naive(model, branches, images, labels, CROWD), labels.tolist()
    before = said[None]

    def share(hits):
        hits = list(hits)
        return Rate(sum(hits), len(hits))

    def right(rows, branch=""):
        return [row[branch] == label for row, label in zip(rows, truth, strict=True)]

    def check(rates, names):
        """An image is robust against a group if it is against each of its members."""
        held = {
            b: [all(hits) for hits in zip(*(right(said[n], b) for n in names), strict=True)] for b in ["", *branches]
        }
        changed = [any(said[n][i][""] != before[i][""] for n in names) for i in range(len(truth))]
        assert rates.robust_accuracy == share(held[""])
        assert rates.fooling_rate == share(changed)
        assert rates.attack_success_rate == share(
            not kept for kept, was in zip(held[""], right(before), strict=True) if was
        )
        assert rates.branches == {name: share(held[name]) for name in branches}

    assert report.images == 30
    assert report.benign_accuracy == share(right(before))
    assert report.benign_branches == {name: share(right(before, name)) for name in branches}
    assert [result.name for result in report.attacks] == [attacker.name for attacker in CROWD]
    for result in report.attacks:
        check(result.rates, [result.name])
    for group in ("semi-black-box", "semi-black-box+", "white-box"):
        check(report.worst[group], [a.name for a in CROWD if a.threat_model == group])
    check(report.worst["all"], [a.name for a in CROWD])
    worst, single = report.worst["all"].robust_accuracy, [r.rates.robust_accuracy.hits for r in report.attacks]
    assert worst.hits <= min(single)
    if kind == "ensemble":
        assert worst.hits < min(single)  # else the AND over attackers would not be seen
    assert {"all", "semi-black-box", "semi-black-box+", "white-box"} == set(report.worst)


def test_detection_is_measured_on_the_models_own_score():
    images, labels = shades(30)
    model, attacker = ensemble(threshold=0.01).eval(), universal(1)
    report = run(model, loaded(), [attacker])
    with torch.no_grad():
        benign = detection_score(model.branch_logits(images))
        logits = model.branch_logits(attacker.attack.perturbation.apply(images))
        right = model(images).argmax(1) == labels
        attacked, fooled = detection_score(logits), right & (model.fusion(logits).argmax(1) != labels)
    found = report.attacks[0].detection
    assert report.threshold == 0.01
    assert report.false_positive_rate == Rate(int((benign > 0.01).sum()), 30)
    assert 0 < report.false_positive_rate.hits < 30
    assert found.flagged == Rate(int((attacked > 0.01).sum()), 30)
    assert found.evading == Rate(int((fooled & ~(attacked > 0.01)).sum()), 30)
    assert found.fooling_images == int(fooled.sum())


def test_without_a_threshold_there_is_no_detector():
    for model in (ensemble(threshold=None), classifier()):
        report = run(model, loaded(), [universal(1)])
        assert report.threshold is report.false_positive_rate is report.attacks[0].detection is None


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_the_batch_size_changes_nothing(size):
    model = ensemble()
    whole, parts = (run(model, loaded(n), CROWD, samples=3) for n in (30, size))
    for result in (*whole.attacks, *parts.attacks):
        assert result.cost.forwards == result.cost.gradients == 0
    assert parts.score_range == pytest.approx(whole.score_range)  # rounding depends on the batch
    assert strip(replace(whole, score_range=None)) == strip(replace(parts, score_range=None))


def test_the_batch_size_does_not_change_the_sanity_checks():
    model = lambda x: x.mean((2, 3)) * 9  # noqa: E731
    whole, parts = (run(model, loaded(n), [], sanity=True).checks for n in (30, 7))
    assert whole == parts


def strip(report):
    """The report without what time and machine put into it."""
    attacks = tuple(replace(result, cost=replace(result.cost, seconds=0)) for result in report.attacks)
    return replace(report, provenance={}, attacks=attacks)


def test_equal_seeds_give_equal_reports_and_other_seeds_other_ones():
    model, attacker = classifier(), white(PGD(eps=EPS, steps=1, step_size=1e-9))
    reports = [run(model, loaded(), [attacker], seed=seed, samples=2) for seed in (0, 0, 1)]
    assert strip(reports[0]) == strip(reports[1])
    assert reports[0].samples[0].attacked != reports[2].samples[0].attacked


def test_an_attackers_randomness_does_not_depend_on_the_others():
    model, attackers = (
        classifier(),
        [white(PGD(eps=EPS, steps=1, step_size=1e-9), name=name) for name in ("one", "two")],
    )
    alone, both = (run(model, loaded(), some, samples=2) for some in (attackers[1:], attackers))
    assert strip(alone).attacks == strip(both).attacks[1:]
    assert both.samples[0].attacked != both.samples[2].attacked


@pytest.mark.parametrize("threshold", [0.01, None])
def test_a_branch_of_an_ensemble_scores_as_it_does_alone(threshold):
    model = ensemble(threshold)
    together = run(model, loaded(), [universal(1)])
    for name, branch in model.branches.items():
        alone = run(branch, loaded(), [universal(1)])
        assert together.benign_branches[name] == alone.benign_accuracy
        assert together.attacks[0].rates.branches[name] == alone.attacks[0].rates.robust_accuracy
        assert together.confidences[name] == alone.confidences["fused"]
        assert together.attacks[0].confidences[name] == alone.attacks[0].confidences["fused"]


def test_histograms_count_every_image_in_the_bin_of_its_largest_probability():
    images, _ = shades(30)
    model = ensemble().eval()
    report = run(model, loaded(), [universal(1)])
    with torch.no_grad():
        logits = model.branch_logits(images)
        rows = torch.cat([logits, model.fusion(logits)[None]])
    largest = confidence(rows, sharpness=0.0)
    for name, row in zip(("one", "two", "benign", "fused"), largest, strict=True):
        counts = [0] * 20
        for value in row.tolist():
            counts[min(int(value * 20), 19)] += 1
        assert report.confidences[name] == tuple(counts)
    for histogram in (*report.confidences.values(), *report.attacks[0].confidences.values()):
        assert sum(histogram) == 30


def test_histograms_of_detection_scores_count_every_image_between_common_ends():
    images, _ = shades(30)
    model = ensemble().eval()
    report = run(model, loaded(), [universal(1), universal(2, eps=0.05)])
    assert report.score_range is not None
    low, high = report.score_range
    with torch.no_grad():
        sets = [images, *(universal(k, eps=e).attack.perturbation.apply(images) for k, e in ((1, 0.3), (2, 0.05)))]
        scores = [model.score(held).double().numpy() for held in sets]
    assert low < min(report.threshold, *(np.quantile(held, 0.01) for held in scores))
    assert high > max(report.threshold, *(np.quantile(held, 0.99) for held in scores))
    for held, counts in zip(scores, (report.scores, *(r.scores for r in report.attacks)), strict=True):
        assert counts == tuple(np.histogram(held.clip(low, high), 40, (low, high))[0])
        assert sum(counts) == 30


def test_one_outlier_does_not_flatten_the_histogram():
    """A single score in a thousand that is far away falls into the outer bin."""
    near = torch.linspace(0, 1, 1000)
    far = near.clone()
    far[-1] = 1e6
    ends = [score_range(predicted(scores), []) for scores in (near, far)]
    assert ends[0] == pytest.approx(ends[1], abs=1e-2)
    assert score_histogram(predicted(far).predictions, ends[1])[-1] >= 1
    assert sum(score_histogram(predicted(far).predictions, ends[1])) == 1000


def predicted(scores):
    rows = torch.zeros(1, len(scores), dtype=torch.int64)
    found = Predictions(predictions=rows, confidences=rows.float(), scores=scores)
    return Benign(predictions=found, labels=rows[0], digests=(), branch_names=(), threshold=0.5)


@pytest.mark.parametrize("steps", [1, 4])
def test_costs_are_the_passes_per_image(steps):
    plain, looked = white(PGD(eps=EPS, steps=steps)), white(PGD(eps=EPS, steps=steps, restarts=2), name="restarts")
    costs = [result.cost for result in run(classifier(), loaded(), [plain, looked]).attacks]
    assert (costs[0].forwards, costs[0].gradients) == (steps, steps)
    assert (costs[1].forwards, costs[1].gradients) == (2 * steps + 2, 2 * steps)
    assert costs[0].seconds > 0


def test_passes_are_counted_on_the_target_whatever_it_is():
    surrogate = classifier(9)
    report = run(classifier(), loaded(), [white(PGD(eps=EPS, steps=3), target=against(surrogate))])
    assert report.attacks[0].cost.forwards == 3
    assert not surrogate._forward_pre_hooks


def test_samples_are_the_first_images():
    images, labels = shades(30)
    model = ensemble(threshold=0.01).eval()
    report = run(model, loaded(size=2), [universal(1), universal(2)], samples=5)
    assert [(s.attacker, s.index) for s in report.samples] == [(f"universal {k}", i) for k in (1, 2) for i in range(5)]
    with torch.no_grad():
        before = model(images).argmax(1)
        logits = model.branch_logits(universal(2).attack.perturbation.apply(images))
    for i, sample in enumerate(report.samples[5:]):
        assert (sample.label, sample.before) == (int(labels[i]), int(before[i]))
        assert sample.after == int(model.fusion(logits).argmax(1)[i])
        assert sample.flagged == bool(detection_score(logits)[i] > 0.01)
        assert sample.benign.startswith(b"\x89PNG")
    assert len(run(model, loaded(), [universal(1)], samples=99).samples) == 30
    assert run(model, loaded(), [universal(1)], samples=0).samples == ()


def test_a_sample_shows_the_pixels():
    import io

    import numpy as np
    from PIL import Image

    images, labels = shades(2)
    attacker = universal(1, eps=0.25)
    sample = run(lambda x: x.mean((2, 3)), [(images, labels)], [attacker], samples=1).samples[0]

    def pixels(png):
        return torch.from_numpy(np.array(Image.open(io.BytesIO(png)))).permute(2, 0, 1) / 255

    attacked = attacker.attack.perturbation.apply(images)[0]
    assert (pixels(sample.benign) - images[0]).abs().max() <= 0.5 / 255 + 1e-6
    assert (pixels(sample.attacked) - attacked).abs().max() <= 0.5 / 255 + 1e-6
    shown = (pixels(sample.perturbation) - 0.5) * 2 * 0.25
    assert (shown - (attacked - images[0])).abs().max() <= 0.25 / 255 + 1e-6


def test_predictions_are_the_largest_logit_however_close_the_second():
    """The softmax of (0, 1e-9) is a tie; the model says one."""
    images, labels = torch.rand(6, 3, 2, 2), torch.ones(6, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([0, 1e-9], dtype=dtype)
        report = run(lambda x, logits=logits: logits.expand(len(x), -1), [(images, labels)], [])
        assert report.benign_accuracy == Rate(6, 6)


@pytest.mark.parametrize("value", [-math.inf, -1e30, 1e30])
def test_extreme_logits_are_counted(value):
    """A masked class and huge logits are legal; what is largest wins."""
    images, labels = shades(12)

    def model(x):
        logits = x.mean((2, 3))
        column = torch.full((len(x), 1), value)
        return torch.cat([logits, column], 1)

    report = run(model, [(images, labels)], [white(Shift())]) if value < 0 else None
    if value < 0:
        assert report.benign_accuracy == Rate(12, 12)
    else:
        with pytest.raises(InputError, match="none of the 12 images is classified right"):
            run(model, [(images, labels)], [])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_decide_nothing_are_refused(value):
    images, labels = shades(12)

    def model(x):
        logits = x.mean((2, 3))
        return torch.where(x.mean((1, 2, 3))[:, None] > 0.9, value, logits)

    with pytest.raises(InputError, match="NaN or infinity"):
        run(model, [(images, labels)], [white(Shift(eps=1.0, by=0.0), name="no shift"), white(_Whiten())])


@dataclass(frozen=True, kw_only=True)
class _Whiten:
    eps: float = 1.0
    norm: str = "linf"

    def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002
        return torch.ones_like(images)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_and_images(dtype):
    images, labels = shades(24)

    def model(x):
        return x.float().mean((2, 3)).to(dtype) * 4

    attackers = [white(PGD(eps=EPS, steps=2)), universal(1), white(PGD(eps=0.5, steps=2, norm="l2"), name="l2")]
    for given in (images, images.to(dtype)):
        report = run(model, batches(given, labels, 9), attackers, sanity=True)
        right = model(given).argmax(1) == labels
        assert report.benign_accuracy == Rate(int(right.sum()), 24)
        assert sum(report.attacks[0].confidences["fused"]) == 24


def test_two_classes_and_int32_labels():
    images, labels = shades(20, classes=2)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[9.0, 0, 0], [0, 9, 0]]))
        model[2].bias.zero_()
    wide, narrow = (run(model, batches(images, labels.to(dtype), 8), CROWD) for dtype in (torch.int64, torch.int32))
    assert strip(wide) == strip(narrow)
    assert wide.benign_accuracy == Rate(20, 20)


def test_class_names_are_those_of_the_data():
    images, labels = shades(12)
    data = TensorDataset(images, labels)
    data.classes = ["red", "green", "blue"]
    loader = DataLoader(Subset(data, range(6)), batch_size=4)
    assert run(classifier(), loader, []).classes == ("red", "green", "blue")
    assert run(classifier(), loaded(), []).classes == ()


def test_without_attackers_there_is_a_benign_report():
    report = run(ensemble(), loaded(), [])
    assert (report.attacks, report.worst, report.samples) == ((), {}, ())
    assert report.benign_accuracy.total == 30


# left alone -------------------------------------------------------------------------------------------------------


def state_of(module):
    """Everything of a module that somebody could notice."""
    return (
        {key: value.clone() for key, value in module.state_dict().items()},
        {name: (p.requires_grad, None if p.grad is None else p.grad.clone()) for name, p in module.named_parameters()},
        {name: part.training for name, part in module.named_modules()},
        [len(part._forward_pre_hooks) for part in module.modules()],
    )


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    for name, (required, grad) in before[1].items():
        assert after[1][name][0] == required
        assert (grad is None) == (after[1][name][1] is None)
        assert grad is None or torch.equal(grad, after[1][name][1])
    assert before[2:] == after[2:]


@dataclass(frozen=True, kw_only=True)
class Broken:
    eps: float = EPS
    norm: str = "linf"

    def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002
        raise RuntimeError("broken attack")


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_found(fails):
    model, surrogate = ensemble().train(), classifier(5).train()
    model.branches["one"].eval()
    model.branches["two"][0].conv.weight.requires_grad_(False)
    model(torch.rand(2, 3, 16, 16)).sum().backward()
    before = [state_of(module) for module in (model, surrogate)]
    attackers = [white(PGD(eps=EPS, steps=2)), white(PGD(eps=EPS, steps=2), name="transfer", target=against(surrogate))]
    if fails:
        with pytest.raises(RuntimeError, match="broken attack"):
            run(model, loaded(), [*attackers, white(Broken(), name="broken")])
    else:
        run(model, loaded(), attackers)
    for module, held in zip((model, surrogate), before, strict=True):
        assert_same(held, state_of(module))


def test_a_model_that_raises_is_left_as_found():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = classifier(), 0

        def forward(self, images):
            self.calls += 1
            if self.calls > 4:
                raise RuntimeError("enough")
            return self.inner(images)

    model = Moody().train()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="enough"):
        run(model, loaded(), [white(PGD(eps=EPS, steps=5))])
    assert_same(before, state_of(model))


def test_the_evaluated_model_is_in_evaluation_mode():
    model, modes = classifier().train(), []
    model.register_forward_hook(lambda module, *_: modes.append([m.training for m in module.modules()]))
    run(model, loaded(), [white(PGD(eps=EPS, steps=2))])
    assert modes
    assert not any(any(flags) for flags in modes)


def test_data_and_the_global_random_state_are_untouched():
    images, labels = shades(30)
    kept = images.clone(), labels.clone()
    model, loader = classifier(), DataLoader(TensorDataset(images, labels), batch_size=12)
    random = torch.get_rng_state()
    run(model, loader, [white(PGD(eps=EPS, steps=2)), universal(1, eps=EPS)], sanity=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])


@dataclass(frozen=True, kw_only=True)
class InPlace:
    """An attack that writes into what it was given."""

    eps: float = EPS
    norm: str = "linf"

    def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002
        targets.zero_()
        return images.add_(self.eps).clamp_(0, 1)


def test_an_attack_that_writes_into_its_input_spoils_neither_data_nor_numbers():
    images, labels = shades(30)
    kept = images.clone()
    model = classifier()
    report = run(model, batches(images, labels, 12), [white(InPlace()), universal(1)], samples=1)
    assert torch.equal(images, kept)
    with torch.no_grad():
        right = model.eval()((kept + EPS).clamp(0, 1)).argmax(1) == labels
    assert report.attacks[0].rates.robust_accuracy == Rate(int(right.sum()), 30)
    assert strip(report).attacks[1] == strip(run(model, loaded(), [universal(1)])).attacks[0]
    assert report.samples[0].benign != report.samples[0].attacked


# refused ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Returns:
    """An attack that returns what a function makes of the images."""

    make: object
    eps: float = EPS
    norm: str = "linf"

    def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002
        return self.make(images)


def one_pixel_more(images):
    attacked = images.clone()
    attacked[-1, 0, 0, 0] += 1.01 * EPS
    return attacked


def patch(images, side):
    attacked = images.clone()
    attacked[:, :, :side, :side] = 1 - attacked[:, :, :side, :side]
    return attacked


def nan_in(images):
    return images.index_fill(0, torch.tensor([1]), math.nan)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Shift(by=1.01 * EPS), "left its ball: linf distance"),
        (Returns(make=one_pixel_more), "left its ball: linf distance"),
        (Returns(make=lambda x: x + 0.01, norm="l2", eps=0.27), "left its ball: l2 distance"),
        (Returns(make=lambda x: patch(x, 5), norm="patch", eps=16 / 256), "left its ball: patch distance"),
        (Returns(make=lambda x: x * 0 + 1.001, eps=1.0), r"pixels in \[1.001, 1.001\]"),
        (Returns(make=lambda x: x * 0 - 0.001, eps=1.0), r"pixels in \[-0.001, -0.001\]"),
        (Returns(make=nan_in), "no finite images"),
        (Returns(make=lambda x: x[:-1]), r"no finite images of shape \(12, 3, 16, 16\)"),
        (Returns(make=lambda x: x[:, :, :8]), "no finite images"),
    ],
)
def test_an_attack_that_leaves_its_ball_is_refused(attack, message):
    with pytest.raises(InputError, match=f"^bad .*{message}"):
        run(classifier(), loaded(), [white(attack, name="bad")])


@pytest.mark.parametrize(
    "attack",
    [
        Shift(by=EPS),
        Returns(make=lambda x: x + 0.01, norm="l2", eps=0.01 * 768**0.5),
        Returns(make=lambda x: patch(x, 4), norm="patch", eps=16 / 256),
        Returns(make=torch.ones_like, eps=1.0),
        PGD(eps=3.0, steps=3, norm="l2"),
    ],
)
def test_an_attack_on_the_edge_of_its_ball_is_accepted(attack):
    run(classifier(), loaded(), [white(attack)])


def test_another_norm_could_not_be_checked():
    with pytest.raises(ConfigError, match="norm must be one of"):
        white(Shift(norm="l1"))


def test_a_loader_that_shuffles_is_refused():
    loader = DataLoader(TensorDataset(*shades(30)), batch_size=12, shuffle=True)
    with pytest.raises(InputError, match="shuffle=False"):
        run(classifier(), loader, [universal(1)])


class Fading:
    """Yields fewer, or more, batches each time."""

    def __init__(self, change):
        self.count, self.change = 3, change

    def __iter__(self):
        self.count += self.change
        return iter((loaded(size=5) * 3)[: self.count])


@pytest.mark.parametrize("change", [-1, 1])
def test_a_loader_that_changes_its_length_is_refused(change):
    with pytest.raises(InputError, match="the loader yielded other images"):
        run(classifier(), Fading(change), [universal(1)])


def test_images_none_of_which_is_right_are_refused():
    images, labels = shades(12)
    with pytest.raises(InputError, match="none of the 12 images is classified right"):
        run(lambda x: x.mean((2, 3)), [(images, (labels + 1) % 3)], [universal(1)])


def test_an_empty_loader_is_refused():
    with pytest.raises(InputError, match="the loader is empty"):
        run(classifier(), [], [universal(1)])


def test_an_iterator_is_refused():
    with pytest.raises(InputError, match="one-shot iterator"):
        run(classifier(), iter(loaded()), [universal(1)])


def test_two_attackers_of_one_name_are_refused():
    with pytest.raises(InputError, match="a name of its own; got one more than once"):
        run(classifier(), loaded(), [universal(1, name="one"), universal(2, name="one")])


@pytest.mark.parametrize(
    "model",
    [nn.Conv2d(3, 8, 3), lambda x: x.mean((1, 2, 3)), lambda x: x[:1].mean((2, 3))],
)
def test_a_bare_encoder_is_refused(model):
    with pytest.raises(InputError, match=r"logits of shape \(12, K\)"):
        run(model, loaded(), [universal(1)])


@pytest.mark.parametrize("change", [{"samples": -1}, {"samples": 1.5}, {"seed": -1}, {"seed": 0.5}, {"resume": True}])
def test_settings_out_of_range_are_refused(change):
    with pytest.raises(ConfigError):
        run(classifier(), loaded(), [universal(1)], **change)


def test_images_out_of_range_are_refused():
    with pytest.raises(InputError, match="images must lie in"):
        run(classifier(), [(torch.randn(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64))], [])


# a fitted defense -------------------------------------------------------------------------------------------------


def test_a_fitted_defense_is_evaluated_with_branches_and_detector(fitted):
    images, labels = shades(30)
    with torch.no_grad():
        flagged = fitted.detect(images)
        right = fitted.predict(images) == labels
    report = run(fitted, loaded(), [white(PGD(eps=EPS, steps=2)), universal(1)])
    assert list(report.benign_branches) == ["victim", "auxiliary", "benign"]
    assert report.benign_accuracy == Rate(int(right.sum()), 30)
    assert report.threshold == fitted.threshold
    assert report.false_positive_rate == Rate(int(flagged.sum()), 30)
    attacked = universal(1).attack.perturbation.apply(images)
    assert report.attacks[1].detection.flagged == Rate(int(fitted.detect(attacked).sum()), 30)
    assert report.attacks[1].rates.robust_accuracy == Rate(int((fitted.predict(attacked) == labels).sum()), 30)


def test_an_ensemble_of_its_branches_is_the_same_as_the_defense(fitted):
    twin = BranchEnsemble({name: fitted.branch(name) for name in fitted.branch_names}, threshold=fitted.threshold)
    reports = [
        run(model, loaded(), [white(PGD(eps=EPS, steps=2)), universal(1)], samples=2) for model in (fitted, twin)
    ]
    assert {record["branch"] for record in reports[0].training} == set(fitted.branch_names)
    assert strip(replace(reports[0], training=())) == strip(reports[1])  # branches alone do not know their training


def test_labels_beyond_the_logits_are_refused():
    images, labels = shades(12)
    with pytest.raises(InputError, match="labels must lie in"):
        run(lambda x: x.flatten(1)[:, :2], [(images, labels + 5)], [])


def test_an_attack_in_bfloat16_stays_in_its_ball_and_is_judged_in_float32():
    (images, labels), model = shades(12), Watched()
    attack = PGD(eps=EPS, steps=4)
    half = Attacker(name="half", threat_model="white-box", attack=attack, precision="bf16")
    report = evaluate(model, batches(images, labels, 12), [half], sanity=False, progress=False)
    assert model.asked == {True: {torch.bfloat16}, False: {torch.float32}}
    assert report.provenance["attacks_in_bfloat16"] == 1
    assert report.attacks[0].settings["precision"] == "bf16"
    whole = replace(half, precision="fp32")
    assert "precision" not in whole.settings  # states that were kept before there was a choice are found again
    assert evaluate(model, batches(images, labels, 12), [whole], sanity=False).provenance["attacks_in_bfloat16"] == 0


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="precision must be"):
        Attacker(name="x", threat_model="white-box", attack=PGD(eps=EPS), precision="fp8")
