"""Attackers who go on with the images that those before them left, against a plain loop over the images."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zepad.errors import InputError
from zepad.evaluation import Attacker, EvalReport, Rate, evaluate
from zepad.evaluation.predictions import Predictions
from zepad.evaluation.rendering.markdown import markdown_tables
from zepad.evaluation.rendering.summary import summary

COUNT, BATCH, EPS = 10, 4, 0.1
NUMBERS = torch.arange(COUNT)
# The first channel holds what the model looks at, the second which image it is.
IMAGES = torch.stack([torch.full((COUNT,), 0.5), NUMBERS / 64], dim=1).view(COUNT, 2, 1, 1)
LABELS = torch.zeros(COUNT, dtype=torch.int64)
LOADER = [(IMAGES[i : i + BATCH], LABELS[i : i + BATCH]) for i in range(0, COUNT, BATCH)]


def model(images: Tensor) -> Tensor:
    """Say class 1 where the first channel has moved at all."""
    moved = (images[:, 0, 0, 0] - 0.5).abs()
    return torch.stack([torch.full_like(moved, 0.01), moved], dim=1)


@dataclass(frozen=True, kw_only=True)
class Breaks:
    """An attack that breaks some of the images, by a shift that tells who did it, and remembers which it was given."""

    broken: frozenset[int]
    by: float
    eps: float = EPS
    norm: str = "linf"
    given: list[int] = field(default_factory=list, compare=False)

    def __call__(self, model, images, targets, *, generator=None):  # noqa: ARG002
        numbers = [round(64 * value) for value in images[:, 1, 0, 0].tolist()]
        self.given.extend(numbers)
        attacked = images.clone()
        attacked[:, 0] += torch.tensor([self.by if number in self.broken else 0.0 for number in numbers]).view(-1, 1, 1)
        return attacked


def attackers(sets, remaining, groups=None, eps=None) -> list[Attacker]:
    return [
        Attacker(
            name=f"attacker {i}",
            threat_model="white-box" if groups is None else groups[i],
            attack=Breaks(broken=frozenset(broken), by=0.02 + 0.005 * i, eps=EPS if eps is None else eps[i]),
            remaining=goes_on,
        )
        for i, (broken, goes_on) in enumerate(zip(sets, remaining, strict=True))
    ]


def measured(members, **settings) -> EvalReport:
    return evaluate(model, LOADER, members, sanity=False, progress=False, **settings)


SETS = st.lists(st.frozensets(st.integers(0, COUNT - 1)), min_size=1, max_size=4)


@given(SETS, st.data())
def test_who_goes_on_is_given_what_no_attacker_before_broke(sets, data):
    groups = [data.draw(st.sampled_from(["replica", "white-box"])) for _ in sets]
    eps = [data.draw(st.sampled_from([EPS, 2 * EPS])) for _ in sets]
    remaining = [data.draw(st.booleans()) for _ in sets]
    members = attackers(sets, remaining, groups, eps)
    report = measured(members)

    wrong = {}  # what is broken so far, by what one must be able to do
    for member, result, broken, goes_on, *able in zip(
        members, report.attacks, sets, remaining, groups, eps, strict=True
    ):
        before = wrong.setdefault(tuple(able), set())
        given = set(range(COUNT)) - (before if goes_on else set())
        assert sorted(member.attack.given) == sorted(given)
        after = (before if goes_on else set()) | (given & broken)
        assert result.rates.robust_accuracy == Rate(COUNT - len(after), COUNT)
        before |= after
    for group in report.groups:
        every = set().union(*(broken for broken, of in zip(sets, groups, strict=True) if of == group))
        assert report.worst[group].robust_accuracy == Rate(COUNT - len(every), COUNT)


@given(SETS)
def test_the_worst_case_is_that_of_attackers_who_all_attack_everything(sets):
    alone, after = (measured(attackers(sets, [goes_on] * len(sets))) for goes_on in (False, True))
    assert alone.worst == after.worst


def test_an_image_stays_as_the_first_attacker_left_it(tmp_path):
    from safetensors.torch import load_file

    measured(attackers([{0, 1}, {1, 2}, {0, 3}], [False, False, True]), folder=tmp_path)
    kept = load_file(tmp_path / "attacker-02-batch-00000.safetensors")["images"][:, 0, 0, 0] - 0.5
    assert torch.allclose(kept, torch.tensor([0.02, 0.02, 0.025, 0.03]), atol=1e-6)


def test_the_model_is_asked_about_the_remaining_images_alone():
    asked = []

    def watched(images):
        asked.append([round(64 * value) for value in images[:, 1, 0, 0].tolist()])
        return model(images)

    members = attackers([{0, 1, 4}, {2, 5, 6, 7}, {3, 8, 9}], [False, True, True])
    report = evaluate(watched, LOADER, members, sanity=False, progress=False)
    everything = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert asked[:3] == everything  # before any attack
    first, second, third = everything
    assert asked[3:] == [first, [2, 3], [3], second, [5, 6, 7], third, third, third]
    assert [result.rates.robust_accuracy.value for result in report.attacks] == [0.7, 0.3, 0.0]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.data(), st.booleans())
def test_replaced_predictions_are_those_of_the_images_in_their_places(whose, data, scored):
    """Two lists of predictions are mixed image by image."""
    count, branches = len(whose), data.draw(st.integers(1, 3))
    first, second = (
        Predictions(
            predictions=torch.randint(5, (branches, count)),
            confidences=torch.rand(branches, count),
            scores=torch.rand(count) if scored else None,
        )
        for _ in range(2)
    )
    rows = torch.tensor(whose) == 1
    mixed = first.replaced(rows, second.of(rows)).tensors()
    for name, tensor in mixed.items():
        for i, chosen in enumerate(rows.tolist()):
            assert torch.equal(tensor[..., i], (second if chosen else first).tensors()[name][..., i])
    assert mixed.keys() == first.tensors().keys()


def test_an_interrupted_evaluation_goes_on_to_the_same_report(tmp_path):
    sets, remaining = [{0, 5}, {1, 5}, {0, 7, 9}], [False, True, True]
    whole = measured(attackers(sets, remaining), folder=tmp_path / "state")
    for batch in (0, 2):
        (tmp_path / "state" / f"attacker-02-batch-{batch:05d}.safetensors").unlink()
    (tmp_path / "state" / "attacker-01-batch-00001.safetensors").unlink()
    members = attackers(sets, remaining)
    again = measured(members, folder=tmp_path / "state", resume=True)
    assert [result.rates for result in again.attacks] == [result.rates for result in whole.attacks]
    assert [member.attack.given for member in members] == [[], [4, 6, 7], [2, 3, 8, 9]]


def test_whoever_goes_on_is_held_to_its_budget():
    members = attackers([{0}, {1}], [False, True])
    members[1] = Attacker(
        name="too far", threat_model="white-box", attack=Breaks(broken=frozenset({1}), by=0.3), remaining=True
    )
    with pytest.raises(InputError, match="too far left its ball"):
        measured(members)


def test_a_report_says_who_went_on_and_does_not_call_it_the_strongest():
    report = measured(attackers([{0, 1, 2}, {1}, {2, 3}], [False, False, True]))
    assert report.attacks[2].rates.robust_accuracy == Rate(6, 10)
    assert report.attacks[2].settings["remaining"] is True
    assert "remaining" not in report.attacks[0].settings
    said = markdown_tables(report)
    assert "attacker 2 (remaining images)" in said
    assert "attacker 0 (remaining" not in said
    assert "those that survived the attackers before" in said
    assert "of 3 attackers the strongest is attacker 0 (70.0 %)" in summary(report)
    alone = measured(attackers([{0, 1, 2}, {1}, {2, 3}], [False] * 3))
    assert "remaining images" not in markdown_tables(alone)
