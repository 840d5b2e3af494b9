"""The command line against the Hub: a model is pushed, deleted locally, pulled and used."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from hub.hub_client import HubClient
from hub.hub_server import READER, STRANGER, WRITER, HubServer
from tiny import toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, ZePAD

ID = "alice/m"
WEIGHTS = ["auxiliary.safetensors", "benign.safetensors", "heads.safetensors", "victim.safetensors"]

# The command line in the process of the client: what `zepad` does, without seconds of imports per call.
MAIN = """
import contextlib, io, os, shutil, sys
from huggingface_hub import constants
from zepad.cli import main

if forget:
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
os.chdir(cwd)
stdout, stderr = io.StringIO(), io.StringIO()
sys.argv = ["zepad", *arguments]
code = 0
with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
    try:
        main()
    except SystemExit as exit:
        code = exit.code
result = [code, stdout.getvalue(), stderr.getvalue()]
"""


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        (line,) = self.out.splitlines()  # one object and nothing else
        values: dict[str, Any] = json.loads(line)
        return values


class CommandLine:
    """Runs commands in the process of a client, each with an empty cache, in a folder of this test's own."""

    def __init__(self, client: HubClient, folder: Path) -> None:
        self.client, self.folder = client, folder

    def __call__(self, *arguments: object, forget: bool = True) -> Done:
        values = {"arguments": [str(argument) for argument in arguments], "cwd": self.folder, "forget": forget}
        code, out, err = self.client.run(MAIN, **values)
        assert "Traceback" not in err
        return Done(code, out, err)


@pytest.fixture(params=["lfs", pytest.param("xet", marks=pytest.mark.slow)])
def client(request: pytest.FixtureRequest) -> HubClient:
    """Either client; what Xet does to bytes, the tests of publishing and loading try by default."""
    either: HubClient = request.getfixturevalue(request.param)
    return either


@pytest.fixture
def zepad(client: HubClient, tmp_path: Path) -> CommandLine:
    return CommandLine(client, tmp_path)


@pytest.fixture
def plain(lfs: HubClient, tmp_path: Path) -> CommandLine:
    """For what has nothing to do with how bytes travel."""
    return CommandLine(lfs, tmp_path)


