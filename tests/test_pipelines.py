"""The pipeline answers as that of transformers does, with what the defense says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import zepad
from tiny import toy_data
from zepad import BenignConfig, ConfigError, HardenConfig, ZePAD
from zepad.pipelines import ImageClassificationPipeline

IMAGES = toy_data(7, seed=3)[0]


def test_answers_are_those_of_the_defense_in_order(fitted: ZePAD) -> None:
    fitted.class_names = ("red", "green", "blue")
    fitted.threshold = float(fitted.detection_score(IMAGES).median())
    answers = zepad.pipeline("image-classification", model=fitted)(list(IMAGES), top_k=2)
    probabilities, flags = fitted.predict_proba(IMAGES), fitted.detect(IMAGES)
    assert {answer["flagged"] for row in answers for answer in row} == {True, False}
    for row, probability, flag in zip(answers, probabilities, flags, strict=True):
        order = probability.argsort(descending=True)[:2].tolist()
        assert [answer["label"] for answer in row] == [fitted.class_names[label] for label in order]
        assert [answer["score"] for answer in row] == pytest.approx([float(probability[label]) for label in order])
        assert [answer["flagged"] for answer in row] == [bool(flag)] * 2


def test_one_image_gives_one_list_and_several_give_one_each(fitted: ZePAD, tmp_path: Path) -> None:
    fitted.threshold = None
    Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / "red.png")
    classify = ImageClassificationPipeline(fitted)
    one = classify(tmp_path / "red.png")
    assert [set(answer) for answer in one] == [{"label", "score", "flagged"}] * 3, "there are three classes, not five"
    assert {answer["flagged"] for answer in one} == {None}
    assert {type(value) for answer in one for value in answer.values()} == {str, float, type(None)}
    assert sum(answer["score"] for answer in one) == pytest.approx(1)
    assert classify([str(tmp_path / "red.png")], top_k=None) == [one]
    assert classify(IMAGES[:1]) == [classify(IMAGES[0])], "a batch of one is a batch"


def test_transformers_returns_answers_of_the_same_form(fitted: ZePAD) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, num_labels=3
    )
    theirs = transformers.pipeline(
        "image-classification",
        model=transformers.ViTForImageClassification(config),
        image_processor=transformers.ViTImageProcessor(size={"height": 16, "width": 16}),
    )
    ours = zepad.pipeline("image-classification", model=fitted)
    images = [Image.new("RGB", (16, 16), (shade, 10, 10)) for shade in (0, 200)]
    for given in (images[0], images, images[:1]):
        for top_k in (1, 5):
            expected, answers = theirs(given, top_k=top_k), ours(given, top_k=top_k)
            assert shape(answers) == shape(expected)


def shape(answers: object) -> object:
    """The nesting of lists and the types of label and score."""
    if isinstance(answers, list):
        return [shape(answer) for answer in answers]
    return type(answers["label"]), type(answers["score"])


def test_a_saved_model_is_loaded(tmp_path: Path) -> None:
    data = zepad.data.digits("train")
    loader = [(data.images[:40], data.labels[:40])]
    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr")
    defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    defense.fit_benign(loader, BenignConfig(epochs=1), head_config=None, progress=False).save_pretrained(tmp_path)
    answers = zepad.pipeline("image-classification", str(tmp_path), device="cpu")(data.images[:3])
    assert answers == ImageClassificationPipeline(defense)(data.images[:3])
    half = zepad.pipeline("image-classification", tmp_path, dtype=torch.bfloat16)
    assert half.model.encoder("victim").backbone.parameters().__next__().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "object-detection"}, '"image-classification"'),
        ({"model": None}, "model must be"),
        ({"dtype": torch.float16}, "None for a model that is loaded already"),
        ({"device": "cuda:99"}, 'Pass "cpu"'),
    ],
)
def test_wrong_settings_are_refused(fitted: ZePAD, settings: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, zepad.InputError), match=message):
        zepad.pipeline(**{"task": "image-classification", "model": fitted, **settings})


@pytest.mark.parametrize("top_k", [0, -1, 2.0, True, "all"])
def test_a_wrong_top_k_is_refused(fitted: ZePAD, top_k: object) -> None:
    with pytest.raises(ConfigError, match="top_k must be a positive integer, or None"):
        zepad.pipeline("image-classification", fitted)(IMAGES, top_k=top_k)
