"""Faults while training: killed at any moment or out of room, it goes on to the weights of an undisturbed run."""

from __future__ import annotations

import multiprocessing
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, CheckpointError, HardenConfig, HeadConfig, ZePAD
from zepad.modules import Branch
from zepad.training import harden_branch, train_benign


def seeds(few: int, many: int) -> Any:
    """A few seeds in the tests that people wait for, and the others among the exhaustive ones."""
    return pytest.mark.parametrize(
        "seed", [seed if seed < few else pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(many)]
    )


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# killed -----------------------------------------------------------------------------------------------------------


def train(folder: Path, result: Path) -> None:
    """Harden and fit a tiny defense, going on from what the folder holds, and write its weights."""
    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(*toy_data(48)), batch_size=16, shuffle=True)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder())
    kept: Any = {"resume": True, "progress": False}
    defense.harden(loader, HardenConfig(epochs=3, steps=1), checkpoint_dir=folder / "harden", **kept)
    heads = HeadConfig(epochs=1)
    defense.fit_benign(loader, BenignConfig(epochs=3), head_config=heads, checkpoint_dir=folder / "benign", **kept)
    save_file({key: value.clone() for key, value in defense.state_dict().items()}, result)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], float]:
    """The weights of an undisturbed run, and how many seconds it takes in a process that has done it before."""
    folder, seconds = tmp_path_factory.mktemp("undisturbed"), 0.0
    for number in range(2):
        start = time.monotonic()
        train(folder / str(number), folder / "weights")
        seconds = time.monotonic() - start
    return load_file(folder / "weights"), seconds


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # a child that hangs is killed
@seeds(few=1, many=8)
def test_killed_at_random_moments_it_ends_with_the_undisturbed_weights(
    undisturbed: tuple[dict[str, Tensor], float], tmp_path: Path, seed: int
) -> None:
    expected, seconds = undisturbed
    warm = multiprocessing.get_context("fork")  # the child has imported everything already
    moments, kills, exitcode = random.Random(seed), 0, None
    while exitcode != 0:
        process = warm.Process(target=train, args=(tmp_path, tmp_path / "weights"))
        process.start()
        process.join(moments.uniform(0, seconds * (1 + kills) / 2))  # later each time, so that it comes to an end
        process.kill()
        process.join()
        exitcode = process.exitcode
        assert exitcode in (0, -signal.SIGKILL)  # it never fails on what the kill before has left
        kills += exitcode != 0
    assert same(load_file(tmp_path / "weights"), expected)
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]  # and leaves nothing half written behind


# out of room ------------------------------------------------------------------------------------------------------


class Filling:
    """A loader that fills the disk when it is read for the n-th time: no file grows beyond a size any more."""

    def __init__(self, passes: int, size: int) -> None:
        self.passes, self.size = passes, size
        self.batches = list(zip(*(part.split(16) for part in toy_data()), strict=True))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes -= 1
        if not self.passes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        yield from self.batches


@pytest.fixture
def room() -> Iterator[Callable[[], None]]:
    """Makes room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def make() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    yield make
    make()


def _harden(loader: Any, **kept: Any) -> Branch:
    torch.manual_seed(0)
    config = HardenConfig(epochs=4, steps=1)
    return harden_branch(TinyEncoder(), loader, config, num_classes=3, progress=False, **kept)[0]


def _fit(loader: Any, **kept: Any) -> Branch:
    torch.manual_seed(0)
    return train_benign(TinyEncoder(), loader, BenignConfig(epochs=4), num_classes=3, progress=False, **kept)[0]


@pytest.mark.parametrize("stage", [_harden, _fit])
@seeds(few=3, many=10)
def test_out_of_room_it_says_so_keeps_the_newest_good_epoch_and_goes_on_once_there_is_room(
    stage: Callable[..., Branch], room: Callable[[], None], tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    number, size = draw.randint(1, 4), draw.randint(0, 10_000)  # less than a checkpoint of either
    with pytest.raises(CheckpointError) as caught:
        stage(Filling(number, size), checkpoint_dir=tmp_path)
    room()
    kept = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert [path.name for path in kept] == [f"epoch-{epoch:04d}.pt" for epoch in range(number - 1)][-2:]
    said = f"The last good checkpoint is {kept[-1]}" if kept else "No checkpoint was kept"
    assert f"epoch-{number - 1:04d}.pt cannot be written: " in str(caught.value)
    assert f"{said}. Make room, and go on with resume=True." in str(caught.value)
    resumed = stage(Filling(0, 0), checkpoint_dir=tmp_path, resume=True)
    assert same(resumed.state_dict(), stage(Filling(0, 0)).state_dict())
