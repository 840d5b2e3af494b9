"""Calibration reaches the benign floor with the smallest influence of the benign branch, and bounds false alarms."""

from __future__ import annotations

import copy
import json
import math
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import reference
from strategies import seeds
from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, ConfigError, HardenConfig, HeadConfig, InputError, ZePAD, detectors, fusion
from zepad import calibration as module
from zepad.calibration import calibrate
from zepad.detectors import DetectorInputs, FittedDetector
from zepad.detectors.features import fit_features
from zepad.errors import CalibrationWarning
from zepad.functional import conformal_threshold, detection_score
from zepad.fusion import RFDM, Bounded, Mean, MixedNUTS, Temperature, ValidationLogits
from zepad.fusion import mixed as mixed_module
from zepad.fusion.temperature import fit_temperature

few = settings(max_examples=25, deadline=None)
GRID = (0.0, *(2 ** (i / 8) for i in range(-56, 57)))
"""Of votes: nothing, and from 1/128 to 128 in eighths of an octave."""


def branches(seed, *, count=60, classes=5, hardened=1.0, benign=3.0, dtype=torch.float32):
    """Logits and labels: hardened branches that are often wrong, and a benign branch that is rarely."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    right = torch.nn.functional.one_hot(labels, classes).to(dtype)
    noise = torch.randn(3, count, classes, generator=generator).to(dtype)
    return noise + torch.tensor([hardened, hardened, benign], dtype=dtype)[:, None, None] * right, labels


def observe(seed, dtype=torch.float32, **settings):
    """The same, and logits under an attack that moves the hardened branches alone."""
    logits, labels = branches(seed, dtype=dtype, **settings)
    attacked = logits.clone()
    attacked[:2] -= torch.nn.functional.one_hot(labels, logits.shape[-1])
    return ValidationLogits(logits, labels, attacked)


def accuracy(outputs, labels):
    return float((outputs.argmax(dim=-1) == labels).double().mean())


def rule_of(name):
    return fusion.resolve(name, argument="fusion")


def detector_of(name):
    return FittedDetector(detectors.resolve(name, argument="detector"))


# the parameters of a fusion


@few
@given(seed=seeds, floor=st.floats(0, 1), count=st.integers(1, 30))
def test_the_smallest_vote_that_reaches_the_floor_is_chosen(seed, floor, count):
    logits, labels = branches(seed, count=count, dtype=torch.float64)
    hardened = [reference.hardened_log_probabilities(image[:-1]) for image in logits.numpy().swapaxes(0, 1)]
    benign = [reference.softmax(row) for row in logits[-1].numpy()]
    found = []
    for vote in GRID:
        says = [int(np.argmax(h + vote * b)) for h, b in zip(hardened, benign, strict=True)]
        found.append(np.mean(np.array(says) == labels.numpy()))
    reached = [vote for vote, value in zip(GRID, found, strict=True) if value >= floor]
    expected = reached[0] if reached else GRID[int(np.argmax(found))]
    chosen = Bounded(vote=7.0).calibrate(ValidationLogits(logits, labels), benign_floor=floor)
    assert chosen.vote == pytest.approx(expected)


def robust(rows, scale, power, bias):
    return np.exp([reference.robust_log_probabilities(row, scale, power, bias) for row in rows])


def weigh(observed, floor, scale, power, bias):
    """The best of one transform by trying every lead of an image: the accuracy that counts, and who survives."""
    clean, attacked = (z[:-1].mean(dim=0).numpy() for z in (observed.logits, observed.attacked))
    labels, benign = observed.labels.numpy(), observed.logits[-1].argmax(dim=-1).numpy()
    rows, images = robust(clean, scale, power, bias), np.arange(len(labels))
    lacks = rows.max(axis=1) - rows[images, benign]
    leads = sorted({0.0, *lacks})
    found = []
    for lead in leads:
        says = np.where(lacks <= lead + 1e-12, benign, rows.argmax(axis=1))
        found.append(np.mean(says == labels))
    wanted = min(floor, max(found))
    first = next(i for i, value in enumerate(found) if value >= wanted)
    rows = robust(attacked, scale, power, bias)
    right = rows[images, labels]
    rows[images, labels] = -np.inf
    return min(found[first], floor), np.mean(right - rows.max(axis=1) > leads[first])


@pytest.mark.parametrize("seed", range(3))
def test_mixed_takes_the_transform_under_which_most_attacked_images_survive(seed, monkeypatch):
    monkeypatch.setattr(mixed_module, "_POWERS", (1.0, 4.0))
    observed, floor = observe(seed, torch.float64, count=40, hardened=2.0), 0.9
    grid = [(s, p, b) for s in mixed_module._SCALES for p in (1.0, 4.0) for b in mixed_module._BIASES]
    values = {setting: weigh(observed, floor, *setting) for setting in grid}
    chosen = MixedNUTS().calibrate(observed, benign_floor=floor)
    assert values[chosen.scale, chosen.power, chosen.bias] == pytest.approx(max(values.values()))
    assert max(values.values())[1] > min(values.values())[1]  # or the choice would show nothing


# The image that has to be overturned last lacks exactly the lead that the weight was made for.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["bounded", "mixed"])
def test_the_floor_holds_on_the_calibration_images_wherever_the_benign_branch_reaches_it(rule, dtype):
    missed = []
    for seed in range(8):
        observed = observe(seed, dtype)
        floor = 0.95 * accuracy(observed.logits[-1], observed.labels)
        chosen = rule_of(rule).calibrate(observed, benign_floor=floor)
        if observed.accuracy(chosen) < floor:
            missed.append((seed, floor, observed.accuracy(chosen)))
    assert missed == []


@pytest.mark.parametrize("rule", ["bounded", "mixed"])
def test_a_higher_floor_gives_the_benign_branch_no_less_say(rule):
    observed = observe(1, torch.float64)
    field = {"bounded": "vote", "mixed": "benign_weight"}[rule]
    settings = [rule_of(rule).calibrate(observed, benign_floor=floor) for floor in (0.0, 0.7, 0.8, 0.9)]
    says = [getattr(chosen, field) for chosen in settings]
    if rule != "mixed":  # whose weight belongs to a transform of its own
        assert says == sorted(says)
    assert says[0] < 1e-3 < says[-1]


@pytest.mark.parametrize("rule", [RFDM(sharpness=1.0), Mean()])
def test_a_rule_without_a_choice_stays_as_it_is(rule):
    assert not rule.has_choice()
    assert rule.calibrate(observe(0), benign_floor=0.99) is rule


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_the_temperature_that_made_the_labels_is_found(temperature):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator).flatten()
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.06)


@few
@given(seeds, st.floats(0.1, 10))
def test_louder_logits_have_a_higher_temperature_by_as_much(seed, scale):
    logits, labels = branches(seed, benign=1.0, dtype=torch.float64)
    found = fit_temperature(logits[-1], labels)
    assert 0.1 < found < 9
    assert fit_temperature(scale * logits[-1], labels) == pytest.approx(scale * found, rel=0.01)


def test_no_temperature_of_a_fine_grid_is_likelier():
    logits, labels = branches(3)
    rows = logits[-1].double()

    def loss(temperature):
        return float(torch.nn.functional.cross_entropy(rows / temperature, labels))

    assert loss(fit_temperature(logits[-1], labels)) <= min(loss(10 ** (i / 100)) for i in range(-200, 201)) + 1e-7


def test_every_branch_has_a_temperature_of_its_own():
    observed = observe(2)
    chosen = Temperature().calibrate(observed, benign_floor=0.0)
    assert chosen.temperatures == tuple(fit_temperature(rows, observed.labels) for rows in observed.logits)
    assert len(set(chosen.temperatures)) == 3
    louder = observed._replace(logits=observed.logits * torch.tensor([1.0, 5.0, 1.0])[:, None, None])
    again = chosen.calibrate(louder, benign_floor=0.0)
    before, after = chosen(observed.logits), again(louder.logits)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)  # one loud branch does not decide


# detector inputs as a function of pixels: a defense without an encoder


class World:
    """Images `(N, 1, 4, 8)` of noise, and what branches and reference make of them."""

    def __init__(self, noise=0.5):
        generator = torch.Generator().manual_seed(5)
        self.reads = torch.randn(4, 32, 3, generator=generator) / 2
        self.reads[1:3] += self.reads[0]
        self.relation = torch.randn(20, 6, generator=generator) / 4
        self.noise = noise

    def images(self, count, seed):
        return torch.rand(count, 1, 4, 8, generator=torch.Generator().manual_seed(seed))

    def labels(self, images):
        return (self.look(images).logits[-1] + self.look(images).logits[0]).argmax(dim=-1)

    def look(self, images):
        pixels = 3 * (images.flatten(1) - 0.5)
        features, errors = pixels[:, :20], pixels[:, 20:26]
        return DetectorInputs(
            logits=torch.stack([pixels @ reads for reads in self.reads[:3]]),
            hardened_features=features[:, :12],
            reference_logits=pixels @ self.reads[3],
            reference_features=features @ self.relation + self.noise * errors,
            blurred_features=features[:, 12:],
        )

    def calibrate(self, loader, *, rule="rfdm", detector="gap", fpr=0.1, benign_floor=None, fit_loader=None):
        return calibrate(
            self.look,
            loader,
            branch_logits=lambda images: self.look(images).logits,
            fit_loader=fit_loader,
            fusion=rule_of(rule),
            detector=detector_of(detector).rule,
            fpr=fpr,
            benign_floor=benign_floor,
            eps=8 / 255,
            channels=1,
            num_classes=3,
            device=torch.device("cpu"),
        )


@pytest.mark.parametrize(
    ("name", "fit_count"),
    [("gap", 0), *((n, c) for n in ("features", "combined") for c in (None, 50))],
)
def test_on_average_over_calibration_sets_no_more_benign_images_are_flagged_than_was_asked_for(name, fit_count):
    """With 40 images for the threshold, 5 in 41 is the rate to expect of "at most 0.125": no lower, no higher.

    Were a detector of 20 inputs fitted to the 40 images of its threshold, it would flag far more.
    """
    world, rates = World(), []
    for seed in range(100):
        images = world.images(80 if fit_count is None else 40, 2 * seed)
        others = world.images(fit_count, 10_000 + seed % 3) if fit_count else None
        found = world.calibrate(images, detector=name, fpr=0.125, fit_loader=others)
        fresh = found.detector(world.look(world.images(200, 2 * seed + 1)))
        rates.append(float((fresh > found.threshold).double().mean()))
    error = 3.5 * np.std(rates) / math.sqrt(len(rates))
    assert np.mean(rates) == pytest.approx(5 / 41, abs=error)
    assert error < 0.025


@pytest.mark.parametrize("name", ["features", "combined"])
def test_the_images_of_the_fit_and_those_of_the_threshold_are_disjoint(name):
    world = World()
    images, other = world.images(60, 0), world.images(60, 1)
    found = world.calibrate(images, detector=name)
    fit_on, set_on = images[0::2], images[1::2]
    expected = detector_of(name)
    expected.fit(world.look(fit_on))
    for key, value in found.detector.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[key])
    threshold = conformal_threshold(expected(world.look(set_on)), fpr=0.1)
    assert found.threshold == pytest.approx(threshold, abs=1e-4)

    mixed = images.clone()
    mixed[1::2] = other[1::2]
    again = world.calibrate(mixed, detector=name)
    torch.testing.assert_close(dict(again.detector.state_dict()), dict(found.detector.state_dict()))
    assert abs(again.threshold - found.threshold) > 1e-3


@pytest.mark.parametrize("name", ["features", "combined"])
@pytest.mark.parametrize("labelled", [True, False])
def test_other_images_for_the_fit_leave_all_of_the_loader_for_the_threshold(name, labelled):
    world = World()
    images, others = world.images(30, 0), world.images(50, 1)
    fit_loader = [(others[:20], world.labels(others[:20])), (others[20:], world.labels(others[20:]))]
    found = world.calibrate(images, detector=name, fit_loader=fit_loader if labelled else others)
    expected = detector_of(name)
    expected.fit(world.look(others))
    torch.testing.assert_close(dict(found.detector.state_dict()), dict(expected.state_dict()))
    threshold = conformal_threshold(expected(world.look(images)), fpr=0.1)
    assert found.threshold == pytest.approx(threshold, abs=1e-4)
    assert found.record["images"] == 30


@pytest.mark.parametrize("name", ["gap"])
def test_a_detector_without_a_fit_does_not_look_at_images_for_it(name):
    world = World()

    def never():
        pytest.fail("the images were looked at")
        yield

    images = world.images(30, 0)
    found = world.calibrate(images, detector=name, fit_loader=never())
    assert found.threshold == world.calibrate(images, detector=name).threshold


def test_the_threshold_of_a_detector_without_a_fit_is_set_on_all_images():
    world = World()
    images = world.images(30, 0)
    scores = detection_score(world.look(images).logits)
    assert world.calibrate(images).threshold == conformal_threshold(scores, fpr=0.1)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(("rule", "detector"), [("bounded", "features"), ("mixed", "gap"), ("temperature", "gap")])
def test_the_batches_do_not_matter(rule, detector, labelled):
    world = World()
    images = world.images(300, 0)  # more than are looked at at a time
    labels = world.labels(images)
    results = []
    for size in (300, 100):
        parts = list(zip(images.split(size), labels.split(size), strict=True)) if labelled else images.split(size)
        results.append(world.calibrate(parts, rule=rule, detector=detector, benign_floor=0.8))
    one, other = results
    values = [[value for value in found.fusion.settings().values() if isinstance(value, float)] for found in results]
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert one.threshold == pytest.approx(other.threshold, abs=1e-5)
    assert ("fusion" in one.record) == labelled


@pytest.mark.parametrize("rule", ["bounded", "mixed", "temperature"])
def test_without_a_label_for_every_image_the_fusion_keeps_its_parameters(rule):
    world = World()
    images = world.images(40, 0)
    labels = world.labels(images)
    halves = [(images[:20], labels[:20]), images[20:]]
    for loader in (images, [images[:20], images[20:]], [(images,)], halves):
        found = world.calibrate(loader, rule=rule)
        assert found.fusion == rule_of(rule)
        assert "fusion" not in found.record
        assert found.record["images"] == 40
    changed = world.calibrate([(images, labels)], rule=rule, benign_floor=0.5)
    assert changed.fusion != rule_of(rule)


@pytest.mark.parametrize("rule", ["bounded", "mixed"])
def test_a_floor_that_is_reached_is_recorded_and_gives_no_warning(rule):
    world = World()
    missed = []
    for seed in range(6):
        images = world.images(60, seed)
        labels = world.labels(images)
        floor = accuracy(world.look(images).logits[-1], labels)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = world.calibrate([(images, labels)], rule=rule, benign_floor=floor)
        record = found.record["fusion"]
        assert record["benign_floor"] == floor
        assert record["benign_accuracy"] == accuracy(found.fusion(world.look(images).logits), labels)
        assert {name: record[name] for name in ("name", "settings")} == asdict(found.fusion.record())
        json.dumps(found.record)
        if caught or record["benign_accuracy"] < floor:
            missed.append(seed)
    assert missed == []


@pytest.mark.parametrize("rule", ["bounded", "mixed"])
@pytest.mark.parametrize("floor", [0.5, 0.8, 1.0])
def test_the_floor_is_asked_for_with_a_standard_error_to_spare(rule, floor):
    world, asked = World(), []
    images = world.images(60, 0)
    cls = type(rule_of(rule))
    original = cls.calibrate

    def watched(self, validation, *, benign_floor):
        asked.append(benign_floor)
        return original(self, validation, benign_floor=benign_floor)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        patch.setattr(cls, "calibrate", watched)
        found = world.calibrate([(images, world.labels(images))], rule=rule, benign_floor=floor)
    assert asked == [pytest.approx(floor + math.sqrt(floor * (1 - floor) / 60))]
    assert found.record["fusion"]["benign_floor"] == floor


@pytest.mark.parametrize("rule", ["bounded", "mixed"])
def test_a_floor_out_of_reach_is_warned_of_and_the_most_accurate_taken(rule):
    world = World()
    images = world.images(60, 0)
    labels = world.labels(images)
    labels[:6] = (labels[:6] + 1) % 3  # the branches agree on most of these, wrongly
    with pytest.warns(CalibrationWarning, match=rf'the rule "{rule}" reaches a benign accuracy of .*, not the 100.0%'):
        found = world.calibrate([(images, labels)], rule=rule, benign_floor=1.0)
    reached = found.record["fusion"]["benign_accuracy"]
    observed = ValidationLogits(world.look(images).logits, labels)
    assert reached < 1
    if rule == "mixed":
        assert reached >= accuracy(observed.logits[-1], labels)
    else:
        others = [observed.accuracy(Bounded(vote=vote)) for vote in GRID]
        assert reached == max(others)
        assert found.fusion.vote == pytest.approx(GRID[int(np.argmax(others))])


class Beside(World):
    """The world with a benign branch and a reference whose accuracy is chosen: that many first images are wrong."""

    def __init__(self, *, benign=0, reference=None, hardened=0):
        super().__init__()
        self.wrong, self.reference = {"benign": benign, "hardened": hardened}, reference

    def one_hot(self, labels, wrong):
        says = torch.cat([(labels[:wrong] + 1) % 3, labels[wrong:]])
        return 9 * torch.nn.functional.one_hot(says, 3).float()

    def calibrate_on(self, count=50, *, rule="bounded", looks_at_reference=True, **arguments):
        images = self.images(count, 0)
        labels = torch.arange(count) % 3
        parts = [self.one_hot(labels, self.wrong[name]) for name in ("hardened", "hardened", "benign")]
        undefended = None if self.reference is None else self.one_hot(labels, self.reference)
        asked = []

        def reference_of(chunk):
            asked.append(len(chunk))
            return undefended

        self.look = lambda _: DetectorInputs(
            torch.stack(parts), reference_logits=undefended if looks_at_reference else None
        )
        settings = {"fit_loader": None, "fpr": 0.1, "benign_floor": None, "eps": 8 / 255, "channels": 1}
        found = calibrate(
            self.look,
            [(images, labels)],
            branch_logits=lambda _: torch.stack(parts),
            fusion=rule_of(rule),
            detector=detector_of("gap").rule,
            num_classes=3,
            device=torch.device("cpu"),
            reference=None if undefended is None else reference_of,
            **{**settings, **arguments},
        )
        assert asked == ([] if looks_at_reference or undefended is None else [count])
        return found.record["fusion"]


@pytest.mark.parametrize("looks_at_reference", [True, False])
@pytest.mark.parametrize(
    ("benign", "reference", "owner", "floor"),
    [(3, 30, "benign", 0.94), (5, 2, "reference", 0.96), (5, None, "benign", 0.9), (4, 4, "reference", 0.92)],
)
def test_without_a_floor_that_of_a_clean_trained_model_is_asked_for(
    benign, reference, owner, floor, looks_at_reference
):
    record = Beside(benign=benign, reference=reference).calibrate_on(looks_at_reference=looks_at_reference)
    assert (record["benign_floor"], record["floor_of"]) == (pytest.approx(floor), owner)
    clean = {"benign": 1 - benign / 50} | ({} if reference is None else {"reference": 1 - reference / 50})
    assert record["clean_accuracies"] == pytest.approx(clean)
    json.dumps(record)


@pytest.mark.parametrize(("reference", "owner"), [(4, "reference"), (5, "reference"), (6, "benign"), (12, "benign")])
def test_the_benign_branch_sets_the_floor_only_where_it_is_more_than_five_points_better(reference, owner):
    """Of 50 images it has 3 wrong."""
    assert Beside(benign=3, reference=reference).calibrate_on()["floor_of"] == owner


def test_a_frozen_victim_on_a_far_task_does_not_lower_the_floor():
    """The benign branch has 94 per cent, the undefended victim 40 and the hardened branches 20: a vote must restore."""
    record = Beside(benign=3, reference=30, hardened=40).calibrate_on()
    assert record["benign_accuracy"] >= record["benign_floor"] == pytest.approx(0.94)


@pytest.mark.parametrize(
    ("floor", "message"),
    [
        (None, r"accuracy of 90\.0% on these 50 images, not the 96\.0% of the undefended victim\. Train the hardened"),
        (0.95, r"accuracy of 90\.0% .*, not the 95\.0% asked for \(the undefended victim has 96\.0%\).*benign_floor="),
    ],
)
def test_a_warning_says_what_was_asked_for_whose_it_is_what_was_reached_and_what_to_do(floor, message):
    with pytest.warns(CalibrationWarning, match=message):
        record = Beside(benign=5, reference=2, hardened=5).calibrate_on(benign_floor=floor)
    assert (record["benign_accuracy"], record["floor_of"]) == (0.9, "caller" if floor else "reference")


def test_what_a_floor_of_ones_own_costs_is_logged(caplog):
    with caplog.at_level("INFO", logger="zepad"):
        Beside(benign=0, hardened=10).calibrate_on(benign_floor=0.5)
        (message,) = caplog.messages
        assert message.endswith("accuracy of 80.0% on these 50 images; the benign branch alone has 100.0%.")
        caplog.clear()
        Beside(benign=10, hardened=0).calibrate_on(benign_floor=0.5)
        assert caplog.messages == []


def test_mixed_is_judged_under_an_attack_on_the_hardened_branches():
    world, budgets = World(), []
    original = module.PGD

    class Watched(original):
        def __call__(self, model, images, labels, **arguments):
            attacked = super().__call__(model, images, labels, **arguments)
            budgets.append(float((attacked - images).abs().max()))
            clean, hit = (-model(points).gather(1, labels[:, None]) for points in (images, attacked))
            assert (hit > clean).float().mean() > 0.9
            return attacked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PGD", Watched)
        images = world.images(40, 0)
        world.calibrate([(images, world.labels(images))], rule="bounded", benign_floor=0.5)
        assert budgets == []
        world.calibrate([(images, world.labels(images))], rule="mixed", benign_floor=0.5)
    assert budgets == [pytest.approx(8 / 255, abs=1e-6)]


@pytest.mark.parametrize("detector", ["features", "combined"])
def test_too_few_images_say_how_many_were_left(detector):
    world = World()
    with pytest.raises(InputError, match=r"at least 10 images.*; got 9 and 9"):
        world.calibrate(world.images(18, 0), detector=detector)
    with pytest.raises(InputError, match=r"rate of 0.05 needs at least 19 .* got 15\..*Of the images 15 were left"):
        world.calibrate(world.images(30, 0), detector=detector, fpr=0.05)
    assert world.calibrate(world.images(38, 0), detector=detector, fpr=0.05).detector.is_fitted


def test_too_few_images_for_a_detector_without_a_fit():
    world = World()
    with pytest.raises(InputError, match=r"rate of 0.05 needs at least 19 benign images; got 18") as error:
        world.calibrate(world.images(18, 0), fpr=0.05)
    assert "left" not in str(error.value)


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan, math.inf, "high", True])
def test_a_floor_that_is_no_accuracy_is_refused(floor):
    world = World()
    with pytest.raises(ConfigError, match=r"benign_floor must be an accuracy in \[0, 1\], or None; got"):
        world.calibrate(world.images(40, 0), benign_floor=floor)


# a whole model

IMAGES, LABELS = toy_data(80, seed=5)


@pytest.fixture(scope="module")
def _guarded() -> ZePAD:
    torch.manual_seed(1)
    loader = DataLoader(TensorDataset(*toy_data()), batch_size=16, shuffle=True)
    model = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), fusion="bounded", detector="combined")
    model.harden(loader, HardenConfig(epochs=4, steps=2, lr=1e-2), progress=False)
    benign, heads = BenignConfig(epochs=20, lr=1e-2), HeadConfig(epochs=60)
    return model.fit_benign(loader, benign, head_config=heads, progress=False)


@pytest.fixture
def guarded(_guarded):
    """A fitted defense with the reference, not calibrated; a copy for each test."""
    return copy.deepcopy(_guarded)


def facts(model):
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, (model.fusion, model.detector.rule, model.threshold, copy.deepcopy(model.provenance))


def assert_unchanged(model, before):
    state, others = facts(model)
    assert others == before[1]
    assert state.keys() == before[0].keys()
    assert all(torch.equal(value, before[0][key]) for key, value in state.items())


def test_calibrating_changes_fusion_detector_and_threshold_and_nothing_else(guarded):
    images, labels = toy_data(80, seed=5)
    before = facts(guarded)[0]
    guarded.calibrate([(images, labels)], fpr=0.1, benign_floor=0.3)
    after = guarded.state_dict()
    assert {key for key in after if not key.startswith("detector.")} == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert guarded.fusion.name == "bounded"
    assert guarded.provenance["calibration"]["fpr"] == 0.1
    record = guarded.provenance["calibration"]["fusion"]
    assert (record["benign_floor"], record["floor_of"]) == (0.3, "caller")
    assert record["clean_accuracies"].keys() == {"benign", "reference"}
    assert guarded.provenance.keys() == {"preset", "harden", "benign", "calibration"}
    assert int(guarded.detect(images[1::2]).sum()) <= 4  # of 40, as (40 + 1) * 0.1 is


def test_a_model_in_evaluation_mode_stays_so_in_every_part(guarded):
    images, labels = toy_data(80, seed=5)
    assert not any(part.training for part in guarded.modules())
    guarded.calibrate([(images, labels)], fpr=0.1, benign_floor=0.3)
    assert [name for name, part in guarded.named_modules() if part.training] == []
    guarded.configure(fusion="mixed", detector="features")
    assert [name for name, part in guarded.named_modules() if part.training] == []


@pytest.mark.parametrize("rule", ["bounded", "mixed", "temperature"])
def test_every_rule_is_calibrated_on_a_whole_model(guarded, rule):
    images, labels = toy_data(60, seed=5)
    guarded.configure(fusion=rule, detector="gap").calibrate([(images, labels)], fpr=0.1, benign_floor=0.5)
    record = guarded.provenance["calibration"]["fusion"]
    assert record["name"] == guarded.fusion.name == rule
    assert record["benign_accuracy"] == accuracy(guarded(images), labels)
    assert guarded.fusion != rule_of(rule)
    assert all(parameter.grad is None for parameter in guarded.parameters())


def test_a_kept_reference_counts_for_the_floor_though_the_detector_does_not_look_at_it(guarded):
    images, labels = toy_data(60, seed=5)
    expected = accuracy(guarded.branch("reference")(images), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        guarded.configure(detector="gap").calibrate([(images, labels)], fpr=0.1)
    assert guarded.provenance["calibration"]["fusion"]["clean_accuracies"]["reference"] == expected


@pytest.mark.parametrize(
    ("change", "arguments", "error"),
    [
        (lambda x: x[:12], {}, InputError),
        (lambda x: x[:30], {"fpr": 0.05}, InputError),
        (lambda x: x, {"fpr": 0.0}, InputError),
        (lambda x: x, {"benign_floor": 2.0}, ConfigError),
        (lambda x: x, {"eps": -1.0}, ConfigError),
        (lambda x: x, {"eps": 8}, ConfigError),
        (lambda x: x, {"fit_loader": []}, InputError),
        (lambda x: x, {"fit_loader": toy_data(9)[0]}, InputError),
        (lambda x: x[:12], {"fit_loader": toy_data(40)[0], "fpr": 0.05}, InputError),
        (lambda _: [], {}, InputError),
        (lambda x: x * 255, {}, InputError),
        (lambda x: [(x, LABELS + 1)], {}, InputError),
        (lambda x: [(x, LABELS), (x, LABELS[:-1])], {}, InputError),
        (lambda x: [(x, LABELS.float())], {}, InputError),
    ],
)
def test_a_calibration_that_fails_leaves_the_model_as_it_was(guarded, change, arguments, error):
    guarded.calibrate([(IMAGES, LABELS)], fpr=0.1, benign_floor=0.5)
    before = facts(guarded)
    with pytest.raises(error):
        guarded.calibrate(change(IMAGES), **arguments)
    assert_unchanged(guarded, before)


def test_an_error_inside_a_loader_leaves_the_model_as_it_was(guarded):
    images, labels = toy_data(40, seed=5)

    def broken():
        yield images, labels
        raise OSError("disk")

    before = facts(guarded)
    with pytest.raises(OSError, match="disk"):
        guarded.calibrate(broken())
    assert_unchanged(guarded, before)


def test_the_budget_of_mixed_is_that_of_the_hardening_unless_said(guarded, monkeypatch):
    images, labels = toy_data(40, seed=5)
    budgets = []
    original = module.PGD
    monkeypatch.setattr(module, "PGD", lambda **settings: budgets.append(settings["eps"]) or original(**settings))
    guarded.configure(fusion="mixed", detector="gap")
    guarded.provenance["harden"]["config"]["eps"] = 3 / 255
    for eps in (None, 5 / 255):
        guarded.calibrate([(images, labels)], fpr=0.1, benign_floor=0.5, eps=eps)
    assert budgets == [3 / 255, 5 / 255]
    del guarded.provenance["harden"]
    guarded.calibrate([(images, labels)], fpr=0.1, benign_floor=0.5)
    assert budgets[-1] == HardenConfig().eps


# Calibration computes in float32, whatever the model does.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gap", "features", "combined"])
def test_a_model_in_another_precision_is_calibrated_and_scores(guarded, name, dtype):
    images, _ = toy_data(60, seed=5)
    guarded.configure(detector=name).to(dtype).calibrate(images.to(dtype), fpr=0.1)
    scores = guarded.detection_score(images.to(dtype))
    assert scores.isfinite().all()
    assert int(guarded.detect(images.to(dtype)[1::2]).sum()) <= 6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["features", "combined"])
def test_a_calibrated_model_scores_in_another_precision(guarded, name, dtype):
    images, _ = toy_data(60, seed=5)
    guarded.configure(detector=name).calibrate(images, fpr=0.1)
    expected = guarded.detection_score(images)
    actual = guarded.to(dtype).detection_score(images.to(dtype)).float()
    assert torch.corrcoef(torch.stack([actual, expected]))[0, 1] > 0.9


def test_the_feature_fit_of_a_model_is_that_of_its_inputs(guarded):
    images, _ = toy_data(60, seed=5)
    guarded.configure(detector="features").calibrate(images, fpr=0.1)
    with torch.no_grad():
        seen = guarded.detector_inputs(images[0::2])
    features = torch.cat([seen.hardened_features, seen.blurred_features], dim=1)
    expected = fit_features(features, seen.reference_features)
    for name, tensor in expected._asdict().items():
        torch.testing.assert_close(getattr(guarded.detector, name), tensor, rtol=1e-3, atol=1e-4)
