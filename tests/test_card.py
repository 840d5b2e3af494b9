"""The model card agrees with the config and the report, the Hub can parse it, and names in it are escaped."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from example_reports import HOSTILE, IMAGES, report
from tiny import TinyEncoder, toy_data
from zepad import CardDetails, HardenConfig, HeadConfig, ZePAD, ZeroShotHead
from zepad.errors import CheckpointError, ConfigError, InputError
from zepad.evaluation import EvalReport, weights_digest
from zepad.persistence import model_card, read_config
from zepad.persistence.config import Base, SavedConfig, parse_config
from zepad.types import ROLES

UNMEASURED = "Nothing was measured when this card was written: no accuracy, clean or robust, is claimed."
TOY = toy_data(12)[0]


def read(text: str) -> ModelCard:
    """The card as the Hub reads it: metadata that is wrong in any way is an error."""
    block = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert block
    assert isinstance(yaml.safe_load(block[1]), dict)
    return ModelCard(text, ignore_metadata_errors=False)


def config_of(defense: ZePAD, folder: Path) -> SavedConfig:
    defense.save_pretrained(folder)
    return read_config(folder / "config.json")


@pytest.fixture
def config(fitted: ZePAD, tmp_path: Path) -> SavedConfig:
    fitted.class_names = ("cat", "dog", "truck")
    return config_of(fitted, tmp_path / "model")


def about(defense: ZePAD, **changes: Any) -> EvalReport:
    """A report with made-up numbers that claims to be of this very model."""
    shown = report(**changes)
    return replace(
        shown,
        threshold=defense.threshold,
        provenance={**shown.provenance, "weights_digest": weights_digest(defense)},
    )


# metadata ---------------------------------------------------------------------------------------------------------


def test_the_metadata_is_what_the_hub_reads(config: SavedConfig) -> None:
    details = CardDetails(license="apache-2.0", datasets=("uoft-cs/cifar10", "mnist"), tags=("street signs",))
    data = read(model_card(config, model_id="me/x", details=details)).data
    assert data.library_name == "zepad"
    assert data.license == "apache-2.0"
    assert data.datasets == ["uoft-cs/cifar10", "mnist"]
    assert data.tags == ["zepad", "adversarial-robustness", "street signs"]
    assert data.pipeline_tag == "image-classification"


def test_what_is_not_known_is_left_out(config: SavedConfig) -> None:
    data = read(model_card(config)).data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}


def test_the_file_is_the_card(fitted: ZePAD, tmp_path: Path) -> None:
    details = CardDetails(license="mit")
    fitted.save_pretrained(tmp_path, card=details)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text == model_card(read_config(tmp_path / "config.json"), details=details)
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
    assert str(fitted.generate_model_card()) == model_card(read_config(tmp_path / "config.json"))


def _built(fitted: ZePAD) -> ZePAD:
    return ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper")


def _zero_shot(fitted: ZePAD) -> ZePAD:
    return fitted.fit_zero_shot({role: ZeroShotHead(torch.randn(3, 8)) for role in ROLES})


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda fitted: fitted, "image-classification"),
        (_zero_shot, "zero-shot-image-classification"),
        (_built, "image-feature-extraction"),
    ],
    ids=["trained heads", "heads of text", "no heads"],
)
def test_the_task_is_what_the_heads_do(
    fitted: ZePAD, tmp_path: Path, make: Callable[[ZePAD], ZePAD], task: str
) -> None:
    assert read(model_card(config_of(make(fitted), tmp_path))).data.pipeline_tag == task


def test_hardened_encoders_have_no_task(fitted: ZePAD, tmp_path: Path) -> None:
    """They have heads, those of the training, and no classifier."""
    batches = [toy_data(12)]
    hardened = _built(fitted).harden(batches, HardenConfig(epochs=1, steps=1), progress=False)
    config = config_of(hardened, tmp_path)
    assert set(config.heads) == {"victim", "auxiliary"}
    assert read(model_card(config)).data.pipeline_tag == "image-feature-extraction"


def test_the_public_encoders_are_the_base(config: SavedConfig) -> None:
    origins = {"victim": "timm/resnet18.a1_in1k", "auxiliary": "timm/resnet18.a1_in1k", "benign": "facebook/dino"}
    known = replace(config, provenance={**config.provenance, "encoders": origins})
    assert read(model_card(known)).data.base_model == ["timm/resnet18.a1_in1k", "facebook/dino"]
    more = CardDetails(base_models=("facebook/dino", "me/own"))
    assert read(model_card(known, details=more)).data.base_model == [
        "timm/resnet18.a1_in1k",
        "facebook/dino",
        "me/own",
    ]


def test_of_heads_alone_the_published_encoders_are_the_base(config: SavedConfig) -> None:
    base = Base(repo_id="alice/encoders", revision="0123456789" * 4)
    provenance = {**config.provenance, "encoders": {"victim": "timm/resnet18.a1_in1k"}}
    card = read(model_card(replace(config, base=base, provenance=provenance)))
    assert card.data.base_model == ["alice/encoders"]
    assert f"[alice/encoders](https://huggingface.co/alice/encoders/tree/{base.revision})" in card.text


# what was measured ------------------------------------------------------------------------------------------------


def test_without_a_report_nothing_is_claimed(config: SavedConfig) -> None:
    card = read(model_card(config, model_id="me/x"))
    assert UNMEASURED in card.text
    assert "How much was not measured here." in card.text
    assert "Publishing turns a private defense into a public encoder" in card.text
    assert "What that leaves was not measured here." in card.text
    assert "%" not in card.text
    assert not {"metrics", "model-index"} & set(card.data.to_dict())


def test_the_model_index_names_attackers_and_budget_of_every_number(fitted: ZePAD, tmp_path: Path) -> None:
    shown = about(fitted, data="made-up data")
    fitted.attach(shown)
    card = read(model_card(config_of(fitted, tmp_path), model_id="me/my-model"))
    data = card.data.to_dict()
    assert data["metrics"] == ["accuracy"]
    (index,) = data["model-index"]
    assert index["name"] == "my-model"
    results: list[EvalResult] = card.data.eval_results
    assert {(r.dataset_name, r.dataset_type, r.metric_type) for r in results} == {
        ("made-up data", "made-up-data", "accuracy")
    }
    expected = {"benign accuracy": shown.benign_accuracy.value}
    for group in shown.groups:
        attackers = ", ".join(result.name for result in shown.group(group))
        name = f"robust accuracy, {group}, worst of {attackers} at linf 10/255"
        expected[name] = shown.worst[group].robust_accuracy.value
    assert {r.metric_name: r.metric_value for r in results} == {n: round(v, 4) for n, v in expected.items()}
    assert len(expected) == 4


def test_the_table_holds_the_reports_numbers(fitted: ZePAD, tmp_path: Path) -> None:
    shown = about(fitted)
    fitted.attach(shown)
    text = model_card(config_of(fitted, tmp_path))
    assert f"{IMAGES} images of made-up data, seed 0." in text
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.count("|") == 5]
    assert [row[0] for row in rows[:4]] == ["", "---", "fusion", "detector"]
    found = {row[0]: row[1:] for row in rows[6:]}
    rates = {"none": ("none", shown.benign_accuracy)}
    for group in shown.groups:
        attackers = ", ".join(result.name for result in shown.group(group))
        rates[f"{group}: worst of {attackers}"] = ("linf 10/255", shown.worst[group].robust_accuracy)
    assert found.keys() == rates.keys()
    for name, (budget, rate) in rates.items():
        low, high = rate.interval
        assert found[name] == [
            budget,
            f"{round(rate.value, 4):.1%}",
            f"{round(low, 4):.1%} to {round(high, 4):.1%}",
        ]
    for result in shown.attacks:
        assert result.detection is not None
        assert f"{result.name} {result.detection.auroc:.2f}" in text
    assert "Sanity checks that failed, so that accuracies may be too high: a large budget breaks it." in text
    assert "How much is in the table above." in text
    assert "What that leaves was not measured here." in text  # by an attacker who has the published encoders
    assert UNMEASURED not in text


def test_the_card_refers_to_published_attackers_where_there_are_some(fitted: ZePAD, tmp_path: Path) -> None:
    fitted.attach(about(fitted, attackers=(("PAP", "semi-black-box", 0.6), ("PGD", "published", 0.3))))
    text = model_card(config_of(fitted, tmp_path))
    assert "published: worst of PGD" in text
    assert "What that leaves is in the table above (published)." in text


def test_a_report_without_attackers_claims_no_robustness(fitted: ZePAD, tmp_path: Path) -> None:
    fitted.attach(about(fitted, attackers=(), checks=()))
    card = read(model_card(config_of(fitted, tmp_path)))
    assert [result.metric_name for result in card.data.eval_results] == ["benign accuracy"]
    assert "How much was not measured here." in card.text
    assert "Detection, area" not in card.text
    assert "Sanity checks that failed" not in card.text


def test_a_report_on_another_model_is_no_claim_of_this_one(fitted: ZePAD) -> None:
    shown = about(fitted)
    fitted.threshold += 0.1
    with pytest.raises(InputError, match="is of another model"):
        fitted.attach(shown)
    fitted.threshold -= 0.1
    with torch.no_grad():
        next(fitted.parameters()).add_(1)
    with pytest.raises(InputError, match="is of another model"):
        fitted.attach(shown)
    assert UNMEASURED in str(fitted.generate_model_card())


def test_training_makes_the_card_forget(fitted: ZePAD) -> None:
    fitted.attach(about(fitted))
    assert UNMEASURED not in str(fitted.generate_model_card())
    fitted.fit_heads([toy_data(12)], HeadConfig(epochs=1), progress=False)
    assert UNMEASURED in str(fitted.generate_model_card())


# use --------------------------------------------------------------------------------------------------------------


def use_of(text: str) -> str:
    found = re.search(r"## Use\n\n```python\n(.*?)```", text, re.DOTALL)
    assert found
    return found[1]


def run(source: str, **values: Any) -> dict[str, Any]:
    exec(source, values)
    return values


def test_the_usage_runs_as_it_stands(fitted: ZePAD, tmp_path: Path) -> None:
    config = config_of(fitted, tmp_path)
    source = use_of(model_card(config, model_id=str(tmp_path)))
    assert "victim=my_victim, auxiliary=my_auxiliary)" in source
    done = run(source, my_victim=TinyEncoder(), my_auxiliary=TinyEncoder(), images=TOY)
    assert torch.equal(done["labels"], fitted.predict(TOY))
    assert torch.equal(done["flagged"], fitted.detect(TOY))


def test_the_usage_of_known_encoders_needs_no_module(tmp_path: Path) -> None:
    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
    source = use_of(model_card(config_of(defense, tmp_path), model_id=str(tmp_path)))
    done = run(source, images=TOY)
    assert torch.equal(done["features"], defense.encoder("victim")(TOY))


def test_the_snippet_names_a_benign_module_of_its_own(tmp_path: Path) -> None:
    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", TinyEncoder(), benign=TinyEncoder(width=4))
    text = model_card(config_of(defense, tmp_path), model_id=str(tmp_path))
    assert "architecture you pass when loading: auxiliary, benign." in text
    run(use_of(text), my_auxiliary=TinyEncoder(), my_benign=TinyEncoder(width=4), images=TOY)


# names and values that are not harmless ---------------------------------------------------------------------------

NASTY = [
    HOSTILE,
    "---",
    "a\n---\nlicense: mit\n---\n",
    "key: value # comment",
    "{[&*!|>'\"%@`",
    "yes",
    "```\n## Measured\n",
    "| 100.0% |\n|---|",
    "\u2028\u0085\x00",
    "\ud800",
    "{title}",
]


@pytest.mark.parametrize("name", NASTY)
def test_no_name_breaks_the_card(fitted: ZePAD, tmp_path: Path, name: str) -> None:
    fitted.class_names = (name, "b", "c")
    shown = about(fitted, data=name, attackers=((name, "white-box", 0.3), ("PAP", "semi-black-box", 0.5)))
    fitted.attach(shown)
    fitted.save_pretrained(tmp_path, card=CardDetails(tags=(name,)))
    card = ModelCard.load(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert read(text).data.to_dict() == card.data.to_dict()
    data = card.data.to_dict()
    assert data.keys() == {"library_name", "pipeline_tag", "tags", "metrics", "model-index"}
    assert len(card.data.eval_results) == 3
    headings = [line for line in card.text.splitlines() if line.startswith("#")]
    sections = ["Use", "What it is", "Threat model", "Measured", "Limits", "Training"]
    assert headings == ["# An encoder hardened with zepad", *(f"## {section}" for section in sections)]
    assert card.text.count("```") == 4
    rows = [re.sub(r"\\.", "", line) for line in card.text.splitlines() if line.startswith("|")]
    assert [row.count("|") for row in rows] == [4] * 5 + [5] * 9


@given(st.text(max_size=30), st.text(max_size=30))
@settings(deadline=None, max_examples=50)
def test_no_name_breaks_the_metadata(fitted_config: SavedConfig, name: str, data: str) -> None:
    evaluation = {
        "data": data,
        "images": 1,
        "seed": 0,
        "benign_accuracy": [0.5, 0.4, 0.6],
        "groups": {name: {"attackers": [name], "budgets": [name], "robust_accuracy": [0.2, 0.1, 0.3]}},
        "detection_auroc": {name: 0.5},
        "failed_checks": [name],
    }
    config = replace(fitted_config, provenance={"evaluation": evaluation}, class_names=(name, data, "c"))
    card = read(model_card(config))
    assert [result.metric_value for result in card.data.eval_results] == [0.5, 0.2]
    assert card.data.license is None


@pytest.fixture(scope="module")
def fitted_config(_fitted: ZePAD, tmp_path_factory: pytest.TempPathFactory) -> SavedConfig:
    return config_of(_fitted, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"license": "My own"}, "license"),
        ({"license": "MIT"}, "license"),
        ({"license": "mit\n"}, "license"),
        ({"license": ""}, "license"),
        ({"license": 1}, "license"),
        ({"datasets": "uoft-cs/cifar10"}, "datasets"),
        ({"datasets": ("a/b/c",)}, "datasets"),
        ({"datasets": ("https://x.example/y",)}, "datasets"),
        ({"datasets": ("",)}, "datasets"),
        ({"datasets": (1,)}, "datasets"),
        ({"base_models": ("../x",)}, "base_models"),
        ({"base_models": ("a/b\n",)}, "base_models"),
        ({"base_models": None}, "base_models"),
        ({"tags": "street"}, "tags"),
        ({"tags": ("",)}, "tags"),
        ({"tags": (" ",)}, "tags"),
    ],
)
def test_details_that_the_hub_would_refuse_are_refused_here(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be"):
        CardDetails(**arguments)


_EVALUATION = {
    "data": "digits",
    "images": 100,
    "seed": 0,
    "benign_accuracy": [0.9, 0.8, 0.95],
    "groups": {"white-box": {"attackers": ["APGD"], "budgets": ["linf 8/255"], "robust_accuracy": [0.1, 0.05, 0.2]}},
    "detection_auroc": {"APGD": 0.7},
    "failed_checks": [],
}
_PROVENANCE = {
    "encoders": {"victim": "timm/resnet18.a1_in1k", "auxiliary": "facebook/dino"},
    "harden": {"config": {"eps": 0.03}, "method": "zepad", "images": 100, "history": {"victim": []}},
    "evaluation": _EVALUATION,
}


def _deep() -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(100_000):
        values = {"a": values}
    return values


_NOT_SHARES = (10**400, -0.1, 1.1, math.nan, math.inf, True, "0.5", None, [0.5])


@pytest.mark.parametrize(
    "provenance",
    [
        {"evaluation": {}},
        {"encoders": {"victim": {"a": 1}}, "evaluation": {"data": 1}},
        *({"evaluation": {**_EVALUATION, "benign_accuracy": [value, 0.1, 0.2]}} for value in _NOT_SHARES),
        *({"evaluation": {**_EVALUATION, "benign_accuracy": [0.1, value, 0.2]}} for value in _NOT_SHARES),
        {"evaluation": {**_EVALUATION, "benign_accuracy": 0.5}},
        {"evaluation": {**_EVALUATION, "groups": []}},
        {"evaluation": {**_EVALUATION, "groups": {"white-box": {}}}},
        {"evaluation": {**_EVALUATION, "detection_auroc": {"APGD": 10**400}}},
        {"harden": _deep()},
    ],
    ids=lambda provenance: str(provenance)[:60] if "harden" not in provenance else "deep",
)
def test_a_provenance_that_is_not_ours_is_refused(fitted_config: SavedConfig, provenance: dict[str, Any]) -> None:
    config = replace(fitted_config, provenance=provenance)
    with pytest.raises(CheckpointError, match=r"no card can be written: the provenance in config.json is not as zepad"):
        model_card(config)


def test_an_origin_that_is_no_repository_is_not_named_as_one(fitted_config: SavedConfig) -> None:
    origins = {"victim": "x\n---\nlicense: mit", "auxiliary": 5, "benign": {"a": 1}}
    card = read(model_card(replace(fitted_config, provenance={"encoders": origins})))
    assert card.data.base_model is None
    assert card.data.license is None


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


def _paths(values: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path for key, value in items for path in ((*prefix, key), *_paths(value, (*prefix, key)))]


@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_hostile_provenance_gives_a_card_or_a_checkpoint_error(
    fitted_config: SavedConfig, data: st.DataObject
) -> None:
    provenance = copy.deepcopy(_PROVENANCE)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(_paths(provenance)))
        owner: Any = provenance
        for key in path:
            owner = owner[key]
        if data.draw(st.booleans()) or isinstance(owner, list):
            owner[last] = data.draw(_json)
        else:
            del owner[last]
        if not _paths(provenance):
            break
    try:
        values = {**fitted_config.to_dict(), "provenance": provenance}
        config = parse_config(json.dumps(values), "a config")
        text = model_card(config)
    except CheckpointError:
        return
    card = read(text)
    assert all(0 <= result.metric_value <= 1 for result in card.data.eval_results or ())
    assert text.encode()


def test_the_provenance_that_is_mutated_above_is_a_good_one(fitted_config: SavedConfig) -> None:
    card = read(model_card(replace(fitted_config, provenance=_PROVENANCE)))
    assert [result.metric_value for result in card.data.eval_results] == [0.9, 0.1]
    assert card.data.base_model == ["timm/resnet18.a1_in1k", "facebook/dino"]
    assert "history" not in card.text


@pytest.mark.parametrize("text", NASTY)
def test_no_text_in_a_provenance_breaks_the_card(fitted_config: SavedConfig, text: str) -> None:
    evaluation = {**_EVALUATION, "images": text, "seed": text}
    steps = {"harden": {"config": text, text: [text]}, "benign": {text: {text: text}}, "evaluation": evaluation}
    card = model_card(replace(fitted_config, provenance=steps), model_id=f'a"{text}')
    headings = [line for line in card.splitlines() if line.startswith("#")]
    plain = model_card(replace(fitted_config, provenance={"evaluation": _EVALUATION}), model_id="a/b")
    assert headings[1:] == [line for line in plain.splitlines() if line.startswith("#")][1:]
    body = card.split("\n---\n\n", 1)[1]
    assert body.count("```") == plain.count("```")
    assert "<script" not in re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    recorded = json.loads(card.rpartition("```json\n")[2].rpartition("```")[0])
    assert recorded["harden"]["config"] == text
