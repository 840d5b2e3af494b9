"""The memory: the benign encoder as it was public joins a benign branch that was trained to resist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, ConfigError, HardenConfig, InputError, StageError, ZePAD
from zepad.calibration import choose_recall
from zepad.ensemble import BranchEnsemble
from zepad.evaluation import white_box
from zepad.fusion import Bounded
from zepad.modules import Branch

EPS = 6 / 255
CPU = torch.device("cpu")


def loader(count: int = 48) -> DataLoader:
    return DataLoader(TensorDataset(*toy_data(count)), batch_size=16, shuffle=True)


def hardened(**options: Any) -> ZePAD:
    torch.manual_seed(2)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), **{"num_classes": 3, "preset": "published"} | options)
    return defense.harden(loader(), HardenConfig(eps=EPS, epochs=1, val_fraction=0.25), progress=False)


def defended(*, freeze: bool = False, **options: Any) -> ZePAD:
    config = BenignConfig(epochs=1, freeze_encoder=freeze)
    return hardened(**options).fit_benign(loader(), config, progress=False)


def branch(seed: int) -> Branch:
    torch.manual_seed(seed)
    return Branch(TinyEncoder(), nn.Linear(8, 3))


def ensemble(above: float | None = None) -> BranchEnsemble:
    branches = {name: branch(seed) for seed, name in enumerate(("one", "two", "benign"))}
    return BranchEnsemble(branches, fusion=Bounded(vote=2.0), memory=branch(7), abstain_above=above).eval()


@given(st.floats(0, 2))
def test_the_benign_branch_is_the_mean_of_both_and_a_memory_that_abstains_prefers_no_class(above: float) -> None:
    images, _ = toy_data(12)
    model = ensemble(above)
    benign, memory = model.branches["benign"], model.memory
    features = benign.encoder(images), memory.encoder(images)
    for i, logits in enumerate(model.branch_logits(images)[-1]):
        distance = (features[0][i] - features[1][i]).norm() / features[1][i].norm()
        recalled = memory.head(features[1])[i].softmax(0) if distance <= above else torch.full((3,), 1 / 3)
        expected = (benign(images)[i].softmax(0) + recalled) / 2
        torch.testing.assert_close(logits.softmax(0), expected)
    torch.testing.assert_close(
        model.restoration_gap(images), (features[0] - features[1]).norm(dim=1) / features[1].norm(dim=1)
    )


def test_a_report_says_on_which_images_the_memory_abstains() -> None:
    images, _ = toy_data(24)
    model = ensemble()
    assert not model.inspect(images).memory_abstains.any()
    gaps = model.restoration_gap(images).detach()
    model.abstain_above = float(gaps.median())
    silent = gaps > gaps.median()
    assert 0 < silent.sum() < len(images)
    report = model.inspect(images)
    assert torch.equal(report.memory_abstains, silent)
    assert not report.abstains.any()  # one half of the benign branch still speaks
    for i, quiet in enumerate(silent.tolist()):
        line = str(model.inspect(images[i])).splitlines()[-1]
        assert line.split()[:2] == ["memory", "abstains" if quiet else "speaks"]
    model.memory = None
    model.abstain_above = None
    report = model.inspect(images)
    assert report.memory_abstains is None
    assert "memory" not in str(report)


def test_a_memory_always_speaks_without_a_limit_and_hardened_branches_are_left_alone() -> None:
    images, _ = toy_data(12)
    model = ensemble()
    both = torch.stack([model.branches["benign"](images).softmax(1), model.memory(images).softmax(1)])
    logits = model.branch_logits(images)
    torch.testing.assert_close(logits[-1].exp(), both.mean(0))
    assert torch.equal(logits[0], model.branches["one"](images))
    assert torch.equal(model.detector_inputs(images).logits, logits)
    model.memory = None
    assert torch.equal(model.branch_logits(images)[-1], model.branches["benign"](images))


def test_the_white_box_keeps_the_memory_speaking() -> None:
    attackers = white_box(ensemble(0.5), eps=EPS, num_classes=3, steps=2)
    assert "APGD-2 that keeps the benign branch speaking" in [attacker.name for attacker in attackers]


# when it speaks -------------------------------------------------------------------------------------------------------


class Bent(nn.Module):
    """An encoder whose features differ a little from those of another, the more the brighter the image."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images) * (1 + 0.3 * images.mean((1, 2, 3))[:, None])


def test_a_memory_that_is_better_speaks_on_all_but_one_benign_image_in_a_hundred() -> None:
    torch.manual_seed(1)
    images, encoder = torch.rand(300, 3, 8, 8), TinyEncoder().eval()
    memory = Branch(encoder, nn.Linear(8, 3))
    benign = Branch(Bent(encoder), nn.Linear(8, 3))
    labels = memory(images).argmax(1)  # what the memory says is right
    assert (benign(images).argmax(1) != labels).any()
    loader = DataLoader(TensorDataset(images, labels), batch_size=7)
    found = choose_recall(benign, memory, loader, device=CPU)
    with torch.no_grad():
        gaps = (benign.encoder(images) - encoder(images)).norm(dim=1) / encoder(images).norm(dim=1)
    assert found == pytest.approx(float(gaps.quantile(0.99)), rel=1e-4)
    unlabelled = choose_recall(benign, memory, images, device=CPU)
    assert unlabelled == pytest.approx(found, rel=1e-4)


