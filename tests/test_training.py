"""The training loop: which weights change, which never change, and how it recovers from faults."""

from __future__ import annotations

import copy
import hashlib
import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import (
    BenignConfig,
    CheckpointError,
    ConfigError,
    HardenConfig,
    HeadConfig,
    InputError,
    StageError,
    TrainingError,
    ZePAD,
)
from zepad.attacks import PGD
from zepad.data import digits
from zepad.encoders.sources.registry import wrap_module
from zepad.evaluation import accuracy
from zepad.functional import structure_loss
from zepad.modules import Branch, MLPHead, NoHead
from zepad.objectives import (
    Batch,
    DAEMixture,
    ObjectiveOutput,
    Recipe,
    benign_recipe,
    fare,
    static_adversarial_training,
    zepad_recipe,
)
from zepad.objectives.zepad import zepad_objective
from zepad.seeding import derive_seed, seeded
from zepad.training import fit_heads, harden, harden_branch, train_benign
from zepad.training.checkpoints import load_latest, save_epoch
from zepad.training.features import FeatureCache
from zepad.training.loaders import hold_out
from zepad.training.rates import default_rate

FAST = HardenConfig(epochs=2, steps=2)


def build(**options: object) -> ZePAD:
    torch.manual_seed(3)
    return ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper", **options)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_hardening_makes_a_real_encoder_robust_to_a_white_box_attack() -> None:
    images, labels = digits("train").images[:256], digits("train").labels[:256]
    held_out = [(digits("test").images[:100], digits("test").labels[:100])]
    data = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", TinyEncoder(), preset="paper")
    encoders = {"victim": copy.deepcopy(defense.encoder("victim"))}
    head = fit_heads(encoders, data, HeadConfig(), channels=3, num_classes=10, progress=False)["victim"]
    undefended = Branch(encoders["victim"], head)
    config = HardenConfig(eps=25 / 255, epochs=10, steps=3, precision="fp32")
    hardened = defense.harden(data, config, progress=False).branch("victim")
    attack = PGD(eps=25 / 255, steps=10)
    robust = {}
    for name, branch in (("undefended", undefended), ("hardened", hardened)):
        robust[name] = accuracy(branch, held_out, attack=lambda x, y, b=branch: attack(b, x, y)).rate
    assert accuracy(hardened, held_out).rate > 0.85
    assert robust["hardened"] > robust["undefended"] + 0.25


def test_same_seed_same_weights_and_another_seed_others(loader: DataLoader) -> None:
    first = build().harden(loader, FAST, progress=False)
    torch.rand(7)  # the caller's generator must not matter
    second = build().harden(loader, FAST, progress=False)
    other = build().harden(loader, HardenConfig(epochs=2, steps=2, seed=1), progress=False)
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


