"""Whole models through the real client: a pulled model decides as the pushed one did, or an error gives the reason."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import load as read_tensors
from safetensors.torch import load_file
from safetensors.torch import save as write_tensors
from torch import Tensor, nn
from torchvision import models

from hub.hub_client import HubClient
from hub.hub_server import READER, STRANGER, WRITER, HubServer
from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, Preprocessing, ZePAD, ZeroShotHead
from zepad.errors import CheckpointError, HubError, InputWarning, StageError, ZePADError
from zepad.types import ROLES

ID, TASK = "alice/m", "alice/task2"
IMAGES, LABELS = toy_data(12, size=32)
BATCHES = [(IMAGES, LABELS)]
ENCODER_FILES = [f"{role}.safetensors" for role in ROLES]
WEIGHTS = [*ENCODER_FILES, "heads.safetensors"]
COMMIT = "/commit/"


# the models -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A way to get a defense.

    Attributes:
        make: Returns victim and auxiliary, as `ZePAD.from_encoders` takes them.
        modules: Source of what `from_pretrained` must be given.
        size: Images are resized to; None is the model's own.
    """

    make: Callable[[], tuple[nn.Module | str, nn.Module | str]]
    modules: str = ""
    size: tuple[int, int] | None = None


def _one_module() -> tuple[nn.Module, nn.Module]:
    module = TinyEncoder()
    return module, module


def _one_weight() -> tuple[nn.Module, nn.Module]:
    victim, auxiliary = TinyEncoder(), TinyEncoder()
    auxiliary.conv.weight = victim.conv.weight
    return victim, auxiliary


def _open_clip() -> tuple[nn.Module, nn.Module]:
    return open_clip.create_model("ViT-S-32-alt"), timm.create_model("test_resnet")  # random weights, no network


def _transformers() -> tuple[nn.Module, nn.Module]:
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    clip = transformers.CLIPVisionConfig(**small, intermediate_size=64, projection_dim=24)
    return (
        transformers.CLIPVisionModelWithProjection(clip),
        transformers.Dinov2Model(transformers.Dinov2Config(**small)),
    )


TINY = "victim=TinyEncoder(), auxiliary=TinyEncoder()"
SMALL = (64, 64)
SAMPLES = {
    "custom": Sample(lambda: (TinyEncoder(), TinyEncoder()), TINY),
    "packaged": Sample(lambda: ("zepad:digits-barlow-twins", "zepad:digits-simclr")),
    "timm resnet": Sample(lambda: (timm.create_model("resnet10t"), timm.create_model("test_resnet")), size=SMALL),
    "timm vit": Sample(lambda: (timm.create_model("test_vit"), timm.create_model("test_vit"))),
    "torchvision": Sample(lambda: (models.squeezenet1_1(), models.mobilenet_v3_small()), size=SMALL),
    "open_clip": Sample(_open_clip),
    "transformers": Sample(_transformers),
    "one module": Sample(_one_module, TINY),
    "one weight": Sample(_one_weight, TINY),
}


# One sample of each kind; the rest takes minutes, and the ViT of open_clip has 43 million weights.
DEFAULT = ("custom", "packaged", "one weight")
NAMES = [name if name in DEFAULT else pytest.param(name, marks=pytest.mark.exhaustive) for name in SAMPLES]