def test_a_memory_that_is_no_better_or_has_other_features_never_speaks() -> None:
    images = torch.rand(60, 3, 8, 8)
    one, other = branch(1).eval(), branch(2).eval()
    right = DataLoader(TensorDataset(images, one(images).argmax(1)), batch_size=20)
    assert choose_recall(one, Branch(Bent(one.encoder), one.head), right, device=CPU) == 0.0
    assert choose_recall(Branch(nn.Flatten(), nn.Linear(192, 3)), other, images, device=CPU) == 0.0


def test_each_encoder_sees_each_image_once_and_labels_that_are_none_are_refused() -> None:
    images, seen = torch.rand(30, 3, 8, 8), []
    benign, memory = branch(1).eval(), branch(2).eval()
    for each in (benign, memory):
        each.encoder.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    choose_recall(benign, memory, [(images, torch.zeros(30, dtype=torch.int64))], device=CPU)
    assert seen == [30, 30]
    with pytest.raises(InputError, match="labels must be integer class indices"):
        choose_recall(benign, memory, [(images, torch.rand(30))], device=CPU)


# the model ------------------------------------------------------------------------------------------------------------


def test_presets_with_a_resistant_benign_branch_keep_its_public_encoder() -> None:
    torch.manual_seed(3)
    victim, auxiliary, third = TinyEncoder(), TinyEncoder(), TinyEncoder(5)
    for preset, benign in (("published", None), ("cautious", third)):
        model = ZePAD.from_encoders(victim, auxiliary, benign=benign, preset=preset)
        kept, public = model.encoder("memory").backbone.state_dict(), (benign or auxiliary).state_dict()
        assert all(torch.equal(kept[name], public[name]) for name in public)
    for preset in ("private", "paper"):
        assert "memory" not in ZePAD.from_encoders(victim, auxiliary, preset=preset).encoders


def test_training_leaves_the_memory_as_it_was_and_gives_it_a_head() -> None:
    model = hardened()
    before = {name: value.clone() for name, value in model.encoder("memory").state_dict().items()}
    public = {role: encoder for role, encoder in model.encoders.items() if role != "memory"}
    model.fit_benign(loader(), BenignConfig(epochs=1), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.encoder("memory").state_dict().items())
    changed = model.encoder("benign").state_dict()
    assert any(not torch.equal(changed[name], before[name]) for name in before)
    assert set(model.heads) == {*public, "memory"}
    assert model.provenance["benign"]["abstain_above"] == model.abstain_above
    assert model.abstain_above is not None


def test_a_benign_encoder_that_stays_public_is_its_own_memory() -> None:
    model, (images, _) = defended(freeze=True), toy_data(9)
    assert model.abstain_above is None
    said = torch.stack([model.branch(role)(images).softmax(1) for role in ("benign", "memory")])
    torch.testing.assert_close(model.branch_logits(images)[-1].exp(), said.mean(0))


def test_new_heads_and_calibration_choose_anew_when_the_memory_speaks() -> None:
    model, (images, labels) = defended(), toy_data(40, seed=7)
    model.fit_heads(loader(24), progress=False)
    assert model.provenance["heads"]["abstain_above"] == model.abstain_above
    model.calibrate(DataLoader(TensorDataset(images, labels), batch_size=8), benign_floor=0.0)
    expected = choose_recall(model.branch("benign"), model.memory, [(images, labels)], device=CPU)
    assert model.abstain_above == pytest.approx(expected)
    model.abstain_above = None  # the user's word holds
    assert model.fit_heads(loader(24), progress=False).calibrate(images).abstain_above is None


def test_a_saved_model_has_its_memory_and_one_in_part_cannot_decide(tmp_path: Path) -> None:
    model, (images, _) = defended(), toy_data(20)
    model.abstain_above = float(model.restoration_gap(images).median())
    model.save_pretrained(tmp_path)
    own = {"victim": TinyEncoder(), "auxiliary": TinyEncoder()}
    loaded = ZePAD.from_pretrained(tmp_path, **own)
    assert torch.equal(loaded(images), model(images))
    assert f"the memory abstains above a restoration gap of {model.abstain_above:.4g}" in (
        tmp_path / "README.md"
    ).read_text(encoding="utf-8")
    part = ZePAD.from_pretrained(tmp_path, branches=("victim", "auxiliary", "benign"), **own)
    with pytest.raises(StageError, match="loaded with victim, auxiliary, benign alone"):
        part.predict(images)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["encoders"]["memory"]["architecture_of"] == "auxiliary"


def test_a_third_encoder_is_the_architecture_of_its_memory(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = defended(benign=TinyEncoder(5))
    assert model.encoder("memory")(torch.rand(1, 3, 16, 16)).shape == (1, 5)
    model.save_pretrained(tmp_path)
    own = {"victim": TinyEncoder(), "auxiliary": TinyEncoder(), "benign": TinyEncoder(5)}
    images, _ = toy_data(5)
    assert torch.equal(ZePAD.from_pretrained(tmp_path, **own)(images), model(images))


def test_a_memory_needs_branches_with_encoders_to_abstain() -> None:
    flat = {"a": nn.Flatten(), "b": nn.Flatten()}
    with pytest.raises(ConfigError, match="abstain_above must be None without two Branch objects"):
        BranchEnsemble(flat, memory=branch(0), abstain_above=0.5)
    with pytest.raises(ConfigError, match="memory must be None without Branch objects"):
        BranchEnsemble(flat, memory=branch(0))
