"""A load takes every file from one commit, repeats damaged downloads, and raises an error that says what to do."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from hub.hub_client import HubClient
from hub.hub_server import READER, STRANGER, WRITER, HubServer
from zepad.errors import CheckpointError, HubError

ID = "alice/m"
CONFIG, WEIGHTS = b'{"library": "zepad", "format": 1}', b"weights" * 1000
MODEL = {"config.json": CONFIG, "victim.safetensors": WEIGHTS}
RESOLVED = "/resolve/"


class Loader:
    """Loads through a client with a cache of its own."""

    def __init__(self, client: HubClient, cache: Path) -> None:
        self.client, self.cache = client, cache

    def __call__(self, repo_id: str = ID, expected: bytes = WEIGHTS, **repo: Any) -> str:
        """Load the config and then the weights, and return the sha of their commit."""
        source = """
import hashlib
from zepad.errors import CheckpointError

def parse(path):
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise CheckpointError(f"{path} was changed")
    return path

config, remote = locate(repo["repo_id"], HubRepo(**repo))
weights = remote.read("victim.safetensors", parse, revision=config.parent.name)
assert weights.parent == config.parent
result = [config, weights]
"""
        digest = hashlib.sha256(expected).hexdigest()
        repo = {"repo_id": repo_id, "token": False, "cache_dir": self.cache, **repo}
        config, weights = self.client.run(source, repo=repo, digest=digest)
        assert Path(weights).read_bytes() == expected
        return Path(config).parent.name

    def config(self, repo_id: str = ID, **repo: Any) -> bytes:
        """Load the config alone."""
        source = "result = locate(repo['repo_id'], HubRepo(**repo))[0]"
        repo = {"repo_id": repo_id, "token": False, "cache_dir": self.cache, **repo}
        return Path(self.client.run(source, repo=repo)).read_bytes()


@pytest.fixture
def load(lfs: HubClient, tmp_path: Path) -> Loader:
    return Loader(lfs, tmp_path / "cache")


# one commit, and no more requests than needed ---------------------------------------------------------------------


def test_a_model_is_downloaded_once(load: Loader, hub: HubServer) -> None:
    sha = hub.put(ID, MODEL)
    assert load() == sha
    assert hub.sent(RESOLVED) == [
        f"HEAD /{ID}/resolve/main/config.json",
        f"GET /{ID}/resolve/main/config.json",
        f"HEAD /{ID}/resolve/{sha}/victim.safetensors",
    ]
    hub.heal()
    assert load() == sha
    assert hub.sent() == [f"HEAD /{ID}/resolve/main/config.json"]
    hub.heal()
    assert load(revision=sha) == sha
    assert not hub.requests


def test_every_file_is_of_one_commit(load: Loader, hub: HubServer) -> None:
    first = hub.put(ID, MODEL)
    newer = {"config.json": b"{}", "victim.safetensors": b"newer" * 1000}
    hub.fail("HEAD", "victim", lambda: hub.put(ID, newer) and None, 1)
    assert load() == first
    assert hub.head(ID) != first
    assert load(expected=newer["victim.safetensors"]) == hub.head(ID)


@pytest.mark.parametrize("branch", ["v2", "feature/x"])
def test_a_branch_is_obeyed(load: Loader, hub: HubServer, branch: str) -> None:
    first = hub.put(ID, MODEL)
    hub.repos[ID].branches[branch] = first
    hub.put(ID, {"victim.safetensors": b"newer" * 1000})
    assert load(revision=branch) == first


def test_what_xet_stores_comes_back_through_xet(xet: HubClient, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    arguments = {"private": True, "revision": None, "token": WRITER, "commit_message": "push", "obsolete": []}
    source = "result = publish(Path(folder), 'alice/m', files=files, **arguments).revision"
    files = ["config.json", "victim.safetensors"]
    sha = xet.run(source, folder=folder, arguments=arguments, files=files)
    weights = (folder / "victim.safetensors").read_bytes()
    assert Loader(xet, tmp_path / "cache")(expected=weights, token=READER) == sha
    assert hub.sent("xet-read-token")
    assert not hub.sent("storage")


# offline ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_what_is_cached_loads_offline(load: Loader, offline: HubClient, hub: HubServer, how: str) -> None:
    sha = hub.put(ID, MODEL)
    online = load()
    hub.heal()
    load.client = offline if how == "HF_HUB_OFFLINE" else load.client
    arguments = {"local_files_only": how == "local_files_only"}
    assert load(**arguments) == load(revision=sha, **arguments) == online == sha
    assert not hub.requests


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_what_is_not_cached_does_not(load: Loader, offline: HubClient, hub: HubServer, how: str) -> None:
    hub.put(ID, MODEL)
    load.client = offline if how == "HF_HUB_OFFLINE" else load.client
    message = r"config.json of 'alice/m' could not be fetched: it is not in the cache.*Load this revision once online"
    with pytest.raises(HubError, match=message):
        load(local_files_only=how == "local_files_only")
    assert not hub.requests


def test_a_hub_that_is_down_is_no_matter_once_cached(load: Loader, hub: HubServer) -> None:
    sha = hub.put(ID, MODEL)
    load()
    hub.fail("HEAD", RESOLVED, "status", status=503)
    assert load() == sha


# who may load what ------------------------------------------------------------------------------------------------


def test_a_private_model_opens_to_its_owner(load: Loader, hub: HubServer) -> None:
    sha = hub.put(ID, MODEL, private=True)
    assert load(token=READER) == sha


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no such repository, or it is private.*Check the id, and pass the token"),
        ({"token": STRANGER}, "no such repository, or it is private"),
        ({"token": "hf_nonsense"}, "wants a token that it knows .401.. Pass a valid token"),
        ({"token": READER, "repo_id": "alice/nothing"}, "no such repository"),
        ({"token": READER, "revision": "v9"}, "has no revision 'v9'. Pass one of its branches"),
        ({"token": READER, "revision": "0" * 40}, "has no revision '0{40}'"),
        ({"token": READER, "repo_id": "alice/m m"}, "no id of a repository. Write it as user/name"),
    ],
)
def test_what_may_not_be_had_is_told_apart_at_once(
    load: Loader, hub: HubServer, arguments: dict[str, Any], message: str
) -> None:
    hub.put(ID, MODEL, private=True)
    with pytest.raises(HubError, match=f"config.json of 'alice/.*' could not be fetched: .*{message}"):
        load(**arguments)
    assert load.client.slept == []
    assert len(hub.requests) <= 1


@pytest.mark.parametrize("token", [False, STRANGER])
def test_a_gated_model_says_so(load: Loader, hub: HubServer, token: str | bool) -> None:
    hub.put(ID, MODEL, gated=True)
    with pytest.raises(HubError, match="the repository is gated. Ask for access on its page"):
        load(token=token)


# what is no zepad model -------------------------------------------------------------------------------------------


def test_pickles_are_never_requested(load: Loader, hub: HubServer) -> None:
    hub.put(ID, {"pytorch_model.bin": b"pickle", "optimizer.pt": b"pickle", "README.md": b"a card"})
    message = r"holds pickles alone \(pytorch_model.bin, optimizer.pt\). zepad never loads.*nothing was downloaded"
    with pytest.raises(HubError, match=message):
        load()
    assert not hub.sent(r"pytorch_model|optimizer|storage")


@pytest.mark.parametrize("files", [{"model.safetensors": b"w", "pytorch_model.bin": b"pickle"}, {"README.md": b"card"}])
def test_a_repository_of_something_else(load: Loader, hub: HubServer, files: dict[str, bytes]) -> None:
    hub.put(ID, files)
    with pytest.raises(
        HubError, match=rf"is no zepad model \(it has .*{next(iter(files))}.*published with push_to_hub"
    ):
        load()
    assert not hub.sent("storage|bin")


def test_a_file_that_is_missing(load: Loader, hub: HubServer) -> None:
    hub.put(ID, {"config.json": CONFIG, "heads.safetensors": b"heads"})
    message = r"victim.safetensors of 'alice/m' could not be fetched: the repository does not have it \(it has heads"
    with pytest.raises(HubError, match=message):
        load()


def test_a_listing_that_fails_hides_nothing(load: Loader, hub: HubServer) -> None:
    hub.put(ID, {"pytorch_model.bin": b"pickle"})
    hub.fail("GET", "/tree/", "status")
    with pytest.raises(HubError, match=r"config.json of 'alice/m' could not be fetched: .*is no zepad model"):
        load()


# broken connections -----------------------------------------------------------------------------------------------

FILE = {"HEAD": ("HEAD", RESOLVED), "GET": ("GET", "/resolve/.*json"), "CDN": ("GET", "/storage/")}


@pytest.mark.parametrize("request_", FILE.values(), ids=FILE)
@pytest.mark.parametrize("action", ["status", "reset", "cut", "close"])
def test_a_connection_that_breaks_once_is_got_over(
    load: Loader, hub: HubServer, request_: tuple[str, str], action: Any
) -> None:
    sha = hub.put(ID, MODEL)
    hub.fail(*request_, action, 1, after=10)
    assert load() == sha
    assert len(hub.sent(request_[1], request_[0])) >= (1 if request_[0] == "HEAD" else 2)


@pytest.mark.parametrize("request_", FILE.values(), ids=FILE)
@pytest.mark.parametrize(
    ("action", "message"),
    [("reset", "the connection failed. Check it"), ("status", "the Hub is out of order .503.. Run it again later")],
)
def test_a_connection_that_stays_broken(
    load: Loader, hub: HubServer, request_: tuple[str, str], action: Any, message: str
) -> None:
    sha = hub.put(ID, MODEL)
    hub.fail(*request_, action, status=503)
    with pytest.raises(HubError, match=f"could not be fetched: {message}"):
        load()
    hub.heal()
    assert load() == sha


def test_a_download_that_keeps_breaking_off(load: Loader, hub: HubServer) -> None:
    sha = hub.put(ID, MODEL)
    for action in ("cut", "close"):
        hub.fail("GET", "/storage/", action, after=1000)
        with pytest.raises(
            HubError, match=r"victim.safetensors of 'alice/m' could not be fetched: the connection failed"
        ):
            load()
        hub.heal()
    assert load() == sha


# damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_is_downloaded_again(load: Loader, hub: HubServer) -> None:
    sha = hub.put(ID, MODEL)
    hub.fail("GET", "/storage/", "flip", 1)
    assert load() == sha
    assert len(hub.sent("GET /storage")) == 2
    hub.heal()
    assert load(local_files_only=True) == sha  # the cache has healed as well


def test_a_flipped_byte_in_the_config_is_downloaded_again(load: Loader, hub: HubServer) -> None:
    hub.put(ID, MODEL)
    hub.fail("GET", "/resolve/", "flip", 1)
    assert load.config() == CONFIG
    assert load.config(local_files_only=True) == CONFIG


def test_bytes_that_keep_flipping_are_never_loaded(load: Loader, hub: HubServer) -> None:
    sha = hub.put(ID, MODEL)
    hub.fail("GET", "/storage/", "flip")
    with pytest.raises(CheckpointError, match=r"victim.safetensors was changed"):
        load()
    assert len(hub.sent("GET /storage")) == 2
    hub.heal()
    hub.fail("GET", "/resolve/", "flip")
    with pytest.raises(HubError, match=r"config.json of 'alice/m' is damaged: .*Load it with force_download=True"):
        load.config(force_download=True)
    hub.heal()
    assert load() == sha


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE"])
def test_damage_in_the_cache_needs_the_hub(load: Loader, offline: HubClient, hub: HubServer, how: str) -> None:
    sha = hub.put(ID, MODEL)
    load()
    hub.heal()
    online, load.client = load.client, offline if how == "HF_HUB_OFFLINE" else load.client
    arguments = {"local_files_only": how == "local_files_only"}
    snapshot = load.cache / "models--alice--m" / "snapshots" / sha
    (snapshot / "victim.safetensors").write_bytes(WEIGHTS[::-1])
    with pytest.raises(CheckpointError, match=r"victim.safetensors was changed"):
        load(**arguments)
    (snapshot / "config.json").write_bytes(CONFIG[::-1])
    with pytest.raises(HubError, match=r"config.json of 'alice/m' is damaged"):
        load(**arguments)
    assert not hub.requests
    load.client = online
    assert load() == sha


def test_a_disk_that_cannot_be_written_is_named(load: Loader, hub: HubServer) -> None:
    hub.put(ID, MODEL)
    load.cache.write_text("a file where the cache should be")
    with pytest.raises(HubError, match=r"could not be read or written here. Check the disk and the cache folder"):
        load()