@functools.cache
def fitted(name: str) -> ZePAD:
    """A fitted defense, hardly trained, in which no two encoders are alike. For reading only."""
    torch.manual_seed(0)
    sample = SAMPLES[name]
    preprocess = None if sample.size is None else Preprocessing.imagenet(size=sample.size)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "victim and auxiliary are the same encoder", InputWarning)  # "one module"
        defense = ZePAD.from_encoders(*sample.make(), preset="paper", preprocess=preprocess)
    defense.harden(BATCHES, HardenConfig(epochs=1, steps=1), progress=False)
    defense.fit_benign(BATCHES, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    defense.threshold, defense.class_names = 0.123456789012345678, ("röd", "grün", "蓝")
    return defense


@functools.cache
def zero_shot() -> ZePAD:
    """The packaged defense with heads made of class names, as far as loading can tell."""
    torch.manual_seed(0)
    defense = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr", preset="paper")
    defense.harden(BATCHES, HardenConfig(epochs=1, steps=1), progress=False)
    heads = {role: ZeroShotHead(torch.randn(3, 128), scale=10.0) for role in ROLES}
    return defense.fit_zero_shot(heads, class_names=["red", "green", "blue"])


def decide(defense: ZePAD) -> dict[str, Tensor]:
    return {
        "predict": defense.predict(IMAGES),
        "predict_proba": defense.predict_proba(IMAGES),
        "detection_score": defense.detection_score(IMAGES),
    }


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def facts(defense: ZePAD) -> dict[str, Any]:
    """All that a model is beside its tensors, as JSON has it."""
    names = ("stage", "channels", "num_classes", "class_names", "threshold", "provenance")
    specs = {role: defense.encoder(role).spec.to_dict() for role in ROLES}
    values = {**{name: getattr(defense, name) for name in names}, "specs": specs}
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_no_two_encoders_of_a_sample_are_alike(name: str) -> None:
    """Or a file that took another's place would go unnoticed."""
    digests = [hashlib.sha256(str(fitted(name).encoder(role).state_dict()).encode()) for role in ROLES]
    assert len({digest.hexdigest() for digest in digests}) == len(ROLES)


# the process with the client --------------------------------------------------------------------------------------

PREAMBLE = f"""
import json, sys
sys.path[:0] = [] if {str(Path(__file__).parents[1])!r} in sys.path else [{str(Path(__file__).parents[1])!r}]
import torch
from safetensors.torch import save_file
from tiny import TinyEncoder, toy_data
from zepad import HeadConfig, ZePAD
from zepad.persistence.config import WEIGHT_FILES
torch.set_num_threads(1)
images, labels = toy_data(12, size=32)

def load(model_id, modules="", **arguments):
    given = eval(f"dict({{modules}})")
    return ZePAD.from_pretrained(model_id, **{{**given, **arguments}})

def keep(defense, path):
    names = ("predict", "predict_proba", "detection_score")
    save_file({{name: getattr(defense, name)(images) for name in names}}, path + ".decided")
    save_file({{key: value.clone() for key, value in defense.state_dict().items()}}, path + ".state")
    names = ("stage", "channels", "num_classes", "class_names", "threshold", "provenance")
    specs = {{role: defense.encoder(role).spec.to_dict() for role in defense.encoders}}
    values = {{**{{name: getattr(defense, name) for name in names}}, "specs": specs}}
    return json.loads(json.dumps(values))
"""


class Remote:
    """The client's process, with models. What it downloads goes into a cache of this test alone."""

    def __init__(self, client: HubClient, folder: Path) -> None:
        self.client, self.folder = client, folder
        self.cache = folder / "cache"
        self.saved = folder / "saved"

    def run(self, source: str, **values: Any) -> Any:
        return self.client.run(PREAMBLE + source, **values)

    def push(self, defense: ZePAD, repo_id: str = ID, *, modules: str = "", **arguments: Any) -> str:
        """Push a defense, leave nothing of it here, and return the commit."""
        defense.save_pretrained(self.saved)
        source = "result = load(saved, modules).push_to_hub(repo_id, **arguments).revision"
        arguments = {"token": WRITER, **arguments}
        try:
            sha: str = self.run(source, saved=self.saved, modules=modules, repo_id=repo_id, arguments=arguments)
        finally:
            shutil.rmtree(self.saved)
        return sha

    def load(self, repo_id: str | Path = ID, *, modules: str = "", **arguments: Any) -> Loaded:
        """Load with an empty cache, if not told otherwise."""
        arguments = {"token": False, "cache_dir": self.cache, **arguments}
        path = str(self.folder / "loaded")
        source = "result = keep(load(str(repo_id), modules, **arguments), path)"
        found = self.run(source, repo_id=repo_id, modules=modules, arguments=arguments, path=path)
        return Loaded(found, load_file(f"{path}.state"), load_file(f"{path}.decided"))

    def fresh(self) -> None:
        shutil.rmtree(self.cache, ignore_errors=True)


@dataclass(frozen=True)
class Loaded:
    """What the process got."""

    facts: dict[str, Any]
    state: dict[str, Tensor]
    decided: dict[str, Tensor]

    def assert_is(self, defense: ZePAD) -> None:
        assert self.facts == facts(defense)
        assert_same(self.state, defense.state_dict())
        assert_same(self.decided, decide(defense))


@pytest.fixture(params=["lfs", pytest.param("xet", marks=pytest.mark.exhaustive)])
def client(request: pytest.FixtureRequest) -> HubClient:
    """Either client; what Xet does to bytes, the tests of publishing and loading try by default."""
    either: HubClient = request.getfixturevalue(request.param)
    return either


@pytest.fixture
def remote(client: HubClient, tmp_path: Path) -> Remote:
    return Remote(client, tmp_path)


@pytest.fixture
def plain(lfs: HubClient, tmp_path: Path) -> Remote:
    """For what has nothing to do with how bytes travel."""
    return Remote(lfs, tmp_path)


def asked(hub: HubServer, repo_id: str = "") -> set[str]:
    """The files that were asked for, by name."""
    return {request.rpartition("/")[2] for request in hub.sent(f"/{repo_id}.*/resolve/")}


def commit_of_another(hub: HubServer) -> None:
    hub.put(ID, {"README.md": b"of somebody else"}, title="another")


# round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_by_commit_by_branch_and_by_tag(remote: Remote, hub: HubServer, name: str) -> None:
    original, modules = fitted(name), SAMPLES[name].modules
    sha = remote.push(original, modules=modules)
    assert hub.head(ID) == sha
    hub.repos[ID].branches["v1.0"] = sha  # a tag is asked for as a branch is
    for revision in (sha, "main", "v1.0"):
        remote.fresh()
        remote.load(modules=modules, revision=revision).assert_is(original)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_from_a_folder(plain: Remote, hub: HubServer, name: str) -> None:
    original = fitted(name)
    original.save_pretrained(plain.saved)
    plain.load(plain.saved, modules=SAMPLES[name].modules).assert_is(original)
    assert not hub.requests


def test_a_zero_shot_model_comes_back(remote: Remote, hub: HubServer) -> None:
    remote.push(zero_shot())
    remote.load().assert_is(zero_shot())


def test_one_encoder_is_one_file(remote: Remote, hub: HubServer) -> None:
    original = fitted("packaged")
    remote.push(original)
    hub.heal()
    source = """
part = load("alice/m", branches=["victim"], token=False, cache_dir=cache)
save_file({"features": part.encoder("victim")(images)}, path)
result = list(part.encoders)
"""
    path = remote.folder / "features"
    assert remote.run(source, cache=remote.cache, path=path) == ["victim"]
    assert torch.equal(load_file(path)["features"], original.encoder("victim")(IMAGES))
    assert asked(hub) == {"config.json", "victim.safetensors"}


def test_a_branch_and_a_private_repository(remote: Remote, hub: HubServer) -> None:
    main = remote.push(zero_shot(), private=True)
    sha = remote.push(fitted("packaged"), revision="v2")
    assert hub.repos[ID].private
    assert (hub.head(ID), hub.head(ID, "v2")) == (main, sha)
    remote.load(token=READER, revision="v2").assert_is(fitted("packaged"))
    remote.load(token=READER).assert_is(zero_shot())


@pytest.mark.parametrize("how", ["local_files_only", pytest.param("HF_HUB_OFFLINE", marks=pytest.mark.exhaustive)])
def test_what_was_loaded_once_loads_offline(plain: Remote, offline: HubClient, hub: HubServer, how: str) -> None:
    sha = plain.push(fitted("custom"), modules=TINY)
    plain.load(modules=TINY)
    hub.heal()
    if how == "HF_HUB_OFFLINE":
        plain.client = offline
    for revision in (None, sha):
        arguments = {"local_files_only": how == "local_files_only", "revision": revision}
        plain.load(modules=TINY, **arguments).assert_is(fitted("custom"))
    assert not hub.requests


# heads alone ------------------------------------------------------------------------------------------------------

REFIT = """
defense = load(base, modules, token=token, cache_dir=cache)
defense.fit_heads([(images, labels % 2)], HeadConfig(epochs=1), progress=False)
"""


def push_heads(remote: Remote, base: str = ID, repo_id: str = TASK, *, modules: str = TINY, **arguments: Any) -> Loaded:
    """Fit heads for a second task on what is loaded from `base`, push them alone, and return the whole model."""
    source = f"{REFIT}\ndefense.push_to_hub(repo_id, heads_only=True, **arguments)\nresult = keep(defense, path)"
    arguments = {"token": WRITER, **arguments}
    path = str(remote.folder / "task2")
    values = {"base": base, "repo_id": repo_id, "modules": modules, "token": READER, "cache": remote.cache}
    found = remote.run(source, **values, arguments=arguments, path=path)
    return Loaded(found, load_file(f"{path}.state"), load_file(f"{path}.decided"))


def assert_equal(found: Loaded, expected: Loaded) -> None:
    assert found.facts == expected.facts
    assert_same(found.state, expected.state)
    assert_same(found.decided, expected.decided)


@pytest.fixture
def base(remote: Remote, hub: HubServer) -> str:
    """Commit of the published model that the heads are for."""
    return remote.push(fitted("custom"), modules=TINY)


def config_of(hub: HubServer, repo_id: str) -> dict[str, Any]:
    content = hub.repos[repo_id].history()[0].files["config.json"].content
    assert content is not None
    values: dict[str, Any] = json.loads(content)
    return values


def test_a_second_task_sends_its_heads_alone(remote: Remote, hub: HubServer, base: str) -> None:
    hub.heal()
    pushed = push_heads(remote)
    assert pushed.facts["num_classes"] == 2
    assert hub.files(TASK).keys() == {"config.json", "README.md", "heads.safetensors"}
    (commit,) = [request.body for request in hub.requests if COMMIT in request.path]
    assert {line["value"]["path"] for line in commit[1:]} == {"config.json", "README.md", "heads.safetensors"}
    assert len(hub.sent("/storage/", "PUT")) <= 1  # Xet stores elsewhere
    assert config_of(hub, TASK)["base"] == {"repo_id": ID, "revision": base}

    hub.heal()
    remote.fresh()
    assert_equal(remote.load(TASK, modules=TINY), pushed)
    assert asked(hub, TASK) == {"config.json", "heads.safetensors"}
    assert asked(hub, ID) == set(ENCODER_FILES)
    assert all(base in request for request in hub.sent(f"/{ID}/resolve/"))

    hub.heal()
    remote.fresh()
    source = "result = list(load(task, modules, branches=['victim'], token=False, cache_dir=cache).encoders)"
    assert remote.run(source, task=TASK, modules=TINY, cache=remote.cache) == ["victim"]
    assert asked(hub, TASK) == {"config.json"}
    assert asked(hub, ID) == {"victim.safetensors"}


@pytest.mark.filterwarnings("ignore:.* the same encoder:zepad.errors.InputWarning")
def test_heads_keep_their_encoders_when_the_base_moves_on(remote: Remote, hub: HubServer, base: str) -> None:
    pushed = push_heads(remote)
    other = remote.push(fitted("one module"), modules=TINY)
    assert hub.head(ID) == other != base
    remote.fresh()
    assert_equal(remote.load(TASK, modules=TINY), pushed)


def test_heads_may_live_on_a_branch_of_their_base(remote: Remote, hub: HubServer, base: str) -> None:
    pushed = push_heads(remote, repo_id=ID, revision="task2")
    assert hub.head(ID) == base
    assert hub.files(ID, "task2").keys() == {"config.json", "README.md", "heads.safetensors"}
    remote.fresh()
    assert_equal(remote.load(modules=TINY, revision="task2"), pushed)


@pytest.mark.parametrize("what", ["deleted", "private"])
def test_heads_whose_base_cannot_be_had(plain: Remote, hub: HubServer, what: str) -> None:
    plain.push(fitted("custom"), modules=TINY)
    push_heads(plain)
    plain.fresh()
    if what == "deleted":
        del hub.repos[ID]
    else:
        hub.repos[ID].private = True
    with pytest.raises(HubError, match=r"victim.safetensors of 'alice/m' could not be fetched: there is no such repo"):
        plain.load(TASK, modules=TINY)


def test_heads_of_heads_name_the_first_base(remote: Remote, hub: HubServer, base: str) -> None:
    push_heads(remote)
    pushed = push_heads(remote, TASK, "alice/task3")
    assert config_of(hub, "alice/task3")["base"] == {"repo_id": ID, "revision": base}
    del hub.repos[TASK]
    remote.fresh()
    assert_equal(remote.load("alice/task3", modules=TINY), pushed)


def test_heads_follow_a_whole_push_of_the_same_object(plain: Remote, hub: HubServer) -> None:
    fitted("custom").save_pretrained(plain.saved)
    source = """
defense = load(saved, modules)
home = defense.push_to_hub("alice/m", token=token)
defense.fit_heads([(images, labels % 2)], HeadConfig(epochs=1), progress=False)
defense.push_to_hub("alice/task2", heads_only=True, token=token)
result = [home.repo_id, home.revision]
"""
    repo_id, revision = plain.run(source, saved=plain.saved, modules=TINY, token=WRITER)
    assert config_of(hub, TASK)["base"] == {"repo_id": repo_id, "revision": revision}
    assert hub.head(ID) == revision
    assert plain.load(TASK, modules=TINY).facts["num_classes"] == 2


def test_a_folder_of_heads_loads_through_the_hub(plain: Remote, hub: HubServer) -> None:
    plain.push(fitted("custom"), modules=TINY)
    source = f"{REFIT}\ndefense.save_pretrained(saved, heads_only=True)\nresult = keep(defense, path)"
    path = str(plain.folder / "task2")
    values = {"base": ID, "modules": TINY, "token": False, "cache": plain.cache}
    found = plain.run(source, **values, saved=plain.saved, path=path)
    assert {file.name for file in plain.saved.iterdir()} == {"config.json", "README.md", "heads.safetensors"}
    hub.heal()
    plain.fresh()
    expected = Loaded(found, load_file(f"{path}.state"), load_file(f"{path}.decided"))
    assert_equal(plain.load(plain.saved, modules=TINY), expected)
    assert asked(hub) == set(ENCODER_FILES)


def test_heads_of_changed_encoders_stay_here(plain: Remote, hub: HubServer) -> None:
    plain.push(fitted("custom"), modules=TINY)
    change = "defense = load('alice/m', modules, token=False, cache_dir=cache)\n"
    change += "defense.encoder('auxiliary').backbone.conv.weight.data[0, 0, 0, 0] += 1\n"
    plain.run(change, modules=TINY, cache=plain.cache)
    hub.heal()
    push = "defense.push_to_hub('alice/task2', heads_only=True, token=token)"
    with pytest.raises(CheckpointError, match=r"auxiliary.safetensors changed since .* published as alice/m.*heads_on"):
        plain.run(f"{change}\n{push}", modules=TINY, cache=plain.cache, token=WRITER)
    assert TASK not in hub.repos
    assert hub.sent("", "POST") == hub.sent("", "PUT") == []


@pytest.mark.parametrize(
    "call", ["push_to_hub('alice/task2', heads_only=True)", "save_pretrained(saved, heads_only=True)"]
)
def test_heads_need_a_published_base(plain: Remote, hub: HubServer, call: str) -> None:
    fitted("custom").save_pretrained(plain.saved)
    before = {path.name: path.read_bytes() for path in plain.saved.iterdir()}
    with pytest.raises(
        StageError, match="the encoders of this model are not on the Hub.*Publish the whole model first"
    ):
        plain.run(f"load(saved, modules).{call}", saved=plain.saved, modules=TINY)
    assert not hub.requests
    assert {path.name: path.read_bytes() for path in plain.saved.iterdir()} == before


# pushes that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": "hf_nonsense"}, "wants a token that it knows"),
        ({"token": READER}, "does not give that right"),
        ({"token": STRANGER}, "does not give that right"),
        ({"private": True}, "it is public, and private=True"),
        ({"revision": "0" * 40}, "is a commit. Pass the name of a branch"),
    ],
)
def test_a_push_that_may_not_be_changes_nothing(
    plain: Remote, hub: HubServer, arguments: dict[str, Any], message: str
) -> None:
    before = plain.push(zero_shot())
    with pytest.raises(HubError, match=f"nothing was published to 'alice/m': .*{message}"):
        plain.push(fitted("packaged"), **arguments)
    assert hub.head(ID) == before
    assert hub.head(ID) != plain.push(fitted("packaged"))
    plain.load().assert_is(fitted("packaged"))


