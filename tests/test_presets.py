"""A preset fills in what the caller leaves open, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, ConfigError, HardenConfig, ZePAD
from zepad.fusion import RFDM, Bounded, Mean
from zepad.objectives import DAEMixture, benign_recipe, fare, static_adversarial_training, zepad_recipe
from zepad.presets import PRESETS, RECOMMENDED, find_preset
from zepad.protocols import replica_of

EPS = 6 / 255
BRIEF = HardenConfig(eps=EPS, epochs=1, val_fraction=0.25)
each_preset = pytest.mark.parametrize("name", PRESETS)


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*toy_data(48)), batch_size=16, shuffle=True)


def built(**options: Any) -> ZePAD:
    torch.manual_seed(2)
    return ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), num_classes=3, **options)


@each_preset
def test_harden_and_fit_benign_follow_the_preset(name: str) -> None:
    preset = PRESETS[name]
    defense = built(preset=name)
    assert defense.fusion == preset.fusion
    assert ("reference" in defense.encoders) == preset.keeps_victim
    defense.harden(loader(), BRIEF, progress=False)
    defense.fit_benign(loader(), replace(preset.benign, epochs=1), progress=False)
    benign = preset.benign_objective
    assert defense.provenance["harden"]["method"] == preset.objective(BRIEF).name
    assert defense.provenance["benign"]["method"] == ("benign" if benign is None else benign(EPS).name)


def test_own_adversaries_scale_with_the_radius_of_the_hardening() -> None:
    for name, share in (("private", 0.5), ("published", 1.0), ("cautious", 1.0)):
        for eps in (2 / 255, 16 / 255):
            inner = PRESETS[name].objective(HardenConfig(eps=eps)).inner
            assert inner is not None
            assert inner.eps == pytest.approx(share * eps)


def test_a_preset_that_is_saved_is_followed_after_loading(tmp_path: Path) -> None:
    encoders = TinyEncoder(), TinyEncoder()
    defense = ZePAD.from_encoders(*encoders, num_classes=3, preset="published")
    defense.save_pretrained(tmp_path)
    loaded = ZePAD.from_pretrained(tmp_path, victim=encoders[0], auxiliary=encoders[1])
    assert loaded.preset is PRESETS["published"]
    assert loaded.fusion == PRESETS["published"].fusion
    loaded.harden(loader(), BRIEF, progress=False)
    assert loaded.provenance["harden"]["method"] == PRESETS["published"].objective(BRIEF).name


@pytest.mark.parametrize(
    ("stated", "then"),
    [(None, Bounded(vote=4.0)), pytest.param(Bounded(vote=2.0), Bounded(vote=2.0), marks=pytest.mark.slow)],
)
def test_a_benign_branch_that_resists_has_a_larger_vote_unless_the_caller_states_one(
    stated: Bounded | None, then: Bounded, tmp_path: Path
) -> None:
    encoders = TinyEncoder(), TinyEncoder()
    defense = ZePAD.from_encoders(*encoders, num_classes=3, fusion=stated).harden(loader(), BRIEF, progress=False)
    before = defense.fusion
    assert before == (stated or PRESETS["private"].fusion)
    defense.save_pretrained(tmp_path)
    defense = ZePAD.from_pretrained(tmp_path, victim=encoders[0], auxiliary=encoders[1])
    assert defense.fusion == before
    cheap = {"objective": static_adversarial_training(static=DAEMixture(steps=1)), "progress": False}
    defense.fit_benign(loader(), BenignConfig(epochs=1), **cheap)
    assert defense.fusion == then
    defense.fit_benign(loader(), BenignConfig(epochs=1), objective=benign_recipe(), progress=False)
    assert defense.fusion == before
    defense.fit_benign(loader(), BenignConfig(epochs=1), **cheap).fit_benign(
        loader(), BenignConfig(epochs=1, freeze_encoder=True), progress=False
    )
    assert defense.fusion == before
    defense.configure(fusion=Bounded(vote=1.0)).fit_benign(loader(), BenignConfig(epochs=1), **cheap)
    assert defense.fusion == Bounded(vote=1.0)


def test_what_the_caller_states_wins() -> None:
    defense = built(preset="published", fusion="mean")
    assert isinstance(defense.fusion, Mean)
    defense.harden(loader(), BRIEF, objective=fare(), progress=False)
    assert defense.provenance["harden"]["method"] == fare().name
    defense.fit_benign(loader(), BenignConfig(epochs=1, freeze_encoder=True), progress=False)
    assert defense.provenance["benign"]["method"] == "benign"


def test_without_a_preset_the_recommended_one_holds() -> None:
    defense = built()
    assert defense.preset is PRESETS[RECOMMENDED]
    assert defense.provenance["preset"] == {"name": RECOMMENDED}
    trained = [built(**given).harden(loader(), BRIEF, progress=False) for given in ({}, {"preset": RECOMMENDED})]
    for key, value in trained[0].state_dict().items():
        assert torch.equal(value, trained[1].state_dict()[key]), key


def test_settings_of_ones_own_replace_the_papers_and_keep_its_objective() -> None:
    defense = built(preset="paper")
    assert isinstance(defense.fusion, RFDM)
    defense.harden(loader(), BRIEF, progress=False)
    explicit = built().harden(loader(), BRIEF, objective=zepad_recipe(), progress=False)
    for role in ("victim", "auxiliary"):
        mine, theirs = (d.encoder(role).state_dict() for d in (defense, explicit))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_the_preset_of_the_paper_has_its_settings() -> None:
    assert PRESETS["paper"].harden == HardenConfig.paper()
    assert PRESETS["paper"].objective(HardenConfig.paper()).name == zepad_recipe(structure_weight=20 * 256).name


@pytest.mark.parametrize("name", ["recomended", "", "Paper"])
def test_an_unknown_preset_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"preset must be one of private, published, cautious, paper; got"):
        built(preset=name)
    with pytest.raises(ConfigError):
        find_preset(name)


@pytest.mark.parametrize("name", ["published", "cautious"])
def test_an_attacker_can_repeat_what_a_preset_trained(name: str) -> None:
    encoders = {"victim": TinyEncoder(), "auxiliary": TinyEncoder()}
    defense = ZePAD.from_encoders(*encoders.values(), num_classes=3, preset=name)
    defense.harden(loader(), BRIEF, progress=False)
    copies = replica_of(defense, encoders, loader(), progress=False)
    mine, theirs = (part["victim"].state_dict() for part in (defense.encoders, copies))
    assert mine.keys() == theirs.keys()
    assert any(not torch.equal(mine[key], theirs[key]) for key in mine)  # by a seed of the attacker's own
