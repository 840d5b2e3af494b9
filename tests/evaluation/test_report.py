"""A report survives a round trip through JSON, and nothing else is read as a report."""

import json
import math
from dataclasses import replace
from pathlib import Path

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
    Rate,
    RobustRates,
    Sample,
    evaluate,
    save_report,
)
from zepad.evaluation.attackers import THREAT_MODELS
from zepad.evaluation.rendering import markdown_tables

laws = settings(max_examples=20, deadline=None)

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
parts = st.builds(
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


def whole(report, bins):
    """Make one report of parts that were drawn apart: what refers to the rest of it does."""
    attacks = {attack.name: replace(attack, confidences=bins) for attack in report.attacks}
    attacked = {group: attack.rates for attack in attacks.values() for group in (attack.threat_model, "all")}
    return replace(report, attacks=tuple(attacks.values()), worst={**report.worst, **attacked}, confidences=bins)


reports = st.builds(whole, parts, st.dictionaries(names, st.tuples(*[st.integers(0, 2**53)] * 3), max_size=3))


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
    ("change", "named"),
    [
        (lambda v: v.pop("format"), "no evaluation report of format 1 to 3"),
        (lambda v: v.update(format=4), "no evaluation report of format 1 to 3"),
        (lambda v: v.update(format="3"), "no evaluation report of format 1 to 3"),
        (lambda v: v.pop("benign_accuracy"), "benign_accuracy"),
        (lambda v: v.pop("model"), "model"),
        (lambda v: v.pop("samples"), "samples"),
        (lambda v: v.update(extra=1), "extra"),
        (lambda v: v.update(attacks=3), "attacks"),
        (lambda v: v.update(images=12.0), "images"),
        (lambda v: v.update(threshold=math.inf), "no evaluation report"),
        (lambda v: v.update(benign_accuracy=None), "benign_accuracy"),
        (lambda v: v["benign_accuracy"].update(hits="many"), "benign_accuracy.hits"),
        (lambda v: v["benign_accuracy"].update(hits=-1), "benign_accuracy: .*hits must lie between 0 and total"),
        (lambda v: v["benign_accuracy"].update(hits=13), "benign_accuracy: .*hits must lie between 0 and total"),
        (lambda v: v["benign_accuracy"].pop("interval"), "benign_accuracy: .*interval"),
        (lambda v: v["benign_accuracy"].update(total=math.inf), "no evaluation report"),
        (lambda v: v["attacks"][0].update(threat_model="all"), "attacks.0.threat_model"),
        (lambda v: v["attacks"][0].pop("rates"), "attacks.0.rates"),
        (lambda v: v["attacks"][0]["rates"].pop("branches"), "attacks.0.rates.branches"),
        (lambda v: v["attacks"][0].update(extra=1), "attacks.0.extra"),
        (lambda v: v["attacks"][0]["cost"].pop("seconds"), "attacks.0.cost.seconds"),
        (lambda v: v["samples"][0].update(benign="not base64!"), "samples.0.benign"),
        (lambda v: v["samples"][0].update(benign=5), "samples.0.benign"),
        (lambda v: v.update(checks=[{"name": "x"}]), "checks.0.passed"),
        (lambda v: v.update(worst=[]), "worst"),
        (lambda v: v["worst"].pop("white-box"), "worst lacks white-box"),
        (lambda v: v["worst"].pop("all"), "worst lacks all"),
        (lambda v: v.update(training=[{"branch": "victim"}]), "its learning curves are none"),
        (
            lambda v: v.update(training=[{"branch": "$\\foo$", "stage": "hardening", "epoch": 1, "loss": 1.0}]),
            "its learning curves are none",
        ),
        (lambda v: v["attacks"].append(v["attacks"][0]), "two attackers share a name"),
        (lambda v: v["confidences"].pop("fused"), "histograms .* differ in their branches"),
        (lambda v: v["attacks"][0]["confidences"].update(more=[0] * 20), "histograms .* differ in their branches"),
        (lambda v: v["attacks"][0]["confidences"]["fused"].pop(), "histograms .* differ in their branches or bins"),
        (lambda v: v["confidences"]["fused"].__setitem__(0, -1), "is no number of images"),
        (lambda v: v["confidences"]["fused"].__setitem__(0, 10**400), "no evaluation report|is no number of images"),
        (lambda v: v.update(scores=[1]), "histograms of detection scores differ"),
        (lambda v: v["attacks"][0].update(scores=[1]), "histograms of detection scores differ"),
        (lambda v: v.update(score_range=[0, 1]), "score_range|histograms of detection scores differ"),
        (lambda v: v["benign_accuracy"].update(total=2**60), "benign_accuracy: .*larger than"),
    ],
)
def test_what_is_no_report_is_refused_by_the_name_of_the_field(real, change, named):
    with pytest.raises(CheckpointError, match=f"the evaluation report is .*{named}"):
        EvalReport.from_json(changed(real, change))


def with_what_format_3_added(values):
    attacks = [{**attack, "scores": []} for attack in values["attacks"]]
    samples = [{**sample, "baseline": None} for sample in values["samples"]]
    added = {"scores": [], "score_range": None, "baseline": None, "training": []}
    return {**values, "attacks": attacks, "samples": samples, **added}


def test_a_report_of_format_2_is_read_with_its_numbers_unchanged_and_shown():
    """Written by `zepad demo` before format 3, all samples but one left out."""
    text = (Path(__file__).parent / "data" / "report-format-2.json").read_text()
    old, report = json.loads(text), EvalReport.from_json(text)
    new = json.loads(report.to_json())
    assert (old.pop("format"), new.pop("format")) == (2, 3)
    assert new == with_what_format_3_added(old)
    assert "67.2 %" in markdown_tables(report)
    assert "undefended" not in markdown_tables(report)


def test_a_report_keeps_the_one_it_is_beside(real):
    undefended = replace(real, model="undefended", samples=())
    report = replace(real, baseline=undefended)
    assert EvalReport.from_json(report.to_json()) == report
    with pytest.raises(CheckpointError, match="its baseline has a baseline"):
        EvalReport.from_json(replace(report, baseline=report).to_json())
    with pytest.raises(CheckpointError, match="baseline.images"):
        EvalReport.from_json(changed(report, lambda v: v["baseline"].update(images="many")))


def test_a_report_of_format_1_is_read_with_its_numbers_unchanged():
    """Written by zepad 0.1.0 before the format changed."""
    text = (Path(__file__).parent / "data" / "report-format-1.json").read_text()
    old, new = json.loads(text), json.loads(EvalReport.from_json(text).to_json())
    assert (old.pop("format"), new.pop("format")) == (1, 3)
    for attack in old["attacks"]:
        attack["threat_model"] = attack.pop("knowledge")
        attack["rates"] = attack.pop("outcome")
    assert new == with_what_format_3_added(old)
    report = EvalReport.from_json(text)
    assert report.worst["white-box"].robust_accuracy == Rate(8, 24)
    assert report.groups == ("semi-black-box", "white-box")


def test_a_name_that_is_no_unicode_is_read_back_with_replacement_marks(real):
    """File systems hold such names; JSON in UTF-8 does not."""
    report = replace(real, data="caf\udce9", classes=("\ud83d\ude00", "\ud800"))
    back = EvalReport.from_json(report.to_json())
    assert (back.data, back.classes) == ("caf\ufffd", ("\U0001f600", "\ufffd"))


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
        save_report(real, file / "folder")