FAILURES: dict[str, tuple[str, str, Any]] = {
    "upload": ("PUT", "/storage/", "reset"),
    "upload through Xet": ("GET", "xet-write-token", "status"),
    "commit": ("POST", COMMIT, "reset"),
    "commit refused": ("POST", COMMIT, "status"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_push_that_breaks_off_changes_nothing(
    lfs: HubClient, xet: HubClient, hub: HubServer, tmp_path: Path, failure: str
) -> None:
    remote = Remote(xet if "Xet" in failure else lfs, tmp_path)
    before = remote.push(zero_shot())
    status = 403 if "Xet" in failure else 500  # hf_xet waits in real time before it asks again
    method, pattern, action = FAILURES[failure]
    hub.fail(method, pattern, action, status=status)
    with pytest.raises(HubError, match=r"nothing was published to 'alice/m': "):
        remote.push(fitted("packaged"))
    assert hub.head(ID) == before
    hub.heal()
    assert remote.push(fitted("packaged")) == hub.head(ID) != before
    remote.load().assert_is(fitted("packaged"))


def test_a_push_whose_answer_is_lost_is_known_as_published(remote: Remote, hub: HubServer) -> None:
    hub.fail("POST", COMMIT, "lose", 1)
    sha = remote.push(fitted("packaged"))
    assert hub.head(ID) == sha
    assert len(hub.history(ID)) == 1
    remote.load(revision=sha).assert_is(fitted("packaged"))


def test_a_push_onto_a_commit_of_somebody_else(plain: Remote, hub: HubServer) -> None:
    plain.push(zero_shot())
    hub.fail("POST", COMMIT, lambda: commit_of_another(hub), 1)
    with pytest.raises(HubError, match=r"nothing was published .*somebody else committed"):
        plain.push(fitted("packaged"))
    assert hub.history(ID)[0].title == "another"
    hub.heal()
    plain.push(fitted("packaged"))
    plain.load().assert_is(fitted("packaged"))


def test_a_push_onto_another_librarys_model(plain: Remote, hub: HubServer) -> None:
    before = hub.put(ID, {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"weights"})
    with pytest.raises(HubError, match="a model that zepad did not write. Choose another repo_id"):
        plain.push(fitted("packaged"))
    assert hub.head(ID) == before
    plain.push(fitted("packaged"), "alice/another")
    plain.load("alice/another").assert_is(fitted("packaged"))


def test_fewer_files_take_the_place_of_more(plain: Remote, hub: HubServer) -> None:
    plain.push(fitted("packaged"))
    built = ZePAD.from_encoders("zepad:digits-barlow-twins", "zepad:digits-simclr", preset="paper")
    plain.push(built)
    assert hub.files(ID).keys() == {"config.json", "README.md", *ENCODER_FILES}


# loads that fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no such repository, or it is private"),
        ({"token": STRANGER}, "no such repository, or it is private"),
        ({"token": "hf_nonsense"}, "wants a token that it knows"),
        ({"token": READER, "repo_id": "alice/nothing"}, "no such repository"),
        ({"token": READER, "revision": "v9"}, "has no revision 'v9'"),
    ],
)
def test_a_load_that_may_not_be(plain: Remote, hub: HubServer, arguments: dict[str, Any], message: str) -> None:
    plain.push(fitted("custom"), modules=TINY, private=True)
    with pytest.raises(HubError, match=f"config.json of 'alice/.*' could not be fetched: .*{message}"):
        plain.load(**arguments)


