"""A report survives the way to JSON and back; nothing else is read as one."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import toy_data
from zepad.attacks import PGD
from zepad.errors import CheckpointError, InputError
from zepad.evaluation import (
    Attacker,
    AttackResult,
    Check,
    Cost,
    Detection,
    EvalReport,
    RobustRates,
    Rate,
    Sample,
    evaluate,
)
from zepad.evaluation.attackers import THREAT_MODELS

laws = settings(max_examples=40, deadline=None)

names = st.text(max_size=5)
numbers = st.floats(allow_nan=False, allow_infinity=False)
shares = st.floats(0, 1)
rates = st.integers(0, 50).flatmap(lambda total: st.builds(Rate, st.integers(0, total), st.just(total)))
rates_by_name = st.dictionaries(names, rates, max_size=2)
pairs = st.tuples(shares, shares)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | names,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=5,
)
histograms = st.dictionaries(names, st.lists(st.integers(0, 9), max_size=3).map(tuple), max_size=2)
robust_rates = st.builds(
    RobustRates, robust_accuracy=rates, fooling_rate=rates, attack_success_rate=rates, branches=rates_by_name
)
detections = st.builds(
    Detection,
    auroc=shares,
    auroc_interval=pairs,
    auroc_fooling=st.none() | shares,
    fooling_images=st.integers(0, 50),
    fpr_at_95_tpr=shares,
    accuracy=shares,
    flagged=rates,
    evading=rates,
    curve=st.lists(pairs, max_size=3).map(tuple),
)
attacks = st.builds(
    AttackResult,
    name=names,
    threat_model=st.sampled_from(THREAT_MODELS),
    eps=numbers,
    norm=names,
    settings=st.dictionaries(names, json_values, max_size=2),
    rates=robust_rates,
    detection=st.none() | detections,
    cost=st.builds(Cost, seconds=numbers, forwards=numbers, gradients=numbers),
    confidences=histograms,
)
checks = st.builds(Check, name=names, passed=st.booleans(), detail=names)
samples = st.builds(
    Sample,
    attacker=names,
    index=st.integers(0),
    label=st.integers(0),
    before=st.integers(0),
    after=st.integers(0),
    flagged=st.none() | st.booleans(),
    benign=st.binary(max_size=9),
    attacked=st.binary(max_size=9),
    perturbation=st.binary(max_size=9),
)
reports = st.builds(
    EvalReport,
    model=names,
    data=names,
    images=st.integers(1),
    classes=st.lists(names, max_size=3).map(tuple),
    benign_accuracy=rates,
    benign_branches=rates_by_name,
    false_positive_rate=st.none() | rates,
    threshold=st.none() | numbers,
    attacks=st.lists(attacks, max_size=2).map(tuple),
    worst=st.dictionaries(names, robust_rates, max_size=2),
    checks=st.lists(checks, max_size=2).map(tuple),
    confidences=histograms,
    samples=st.lists(samples, max_size=2).map(tuple),
    provenance=st.dictionaries(names, json_values, max_size=3),
)


def strict(text):
    """Read JSON as the standard has it: without NaN and infinities."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


@laws
@given(reports)
def test_json_and_back_is_the_same_report(report):
    text = report.to_json()
    strict(text)
    back = EvalReport.from_json(text)
    assert back == report
    assert back.to_json() == text


@laws
@given(reports)
def test_groups_share_out_the_attacks(report):
    assert sorted(map(id, report.attacks)) == sorted(id(r) for group in report.groups for r in report.group(group))
    assert list(report.groups) == [g for g in THREAT_MODELS if any(r.threat_model == g for r in report.attacks)]
    assert report.warnings == tuple(check for check in report.checks if not check.passed)


@pytest.fixture(scope="module")
def real():
    images, labels = toy_data(12)
    pgd = Attacker(name="PGD", threat_model="white-box", attack=PGD(eps=0.1, steps=2), notes={"odd": (math.inf, {"a"})})
    with torch.random.fork_rng():
        return evaluate(
            lambda x: x.mean((2, 3)) * 9, [(images, labels)], [pgd], samples=2, sanity=False, progress=False
        )


def test_a_measured_report_survives(real, tmp_path):
    assert EvalReport.from_json(real.to_json()) == real
    (tmp_path / "report.json").write_text(real.to_json())
    assert EvalReport.load(tmp_path) == EvalReport.load(tmp_path / "report.json") == real


def test_every_rate_is_written_with_value_and_interval(real):
    held = strict(real.to_json())
    assert held["benign_accuracy"] == {
        "hits": 12,
        "total": 12,
        "value": 1.0,
        "interval": list(real.benign_accuracy.interval),
    }
    nothing = replace(real, benign_accuracy=Rate(0, 0))
    assert strict(nothing.to_json())["benign_accuracy"] == {"hits": 0, "total": 0, "value": None, "interval": None}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_json_has_no_word_for_is_never_written(real, value):
    with pytest.raises(ValueError, match="JSON"):
        replace(real, threshold=value).to_json()


def changed(report, change):
    values = json.loads(report.to_json())
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("format"),
        lambda v: v.update(format=2),
        lambda v: v.update(format="1"),
        lambda v: v.pop("benign_accuracy"),
        lambda v: v.pop("model"),
        lambda v: v.update(extra=1),
        lambda v: v.update(attacks=3),
        lambda v: v.update(benign_accuracy=None),
        lambda v: v["benign_accuracy"].update(hits="many"),
        lambda v: v["benign_accuracy"].update(total=math.inf),
        lambda v: v["attacks"][0].pop("rates"),
        lambda v: v["attacks"][0]["rates"].pop("branches"),
        lambda v: v["attacks"][0].update(extra=1),
        lambda v: v["attacks"][0]["cost"].pop("seconds"),
        lambda v: v["samples"][0].update(benign="not base64!"),
        lambda v: v["samples"][0].update(benign=5),
        lambda v: v.update(checks=[{"name": "x"}]),
        lambda v: v.update(worst=[]),
    ],
)
def test_what_is_no_report_is_refused(real, change):
    with pytest.raises(CheckpointError, match="no evaluation report of format 1"):
        EvalReport.from_json(changed(real, change))


@pytest.mark.parametrize("text", ["", "null", "[]", "3", '"report"', "{}", "{"])
def test_other_text_is_refused(text):
    with pytest.raises(CheckpointError, match="no evaluation report"):
        EvalReport.from_json(text)


def test_a_truncated_report_is_refused(real):
    text = real.to_json()
    for end in range(0, len(text) - 1, 97):
        with pytest.raises(CheckpointError):
            EvalReport.from_json(text[:end])


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b""])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        EvalReport.load(tmp_path)
    with pytest.raises(CheckpointError):
        EvalReport.load(tmp_path / "report.json")


def test_a_folder_that_cannot_be_written_is_refused(real, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="cannot be written"):
        real.save(file / "folder")
