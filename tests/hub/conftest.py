"""One loopback Hub, and one client process per protocol and setting."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hub.hub_client import HubClient
from hub.hub_server import HubServer

StartClient = Callable[..., HubClient]


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("xet")) as server:
        yield server


@pytest.fixture
def hub(_server: HubServer) -> Iterator[HubServer]:
    """The Hub, empty; whatever a test does, no token may reach the storage origin."""
    _server.reset()
    yield _server
    assert not _server.errors
    assert not [request for request in _server.requests if request.origin == "storage" and request.authorization]


@pytest.fixture(scope="session")
def _start(_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartClient]:
    started: dict[str, HubClient] = {}
    with ExitStack() as processes:

        def start(name: str, **environment: str) -> HubClient:
            if name not in started:
                own = {
                    "HF_ENDPOINT": _server.endpoint,
                    "HF_HOME": str(tmp_path_factory.mktemp(name)),
                    "HF_TOKEN": "",
                    "NO_PROXY": "127.0.0.1,localhost",
                    **environment,
                }
                started[name] = processes.enter_context(HubClient(own))
            return started[name]

        yield start


@pytest.fixture
def lfs(_start: StartClient) -> HubClient:
    """A client that talks plain HTTP."""
    return _start("lfs", HF_HUB_DISABLE_XET="1")


@pytest.fixture
def xet(_start: StartClient) -> HubClient:
    """A client that talks Xet."""
    if importlib.util.find_spec("hf_xet") is None:
        pytest.skip("hf_xet is not there")
    return _start("xet", HF_HUB_DISABLE_XET="0")


@pytest.fixture
def offline(_start: StartClient) -> HubClient:
    """A client that is told not to go online."""
    return _start("offline", HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE="1")


@pytest.fixture(params=["lfs", "xet"])
def client(request: pytest.FixtureRequest) -> HubClient:
    """Either client."""
    either: HubClient = request.getfixturevalue(request.param)
    return either


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved model, and things beside it that are nobody's business."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"library": "zepad", "format": 1}')
    (path / "README.md").write_text("---\nlibrary_name: zepad\n---\n# A model\n")
    (path / "victim.safetensors").write_bytes(b"victim" * 1000)
    (path / "heads.safetensors").write_bytes(b"heads" * 1000)
    (path / "optimizer.pt").write_bytes(b"of no concern")
    (path / "secret.txt").write_text("of no concern")
    return path