@pytest.fixture(scope="module")
def defense() -> ZePAD:
    torch.manual_seed(0)
    batches = [toy_data(12, size=32)]
    model = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr", preset="paper")
    model.harden(batches, HardenConfig(epochs=1, steps=1), progress=False)
    model.fit_benign(batches, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    model.class_names = ("red", "green", "blue")
    return model


@pytest.fixture
def model(defense: ZePAD, tmp_path: Path) -> Path:
    """A saved model, and an image and things that are nobody's business beside it."""
    folder = tmp_path / "model"
    defense.save_pretrained(folder)
    (folder / "optimizer.pt").write_bytes(b"of no concern")
    pixels = (toy_data(1, size=32, seed=5)[0][0].permute(1, 2, 0) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "image.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# the path ---------------------------------------------------------------------------------------------------------


def test_what_is_pulled_predicts_as_what_was_pushed(zepad: CommandLine, hub: HubServer, model: Path) -> None:
    before = zepad("predict", model, "image.png", "--json").json
    saved = contents(model)
    pushed = zepad("push", model, ID, "--token", WRITER, "--message", "First", "--json").json
    assert pushed["repo_id"] == ID
    assert pushed["revision"] == hub.head(ID)
    assert pushed["url"].endswith(f"/{ID}/commit/{pushed['revision']}")
    assert hub.history(ID)[0].title == "First"
    assert hub.files(ID).keys() == {"config.json", "README.md", *WEIGHTS}

    shutil.rmtree(model)
    pulled = zepad("pull", ID, "new/copy", "--json").json
    size = sum(len(saved[name]) for name in WEIGHTS)
    assert pulled == {"path": "new/copy", "bytes": size, "files": WEIGHTS}
    there = contents(zepad.folder / "new" / "copy")
    assert there.keys() == {"config.json", "README.md", *WEIGHTS}
    assert {name: there[name] for name in ("config.json", *WEIGHTS)} == {
        name: saved[name] for name in ("config.json", *WEIGHTS)
    }
    hub.heal()
    assert zepad("predict", "new/copy", "image.png", "--json").json == before
    assert not hub.requests


def test_without_json_they_say_what_to_do_next(plain: CommandLine, hub: HubServer, model: Path) -> None:
    said = plain("push", model, ID, "--token", WRITER).out
    assert f'ZePAD.from_pretrained("{ID}", revision="{hub.head(ID)}")' in said
    assert "Next: zepad info copy" in plain("pull", ID, "copy").out
    assert plain("info", "copy").code == 0


def test_heads_are_pulled_with_their_encoders(
    zepad: CommandLine, client: HubClient, hub: HubServer, model: Path
) -> None:
    zepad("push", model, ID, "--token", WRITER)
    shutil.rmtree(model)
    source = """
import sys
sys.path.insert(0, tests)
from tiny import toy_data
from zepad import HeadConfig, ZePAD
images, labels = toy_data(12, size=32)
defense = ZePAD.from_pretrained("alice/m", token=False, cache_dir=cache)
defense.fit_heads([(images, labels % 2)], HeadConfig(epochs=1), progress=False)
defense.push_to_hub("alice/task2", heads_only=True, token=token)
result = defense.predict_proba(images).tolist()
"""
    tests = Path(__file__).parents[1]
    expected = client.run(source, token=WRITER, tests=tests, cache=zepad.folder / "cache")
    assert hub.files("alice/task2").keys() == {"config.json", "README.md", "heads.safetensors"}

    assert zepad("pull", "alice/task2", "task2", "--json").json["files"] == WEIGHTS
    hub.heal()
    loaded = ZePAD.from_pretrained(zepad.folder / "task2", local_files_only=True)
    assert loaded.predict_proba(toy_data(12, size=32)[0]).tolist() == expected
    assert zepad("predict", "task2", "image.png", "--json").json["predictions"]
    assert not hub.requests
    assert f"base        {ID} at {hub.head(ID)}" in zepad("info", "task2").out
    assert "alice/m" in (ModelCard.load(zepad.folder / "task2" / "README.md").data.base_model or [])

    # What was pulled whole is pushed as what it is: heads of the base.
    zepad("push", "task2", "alice/task2-copy", "--token", WRITER)
    assert hub.files("alice/task2-copy").keys() == {"config.json", "README.md", "heads.safetensors"}


def test_a_branch_a_private_repository_and_a_revision(plain: CommandLine, hub: HubServer, model: Path) -> None:
    first = plain("push", model, ID, "--token", WRITER, "--private", "--json").json["revision"]
    assert hub.repos[ID].private
    plain("card", model, "--license", "mit")
    second = plain("push", model, ID, "--token", WRITER, "--revision", "v2", "--json").json["revision"]
    assert (hub.head(ID), hub.head(ID, "v2")) == (first, second)
    hub.heal()
    assert plain("pull", ID, "copy", "--token", READER, "--revision", "v2").code == 0
    assert all(f"/resolve/{second}/" in line for line in hub.sent("/resolve/.*safetensors"))


def test_what_is_pulled_takes_the_place_of_what_was_there(
    plain: CommandLine, hub: HubServer, model: Path, tmp_path: Path
) -> None:
    plain("push", model, ID, "--token", WRITER)
    built = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr", preset="paper")
    built.save_pretrained(tmp_path / "built")
    plain("push", "built", "alice/built", "--token", WRITER)
    assert plain("pull", "alice/built", model).code == 0
    assert contents(model).keys() == {"config.json", "README.md", "optimizer.pt", *WEIGHTS} - {"heads.safetensors"}
    assert ZePAD.from_pretrained(model).stage == "built"


def test_a_folder_by_the_name_of_the_repository_is_updated_and_not_read(
    plain: CommandLine, hub: HubServer, model: Path
) -> None:
    plain("push", model, ID, "--token", WRITER)
    for _ in range(2):
        done = plain("pull", ID, ID)
        assert done.code == 0, done.err
        assert ZePAD.from_pretrained(plain.folder / ID).stage == "fitted"
    (plain.folder / ID / "victim.safetensors").write_bytes(b"damaged")
    assert plain("pull", ID, ID).code == 0
    assert ZePAD.from_pretrained(plain.folder / ID).stage == "fitted"


# the card ---------------------------------------------------------------------------------------------------------


def test_a_card_is_written_with_what_only_the_publisher_knows(plain: CommandLine, hub: HubServer, model: Path) -> None:
    (model / "README.md").write_text("of an older model")
    before = contents(model)
    arguments = ("--license", "mit", "--dataset", "a/b", "--dataset", "c", "--base-model", "x/y", "--tag", "street")
    done = plain("card", model, "--repo-id", ID, *arguments)
    assert (done.code, done.out.split()) == (0, ["card", str(model / "README.md")])
    card = ModelCard.load(model / "README.md")
    assert (card.data.license, card.data.datasets, card.data.base_model) == ("mit", ["a/b", "c"], ["x/y"])
    assert "street" in card.data.tags
    assert f'ZePAD.from_pretrained("{ID}")' in card.text
    after = contents(model)
    assert {name for name in before if before[name] != after[name]} == {"README.md"}
    plain("push", model, ID, "--token", WRITER)
    content = hub.repos[ID].history()[0].files["README.md"].content
    assert content == after["README.md"]
    plain("pull", ID, "copy")
    assert (plain.folder / "copy" / "README.md").read_bytes() == content, "license and all"


# what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["victim.safetensors", "heads.safetensors"])
@pytest.mark.parametrize("change", ["flipped", "gone"])
@pytest.mark.parametrize("command", ["push", "card"])
def test_a_folder_whose_weights_changed_stays_here(
    plain: CommandLine, hub: HubServer, model: Path, name: str, change: str, command: str
) -> None:
    if change == "gone":
        (model / name).unlink()
    else:
        blob = bytearray((model / name).read_bytes())
        blob[-1] ^= 1
        (model / name).write_bytes(blob)
    card = (model / "README.md").read_bytes()
    done = plain("push", model, ID, "--token", WRITER, "--json") if command == "push" else plain("card", model)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: ")
    assert name in done.err
    assert ("its content was changed" in done.err) == (change == "flipped")
    assert not hub.requests
    assert (model / "README.md").read_bytes() == card


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["push", "MODEL", ID, "--token", "hf_nonsense"], 1, "nothing was published to 'alice/m': the Hub wants a tok"),
        (["push", "MODEL", ID, "--token", STRANGER], 1, "does not give that right (403)"),
        (["push", "MODEL", "a/b/c", "--token", WRITER], 1, "is no id of a repository"),
        (["push", "nowhere", ID, "--token", WRITER], 1, "nowhere holds no config.json"),
        (["push", "MODEL"], 2, "Missing argument"),
        (["push", "MODEL", ID, "--heads"], 2, "No such option"),
        (["pull", "alice/nothing", "copy"], 1, "there is no such repository"),
        (["pull", "alice/theirs", "copy"], 1, "is no zepad model"),
        (["pull", "a/b/c", "copy"], 1, "is no id of a repository"),
        (["pull", "./model", "copy"], 1, "is no id of a repository"),
        (["pull", ID], 2, "Missing argument"),
        (["card", "nowhere"], 1, "nowhere holds no config.json"),
        (["card", "MODEL", "--license", "My own"], 1, "license must be an identifier"),
        (["card", "MODEL", "--dataset", "https://x.example"], 1, "datasets must be a tuple of Hub ids"),
        (["card", "MODEL", "--base-model", "a/b/c"], 1, "base_models must be a tuple of Hub ids"),
        (["card", "MODEL", "--tag", " "], 1, "tags must be a tuple of words"),
    ],
)
def test_bad_arguments_give_a_message_and_an_exit_code(
    plain: CommandLine, hub: HubServer, model: Path, arguments: list[str], code: int, message: str
) -> None:
    hub.put("alice/theirs", {"model.safetensors": b"weights"})
    before = contents(model)
    done = plain(*(model if argument == "MODEL" else argument for argument in arguments))
    assert (done.code, done.out) == (code, "")
    assert message in " ".join(done.err.replace("│", " ").split())
    assert done.err.startswith("error: ") == (code == 1)
    assert hub.repos.keys() == {"alice/theirs"}
    assert contents(model) == before
    assert not (plain.folder / "copy").exists()


def test_what_arrives_damaged_leaves_the_older_copy_whole(plain: CommandLine, hub: HubServer, model: Path) -> None:
    plain("push", model, ID, "--token", WRITER)
    plain("pull", ID, "copy")
    before = contents(plain.folder / "copy")
    hub.fail("GET", "/storage/", "flip")
    done = plain("pull", ID, "copy", "--json")
    assert (done.code, done.out) == (1, "")
    assert "its content was changed" in done.err
    assert contents(plain.folder / "copy") == before


def test_a_folder_that_cannot_be_written_is_named(plain: CommandLine, hub: HubServer, model: Path) -> None:
    plain("push", model, ID, "--token", WRITER)
    (plain.folder / "file").write_text("in the way")
    done = plain("pull", ID, "file/copy")
    assert done.code == 1
    assert "file/copy cannot be written" in done.err
    assert "Choose a writable folder" in done.err
