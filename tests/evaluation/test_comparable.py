"""A report beside that of an undefended model holds both, and refuses what was measured otherwise."""

from dataclasses import replace

import pytest

import example_reports as examples
from zepad.errors import InputError
from zepad.evaluation import with_baseline


def reports():
    return examples.report(), examples.plain()


def test_both_reports_are_kept_and_no_picture_twice():
    defense, bare = reports()
    both = with_baseline(defense, bare)
    assert replace(both, baseline=None, samples=defense.samples) == defense
    assert both.baseline == replace(bare, samples=())


def test_a_sample_knows_what_the_undefended_model_said_where_it_saw_the_same_image():
    """A white box attacks each model by itself, so its images are not the same."""
    defense, bare = reports()
    groups = {result.name: result.threat_model for result in defense.attacks}
    said = {(sample.attacker, sample.index): (sample.before, sample.after) for sample in bare.samples}
    both = with_baseline(defense, bare)
    assert {groups[sample.attacker] for sample in both.samples} == {"semi-black-box", "semi-black-box+", "white-box"}
    for sample in both.samples:
        seen = None if groups[sample.attacker] == "white-box" else said[sample.attacker, sample.index]
        assert sample.baseline == seen


def test_a_baseline_of_a_baseline_is_left_out():
    defense, bare = reports()
    chain = with_baseline(replace(defense, model="another"), bare)
    assert with_baseline(defense, chain).baseline.baseline is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"provenance": {"data_digest": "other"}}, "different data"),
        ({"model": "ZePAD"}, "ZePAD more than once"),
        ({"attacks": ()}, "attacked differently"),
    ],
)
def test_what_was_measured_otherwise_is_refused(change, message):
    defense, bare = reports()
    with pytest.raises(InputError, match=message):
        with_baseline(defense, replace(bare, **change))