def test_a_flipped_byte_is_fetched_again_once(plain: Remote, hub: HubServer) -> None:
    plain.push(fitted("packaged"))
    hub.heal()
    hub.fail("GET", "/storage/", "flip", 2)
    plain.load().assert_is(fitted("packaged"))
    assert len(hub.sent("/storage/", "GET")) == len(WEIGHTS) + 1
    plain.load(local_files_only=True).assert_is(fitted("packaged"))


def test_a_byte_that_stays_flipped_is_never_loaded(plain: Remote, hub: HubServer) -> None:
    plain.push(fitted("packaged"))
    hub.heal()
    hub.fail("GET", "/storage/", "flip")
    with pytest.raises(CheckpointError, match=r"victim.safetensors has sha256 .*its content was changed"):
        plain.load()
    assert len(hub.sent("/storage/", "GET")) == 2
    hub.heal()
    plain.load().assert_is(fitted("packaged"))


def saved_files(defense: ZePAD, folder: Path) -> dict[str, bytes]:
    defense.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return files


def vouched(files: dict[str, bytes], name: str, blob: bytes) -> dict[str, bytes]:
    """The files with another weight file, as someone would publish it who also writes the config."""
    values = json.loads(files["config.json"])
    values["files"][name] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    return {**files, name: blob, "config.json": json.dumps(values).encode()}


