"""The benign branch abstains where the encoder restored from the same public one sees something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, CheckpointError, ConfigError, HardenConfig, InputError, ZePAD, ZeroShotHead
from zepad.calibration import choose_abstention
from zepad.ensemble import BranchEnsemble
from zepad.evaluation import white_box
from zepad.functional import restoration_gap
from zepad.fusion import Bounded, names, resolve
from zepad.modules import Branch

EPS = 6 / 255
CPU = torch.device("cpu")


def loader(count: int = 48) -> DataLoader:
    return DataLoader(TensorDataset(*toy_data(count)), batch_size=16, shuffle=True)


def defended(*, freeze: bool | None = True, **options: Any) -> ZePAD:
    torch.manual_seed(2)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), num_classes=3, **options)
    defense.harden(loader(), HardenConfig(eps=EPS, epochs=1, val_fraction=0.25), progress=False)
    return defense.fit_benign(loader(), BenignConfig(epochs=1, freeze_encoder=freeze), progress=False)


def ensemble(above: float | None) -> BranchEnsemble:
    torch.manual_seed(0)
    branches = {name: Branch(TinyEncoder(), nn.Linear(8, 3)) for name in ("one", "two", "benign")}
    return BranchEnsemble(branches, fusion=Bounded(vote=2.0), abstain_above=above).eval()


@given(
    st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3),
    st.floats(0.125, 8, width=32),
)
def test_the_gap_is_a_relative_distance(rows: list[list[float]], public: list[float], scale: float) -> None:
    restored, original = torch.tensor(rows), torch.tensor(public).expand(len(rows), 3)
    found = restoration_gap(restored, original)
    for row, value in zip(rows, found, strict=True):
        length = max(sum(p * p for p in public) ** 0.5, 1e-6)
        naive = sum((r - p) ** 2 for r, p in zip(row, public, strict=True)) ** 0.5 / length
        assert float(value) == pytest.approx(naive, rel=1e-4, abs=1e-6)
    assert not restoration_gap(original, original).any()
    if original.norm(dim=1).amin() > 1e-3:  # shorter features count as zero, whatever the unit
        torch.testing.assert_close(restoration_gap(scale * restored, scale * original), found, rtol=1e-3, atol=1e-5)


def test_the_gap_of_half_precision_is_that_of_float32_and_has_a_gradient_at_zero() -> None:
    restored, public = torch.randn(4, 8).half(), torch.randn(4, 8).half()
    assert torch.equal(restoration_gap(restored, public), restoration_gap(restored.float(), public.float()).half())
    same = torch.ones(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(restoration_gap(same, torch.ones(2, 3)).sum(), same)
    assert gradient.isfinite().all()


def test_the_benign_branch_is_silent_above_the_gap_and_unchanged_below() -> None:
    images, _ = toy_data(24)
    plain = ensemble(None)
    gaps = plain.restoration_gap(images).detach()
    model = ensemble(float(gaps.median()))
    silent = gaps > gaps.median()
    assert 0 < silent.sum() < len(images)
    then, now = plain.branch_logits(images), model.branch_logits(images)
    assert torch.equal(now[:2], then[:2])
    assert torch.equal(now[2][~silent], then[2][~silent])
    assert not now[2][silent].any()
    assert torch.equal(model(images)[~silent], plain(images)[~silent])
    alone = Bounded(vote=0.0)(then).softmax(dim=-1)  # a silent branch leaves the decision to the hardened ones
    torch.testing.assert_close(model(images).softmax(dim=-1)[silent], alone[silent])
    report = model.inspect(images)
    assert torch.equal(report.abstains, silent)
    assert str(report).count("abstains") == silent.sum()


@pytest.mark.parametrize("rule", names())
def test_under_every_rule_a_silent_branch_prefers_no_class(rule: str) -> None:
    images, _ = toy_data(6)
    model = ensemble(0.0)
    model.fusion = resolve(rule, argument="fusion")
    order = torch.tensor([2, 0, 1])
    before = model(images)
    for branch in model.branches.values():  # with the classes in another order nothing but the order changes
        branch.head.weight.data, branch.head.bias.data = branch.head.weight.data[order], branch.head.bias.data[order]
    torch.testing.assert_close(model(images), before[:, order])


def test_the_decision_has_gradients_and_detectors_see_the_silence() -> None:
    images, _ = toy_data(4)
    model = ensemble(0.0)
    points = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(points).square().sum(), points)
    assert gradient.any()
    assert torch.equal(model.detector_inputs(images).logits, model.branch_logits(images))
    assert (gradient.isfinite()).all()


@pytest.mark.parametrize("above", [-0.1, float("nan"), float("inf")])
def test_a_gap_out_of_range_is_refused(above: float) -> None:
    with pytest.raises(ConfigError, match="abstain_above must be a"):
        ensemble(above)
    with pytest.raises(ConfigError, match="abstain_above must be None without two Branch objects"):
        BranchEnsemble({"a": nn.Flatten(), "b": nn.Flatten()}, abstain_above=0.5)


# which gap ------------------------------------------------------------------------------------------------------------


def test_one_benign_image_in_a_hundred_is_above_the_chosen_gap() -> None:
    torch.manual_seed(1)
    public = TinyEncoder().eval()
    images = torch.rand(300, 3, 8, 8)

    def restored(batch: Tensor) -> Tensor:
        return public(batch) * (1 + 0.3 * batch.mean((1, 2, 3))[:, None])

    found = choose_abstention(restored, public, DataLoader(TensorDataset(images), batch_size=7), device=CPU)
    gaps = restoration_gap(restored(images), public(images)).detach()
    assert found == pytest.approx(sorted(gaps.tolist())[296], rel=0.01)
    assert found == pytest.approx(choose_abstention(restored, public, images, device=CPU))
    assert choose_abstention(public, public, images, device=CPU) == 0.0


def test_no_more_images_are_read_than_needed() -> None:
    read = 0

    class Endless:
        def __iter__(self) -> Iterator[Tensor]:
            nonlocal read
            while True:
                read += 1
                yield torch.rand(500, 3, 4, 4)

    flat = nn.Flatten()
    assert choose_abstention(flat, flat, Endless(), device=CPU) == 0.0
    assert read == 5


def test_where_features_have_nothing_in_common_the_branch_always_speaks() -> None:
    images, flat = torch.rand(20, 3, 4, 4), nn.Flatten()
    assert choose_abstention(flat, lambda x: flat(x)[:, :5], images, device=CPU) is None
    assert choose_abstention(flat, lambda x: -flat(x), images, device=CPU) is None
    assert choose_abstention(flat, lambda x: flat(x) * float("nan"), images, device=CPU) is None
    with pytest.raises(InputError, match="the loader is empty"):
        choose_abstention(flat, flat, [], device=CPU)


# the model ------------------------------------------------------------------------------------------------------------


def test_only_a_public_benign_encoder_of_the_private_preset_abstains() -> None:
    defense = defended()
    above = defense.abstain_above
    assert above is not None
    assert defense.provenance["benign"]["abstain_above"] == above
    assert defended(freeze=False).abstain_above is None
    assert defended(preset="paper").abstain_above is None
    torch.manual_seed(3)
    assert defended(benign=TinyEncoder(5)).abstain_above is None


def test_hardening_chooses_the_gap_while_the_benign_encoder_is_public() -> None:
    defense, config = defended(), HardenConfig(eps=EPS, epochs=1, val_fraction=0)
    unlabelled = [images for images, _ in loader()]
    defense.harden(unlabelled, config, progress=False)
    above = defense.abstain_above
    gaps = torch.cat([defense.restoration_gap(images).detach() for images in unlabelled])
    assert above == pytest.approx(float(gaps.quantile(0.99)), rel=1e-4)
    assert defense.provenance["harden"]["abstain_above"] == above
    heads = {role: ZeroShotHead(torch.rand(3, 8)) for role in ("victim", "auxiliary", "benign")}
    assert defense.fit_zero_shot(heads).abstain_above == above
    images = torch.cat(unlabelled)
    silent = defense.restoration_gap(images) > above
    assert silent.any()
    assert torch.equal((defense.branch_logits(images)[-1] == 0).all(dim=1), silent)
    defense.abstain_above = None  # the user's word holds
    assert defense.fit_zero_shot(heads).abstain_above is None
    for trained in (defended(freeze=False), defended(preset="paper")):
        assert trained.harden(loader(), config, progress=False).abstain_above is None


def test_new_heads_and_calibration_choose_the_gap_on_their_own_images() -> None:
    defense = defended()
    before, images = defense.abstain_above, toy_data(40, seed=7)
    defense.fit_heads(loader(24), progress=False)
    again = defense.abstain_above
    assert again is not None
    assert again != before
    assert defense.provenance["heads"]["abstain_above"] == again
    defense.calibrate(DataLoader(TensorDataset(*images), batch_size=8), benign_floor=0.0)
    gaps = defense.restoration_gap(images[0]).detach()
    assert defense.abstain_above == pytest.approx(float(gaps.quantile(0.99)), rel=1e-5)
    assert defense.provenance["calibration"]["abstain_above"] == defense.abstain_above
    defense.abstain_above = None  # the user's word holds
    assert defense.fit_heads(loader(24), progress=False).calibrate(images[0]).abstain_above is None


def test_a_calibration_that_fails_leaves_the_gap_as_it_was() -> None:
    defense = defended()
    before = defense.abstain_above
    broken = torch.full((4, 3, 16, 16), 0.5), torch.tensor([0, 1, 2, 9])
    with pytest.raises(InputError):
        defense.calibrate(DataLoader(TensorDataset(*broken), batch_size=4))
    assert defense.abstain_above == before


def test_images_that_can_be_read_once_still_calibrate() -> None:
    defense = defended()
    before = defense.abstain_above
    images, labels = toy_data(40)
    defense.calibrate(batch for batch in [(images, labels)])
    assert defense.abstain_above == before


def test_the_gap_is_saved_and_a_strange_one_refused(tmp_path: Path) -> None:
    defense = defended()
    defense.save_pretrained(tmp_path / "model")
    own = {"victim": TinyEncoder(), "auxiliary": TinyEncoder()}
    loaded = ZePAD.from_pretrained(tmp_path / "model", **own)
    images, _ = toy_data(30)
    assert loaded.abstain_above == defense.abstain_above
    assert torch.equal(loaded(images), defense(images))
    assert f"abstains above a restoration gap of {defense.abstain_above:.4g}" in (
        tmp_path / "model" / "README.md"
    ).read_text(encoding="utf-8")
    config = tmp_path / "model" / "config.json"
    saved = json.loads(config.read_text())
    config.write_text(json.dumps({**saved, "abstain_above": -1.0}))
    with pytest.raises(CheckpointError, match="abstain_above must be a number of zero or more"):
        ZePAD.from_pretrained(tmp_path / "model", **own)
    del saved["abstain_above"]
    config.write_text(json.dumps({**saved, "format": 4}))  # of a time when the branch always spoke
    assert ZePAD.from_pretrained(tmp_path / "model", **own).abstain_above is None


def test_the_white_box_knows_of_the_silence() -> None:
    images, labels = toy_data(12)
    name = "APGD-3 that keeps the benign branch speaking"
    speaking = ensemble(None)
    assert name not in [attacker.name for attacker in white_box(speaking, eps=0.3, num_classes=3, steps=3)]
    model = ensemble(float(speaking.restoration_gap(images).detach().amax()))  # it speaks on every benign image
    (attacker,) = [a for a in white_box(model, eps=0.3, num_classes=3, steps=3) if a.name == name]
    attacked = attacker.attack(model, images, labels)
    won = model(attacked).argmax(1) != labels
    heard = model.restoration_gap(attacked) <= model.abstain_above
    assert (won & heard).any()
    assert (attacked - images).abs().amax() <= 0.3 + 1e-6
