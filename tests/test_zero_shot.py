"""Hardening and classification with zero-shot heads: with labels, with zero-shot labels, and without labels."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD, ZeroShotHead
from zepad.errors import CheckpointError, ConfigError, InputError, StageError
from zepad.objectives import fare, trades
from zepad.training import harden_branch
from zepad.types import ROLES

IMAGES, LABELS = toy_data(48)
NAMES = ("red", "green", "blue")
RECIPE = HardenConfig(epochs=1, steps=1, lr=1e-3)


def head(encoder: nn.Module, classes: int = 3) -> ZeroShotHead:
    """The mean feature of each class stands in for the embedding of its name."""
    with torch.no_grad():
        features = encoder.eval()(IMAGES)
    centre = features.mean(0)
    weight = torch.stack([features[label % 3 == LABELS].mean(0) - centre for label in range(classes)])
    return ZeroShotHead(weight, scale=10.0)


@pytest.fixture
def encoders() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    return TinyEncoder(), TinyEncoder(width=6)


@pytest.fixture
def heads(encoders: tuple[nn.Module, nn.Module]) -> dict[str, ZeroShotHead]:
    victim, auxiliary = map(head, encoders)
    return {"victim": victim, "auxiliary": auxiliary, "benign": auxiliary}


@pytest.fixture
def defense(encoders: tuple[nn.Module, nn.Module]) -> ZePAD:
    return ZePAD.from_encoders(*encoders, preset="paper")


@pytest.fixture(scope="module")
def _hardened() -> ZePAD:
    torch.manual_seed(3)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(width=6))
    return defense.harden(unlabelled(), RECIPE, objective=fare(), progress=False)


@pytest.fixture
def hardened(_hardened: ZePAD) -> ZePAD:
    """`defense`, hardened without labels; a copy for each test."""
    return copy.deepcopy(_hardened)


def unlabelled() -> DataLoader:
    return DataLoader(IMAGES, batch_size=16)


def labelled(labels: Tensor = LABELS) -> DataLoader:
    return DataLoader(TensorDataset(IMAGES, labels), batch_size=16)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_no_label_at_all_is_enough(defense: ZePAD, heads: dict[str, ZeroShotHead]) -> None:
    public = weights(defense.encoders)
    defense.harden(unlabelled(), RECIPE, objective=fare(), progress=False)
    assert (defense.stage, defense.num_classes, len(defense.heads)) == ("hardened", None, 0)
    with pytest.raises(StageError, match="has no head yet"):
        defense.branch("victim")
    defense.fit_zero_shot(heads, class_names=NAMES)
    assert (defense.stage, defense.num_classes, defense.class_names) == ("fitted", 3, NAMES)
    now = weights(defense.encoders)
    changed = {key.partition(".")[0] for key in public if not torch.equal(public[key], now[key])}
    assert changed == {"victim", "auxiliary"}
    assert defense.predict(IMAGES).shape == defense.detect(IMAGES).shape == (48,)
    assert defense.inspect(IMAGES[:1]).name(0) == "red"


def test_labels_do_not_matter_to_the_label_free_method(defense: ZePAD, heads: dict[str, ZeroShotHead]) -> None:
    other = copy.deepcopy(defense)
    defense.harden(unlabelled(), RECIPE, objective=fare(), progress=False)
    other.harden(labelled(), RECIPE, objective=fare(), zero_shot=heads, progress=False)
    assert same(weights(defense.encoders), weights(other.encoders))


def test_text_labels_are_those_of_the_public_zero_shot_classifiers(
    defense: ZePAD, encoders: tuple[nn.Module, nn.Module], heads: dict[str, ZeroShotHead]
) -> None:
    with torch.no_grad():
        scores = sum(heads[r](e.eval()(IMAGES)) for r, e in zip(("victim", "auxiliary"), encoders, strict=True))
        text = scores.argmax(1)
    assert not torch.equal(text, LABELS), "or the test would not tell the two apart"
    by_text, by_labels, by_truth = defense, copy.deepcopy(defense), copy.deepcopy(defense)
    by_text.harden(unlabelled(), RECIPE, zero_shot=heads, progress=False)
    by_labels.harden(labelled(text), RECIPE, zero_shot=heads, progress=False)
    by_truth.harden(labelled(), RECIPE, zero_shot=heads, progress=False)
    assert same(weights(by_text), weights(by_labels))
    assert not same(weights(by_text), weights(by_truth))


@pytest.mark.parametrize("objective", [None, trades(beta=1)], ids=["zepad", "trades"])
def test_heads_of_text_are_never_trained(defense: ZePAD, heads: dict[str, ZeroShotHead], objective: object) -> None:
    before = {role: weights(head) for role, head in heads.items()}
    defense.harden(labelled(), RECIPE, zero_shot=heads, objective=objective, progress=False)  # type: ignore[arg-type]
    assert defense.stage == "hardened"
    for role in ("victim", "auxiliary"):
        assert same(weights(defense.heads[role]), before[role])
        assert same(weights(heads[role]), before[role])
        assert defense.heads[role] is not heads[role]


def test_a_new_task_needs_new_names_alone(hardened: ZePAD, heads: dict[str, ZeroShotHead]) -> None:
    hardened.fit_zero_shot(heads)
    before = weights(hardened.encoders)
    hardened.threshold = 0.7
    other = {role: ZeroShotHead(torch.rand(5, h.features)) for role, h in heads.items()}
    hardened.fit_zero_shot(other)
    assert (hardened.num_classes, hardened.threshold, hardened.class_names) == (5, 0.1, None)
    assert same(weights(hardened.encoders), before)


def test_the_trained_branches_may_follow_all_the_same(hardened: ZePAD) -> None:
    hardened.fit_benign(labelled(), BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    assert (hardened.stage, hardened.num_classes) == ("fitted", 3)


@pytest.mark.parametrize("fitted", [False, True])
def test_a_zero_shot_model_comes_back_bit_for_bit(
    hardened: ZePAD, heads: dict[str, ZeroShotHead], tmp_path: Path, fitted: bool
) -> None:
    if fitted:
        hardened.fit_zero_shot(heads, class_names=NAMES)
    hardened.save_pretrained(tmp_path)
    loaded = ZePAD.from_pretrained(tmp_path, victim=TinyEncoder(), auxiliary=TinyEncoder(width=6))
    assert same(weights(loaded), weights(hardened))
    assert loaded.stage == hardened.stage
    if fitted:
        assert torch.equal(loaded.predict_proba(IMAGES), hardened.predict_proba(IMAGES))
        assert all(isinstance(loaded.heads[role], ZeroShotHead) for role in ROLES)


@pytest.mark.parametrize("size", [(2, 8), (3, 7), (2**20, 8)])
def test_a_stored_head_of_another_size_is_refused(
    hardened: ZePAD, heads: dict[str, ZeroShotHead], tmp_path: Path, size: tuple[int, int]
) -> None:
    hardened.fit_zero_shot(heads)
    hardened.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_classes"], config["encoders"]["victim"]["features"] = size
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit ZeroShotHead"):
        ZePAD.from_pretrained(tmp_path, victim=TinyEncoder(), auxiliary=TinyEncoder(width=6))


def test_a_single_encoder_is_hardened_without_labels_too() -> None:
    branch, history = harden_branch(TinyEncoder(), unlabelled(), RECIPE, objective=fare(), progress=False)
    assert isinstance(branch.head, nn.Identity)
    assert branch(IMAGES).shape == (48, 8)
    assert len(history["hardening"]) == 1


# bad input ------------------------------------------------------------------------------------------------------


def test_a_method_that_needs_labels_says_so(defense: ZePAD) -> None:
    before = weights(defense)
    with pytest.raises(InputError, match=r"must yield \(images, labels\); got Tensor. .*fare\(\), or with zero_shot="):
        defense.harden(unlabelled(), RECIPE, progress=False)
    assert same(weights(defense), before)


def test_an_empty_loader_is_refused(defense: ZePAD) -> None:
    with pytest.raises(InputError, match="the loader is empty"):
        defense.harden([], RECIPE, objective=fare(), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda heads: heads.pop("benign"), "must be a mapping of victim, auxiliary, benign to ZeroShotHead"),
        (lambda heads: heads.update(attacker=heads["victim"]), "must be a mapping"),
        (
            lambda heads: heads.update(victim=nn.Linear(8, 3)),
            "victim.* must be a ZeroShotHead; got .* Linear",
        ),
        (lambda heads: heads.update(victim=heads["auxiliary"]), "takes 6 features and the encoder gives 8"),
        (lambda heads: heads.update(victim=ZeroShotHead(torch.rand(4, 8))), "agree on the number of classes"),
    ],
)
def test_heads_that_do_not_fit_change_nothing(
    hardened: ZePAD, heads: dict[str, ZeroShotHead], change: object, message: str
) -> None:
    before = weights(hardened)
    change(heads)  # type: ignore[operator]
    with pytest.raises((ConfigError, InputError), match=message):
        hardened.fit_zero_shot(heads)
    assert same(weights(hardened), before)
    assert hardened.stage == "hardened"


def test_names_must_be_as_many_as_classes(hardened: ZePAD, heads: dict[str, ZeroShotHead]) -> None:
    with pytest.raises(ConfigError, match="must name 3 classes; got 2"):
        hardened.fit_zero_shot(heads, class_names=["a", "b"])


def test_public_encoders_are_not_served(defense: ZePAD, heads: dict[str, ZeroShotHead]) -> None:
    with pytest.raises(StageError, match=r"needs hardened encoders. Call harden\(loader\) first"):
        defense.fit_zero_shot(heads)


def test_a_run_resumes_under_the_same_heads_alone(
    defense: ZePAD, heads: dict[str, ZeroShotHead], tmp_path: Path
) -> None:
    again = copy.deepcopy(defense)
    defense.harden(labelled(), RECIPE, zero_shot=heads, checkpoint_dir=tmp_path, progress=False)
    other = {role: ZeroShotHead(torch.rand(3, h.features)) for role, h in heads.items()}
    with pytest.raises(CheckpointError, match="head"):
        again.harden(labelled(), RECIPE, zero_shot=other, checkpoint_dir=tmp_path, resume=True, progress=False)
    again.harden(labelled(), RECIPE, zero_shot=heads, checkpoint_dir=tmp_path, resume=True, progress=False)
    assert same(weights(again), weights(defense))
