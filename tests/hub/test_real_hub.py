"""The loopback Hub is our reading of the real one; this asks the real one. It needs a token and leaves no repository.

ZEPAD_HF_TOKEN=hf_... ZEPAD_HF_REPO=me/zepad-test pytest -n 0 tests/hub/test_real_hub.py
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from zepad.errors import HubError
from zepad.persistence.commits import Published, publish
from zepad.persistence.hub import HubRepo, locate

TOKEN = os.environ.get("ZEPAD_HF_TOKEN", "")

pytestmark = [
    pytest.mark.skipif(not TOKEN, reason="set ZEPAD_HF_TOKEN, a token that may write, to ask the real Hub"),
    # The client's own deprecations are not ours to fix.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def repo_id() -> Iterator[str]:
    """A name that is new; the repository is deleted afterwards."""
    base = os.environ.get("ZEPAD_HF_REPO", "zepad-test")
    api = HfApi(token=TOKEN)
    name = f"{base}-{uuid.uuid4().hex[:8]}"
    name = name if "/" in name else f"{api.whoami()['name']}/{name}"
    yield name
    api.delete_repo(name, missing_ok=True)


def test_the_real_hub_does_as_the_loopback_one(repo_id: str, folder: Path, tmp_path: Path) -> None:
    files = ["config.json", "README.md", "victim.safetensors", "heads.safetensors"]
    # Content that no other run stored, so that something is uploaded.
    (folder / "heads.safetensors").write_bytes(uuid.uuid4().bytes * 1000)

    def push(files: list[str], obsolete: tuple[str, ...] = (), revision: str | None = None) -> Published:
        return publish(
            folder,
            repo_id,
            private=True,
            revision=revision,
            token=TOKEN,
            commit_message="Test zepad",
            files=files,
            obsolete=obsolete,
        )

    first = push(files)
    assert push(files) == first
    repo = HubRepo(repo_id=repo_id, token=TOKEN, cache_dir=tmp_path / "cache")
    config, remote = locate(repo_id, repo)
    assert remote is repo
    assert config.parent.name == first.revision
    for name in files:
        assert repo.fetch(name, revision=first.revision).read_bytes() == (folder / name).read_bytes()
    with pytest.raises(HubError, match="the repository does not have it"):
        repo.fetch("benign.safetensors")
    with pytest.raises(HubError, match="has no revision"):
        repo.fetch("config.json", revision="v9")
    with pytest.raises(HubError, match="no such repository|wants a token that it knows"):
        HubRepo(repo_id=repo_id, token=False, cache_dir=tmp_path / "other").fetch("config.json")
    with pytest.raises(HubError, match=r"nothing was published .*401"):
        publish(
            folder,
            repo_id,
            private=None,
            revision=None,
            token="hf_nonsense",
            commit_message="Test zepad",
            files=files,
            obsolete=(),
        )

    second = push(files[:-1], obsolete=("heads.safetensors",))
    assert second.revision != first.revision
    names = set(HfApi(token=TOKEN).list_repo_files(repo_id))
    assert names - {".gitattributes"} == set(files[:-1])
    on_branch = push(files, revision="v2")
    assert HfApi(token=TOKEN).model_info(repo_id).sha == second.revision
    assert repo.fetch("heads.safetensors", revision="v2").parent.name == on_branch.revision