def _without_the_last(blob: bytes) -> bytes:
    return write_tensors(dict(list(read_tensors(blob).items())[:-1]))


def _with_another(blob: bytes) -> bytes:
    return write_tensors({**read_tensors(blob), "victim.surplus": torch.ones(1)})


def _with_a_huge_header(blob: bytes) -> bytes:
    return (10 * 2**30).to_bytes(8, "little") + b"{" + b" " * 1000


@pytest.mark.parametrize("name", ["victim.safetensors", "heads.safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_the_last, "missing keys: "),
        (_with_another, "unexpected keys: (victim.)?surplus"),
        (_with_a_huge_header, "is no safetensors file"),
    ],
)
def test_weights_that_the_config_vouches_for_must_still_fit(
    plain: Remote, hub: HubServer, name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    files = saved_files(fitted("custom"), plain.saved)
    hub.put(ID, vouched(files, name, change(files[name])))
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        plain.load(modules=TINY)


def test_a_pickle_is_never_asked_for(plain: Remote, hub: HubServer) -> None:
    hub.put(ID, {"pytorch_model.bin": b"pickle", "README.md": b"a card"})
    with pytest.raises(HubError, match="holds pickles alone"):
        plain.load()
    assert asked(hub) == {"config.json"}
    assert not hub.sent("/storage/")


_SPEC = ("encoders", "victim", "spec")
_BASE = {"repo_id": ID, "revision": "0" * 40}
HOSTILE: dict[str, tuple[tuple[str, ...], Any]] = {
    "another library": (("library",), "transformers"),
    "a newer format": (("format",), 99),
    "a model of the Hub": ((*_SPEC, "name"), "hf-hub:mallory/model"),
    "a model of the Hub, for timm": (_SPEC, {"source": "timm", "name": "hf-hub:mallory/model"}),
    "a path": ((*_SPEC, "name"), "../../etc/passwd"),
    "an import": (_SPEC, {"source": "timm", "name": "os.system"}),
    "a source to be imported": (_SPEC, {"source": "os.path", "name": "join"}),
    "a module to be imported": (_SPEC, {"source": "antigravity", "name": "this"}),
    "a custom module by name": (_SPEC, {"source": "custom", "name": "tiny.TinyEncoder"}),
    "weights of the Hub": ((*_SPEC, "weights"), "mallory/model"),
    "weights of transformers": (_SPEC, {"source": "transformers", "name": "", "weights": "mallory/model"}),
    "a checkpoint": (_SPEC, {"source": "timm", "name": "resnet18", "arguments": {"checkpoint_path": "evil.pth"}}),
    "an address": (_SPEC, {"source": "timm", "name": "resnet18", "arguments": {"url": "https://mallory.example/x"}}),
    "a pre-trained model": (_SPEC, {"source": "timm", "name": "resnet18", "arguments": {"pretrained": True}}),
    "an argument with a path": (_SPEC, {"source": "timm", "name": "resnet18", "arguments": {"block": "/etc/passwd"}}),
    "a base elsewhere": (("base",), {**_BASE, "repo_id": "https://mallory.example/model"}),
    "a base that is a path": (("base",), {**_BASE, "repo_id": "../../etc"}),
    "a base of another kind": (("base",), {**_BASE, "repo_id": "datasets/mallory/model"}),
    "a base that may move": (("base",), {**_BASE, "revision": "main"}),
    "a file elsewhere": (("files", "../../evil.safetensors"), {"sha256": "0" * 64, "bytes": 1}),
    "a file by address": (("files", "https://mallory.example/x"), {"sha256": "0" * 64, "bytes": 1}),
    "a head to be imported": (("heads", "victim"), "os.system"),
    "a timm of the future": (_SPEC, {"source": "timm", "name": "resnet18_of_the_future"}),
    "a torchvision of the future": (_SPEC, {"source": "torchvision", "name": "resnet18_of_the_future"}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_config_that_is_not_to_be_trusted_is_the_last_thing_asked_for(
    plain: Remote, hub: HubServer, case: str
) -> None:
    files = saved_files(fitted("packaged"), plain.saved)
    values = json.loads(files["config.json"])
    (*path, last), value = HOSTILE[case]
    owner = values
    for key in path:
        owner = owner[key]
    owner[last] = {**owner[last], **value} if last == "spec" else value
    hub.put("alice/good", files)
    hub.put(ID, {**files, "config.json": json.dumps(values).encode()})
    source = """
import timm, torchvision
from zepad.errors import ZePADError
load("alice/good", token=False, cache_dir=cache)  # what is imported late, is imported now
before = set(sys.modules)
try:
    load("alice/m", token=False, cache_dir=cache)
except ZePADError as error:
    result = [type(error).__name__, str(error), sorted(set(sys.modules) - before)]
"""
    kind, message, imported = plain.run(source, cache=plain.cache)
    assert kind in ("CheckpointError", "ConfigError"), message
    assert imported == []
    after = hub.sent()[hub.sent().index(f"HEAD /{ID}/resolve/main/config.json") :]
    assert after == [f"HEAD /{ID}/resolve/main/config.json", f"GET /{ID}/resolve/main/config.json"]


def test_nothing_is_fetched_for_a_module_that_was_not_passed(plain: Remote, hub: HubServer) -> None:
    plain.push(fitted("custom"), modules=TINY)
    hub.heal()
    with pytest.raises(ZePADError, match="the victim encoder is a module of the caller's"):
        plain.load()
    assert asked(hub) == {"config.json"}
