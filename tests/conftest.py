"""Fixtures small enough that the whole suite runs on two cores in minutes."""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader

from chromium import launched
from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD, progress

torch.set_num_threads(1)  # tiny models gain nothing from a second thread, and processes do not fight


settings.register_profile("default", max_examples=25, deadline=None)
settings.register_profile("exhaustive", max_examples=200, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Draw many examples of each law where exhaustive tests are asked for, and a few in runs that people wait for."""
    many = config.getoption("markexpr") == "exhaustive" or bool(os.environ.get("CI_EXHAUSTIVE"))
    settings.load_profile("exhaustive" if many else "default")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. Playwright runs an event loop as long as it is open, which tests of other modules may not find."""
    with launched() as started:
        yield started


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that looks a name up."""

    def called(*_: object, **__: object) -> None:
        pytest.fail("a name was looked up on the network")

    monkeypatch.setattr(socket, "getaddrinfo", called)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 60 columns is sent of the progress; standard error is none, and a log stays quiet."""
    sent = io.StringIO()
    console = Console(file=sent, width=60, height=20, force_terminal=True, color_system=None, legacy_windows=False)
    monkeypatch.setattr(progress, "_console", lambda: console)
    monkeypatch.setattr(progress, "_REDRAWN", 0.0)  # a fast machine would skip short stages
    return sent


@pytest.fixture
def tiny() -> nn.Module:
    """A convolutional encoder with BatchNorm, 3x16x16 images to 8 features."""
    return TinyEncoder()


@pytest.fixture
def toy() -> tuple[Tensor, Tensor]:
    """96 separable images of three classes, `(N, 3, 16, 16)` in [0, 1]."""
    return toy_data()


@pytest.fixture
def loader(toy: tuple[Tensor, Tensor]) -> DataLoader:
    return DataLoader(torch.utils.data.TensorDataset(*toy), batch_size=16, shuffle=True)


@pytest.fixture(scope="session")
def _fitted() -> ZePAD:
    torch.manual_seed(1)
    data = DataLoader(torch.utils.data.TensorDataset(*toy_data()), batch_size=16, shuffle=True)
    defense = ZePAD.from_encoders(TinyEncoder(), TinyEncoder(), preset="paper")
    defense.harden(data, HardenConfig(epochs=2, steps=2), progress=False)
    return defense.fit_benign(
        data, BenignConfig(epochs=2), head_config=HeadConfig(epochs=5, batch_size=32), progress=False
    )


@pytest.fixture
def fitted(_fitted: ZePAD) -> ZePAD:
    """A fitted defense on the toy data; a copy for each test."""
    import copy

    return copy.deepcopy(_fitted)
