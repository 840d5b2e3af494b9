"""A push is published whole in one commit, or nothing changes and the error says so."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from hub.hub_client import HubClient
from hub.hub_server import READER, STRANGER, WRITER, HubServer
from zepad.errors import CheckpointError, HubError

ID = "alice/m"
FILES = ["config.json", "README.md", "victim.safetensors", "heads.safetensors"]
WEIGHTS = [name for name in FILES if name.endswith(".safetensors")]
COMMIT = "/commit/"


def push(client: HubClient, folder: Path, repo_id: str = ID, **arguments: Any) -> str:
    """Publish and return the sha."""
    source = """
published = publish(Path(folder), repo_id, **arguments)
result = [published.repo_id, published.revision, published.url]
"""
    defaults = {"private": None, "revision": None, "token": WRITER, "commit_message": "push", "files": FILES}
    arguments = {**defaults, "obsolete": [], **arguments}
    name, sha, url = client.run(source, folder=folder, repo_id=repo_id, arguments=arguments)
    assert name == f"alice/{repo_id.rpartition('/')[2]}"
    assert url.endswith(f"/{name}/commit/{sha}")
    return str(sha)


def digests(folder: Path, *names: str) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names or FILES}


def assert_published(hub: HubServer, folder: Path, sha: str, *, commits: int = 1) -> None:
    assert hub.head(ID) == sha
    assert len(hub.history(ID)) == commits
    assert hub.files(ID) == digests(folder)


def assert_unpublished(hub: HubServer, before: str | None) -> None:
    """`main` is as it was, or new and empty."""
    assert hub.head(ID) == before if before else not hub.repos or not hub.history(ID)


def commit_of_another(hub: HubServer) -> None:
    hub.put(ID, {"README.md": b"of somebody else"}, title="another")


# what is sent -----------------------------------------------------------------------------------------------------


def test_a_model_is_one_commit_of_the_named_files(client: HubClient, hub: HubServer, folder: Path) -> None:
    sha = push(client, folder)
    assert_published(hub, folder, sha)
    (commit,) = hub.history(ID)
    assert commit.title == "push"
    assert not hub.repos[ID].private
    sent = json.dumps([[request.path, request.body] for request in hub.requests])
    assert "victim.safetensors" in sent
    assert "optimizer" not in sent
    assert "secret" not in sent
    assert len(hub.sent(COMMIT)) == 1


def test_the_name_alone_is_a_repository_of_the_user(client: HubClient, hub: HubServer, folder: Path) -> None:
    assert_published(hub, folder, push(client, folder, "m"))


def test_an_unchanged_push_sends_nothing(client: HubClient, hub: HubServer, folder: Path) -> None:
    first = push(client, folder)
    hub.heal()
    assert push(client, folder) == first
    assert hub.sent() == ["POST /api/repos/create", "GET /api/models/alice/m"]
    assert_published(hub, folder, first)


def test_only_what_changed_is_sent(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    first = push(lfs, folder)
    hub.heal()
    (folder / "heads.safetensors").write_bytes(b"other heads" * 1000)
    second = push(lfs, folder)
    assert_published(hub, folder, second, commits=2)
    assert hub.history(ID)[0].parent == first
    (commit,) = [request.body for request in hub.requests if COMMIT in request.path]
    assert commit[0]["value"]["parentCommit"] == first
    assert [line["value"]["path"] for line in commit[1:]] == ["heads.safetensors"]
    assert hub.sent(method="PUT") == [f"PUT /storage/{digests(folder)['heads.safetensors']}"]


def test_what_an_earlier_push_left_goes_in_the_same_commit(client: HubClient, hub: HubServer, folder: Path) -> None:
    push(client, folder)
    hub.put(ID, {"notes.txt": b"of the user"})
    kept = [name for name in FILES if name != "heads.safetensors"]
    sha = push(client, folder, files=kept, obsolete=["heads.safetensors", "benign.safetensors"])
    assert hub.head(ID) == sha
    assert len(hub.history(ID)) == 3
    assert hub.files(ID).keys() == {*kept, "notes.txt"}
    hub.heal()
    assert push(client, folder, files=kept, obsolete=["heads.safetensors", "benign.safetensors"]) == sha
    assert not hub.sent(COMMIT)


def test_a_missing_file_is_noticed_before_anything_is_sent(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    (folder / "heads.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"heads.safetensors cannot be read: No such file.*Save the model again"):
        push(lfs, folder)
    assert not hub.requests


@pytest.mark.parametrize("repo_id", ["a/b/c", "", "alice/", "/m", "alice/m m", "alice/../m", "-m", "x" * 200, "a.git"])
def test_a_bad_id_is_refused_before_anything_is_sent(
    lfs: HubClient, hub: HubServer, folder: Path, repo_id: str
) -> None:
    with pytest.raises(HubError, match="no id of a repository. Write it as user/name"):
        push(lfs, folder, repo_id)
    assert not hub.requests


# visibility and branches ------------------------------------------------------------------------------------------


def test_a_repository_is_private_if_asked_for_and_stays_so(client: HubClient, hub: HubServer, folder: Path) -> None:
    push(client, folder, private=True)
    assert hub.repos[ID].private
    (folder / "README.md").write_text("# Another card")
    push(client, folder)
    assert_published(hub, folder, push(client, folder, private=True), commits=2)
    assert hub.repos[ID].private


def test_a_private_model_never_gets_into_a_public_repository(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    before = hub.put(ID, {"README.md": b"public"})
    with pytest.raises(HubError, match=r"nothing was published to 'alice/m': it is public, and private=True"):
        push(lfs, folder, private=True)
    assert_unpublished(hub, before)
    assert hub.sent() == ["POST /api/repos/create", "GET /api/models/alice/m"]


@pytest.mark.parametrize("branch", ["v2", "feature/x"])
def test_a_branch_is_made_if_it_is_not_there(client: HubClient, hub: HubServer, folder: Path, branch: str) -> None:
    first = push(client, folder)
    (folder / "heads.safetensors").write_bytes(b"other heads" * 1000)
    sha = push(client, folder, revision=branch)
    assert hub.head(ID) == first
    assert hub.head(ID, branch) == sha
    assert hub.files(ID, branch) == digests(folder)
    assert push(client, folder, revision=branch) == sha


def test_a_branch_is_made_from_what_was_looked_at(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    first = push(lfs, folder)
    (folder / "heads.safetensors").write_bytes(b"other heads" * 1000)
    hub.fail("POST", "/branch/", lambda: commit_of_another(hub), 1)
    push(lfs, folder, revision="v2")
    assert hub.history(ID, "v2")[0].parent == first
    assert hub.files(ID, "v2") == digests(folder)


def test_a_commit_is_no_branch(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    with pytest.raises(HubError, match="is a commit. Pass the name of a branch"):
        push(lfs, folder, revision="0" * 40)
    assert not hub.requests


# another library's model ------------------------------------------------------------------------------------------

FOREIGN: dict[str, dict[str, bytes]] = {
    "config": {"config.json": b'{"model_type": "bert"}'},
    "list": {"config.json": b"[]"},
    "no JSON": {"config.json": b"\xff\xfe"},
    "nested": {"config.json": b"[" * 100_000},
    "pickle": {"pytorch_model.bin": b"pickle"},
    "safetensors": {"model.safetensors": b"weights"},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("revision", [None, "new"])
def test_another_librarys_model_is_never_overwritten(
    lfs: HubClient, hub: HubServer, folder: Path, files: dict[str, bytes], revision: str | None
) -> None:
    before = hub.put(ID, files)
    with pytest.raises(HubError, match=r"nothing was published .* a model that zepad did not write. Choose another"):
        push(lfs, folder, revision=revision)
    assert_unpublished(hub, before)
    assert hub.repos[ID].branches.keys() == {"main"}
    assert not hub.sent("preupload|objects|storage")


def test_a_repository_without_a_model_may_be_filled(client: HubClient, hub: HubServer, folder: Path) -> None:
    hub.put(ID, {"README.md": b"a model is coming"})
    assert_published(hub, folder, push(client, folder), commits=2)


def test_an_older_model_of_ours_is_replaced(client: HubClient, hub: HubServer, folder: Path) -> None:
    hub.put(ID, {"config.json": b'{"library": "zepad", "format": 0}'}, private=True)
    assert_published(hub, folder, push(client, folder), commits=2)


def test_what_counts_is_the_branch_that_is_pushed_to(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    ours = push(lfs, folder)
    hub.repos[ID].branches["v2"] = ours
    before = hub.put(ID, {"config.json": b'{"model_type": "bert"}'}, branch="v2")
    with pytest.raises(HubError, match="a model that zepad did not write"):
        push(lfs, folder, revision="v2")
    assert hub.head(ID, "v2") == before


# rights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_nonsense", "wants a token that it knows .401.. Pass a valid token"),
        (False, "wants a token that it knows .401.. Pass a valid token"),
        (READER, "does not give that right .403."),
        (STRANGER, "does not give that right .403."),
    ],
)
@pytest.mark.parametrize("there", [False, True])
def test_rights_that_lack_are_named_at_once(
    client: HubClient, hub: HubServer, folder: Path, token: str | bool, message: str, there: bool
) -> None:
    before = push(client, folder) if there else None
    (folder / "README.md").write_text("# Another card")
    with pytest.raises(HubError, match=f"nothing was published to 'alice/m': .*{message}"):
        push(client, folder, token=token)
    assert client.slept == []
    assert_unpublished(hub, before)
    sha = push(client, folder)
    assert_published(hub, folder, sha, commits=2 if there else 1)


def test_somebody_elses_private_repository_is_as_good_as_none(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    before = hub.put(ID, {"README.md": b"private"}, private=True)
    with pytest.raises(HubError, match="nothing was published"):
        push(lfs, folder, token=STRANGER)
    assert_unpublished(hub, before)


# failures ---------------------------------------------------------------------------------------------------------

STEPS = {
    "lfs": {
        "create": ("POST", "repos/create"),
        "info": ("GET", "/api/models/alice/m$"),
        "card": ("POST", "validate-yaml"),
        "preupload": ("POST", "preupload"),
        "batch": ("POST", "objects/batch"),
        "upload": ("PUT", "/storage/"),
        "verify": ("POST", "lfs-verify"),
        "commit": ("POST", COMMIT),
    },
    "xet": {"preupload": ("POST", "preupload"), "commit": ("POST", COMMIT)},
}


@pytest.mark.parametrize(("mode", "step"), [(mode, step) for mode, steps in STEPS.items() for step in steps])
@pytest.mark.parametrize("action", ["status", pytest.param("reset", marks=pytest.mark.slow)])
@pytest.mark.parametrize("there", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_that_fails_for_good_publishes_nothing(
    request: pytest.FixtureRequest, hub: HubServer, folder: Path, mode: str, step: str, action: Any, there: bool
) -> None:
    client: HubClient = request.getfixturevalue(mode)
    before = push(client, folder) if there else None
    for name in FILES:
        if name != "config.json":
            (folder / name).write_bytes((folder / name).read_bytes() * 2)
    hub.fail(*STEPS[mode][step], action)
    expected = "is out of order .500.. Run it again later" if action == "status" else "the connection failed. Check it"
    with pytest.raises(HubError, match=f"nothing was published to 'alice/m': .*{expected}"):
        push(client, folder)
    assert_unpublished(hub, before)
    hub.heal()
    assert_published(hub, folder, push(client, folder), commits=2 if there else 1)


@pytest.mark.parametrize(("mode", "step"), [(mode, step) for mode, steps in STEPS.items() for step in steps])
@pytest.mark.parametrize("action", ["status", "reset"])
def test_a_step_that_fails_once_is_got_over(
    request: pytest.FixtureRequest, hub: HubServer, folder: Path, mode: str, step: str, action: Any
) -> None:
    client: HubClient = request.getfixturevalue(mode)
    hub.fail(*STEPS[mode][step], action, 1)
    assert_published(hub, folder, push(client, folder))


def test_a_hub_that_stumbles_over_the_commit_once_is_asked_again(
    client: HubClient, hub: HubServer, folder: Path
) -> None:
    hub.fail("POST", COMMIT, "status", 1, status=503)
    assert_published(hub, folder, push(client, folder))
    assert len(hub.sent(COMMIT)) == 2
    assert len(hub.sent("preupload")) == 1  # what is uploaded stays uploaded


def test_a_hub_that_does_not_answer_at_all(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    for method in ("GET", "POST", "PUT", "HEAD"):
        hub.fail(method, "", "reset")
    with pytest.raises(HubError, match=r"nothing was published .*the connection failed"):
        push(lfs, folder)
    hub.heal()
    assert_published(hub, folder, push(lfs, folder))


def test_an_answer_that_makes_no_sense(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "validate-yaml", "flip")
    with pytest.raises(HubError, match=r"nothing was published .*the answer makes no sense.*any proxy"):
        push(lfs, folder)
    assert_unpublished(hub, None)


def test_too_many_requests_are_not_made_more(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    hub.fail("POST", COMMIT, "status", status=429)
    with pytest.raises(HubError, match=r"nothing was published .*too many requests .429.. Wait some minutes"):
        push(lfs, folder)
    assert len(hub.sent(COMMIT)) == 1


def test_a_deletion_that_fails_is_not_taken_for_done(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    before = push(lfs, folder)
    hub.fail("POST", COMMIT, "reset")
    with pytest.raises(HubError, match="nothing was published"):
        push(lfs, folder, files=FILES[:-1], obsolete=FILES[-1:])
    assert_unpublished(hub, before)


def test_a_xet_token_that_is_refused_publishes_nothing(xet: HubClient, hub: HubServer, folder: Path) -> None:
    hub.fail("GET", "xet-write-token", "status", status=403)
    with pytest.raises(HubError, match="nothing was published to 'alice/m': "):
        push(xet, folder)
    assert_unpublished(hub, None)
    hub.heal()
    assert_published(hub, folder, push(xet, folder))


# the answer to the commit -----------------------------------------------------------------------------------------


def test_a_commit_whose_answer_is_lost_is_published_once(client: HubClient, hub: HubServer, folder: Path) -> None:
    hub.fail("POST", COMMIT, "lose", 1)
    sha = push(client, folder)
    assert_published(hub, folder, sha)
    assert len(hub.sent(COMMIT)) == 1
    assert push(client, folder) == sha


def test_a_repository_whose_answer_is_lost_is_made_once(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "repos/create", "lose", 1)
    assert_published(hub, folder, push(lfs, folder))


def test_what_cannot_be_told_is_not_claimed(client: HubClient, hub: HubServer, folder: Path) -> None:
    def go_down() -> str:
        hub.fail("GET", "/api/models/alice/m$", "status", status=503)
        return "lose"

    hub.fail("POST", COMMIT, go_down)
    message = "unknown whether 'alice/m' was published: the connection failed.*Run it again: .*not committed twice"
    with pytest.raises(HubError, match=message):
        push(client, folder)
    hub.heal()
    assert_published(hub, folder, push(client, folder))


def test_a_commit_in_the_meantime_is_not_overwritten(client: HubClient, hub: HubServer, folder: Path) -> None:
    push(client, folder)
    (folder / "heads.safetensors").write_bytes(b"other heads" * 1000)
    hub.fail("POST", COMMIT, lambda: commit_of_another(hub), 1)
    with pytest.raises(HubError, match=r"nothing was published .*somebody else committed .*run it again"):
        push(client, folder)
    assert [commit.title for commit in hub.history(ID)] == ["another", "push"]
    assert len(hub.sent(COMMIT)) == 2  # of the first push and of the second
    sha = push(client, folder)
    assert_published(hub, folder, sha, commits=3)


def test_a_commit_in_the_meantime_is_not_taken_for_ours(lfs: HubClient, hub: HubServer, folder: Path) -> None:
    push(lfs, folder)
    (folder / "heads.safetensors").write_bytes(b"other heads" * 1000)
    hub.fail("POST", COMMIT, "reset")
    hub.fail("GET", "/api/models/alice/m$", lambda: commit_of_another(hub), 2)
    with pytest.raises(HubError, match=r"nothing was published .*somebody else committed"):
        push(lfs, folder)
    hub.heal()
    assert [commit.title for commit in hub.history(ID)] == ["another", "push"]
