"""A push or a pull is killed, or the disk is full: the Hub and the folder hold the old model or the new one, whole."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faults import COMMAND, WarmProcess
from hub.hub_server import WRITER, HubServer
from tiny import TinyEncoder
from zepad import ZePAD
from zepad.persistence.folder import OpenedFolder

ID = "alice/m"

PRELUDE = "import torch; torch.set_num_threads(1)" + COMMAND
PUSH = 'command("push", folder, "alice/m", "--token", token)'
PULL = 'command("pull", "alice/m", folder, "--token", token)'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two saved models, of which no file but the config's name is alike."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("old", "new")):
        torch.manual_seed(seed)
        ZePAD.from_encoders(TinyEncoder(), TinyEncoder()).save_pretrained(folder / name)
        (folder / name / "README.md").write_text(f"# The {name} card\n")
    return {name: folder / name for name in ("old", "new")}


@pytest.fixture(scope="module")
def warm(_server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmProcess]:
    home = tmp_path_factory.mktemp("home")
    environment = {"HF_ENDPOINT": _server.endpoint, "HF_HOME": str(home), "HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1"}
    with WarmProcess(PRELUDE, {**environment, "NO_PROXY": "127.0.0.1,localhost"}) as process:
        yield process


def contents(folder: Path) -> dict[str, bytes]:
    with OpenedFolder(folder) as opened:
        names = ("config.json", "README.md", *opened.config.own_files)
        return {name: opened.read(name, limit=2**20) for name in names}


@pytest.mark.exhaustive
def test_a_killed_push_leaves_the_old_commit_or_the_new_one(
    warm: WarmProcess, hub: HubServer, models: dict[str, Path]
) -> None:
    moments = random.Random(0)
    assert warm.run(PUSH, folder=models["old"], token=WRITER).error is None
    old = hub.files(ID)
    measured = warm.run(PUSH, folder=models["new"], token=WRITER)
    assert measured.error is None
    new = hub.files(ID)
    assert old.keys() == new.keys()
    killed = 0
    for _ in range(6):
        assert warm.run(PUSH, folder=models["old"], token=WRITER).error is None
        killed += warm.run(PUSH, after=moments.uniform(0, measured.seconds), folder=models["new"], token=WRITER).killed
        assert hub.files(ID) in (old, new)
        assert warm.run(PUSH, folder=models["new"], token=WRITER).error is None
        assert hub.files(ID) == new
    assert killed


@pytest.mark.exhaustive
def test_a_killed_pull_leaves_the_old_model_or_the_new_one(
    warm: WarmProcess, hub: HubServer, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    old, new = contents(models["old"]), contents(models["new"])
    assert warm.run(PUSH, folder=models["new"], token=WRITER).error is None
    assert warm.run(PULL, folder=folder, token=WRITER).error is None  # the files are in the cache from now on
    events = warm.run(PULL, within=folder, folder=folder, token=WRITER).events
    for at in range(1 + events % 2, events + 1, 2):
        shutil.rmtree(folder)
        shutil.copytree(models["old"], folder)
        (folder / "notes.txt").write_text("the user's own")
        assert warm.run(PULL, within=folder, at=at, folder=folder, token=WRITER).killed
        assert contents(folder) in (old, new)
        assert warm.run(PULL, folder=folder, token=WRITER).error is None
        assert contents(folder) == new
        assert {path.name for path in folder.iterdir()} == {*new, "notes.txt"}


def test_a_pull_to_a_full_disk_leaves_the_old_model(
    warm: WarmProcess, hub: HubServer, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["old"], folder)
    assert warm.run(PUSH, folder=models["new"], token=WRITER).error is None
    assert warm.run(PULL, folder=tmp_path / "elsewhere", token=WRITER).error is None  # it is in the cache from now on
    for largest in (0, 100, 1000):
        outcome = warm.run(PULL, largest_file=largest, folder=folder, token=WRITER)
        assert outcome.error
        assert contents(folder) == contents(models["old"])


@pytest.mark.parametrize("killed_at", ["committed", "half in place"])
def test_a_push_sends_an_interrupted_save_whole(
    warm: WarmProcess, hub: HubServer, models: dict[str, Path], tmp_path: Path, killed_at: str
) -> None:
    """Where a process died after it committed a save, the model in the folder is the new one."""
    folder = tmp_path / "model"
    shutil.copytree(models["old"], folder)
    shutil.copytree(models["new"], folder / ".zepad-saved")
    if killed_at == "half in place":
        for name in ("config.json", "victim.safetensors"):
            (folder / ".zepad-saved" / name).replace(folder / name)
    shutil.copytree(models["old"], folder / ".zepad-next")  # and another died while it wrote
    assert contents(folder) == contents(models["new"])
    assert warm.run(PUSH, folder=folder, token=WRITER).error is None
    assert hub.files(ID).keys() == contents(models["new"]).keys()
    assert warm.run(PUSH, folder=models["new"], token=WRITER).error is None
    assert len(hub.history(ID)) == 1, "the second push has nothing to send"


@pytest.mark.parametrize("name", ["README.md", "config.json", "victim.safetensors"])
def test_a_push_follows_no_link(
    warm: WarmProcess, hub: HubServer, models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder, secret = tmp_path / "model", tmp_path / "id_rsa"
    shutil.copytree(models["old"], folder)
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    error = warm.run(PUSH, folder=folder, token=WRITER).error
    assert f"{name} cannot be read: it is a symbolic link. Put a copy of what it points at in its place" in str(error)
    assert not hub.requests
