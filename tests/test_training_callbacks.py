"""Callbacks and trackers: what they are told, how they stop a training, and that they change nothing else."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tiny import TinyEncoder
from zepad import BenignConfig, ConfigError, HardenConfig, HeadConfig, InputError, ZePAD
from zepad.objectives import gen_af
from zepad.training import Callback, StopTraining, Tracker, TrainingStatus, harden_branch

FAST = HardenConfig(epochs=3, steps=1)
UPDATES = 6  # of an epoch: 86 images in batches of 16


class Told(Callback):
    """Keeps what it is told; draws random numbers and tries to change what it is given."""

    def __init__(self) -> None:
        self.begun: list[TrainingStatus] = []
        self.steps: list[TrainingStatus] = []
        self.epochs: list[TrainingStatus] = []

    def on_stage_begin(self, status: TrainingStatus) -> None:
        self.begun.append(status)

    def on_step_end(self, status: TrainingStatus) -> None:
        self.steps.append(status)
        random.random(), np.random.rand(3), torch.rand(5)  # noqa: NPY002
        torch.manual_seed(0)

    def on_epoch_end(self, status: TrainingStatus) -> None:
        self.epochs.append(status)


class Stop(Callback):
    """Stops each branch once a number of epochs is complete."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_stage_begin(self, status: TrainingStatus) -> None:
        if status.epoch >= self.epochs:
            raise StopTraining

    on_epoch_end = on_stage_begin


def build() -> ZePAD:
    torch.manual_seed(3)
    return ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper")


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_callback_is_told_everything_and_changes_nothing(loader: DataLoader) -> None:
    told, alone = Told(), build().harden(loader, FAST, progress=False)
    defense = build().harden(loader, FAST, progress=False, callbacks=[told])
    assert same(weights(defense), weights(alone))
    history = defense.provenance["harden"]["history"]
    assert history == alone.provenance["harden"]["history"]
    assert [(status.branch, status.epoch, status.step) for status in told.begun] == [
        ("victim", 0, 0),
        ("auxiliary", 0, 0),
    ]
    for branch in ("victim", "auxiliary"):
        steps = [status for status in told.steps if status.branch == branch]
        epochs = [status for status in told.epochs if status.branch == branch]
        assert [status.step for status in steps] == list(range(1, 3 * UPDATES + 1))
        assert [status.epoch for status in steps] == [0] * UPDATES + [1] * UPDATES + [2] * UPDATES
        assert [(status.epoch, status.step) for status in epochs] == [(1, 6), (2, 12), (3, 18)]
        assert [status.metrics for status in epochs] == history[branch] == list(epochs[-1].history)
        assert all((status.stage, status.epochs) == ("hardening", 3) for status in (*steps, *epochs))
        assert [status.metrics["lr"] for status in steps] == sorted((s.metrics["lr"] for s in steps), reverse=True)
        losses = [status.metrics["loss"] for status in steps[:UPDATES]]
        sizes = [16, 16, 16, 16, 16, 6]
        assert np.average(losses, weights=sizes) == pytest.approx(history[branch][0]["loss"])
    with pytest.raises(TypeError):
        told.epochs[0].history[0]["loss"] = 0.0  # type: ignore[index]


def test_the_stages_of_a_defense_are_named(loader: DataLoader) -> None:
    told, quick = Told(), HardenConfig(epochs=1, steps=1)
    objective = gen_af(probes=16, adaptation_epochs=1)
    defense = build().harden(loader, quick, objective=objective, progress=False, callbacks=[told])
    benign = BenignConfig(epochs=1)
    defense.fit_benign(loader, benign, head_config=HeadConfig(epochs=1), progress=False, callbacks=[told])
    assert [(status.stage, status.branch) for status in told.begun] == [
        *((stage, branch) for branch in ("victim", "auxiliary") for stage in ("hardening", "adaptation")),
        ("benign", "benign"),
    ]


