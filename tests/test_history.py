"""Learning curves: every epoch that was trained is in the records, the data frame and the picture."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, CheckpointError, ConfigError, HardenConfig, HeadConfig, InputError, StageError, ZePAD
from zepad.history import COLUMNS, TrainingHistory
from zepad.objectives import fare, gen_af


@pytest.fixture(scope="module")
def trained() -> ZePAD:
    loader = DataLoader(TensorDataset(*toy_data()), batch_size=16)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper")
    config = HardenConfig(epochs=3, steps=1)
    defense.harden(loader, config, objective=gen_af(probes=16, adaptation_epochs=2), progress=False)
    return defense.fit_benign(loader, BenignConfig(epochs=2), head_config=HeadConfig(epochs=1), progress=False)


RUNS = [
    *[("victim", "hardening", epoch) for epoch in (1, 2, 3)],
    *[("auxiliary", "hardening", epoch) for epoch in (1, 2, 3)],
    *[("victim", "adaptation", epoch) for epoch in (1, 2)],
    *[("auxiliary", "adaptation", epoch) for epoch in (1, 2)],
    *[("benign", "benign", epoch) for epoch in (1, 2)],
]


def test_the_records_are_those_of_every_epoch_also_of_a_loaded_model(trained: ZePAD, tmp_path: Path) -> None:
    history = trained.history
    assert [(record["branch"], record["stage"], record["epoch"]) for record in history] == RUNS
    assert {*history[0]} == {*COLUMNS}
    assert {*history[-1]} == {name for name in COLUMNS if "adversarial" not in name}
    assert [record["step"] for record in history[:3]] == [6, 12, 18]
    assert [record["loss"] for record in history[-2:]] == [r["loss"] for r in trained.provenance["benign"]["history"]]
    trained.save_pretrained(tmp_path)
    loaded = ZePAD.from_pretrained(tmp_path, victim=TinyEncoder(), auxiliary=TinyEncoder())
    assert list(loaded.history) == list(history)
    assert repr(history).startswith("TrainingHistory(epochs: victim, hardening 3, auxiliary, hardening 3, ")


def test_the_data_frame_has_the_same_columns_and_types_whatever_was_measured(
    trained: ZePAD, loader: DataLoader
) -> None:
    unlabelled = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    unlabelled.harden([toy[0] for toy in loader], HardenConfig(epochs=1, steps=1), objective=fare(), progress=False)
    older = TrainingHistory.of({"benign": {"history": [{"loss": 0.5, "benign_accuracy": 0.75}]}})
    histories = [trained.history, unlabelled.history, older, TrainingHistory()]
    frames = [history.to_frame() for history in histories]
    for history, frame in zip(histories, frames, strict=True):
        assert tuple(frame.columns) == COLUMNS
        assert len(frame) == len(history)
        for row, record in zip(frame.to_dict("records"), history, strict=True):
            assert {name: value for name, value in row.items() if not pandas.isna(value)} == record
    assert all((frame.dtypes == frames[0].dtypes).all() for frame in frames)
    assert math.isnan(frames[2]["lr"][0])


def test_without_pandas_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"pandas is not installed. Install it with: pip install 'zepad\[pandas\]'"):
        TrainingHistory().to_frame()


def inked(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(image.convert("RGB")) == colour).all(axis=-1).sum())


def test_the_picture_shows_what_was_measured(trained: ZePAD, tmp_path: Path) -> None:
    path = trained.history.plot(tmp_path / "new" / "curves.png")
    with Image.open(path) as whole, Image.open(io.BytesIO(trained.history[-2:].png())) as benign:
        assert whole.width > benign.width
        attacked, clean = (0xC2, 0x57, 0x1A), (0x1F, 0x6F, 0x9F)
        assert inked(whole, attacked) > 0
        assert inked(benign, attacked) == 0 < inked(benign, clean)  # the benign branch is not attacked in training
    path.write_bytes(b"old")
    trained.history.plot(str(path))
    assert path.read_bytes() == trained.history.png()


def test_what_cannot_be_drawn_or_written_is_refused(trained: ZePAD, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"no learning curves: nothing was trained. Call harden\(loader\) first"):
        ZePAD.from_encoders(TinyEncoder(), TinyEncoder()).history.plot(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"path must end in .png; got '.*a.jpg'"):
        trained.history.plot(tmp_path / "a.jpg")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written: .*Choose a writable folder"):
        trained.history.plot(tmp_path / "file" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("records", [3, ["a"], [{"lr": 1.0}], [{"loss": "x"}], [{"loss": 1.0}, {"loss": 1.0, "lr": 1}]])
def test_a_history_that_zepad_did_not_write_is_refused(records: Any) -> None:
    for provenance in (
        {"harden": {"history": {"victim": records}}},
        {"harden": {"history": [records]}},
        {"benign": {"history": records}},
    ):
        with pytest.raises(CheckpointError, match="the training history is not as zepad writes it"):
            TrainingHistory.of(provenance)
