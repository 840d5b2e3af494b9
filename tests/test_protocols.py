"""The evaluation protocols on tiny encoders: the data of each training step, and the attackers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, CheckpointError, ConfigError, HardenConfig, HeadConfig, protocols
from zepad.attacks import PAPBase, UniversalFeatureAttack
from zepad.evaluation import EvalReport, statistics
from zepad.protocols import ABLATION, Protocol, ablation, matched, measure, slug, transfer

EPS = 8 / 255
QUICK = Protocol(
    eps=EPS,
    harden=HardenConfig(eps=EPS, epochs=1, steps=1),
    benign=BenignConfig(epochs=2),
    heads=HeadConfig(epochs=5, batch_size=32),
    steps=2,
    queries=3,
    universal={"PAP": PAPBase(eps=EPS, epochs=1), "cosine": UniversalFeatureAttack(eps=EPS, epochs=1)},
    progress=False,
)


FEW = replace(QUICK, plus=False, universal={})


@pytest.fixture(scope="module", autouse=True)
def _only_what_is_trained_and_attacked() -> Iterator[None]:
    """Neither sanity checks nor intervals depend on the experiment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, "evaluate", partial(protocols.evaluate, sanity=False))
        patch.setattr(statistics, "_RESAMPLES", 20)
        yield


def make_encoders() -> tuple[TinyEncoder, TinyEncoder]:
    torch.manual_seed(2)
    return TinyEncoder(), TinyEncoder()


def make_loader(images, labels) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size=12)


TRAIN, TEST = make_loader(*toy_data()), make_loader(*toy_data(24, seed=9))


@pytest.fixture(scope="module")
def taken_apart() -> dict[str, EvalReport]:
    return ablation(*make_encoders(), TRAIN, TEST, protocol=QUICK)


def test_matched_scores_both_models_and_saves_the_reports(tmp_path) -> None:
    encoders = make_encoders()
    before = [{k: v.clone() for k, v in encoder.state_dict().items()} for encoder in encoders]
    reports = matched(*encoders, TRAIN, TEST, protocol=FEW, folder=tmp_path)
    assert list(reports) == ["undefended", "ZePAD"]
    undefended, zepad = reports.values()
    assert undefended.images == zepad.images == 24
    assert set(zepad.benign_branches) == {"victim", "auxiliary", "benign"}
    assert not undefended.benign_branches
    assert zepad.groups == ("semi-black-box", "white-box")  # without plus nobody attacks both encoders
    for name, report in reports.items():
        assert EvalReport.load(tmp_path / slug(name)) == report
    for encoder, weights in zip(encoders, before, strict=True):  # copied, never modified
        assert all(torch.equal(weights[k], v) for k, v in encoder.state_dict().items())


def test_all_models_meet_the_same_public_attackers(taken_apart) -> None:
    undefended, zepad = taken_apart["nothing"], taken_apart["all"]
    for group in ("semi-black-box", "semi-black-box+"):
        own = [[(a.name, a.settings) for a in report.group(group)] for report in (undefended, zepad)]
        assert own[0] == own[1]
        assert len(own[0]) == 3
    assert len(zepad.group("white-box")) > len(undefended.group("white-box")) == 3


def test_a_folder_of_other_models_is_refused(tmp_path) -> None:
    def run(seed: int) -> None:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(TinyEncoder(), torch.nn.Linear(8, 3))
        models = {"a model": model}
        measure(models, TEST, public={}, surrogate=TRAIN, num_classes=3, protocol=FEW, folder=tmp_path)

    run(0)
    run(0)
    with pytest.raises(CheckpointError, match="model_digest"):
        run(1)


def test_transfer_fits_heads_of_the_new_task_on_encoders_of_the_old() -> None:
    images, labels = toy_data(48, seed=5)
    task = make_loader(images, labels % 2)
    reports = transfer(*make_encoders(), TRAIN, task, task, protocol=FEW)
    assert list(reports) == ["undefended", "ZePAD"]
    assert reports["ZePAD"].images == 48
    # Chance is one half: heads of the old task, which has three classes, would not reach it.
    assert reports["ZePAD"].benign_accuracy.value > 0.6


def test_the_ablation_takes_each_part_away(taken_apart) -> None:
    reports = taken_apart
    assert tuple(reports) == ABLATION
    branches = {name: set(report.benign_branches) for name, report in reports.items()}
    assert branches == {
        "nothing": set(),
        "no adversarial tuning": {"victim", "auxiliary", "benign"},
        "no MPAE": {"victim", "benign"},
        "no BMP": {"victim", "auxiliary"},
        "all": {"victim", "auxiliary", "benign"},
    }
    everything, no_bmp, untuned = reports["all"], reports["no BMP"], reports["no adversarial tuning"]
    # The same trained parts, not new ones.
    assert no_bmp.benign_branches["victim"] == everything.benign_branches["victim"]
    assert untuned.benign_branches["benign"] == everything.benign_branches["benign"]
    assert untuned.benign_branches["victim"] == reports["nothing"].benign_accuracy
    assert no_bmp.threshold is None  # without the benign branch there is no confidence gap
    assert everything.threshold is not None


@pytest.mark.parametrize("change", [{"eps": 10}, {"steps": 0}, {"queries": 0}])
def test_a_bad_protocol_is_refused(change) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Protocol(**change)


def test_a_slug_is_one_part_of_a_path() -> None:
    assert slug("no BMP") == "no-bmp"
    assert slug("/tmp/a model") == "tmp-a-model"
    assert slug("../..") == "model"
