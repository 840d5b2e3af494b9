"""The experiments of the field, on tiny encoders: what is trained on what, and by whom it is attacked."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, CheckpointError, ConfigError, HardenConfig, HeadConfig
from zepad.attacks import PAPBase, UniversalFeatureAttack
from zepad.evaluation import EvalReport
from zepad.protocols import ABLATION, Protocol, ablation, matched, slug, transfer

pytestmark = pytest.mark.filterwarnings("ignore::zepad.errors.EvaluationWarning")  # one epoch defends nothing

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


@pytest.fixture
def encoders():
    torch.manual_seed(2)
    return TinyEncoder(), TinyEncoder()


@pytest.fixture
def test_loader():
    return DataLoader(TensorDataset(*toy_data(24, seed=9)), batch_size=12)


def test_matched_scores_both_models_by_the_same_public_attackers_and_saves_the_reports(
    encoders, loader, test_loader, tmp_path
) -> None:
    before = [{k: v.clone() for k, v in encoder.state_dict().items()} for encoder in encoders]
    reports = matched(*encoders, loader, test_loader, protocol=QUICK, folder=tmp_path)
    assert list(reports) == ["undefended", "ZePAD"]
    undefended, zepad = reports.values()
    for group in ("semi-black-box", "semi-black-box+"):
        own = [[(a.name, a.settings) for a in report.group(group)] for report in (undefended, zepad)]
        assert own[0] == own[1]
        assert len(own[0]) == 3
    assert undefended.images == zepad.images == 24
    assert set(zepad.benign_branches) == {"victim", "auxiliary", "benign"}
    assert not undefended.benign_branches
    assert len(zepad.group("white-box")) > len(undefended.group("white-box")) == 3
    for name, report in reports.items():
        assert EvalReport.load(tmp_path / slug(name)) == report
    for encoder, weights in zip(encoders, before, strict=True):  # copied, never modified
        assert all(torch.equal(weights[k], v) for k, v in encoder.state_dict().items())


def test_matched_refuses_a_folder_of_other_models(encoders, loader, test_loader, tmp_path) -> None:
    few = Protocol(**{**vars(QUICK), "plus": False, "universal": {}})
    matched(*encoders, loader, test_loader, protocol=few, folder=tmp_path)
    others = TinyEncoder(), TinyEncoder()
    with pytest.raises(CheckpointError, match="model_digest"):
        matched(*others, loader, test_loader, protocol=few, folder=tmp_path)


def test_transfer_fits_heads_of_the_new_task_on_encoders_of_the_old(encoders, loader) -> None:
    images, labels = toy_data(48, seed=5)
    task = DataLoader(TensorDataset(images, labels % 2), batch_size=24)
    reports = transfer(*encoders, loader, task, task, protocol=QUICK)
    assert list(reports) == ["undefended", "ZePAD"]
    assert reports["ZePAD"].images == 48
    # Chance is one half: heads of the old task, which has three classes, would not reach it.
    assert reports["ZePAD"].benign_accuracy.value > 0.6


def test_the_ablation_takes_each_part_away(encoders, loader, test_loader) -> None:
    reports = ablation(*encoders, loader, test_loader, protocol=QUICK)
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


def test_without_plus_nobody_attacks_both_encoders(encoders, loader, test_loader) -> None:
    protocol = Protocol(**{**vars(QUICK), "plus": False})
    assert matched(*encoders, loader, test_loader, protocol=protocol)["ZePAD"].groups == (
        "semi-black-box",
        "white-box",
    )


@pytest.mark.parametrize("change", [{"eps": 10}, {"steps": 0}, {"queries": 0}])
def test_a_bad_protocol_is_refused(change) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        Protocol(**change)


def test_a_slug_is_one_part_of_a_path() -> None:
    assert slug("no BMP") == "no-bmp"
    assert slug("/tmp/a model") == "tmp-a-model"
    assert slug("../..") == "model"