def test_the_callers_random_state_is_given_back(loader: DataLoader) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_state = torch.get_rng_state()
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    torch.set_rng_state(build_state)
    defense.harden(DataLoader(TensorDataset(*toy_data()), batch_size=16), FAST, progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_hardening_changes_only_the_mpae_encoders(loader: DataLoader) -> None:
    victim, auxiliary = TinyEncoder(), TinyEncoder()
    before = weights(victim), weights(auxiliary)
    defense = ZePAD.from_encoders(victim, auxiliary)
    benign, hardened = weights(defense.encoder("benign")), weights(defense.encoder("victim"))
    defense.harden(loader, FAST, progress=False)
    assert same(weights(victim), before[0])
    assert same(weights(auxiliary), before[1])
    assert same(weights(defense.encoder("benign")), benign)
    assert not same(weights(defense.encoder("victim")), hardened)


def test_fit_benign_and_fit_heads_leave_the_hardened_encoders_alone(loader: DataLoader) -> None:
    defense = build().harden(loader, FAST, progress=False)
    hardened = weights(defense.encoder("victim")), weights(defense.encoder("auxiliary"))
    defense.fit_benign(loader, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    benign = weights(defense.encoder("benign"))
    defense.train()  # a caller who forgets the mode must not move BatchNorm either
    defense.fit_heads(loader, HeadConfig(epochs=1), progress=False)
    defense(toy_data()[0])
    assert same(weights(defense.encoder("victim")), hardened[0])
    assert same(weights(defense.encoder("auxiliary")), hardened[1])
    assert same(weights(defense.encoder("benign")), benign)


def test_heads_trained_along_can_be_kept_for_the_same_task(loader: DataLoader) -> None:
    defense = build(detector="features").harden(loader, FAST, progress=False)
    trained = {role: weights(head) for role, head in defense.heads.items()}
    defense.fit_benign(loader, BenignConfig(epochs=1), head_config=None, progress=False)
    assert set(defense.heads) == {"victim", "auxiliary", "benign", "reference"}
    assert all(same(weights(defense.heads[role]), before) for role, before in trained.items())
    assert defense.provenance["benign"]["head_config"] is None
    defense.harden(loader, FAST, progress=False)
    defense.fit_benign(loader, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    assert not any(same(weights(defense.heads[role]), before) for role, before in trained.items())


def test_heads_of_another_task_or_none_cannot_be_kept(loader: DataLoader) -> None:
    images, _ = toy_data()
    more_classes = DataLoader(TensorDataset(images, torch.arange(len(images)) % 5), batch_size=16)
    defense = build().harden(loader, FAST, progress=False)
    with pytest.raises(ConfigError, match=r"kept heads are for \d classes and the loader has 5. Pass head_config="):
        defense.fit_benign(more_classes, head_config=None, progress=False)
    assert defense.stage == "hardened"
    unlabelled = build().harden(loader, FAST, objective=fare(), progress=False)
    for role in ("victim", "auxiliary"):
        unlabelled.branch(role).head = NoHead()
    with pytest.raises(StageError, match="no heads to keep. Pass head_config="):
        unlabelled.fit_benign(loader, head_config=None, progress=False)


def test_a_frozen_benign_encoder_keeps_weights_and_batchnorm_statistics(loader: DataLoader) -> None:
    defense = build(benign=TinyEncoder()).harden(loader, FAST, progress=False)
    before = weights(defense.encoder("benign"))
    defense.fit_benign(
        loader, BenignConfig(epochs=2, freeze_encoder=True), head_config=HeadConfig(epochs=1), progress=False
    )
    assert same(weights(defense.encoder("benign")), before)


def blind() -> TinyEncoder:
    """An encoder whose features say nothing of the image, until it is trained."""
    encoder = TinyEncoder()
    nn.init.zeros_(encoder.norm.weight)
    nn.init.constant_(encoder.norm.bias, 0.5)
    return encoder


@pytest.mark.parametrize(
    ("build_encoder", "config", "frozen"),
    [(blind, BenignConfig(epochs=60, lr=2e-2, head_lr=1e-2), False), (TinyEncoder, BenignConfig(epochs=1), True)],
    ids=["fine-tuned", "frozen"],
)
def test_the_form_of_the_benign_branch_that_is_better_on_held_out_images_is_kept(
    loader: DataLoader, build_encoder: Callable[[], nn.Module], config: BenignConfig, frozen: bool
) -> None:
    encoder, forms = build_encoder(), {}
    for freeze in (None, False):
        torch.manual_seed(len(forms))
        expected = torch.rand(3)
        torch.manual_seed(len(forms))  # the caller's generator does not matter and is given back
        forms[freeze] = train_benign(encoder, loader, replace(config, freeze_encoder=freeze), progress=False)
        assert torch.equal(torch.rand(3), expected)
    (chosen, record), (tuned, tuned_record) = forms[None], forms[False]
    accuracies = record["choice"]["accuracies"]
    assert record["choice"]["freeze_encoder"] == frozen == (accuracies["frozen"] >= accuracies["fine_tuned"])
    assert record["choice"]["held_out_images"] == 10
    assert accuracies["fine_tuned"] == tuned_record["history"][-1]["val_benign_accuracy"]
    assert record["history"] == tuned_record["history"]
    held_out = hold_out(loader, config.val_fraction, config.seed)[1]
    if frozen:
        assert same(weights(chosen.encoder.backbone), weights(encoder))
        assert accuracy(chosen, held_out).rate == accuracies["frozen"]
    else:
        assert same(weights(chosen), weights(tuned))
    assert not any(part.training for part in chosen.modules())
    assert not any(parameter.requires_grad for parameter in chosen.encoder.parameters())


def cheap() -> Recipe:
    return static_adversarial_training(static=DAEMixture(steps=1))


def harmful() -> Recipe:
    """A recipe that learns wrong labels."""
    good = cheap()

    def objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
        return good.objective(branch, batch._replace(labels=(batch.labels + 1) % 3))

    return replace(good, name="harmful", objective=objective)


@pytest.mark.parametrize(
    ("build_encoder", "settings", "objective", "kept"),
    [
        (blind, {"epochs": 40, "lr": 2e-2, "head_lr": 1e-2}, cheap, "resistant"),
        (blind, {"epochs": 40, "lr": 2e-2, "head_lr": 1e-2}, harmful, "frozen"),
        (TinyEncoder, {"epochs": 1}, cheap, "frozen"),
    ],
    ids=["resistant", "resistant but worse", "frozen"],
)
@pytest.mark.slow
def test_an_encoder_that_is_worth_fine_tuning_is_trained_by_the_objective_and_kept_unless_it_serves_worse(
    loader: DataLoader, build_encoder: Callable, settings: dict, objective: Callable, kept: str, tmp_path: Path
) -> None:
    encoder, config, recipe = build_encoder(), BenignConfig(freeze_encoder=None, **settings), objective()
    branch, record = train_benign(
        encoder, loader, config, objective=recipe, eps=8 / 255, checkpoint_dir=tmp_path, progress=False
    )
    rates = record["choice"]["accuracies"]
    assert record["choice"]["freeze_encoder"] == (kept == "frozen")
    assert record["method"] == ("benign" if kept == "frozen" else recipe.name)
    pays = rates["fine_tuned"] > rates["frozen"]
    assert pays == ("resistant" in rates) == (tmp_path / "resistant").exists() == (build_encoder is blind)
    assert not pays or (rates["resistant"] < rates["frozen"]) == (kept == "frozen")
    held_out = hold_out(loader, config.val_fraction, config.seed)[1]
    assert accuracy(branch, held_out).rate == rates[kept]
    if kept == "frozen":
        assert same(weights(branch.encoder.backbone), weights(encoder))
    else:
        alone = replace(config, freeze_encoder=False)
        same_objective, _ = train_benign(encoder, loader, alone, objective=recipe, eps=8 / 255, progress=False)
        assert same(weights(branch), weights(same_objective))


def test_the_benign_branch_is_fine_tuned_where_nothing_can_be_held_out_and_as_told_where_told() -> None:
    batches = list(zip(*(part.split(16) for part in toy_data(48)), strict=True))
    encoder, config = TinyEncoder(), BenignConfig(epochs=1, freeze_encoder=None)
    chosen, record = train_benign(encoder, batches, config, progress=False)
    assert record["choice"] == {"freeze_encoder": False, "held_out_images": 0}
    assert BenignConfig.from_dict(record["config"]).freeze_encoder is None
    tuned, told = train_benign(encoder, batches, replace(config, freeze_encoder=False), progress=False)
    assert same(weights(chosen), weights(tuned))
    assert "choice" not in told
    frozen, told = train_benign(encoder, batches, replace(config, freeze_encoder=True), progress=False)
    assert same(weights(frozen.encoder.backbone), weights(encoder))
    assert "choice" not in told


def test_the_objective_is_cross_entropy_plus_structure_per_row_and_clean_images_leave_batchnorm_alone() -> None:
    images, labels = toy_data(24)
    attacked = (images + 0.1).clamp(0, 1)
    branch = Branch(TinyEncoder(), MLPHead(8, 3))
    branch.head.eval()  # dropout aside, so that the loss can be computed twice
    twin = copy.deepcopy(branch)
    outcome = zepad_objective(structure_weight=2.0)(branch, Batch(images, attacked, labels))
    features = twin.encoder(attacked)
    statistics = weights(twin)
    twin.eval()
    clean = twin.encoder(images).detach()
    twin_loss = nn.functional.cross_entropy(twin.head(features), labels)
    expected = twin_loss + 2.0 * structure_loss(adversarial=features, benign=clean) / 24
    torch.testing.assert_close(outcome.loss, expected)
    assert same(weights(branch), statistics)  # only the adversarial images trained the statistics
    assert branch.encoder.training


def test_every_parameter_of_the_encoder_is_trained_in_mixed_precision(loader: DataLoader) -> None:
    # Autocast caches cast weights; a cache filled without gradients would silently freeze the encoder.
    defense = build()
    before = dict(defense.encoder("victim").named_parameters())
    before = {key: value.clone() for key, value in before.items()}
    config = HardenConfig(epochs=1, steps=1, precision="bf16")
    after = dict(defense.harden(loader, config, progress=False).encoder("victim").named_parameters())
    assert [key for key in before if torch.equal(before[key], after[key])] == []


def test_the_images_pass_eight_modules_from_harden_to_the_loss() -> None:
    """The reader's way: every module on the stack where images enter, where a backbone sees them, where a loss is."""
    met: set[str] = set()

    def watch(frame: Any, event: str, _: object) -> None:
        stations = ("check_images", "forward", "structure_loss")
        batches = (isinstance(value, Tensor) and len(value) == 16 for value in frame.f_locals.values())
        if event == "call" and frame.f_code.co_name in stations and any(batches):
            met.update(name for name in modules_on_stack(frame) if name.startswith("zepad."))

    defense = build(num_classes=3)
    data = DataLoader(TensorDataset(*toy_data(32)), batch_size=16)
    sys.setprofile(watch)
    try:
        defense.harden(data, HardenConfig(epochs=1, steps=1, val_fraction=0), progress=False)
    finally:
        sys.setprofile(None)
    assert met - {"zepad.functional.losses", "zepad.arguments"} == {  # where the loss is, and the types are checked
        "zepad.model",
        "zepad.training.hardening",
        "zepad.training.loop",
        "zepad.inputs",
        "zepad.attacks.pgd",
        "zepad.objectives.zepad",
        "zepad.modules",
        "zepad.encoders.encoder",
    }


def modules_on_stack(frame: Any) -> Iterator[str]:
    while frame is not None:
        yield frame.f_globals.get("__name__", "")
        frame = frame.f_back


def test_the_benign_stage_alone_equals_that_of_the_defense(loader: DataLoader) -> None:
    defense = build().harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    before = weights(defense.encoder("benign"))
    config = BenignConfig(epochs=2)
    branch, record = train_benign(defense.encoder("benign"), loader, config, progress=False)
    assert same(weights(defense.encoder("benign")), before)
    defense.fit_benign(loader, config, head_config=HeadConfig(epochs=1), progress=False)
    assert same(weights(branch), weights(defense.branch("benign")))
    also = {"head_config": HeadConfig(epochs=1).to_dict(), "abstain_above": None}  # for fine-tuned branches
    assert defense.provenance["benign"] == {**record, **also}


class Streamed(IterableDataset):
    """A stream that does not know its length."""

    def __iter__(self):
        yield from zip(*toy_data(40), strict=True)


@pytest.mark.parametrize("kind", ["iterable data set", "list of batches"])
def test_loaders_of_unknown_length_and_plain_iterables(kind: str) -> None:
    images, labels = toy_data(40)
    stream = DataLoader(Streamed(), batch_size=16)
    batches = list(zip(images.split(16), labels.split(16), strict=True))
    defense = build().harden(stream if kind == "iterable data set" else batches, FAST, progress=False)
    history = defense.provenance["harden"]["history"]["victim"]
    assert len(history) == 2
    assert "val_benign_accuracy" not in history[0]  # nothing could be held out


class Tokens(nn.Module):
    """An encoder that normalises by LayerNorm alone, as a ViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, stride=8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.block(self.patches(x).flatten(2).transpose(1, 2))).mean(1)


class RMSNorm(nn.Module):
    """A stand-in for the many classes of this name."""


@pytest.mark.parametrize(
    ("encoder", "rate"),
    [
        (TinyEncoder(), 2e-3),
        (Tokens(), 1e-4),
        (wrap_module(Tokens()), 1e-4),
        (RMSNorm(), 1e-4),
        (nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(4)), 2e-3),
        (nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4)), 2e-3),
        (nn.Linear(2, 2), 2e-3),
    ],
)
def test_the_rate_is_lower_where_layer_norm_is_the_only_norm(encoder: nn.Module, rate: float) -> None:
    assert default_rate(encoder) == rate
    assert default_rate(encoder, usual=1e-5) == 1e-5


@pytest.mark.parametrize(("make", "rate"), [(TinyEncoder, 2e-3), (Tokens, 1e-4)])
def test_a_config_without_a_rate_trains_as_one_with_the_rate_that_suits_the_encoder(
    loader: DataLoader, make: Callable[[], nn.Module], rate: float
) -> None:
    encoders = {"victim": wrap_module(make())}
    results = [
        harden(encoders, loader, replace(FAST, lr=lr), num_classes=3, progress=False) for lr in (None, rate, 10 * rate)
    ]
    suited, stated, higher = (weights(found.branches["victim"]) for found in results)
    assert same(suited, stated)
    assert not same(suited, higher)
    assert [found.record["lr"]["victim"] for found in results] == [rate, rate, 10 * rate]
    assert results[0].record["config"]["lr"] == rate
    config = BenignConfig(epochs=1)
    records = [
        train_benign(encoders["victim"], loader, c, progress=False)[1] for c in (config, replace(config, lr=1.0))
    ]
    assert [record["config"]["lr"] for record in records] == [rate, 1.0]
    mixed = harden({"a": wrap_module(TinyEncoder()), "b": wrap_module(Tokens())}, loader, FAST, progress=False)
    assert mixed.record["lr"] == {"a": 2e-3, "b": 1e-4}
    assert mixed.record["config"]["lr"] is None


def test_few_batches_mean_more_epochs() -> None:
    assert zepad_recipe().epochs(None, 6) == 150  # 6 batches a pass, 900 updates
    assert benign_recipe().epochs(None, 6) == 17
    assert zepad_recipe().epochs(None, 500) == zepad_recipe().epochs(None, None) == 10
    assert zepad_recipe().epochs(3, 6) == 3
    short = replace(zepad_recipe(structure_weight=0), min_updates=30)
    small = DataLoader(TensorDataset(*toy_data(10)), batch_size=5)
    config = HardenConfig(steps=1, val_fraction=0)
    assert len(harden_branch(TinyEncoder(), small, config, objective=short, progress=False)[1]["hardening"]) == 15


def test_hold_out_splits_without_overlap_and_keeps_the_loaders_settings(toy: tuple[Tensor, Tensor]) -> None:
    original = DataLoader(TensorDataset(*toy), batch_size=7, shuffle=True, drop_last=True)
    train, val = hold_out(original, 0.25, seed=0)
    assert (len(train.dataset), len(val.dataset)) == (72, 24)
    assert set(train.dataset.indices).isdisjoint(val.dataset.indices)
    assert (train.batch_size, train.drop_last, val.batch_size, val.drop_last) == (7, True, 7, False)
    assert isinstance(train.sampler, torch.utils.data.RandomSampler)
    assert hold_out(original, 0.25, seed=0)[1].dataset.indices == val.dataset.indices
    assert hold_out(original, 0.25, seed=1)[1].dataset.indices != val.dataset.indices
    assert hold_out([1, 2], 0.25, seed=0) == ([1, 2], None)


def test_the_best_epoch_by_validation_is_kept(loader: DataLoader) -> None:
    # A validation set whose labels are wrong: the less the branch has learnt, the better it scores there.
    images, labels = toy_data(48, seed=4)
    wrong = [(images, (labels + 1) % 3)]
    config = HardenConfig(epochs=6, steps=1, lr=1e-2, head_lr=1e-2)
    defense = build().harden(loader, config, val_loader=wrong, progress=False)
    history = defense.provenance["harden"]["history"]["victim"]
    scores = [record["val_adversarial_accuracy"] for record in history]
    best = accuracy(defense.branch("victim"), wrong).rate
    assert scores[-1] < max(scores)
    assert best == pytest.approx(
        history[max(i for i, s in enumerate(scores) if s == max(scores))]["val_benign_accuracy"]
    )


class Explosive(nn.Module):
    """An encoder whose features stop being finite after some forwards in training mode."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.inner = TinyEncoder()
        self.left = after

    def forward(self, x: Tensor) -> Tensor:
        self.left -= self.training
        return self.inner(x) * (1.0 if self.left >= 0 else float("nan"))


def test_a_loss_that_is_not_finite_stops_with_the_step_and_leaves_everything_intact(
    loader: DataLoader, tmp_path: Path
) -> None:
    defense = ZePAD.from_encoders(Explosive(after=8), TinyEncoder(), preset="paper")
    before = weights(defense)
    config = HardenConfig(epochs=3, steps=1, precision="fp32", val_fraction=0)
    with pytest.raises(
        TrainingError, match=r"harden victim: the loss is nan at epoch 2, batch 3\. The last good checkpoint"
    ) as error:
        defense.harden(loader, config, checkpoint_dir=tmp_path, progress=False)
    assert same(weights(defense), before)
    assert defense.stage == "built"
    kept = tmp_path / "victim" / "epoch-0000.pt"
    assert str(kept) in str(error.value)
    state = torch.load(kept, weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["weights"].values())


def test_weights_that_the_last_step_of_an_epoch_broke_are_never_saved(loader: DataLoader, tmp_path: Path) -> None:
    calls = []

    def objective(branch: Branch, batch: Batch) -> ObjectiveOutput:
        calls.append(1)
        logits = branch(batch.images)
        loss = nn.functional.cross_entropy(logits, batch.labels)
        if len(calls) == 12:  # finite itself, but with gradients that are not: the last step of the second epoch
            loss = loss + 0 * (logits - logits.detach()).abs().sqrt().sum()
        return ObjectiveOutput(loss, logits.detach(), logits.detach())

    config = HardenConfig(epochs=3, steps=1, precision="fp32", val_fraction=0)
    with pytest.raises(TrainingError, match="a weight is not finite at epoch 2, batch 6"):
        build().harden(loader, config, objective=objective, checkpoint_dir=tmp_path, progress=False)
    assert [path.name for path in (tmp_path / "victim").iterdir()] == ["epoch-0000.pt"]


def test_resuming_without_a_fault_equals_an_undisturbed_run(loader: DataLoader, tmp_path: Path) -> None:
    straight = build().harden(loader, HardenConfig(epochs=3, steps=1), progress=False)
    build().harden(loader, HardenConfig(epochs=3, steps=1), checkpoint_dir=tmp_path, progress=False)
    for role in ("victim", "auxiliary"):
        (tmp_path / role / "epoch-0002.pt").unlink()  # as if killed in the last epoch
    resumed = build().harden(
        loader, HardenConfig(epochs=3, steps=1), checkpoint_dir=tmp_path, resume=True, progress=False
    )
    assert same(weights(resumed), weights(straight))


def test_a_folder_of_another_run_is_refused(loader: DataLoader, tmp_path: Path) -> None:
    build().harden(loader, FAST, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match="holds checkpoints of an earlier run. Pass resume=True"):
        build().harden(loader, FAST, checkpoint_dir=tmp_path, progress=False)
    with pytest.raises(CheckpointError, match=r"belongs to another run: lr was 0\.002, now 0\.001"):
        build().harden(
            loader, HardenConfig(epochs=2, steps=2, lr=1e-3), checkpoint_dir=tmp_path, resume=True, progress=False
        )
    newest = max((tmp_path / "victim").glob("epoch-*.pt"))
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"epoch-0001\.pt cannot be read.*Delete it"):
        build().harden(loader, FAST, checkpoint_dir=tmp_path, resume=True, progress=False)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the victim after the second of two epochs."""
    folder = tmp_path_factory.mktemp("kept")
    data = DataLoader(TensorDataset(*toy_data()), batch_size=16, shuffle=True)
    harden_branch(TinyEncoder(), data, FAST, checkpoint_dir=folder, progress=False)
    return folder / "epoch-0001.pt"


def resumed(path: Path, content: bytes, folder: Path) -> dict[str, Any]:
    (folder / path.name).write_bytes(content)
    fingerprint = torch.load(path, weights_only=True)["fingerprint"]
    state = load_latest(folder, fingerprint)
    assert state is not None
    return state


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_checkpoint_with_any_byte_flipped_cut_off_or_added_is_refused(
    kept: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(kept.read_bytes())
    assert resumed(kept, bytes(content), tmp_path)["epoch"] == 1
    place = data.draw(st.integers(0, len(content) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "add"])):
        case "flip":
            content[place] ^= data.draw(st.integers(1, 255))
        case "cut":
            del content[place:]
        case "add":
            content[place:place] = data.draw(st.binary(min_size=1))
    with pytest.raises(CheckpointError, match=r"epoch-0001.pt cannot be read: .* Delete it to go on from the epoch"):
        resumed(kept, bytes(content), tmp_path)


def vouched(state: Any) -> bytes:
    """A file as of someone who can also write the digest."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"epoch": 7}, "it is of epoch 7 with 2 records, not of its name"),
        ({"epoch": "one"}, "epoch: Input should be a valid integer"),
        ({"epoch": None}, "epoch: "),
        ({"history": []}, "it is of epoch 1 with 0 records"),
        ({"history": [[], []]}, "history.0: Input should be a valid dictionary"),
        ({"weights": {"encoder.conv.weight": 1}}, "weights.encoder.conv.weight: "),
        ({"weights": {"a": torch.tensor([1.0, torch.nan])}}, "its weights are not finite: a"),
        ({"best": {"epoch": 0, "score": 1.0, "weights": {"a": torch.tensor(torch.inf)}}}, "not finite: a"),
        ({"best": {"weights": {}}}, "best.epoch: Field required"),
        ({"batches": 0}, "batches: Input should be greater than 0"),
        ({"more": 1}, "more: Unexpected keyword argument"),
    ],
)
def test_a_checkpoint_of_another_structure_is_refused_by_field(
    kept: Path, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    state = torch.load(kept, weights_only=True)
    with pytest.raises(CheckpointError, match=problem):
        resumed(kept, vouched(state | change), tmp_path)
    del state["optimizer"]
    with pytest.raises(CheckpointError, match="optimizer: Field required"):
        resumed(kept, vouched(state), tmp_path)
    with pytest.raises(CheckpointError, match="holds no training state|more than tensors and plain values"):
        resumed(kept, vouched([Path()] if "more" in change else [1]), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq"),
        lambda state: state["optimizer"]["param_groups"][0].update(betas=(0.9, 2.0)),
        lambda state: state["optimizer"]["param_groups"].pop(),
        lambda state: state.update(optimizer={}),
        lambda state: state["weights"].update({"encoder.backbone.conv.weight": torch.zeros(1)}),
        lambda state: state["weights"].pop("encoder.backbone.conv.weight"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused_and_trains_nothing(
    kept: Path, tmp_path: Path, loader: DataLoader, change: Callable[[Any], object]
) -> None:
    state = torch.load(kept, weights_only=True)
    change(state)
    (tmp_path / kept.name).write_bytes(vouched(state))
    with pytest.raises(CheckpointError, match="is of another architecture: .*Resume with the encoder that it is of"):
        harden_branch(TinyEncoder(), loader, FAST, checkpoint_dir=tmp_path, resume=True, progress=False)


def test_a_checkpoint_that_unpacks_to_more_or_is_no_file_is_refused(kept: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with ZipFile(kept) as source, ZipFile(buffer, "w", ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(CheckpointError, match="is compressed, which torch.save never does"):
        resumed(kept, buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest(), tmp_path)
    (tmp_path / kept.name).unlink()
    os.mkfifo(tmp_path / kept.name)
    with pytest.raises(CheckpointError, match="it is no regular file. Delete it"):
        load_latest(tmp_path, {})


def test_the_newest_epoch_is_the_one_of_the_largest_number(tmp_path: Path) -> None:
    state = {"fingerprint": {}, "batches": 1, "weights": {}, "optimizer": {}, "best": None}
    for epoch in (9_998, 9_999, 10_000):
        save_epoch(tmp_path, epoch, {**state, "epoch": epoch, "history": [{}] * (epoch + 1)})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["epoch-10000.pt", "epoch-9999.pt"]
    latest = load_latest(tmp_path, {})
    assert latest is not None
    assert latest["epoch"] == 10_000


class Normed(TinyEncoder):
    """An encoder that ends in BatchNorm over images alone."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x))


def test_a_batch_of_one_with_batchnorm_says_drop_last() -> None:
    data = TensorDataset(*toy_data(33))
    config = HardenConfig(epochs=1, steps=1, val_fraction=0)
    with pytest.raises(InputError, match=r"a batch of one image, on which BatchNorm .*drop_last=True"):
        harden_branch(Normed(), DataLoader(data, batch_size=16), config, progress=False)
    with pytest.raises(InputError, match=r"drop_last=True"):
        benign = BenignConfig(epochs=1, val_fraction=0)
        train_benign(Normed(), DataLoader(data, batch_size=16), benign, progress=False)
    harden_branch(Normed(), DataLoader(data, batch_size=16, drop_last=True), config, progress=False)
    harden_branch(TinyEncoder(), DataLoader(data, batch_size=16), config, progress=False)


def test_a_folder_that_cannot_be_written_is_refused_before_training(loader: DataLoader, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    started = []

    def spy(*args: object) -> None:
        started.append(args)

    with pytest.raises(InputError, match="cannot be written"):
        build().harden(loader, FAST, objective=spy, checkpoint_dir=tmp_path / "file" / "sub", progress=False)
    assert started == []


LONG = HardenConfig(epochs=8, steps=2)

KILLED = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
sys.path.insert(0, {tests!r})
from tiny import TinyEncoder, toy_data
from zepad import HardenConfig, ZePAD
torch.set_num_threads(1)
torch.manual_seed(3)
defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper")
loader = DataLoader(TensorDataset(*toy_data()), batch_size=16, shuffle=True)
config = HardenConfig(epochs=8, steps=2)
defense.harden(loader, config, checkpoint_dir={folder!r}, progress=False)
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_harden_then_resume_gives_the_undisturbed_weights(
    loader: DataLoader, tmp_path: Path
) -> None:
    folder = tmp_path / "disturbed"
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", code])
    undisturbed = build().harden(loader, LONG, progress=False)
    victim, auxiliary = folder / "victim", folder / "auxiliary"
    deadline = time.monotonic() + 60
    while not list(auxiliary.glob("epoch-000*.pt")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list(victim.glob("epoch-0007.pt"))
    assert not list(auxiliary.glob("epoch-0007.pt"))  # killed before the end
    resumed = build().harden(loader, LONG, checkpoint_dir=folder, resume=True, progress=False)
    assert same(weights(resumed), weights(undisturbed))


@pytest.mark.parametrize("limit", [0, 10**9])
def test_the_feature_cache_gives_back_every_row_in_order(limit: int) -> None:
    rows = torch.rand(23, 5)
    with FeatureCache(limit) as cache:
        for chunk in rows.split(4):
            cache.append(chunk)
        assert torch.equal(cache.rows(), rows)
        folder = cache._folder
    assert (folder is None) == (limit > 0)
    assert folder is None or not Path(folder.name).exists()


def test_a_feature_cache_without_room_says_what_to_do_and_leaves_nothing() -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        with pytest.raises(InputError, match=r"cannot be kept in .*TMPDIR"), FeatureCache(0) as cache:
            cache.append(torch.rand(100, 5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert cache._folder is not None
    assert not Path(cache._folder.name).exists()


def test_heads_are_the_same_from_memory_and_from_disk_and_encoders_see_each_image_once(loader: DataLoader) -> None:
    seen = []

    class Counting(TinyEncoder):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    defense = ZePAD.from_encoders(Counting(), TinyEncoder())
    encoders = {"victim": defense.encoder("victim")}
    ordered = DataLoader(loader.dataset, batch_size=16)
    seen.clear()
    results = [
        fit_heads(encoders, ordered, HeadConfig(epochs=3, cache_bytes=limit), channels=3, num_classes=3, progress=False)
        for limit in (0, 10**9)
    ]
    assert sum(seen) == 2 * len(loader.dataset)
    assert same(weights(results[0]["victim"]), weights(results[1]["victim"]))


def test_seeds_differ_in_every_part_and_seeded_restores_the_generators() -> None:
    assert len({derive_seed(a, b, c) for a in range(4) for b in range(4) for c in range(4)}) == 64
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError), seeded(1):
        torch.rand(5)
        raise ZeroDivisionError
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (HardenConfig, "epochs", 1.5),
        (HardenConfig, "epochs", True),
        (HardenConfig, "lr", "x"),
        (HardenConfig, "lr", 0.0),
        (HeadConfig, "head_lr", None),
        (HardenConfig, "head_lr", True),
        (HardenConfig, "weight_decay", float("nan")),
        (HardenConfig, "val_fraction", "half"),
        (HardenConfig, "seed", 1.0),
        (HardenConfig, "seed", -1),
        (HardenConfig, "eps", "8/255"),
        (HardenConfig, "step_size", "x"),
        (HardenConfig, "steps", True),
        (HardenConfig, "structure_weight", [1]),
        (BenignConfig, "freeze_encoder", 1),
        (HeadConfig, "batch_size", 1.5),
        (HeadConfig, "cache_bytes", "x"),
        (HeadConfig, "head_lr", float("inf")),
    ],
)
def test_settings_of_the_wrong_type_are_refused_by_name(config: type, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} must be .*; got "):
        config(**{field: value})