def test_a_stopped_branch_is_the_best_so_far_and_goes_on_where_it_stopped(loader: DataLoader, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder, told = TinyEncoder(), Told()
    kept: dict[str, Any] = {"checkpoint_dir": tmp_path, "progress": False}
    _, whole = harden_branch(encoder, loader, FAST, progress=False)
    stopped, history = harden_branch(encoder, loader, FAST, callbacks=[Stop(2), told], **kept)
    assert history["hardening"] == whole["hardening"][:2]
    assert len(told.epochs) == 2  # also the callbacks behind the one that stops are told
    again, _ = harden_branch(encoder, loader, FAST, callbacks=[Stop(2)], resume=True, **kept)
    assert same(weights(again), weights(stopped))  # stopped again before it trained any further
    resumed, history = harden_branch(encoder, loader, FAST, resume=True, callbacks=[told], **kept)
    assert history["hardening"] == whole["hardening"]
    undisturbed, _ = harden_branch(encoder, loader, FAST, progress=False)
    assert same(weights(resumed), weights(undisturbed))
    assert [(status.epoch, status.step) for status in told.begun] == [(0, 0), (2, 12)]


def test_a_stop_amid_an_epoch_waits_for_its_end_and_one_before_the_first_for_that(loader: DataLoader) -> None:
    class Amid(Callback):
        def on_step_end(self, status: TrainingStatus) -> None:
            if status.step == UPDATES + 1:
                raise StopTraining

    assert len(harden_branch(TinyEncoder(), loader, FAST, progress=False, callbacks=[Amid()])[1]["hardening"]) == 2
    assert len(harden_branch(TinyEncoder(), loader, FAST, progress=False, callbacks=[Stop(0)])[1]["hardening"]) == 1


@pytest.mark.parametrize("event", ["on_stage_begin", "on_step_end", "on_epoch_end"])
def test_an_error_in_a_callback_leaves_the_model_unchanged_and_the_epochs_kept(
    loader: DataLoader, tmp_path: Path, event: str
) -> None:
    def fail(status: TrainingStatus) -> None:
        if status.branch == "auxiliary":
            raise KeyError("mine")

    failing = Callback()
    setattr(failing, event, fail)
    defense = build()
    before = weights(defense)
    with pytest.raises(KeyError, match="mine"):
        defense.harden(loader, FAST, checkpoint_dir=tmp_path, progress=False, callbacks=[failing])
    assert defense.stage == "built"
    assert same(weights(defense), before)
    assert "harden" not in defense.provenance
    assert len(list((tmp_path / "auxiliary").glob("*.pt"))) == (1 if event == "on_epoch_end" else 0)


def test_what_is_no_callback_is_refused(loader: DataLoader) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\[0\] must be a Callback; got the class Told. Pass an object"):
        build().harden(loader, FAST, callbacks=[Told])  # type: ignore[list-item]


# trackers ---------------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in the TensorBoard files of a folder: steps and values by tag, in the order of the steps."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for path in sorted(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] += [(event.step, event.value) for event in events.Scalars(tag)]
    return {tag: sorted(values) for tag, values in found.items()}


def curve(history: list[dict[str, float]], name: str, before: int) -> list[Any]:
    return [(before + record["step"], pytest.approx(record[name])) for record in history]


def test_tensorboard_files_hold_every_epoch_of_every_branch(loader: DataLoader, tmp_path: Path) -> None:
    with Tracker("tensorboard", tmp_path, log_every=4, config={"eps": 0.1, "note": "x", "lr": None}) as tracker:
        defense = build().harden(loader, FAST, progress=False, callbacks=[tracker])
        benign, heads = BenignConfig(epochs=2), HeadConfig(epochs=1)
        defense.fit_benign(loader, benign, head_config=heads, progress=False, callbacks=[tracker])
    found = scalars(tmp_path / "zepad")
    history = {**defense.provenance["harden"]["history"], "benign": defense.provenance["benign"]["history"]}
    names = {"loss", "lr", "head_lr", "benign_accuracy", "val_benign_accuracy"}
    attacked = {"adversarial_accuracy", "val_adversarial_accuracy"}
    for branch, before in (("victim", 0), ("auxiliary", 18), ("benign", 36)):
        shown = names | (set() if branch == "benign" else attacked)
        shown &= history[branch][0].keys()
        assert {"loss", "lr", "val_benign_accuracy"} <= shown
        for name in shown:
            assert found[f"{branch}/{name}"] == curve(history[branch], name, before)
        steps = 2 * UPDATES if branch == "benign" else 3 * UPDATES
        assert [step for step, _ in found[f"{branch}/step/loss"]] == [before + n for n in range(4, steps + 1, 4)]
    assert len(list((tmp_path / "zepad").rglob("hparams.yml"))) == 1


def test_a_resumed_training_logs_on_from_where_it_was(loader: DataLoader, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with Tracker("tensorboard", whole) as tracker:
        build().harden(loader, FAST, progress=False, callbacks=[tracker])
    kept: dict[str, Any] = {"checkpoint_dir": tmp_path / "kept", "progress": False}

    class Killed(Callback):
        def on_epoch_end(self, status: TrainingStatus) -> None:
            if (status.branch, status.epoch) == ("auxiliary", 2):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Tracker("tensorboard", parts) as tracker:
        build().harden(loader, FAST, callbacks=[tracker, Killed()], **kept)
    with Tracker("tensorboard", parts) as tracker:
        build().harden(loader, FAST, callbacks=[tracker], resume=True, **kept)
    assert scalars(parts / "zepad") == scalars(whole / "zepad")


class Own(GeneralTracker):
    """A tracker of one's own."""

    name = "own"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    @property
    def tracker(self) -> Any:
        return self.logged

    def log(self, values: dict[str, float], step: int, **_: object) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_a_tracker_of_ones_own_is_given_each_epoch_and_ended_once(loader: DataLoader, tmp_path: Path) -> None:
    own = Own()
    with Tracker([own, "tensorboard"], tmp_path) as tracker:
        _, history = harden_branch(TinyEncoder(), loader, FAST, progress=False, callbacks=[tracker])
        assert own.finished == 0
    assert own.finished == 1
    assert [step for step, _ in own.logged] == [6, 12, 18]
    for (_, values), record in zip(own.logged, history["hardening"], strict=True):
        assert values.pop("encoder/epoch") in (1, 2, 3)
        assert values == {f"encoder/{name}": value for name, value in record.items() if name != "step"}
    assert "encoder/loss" in scalars(tmp_path / "zepad")


def test_bad_settings_of_a_tracker_are_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match=r"wandb is not installed. Install it with: pip install wandb\."):
        Tracker("wandb")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"log_with must name one of .*tensorboard.*wandb.*; got 'tensorbord'\."):
        Tracker(["tensorbord"], tmp_path)
    with pytest.raises(ConfigError, match=r'writes files. Say where: Tracker\("tensorboard", project_dir="runs"\)'):
        Tracker("tensorboard")
    with pytest.raises(ConfigError, match="log_with must be at least one tracker"):
        Tracker([])
    with pytest.raises(ConfigError, match="log_every must be at least 1, or None; got 0"):
        Tracker("tensorboard", tmp_path, log_every=0)
    with pytest.raises(ConfigError, match="log_with must be a string, a GeneralTracker or a list"):
        Tracker(3)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_ends_the_call(loader: DataLoader, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tracker = Tracker("tensorboard", tmp_path / "file")
    with pytest.raises(InputError, match=r"project_dir .*file cannot be written: .*Choose a writable folder"):
        build().harden(loader, FAST, progress=False, callbacks=[tracker])
