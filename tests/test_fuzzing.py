"""Thousands of damaged and hostile saves: each is refused in zepad's own words, or is the model that was saved.

No case runs code, starts a process, opens a connection, or touches a file that is not the model's or a library's.
"""

from __future__ import annotations

import argparse
import codecs
import copy
import hashlib
import importlib
import io
import json
import os
import resource
import signal
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import zepad
from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, HardenConfig, HeadConfig, Preprocessing, ZePAD, ZeroShotHead, fusion
from zepad.data import load_data, read_image
from zepad.encoders import Encoder
from zepad.encoders.checkpoints import read_checkpoint
from zepad.encoders.sources import lightly, solo
from zepad.encoders.sources.lightly import load_lightly
from zepad.encoders.sources.resnet import build_resnet
from zepad.encoders.sources.solo import load_solo
from zepad.errors import ZePADError
from zepad.training import harden_branch
from zepad.training.checkpoints import load_latest
from zepad.types import ROLES

pytestmark = pytest.mark.exhaustive

IMAGES, LABELS = toy_data(8)
BATCHES = [(IMAGES, LABELS)]
GIGABYTE = 2**30


# what Python tells of what it does --------------------------------------------------------------------------------

# Libraries import their own parts when they first need them; which, no config decides.
_LIBRARIES = ("open_clip", "safetensors", "timm", "torch", "torchvision", "transformers", "zepad")
_FORBIDDEN = (
    "ctypes.dlopen",
    "ftplib.",
    "http.client.",
    "marshal.load",
    "os.chmod",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.startfile",
    "os.symlink",
    "os.system",
    "os.truncate",
    "pickle.find_class",
    "pty.spawn",
    "shutil.",
    "socket.",
    "subprocess.Popen",
    "tempfile.",
    "urllib.Request",
    "webbrowser.open",
)
_READABLE = tuple(
    str(Path(path).resolve())
    for path in (*{sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}, *zepad.__path__)
)


class Watch:
    """What this thread did while it was watched, as far as a load has no business with it."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.folder = ""
        self.thread = 0
        sys.addaudithook(self.hook)  # for good: a hook cannot be taken back

    def find_spec(self, name: str, *_: object) -> None:
        """Be asked first for whatever is imported, by `importlib` too, which raises no event; find nothing."""
        if self.thread == threading.get_ident() and name.partition(".")[0] not in _LIBRARIES:
            self.seen.append(f"import of {name}")

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Watch a load from a folder."""
        self.seen, self.folder, self.thread = [], str(folder.resolve()), threading.get_ident()
        try:
            yield
        finally:
            self.thread = 0

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.thread != threading.get_ident():
            return
        if event.startswith(_FORBIDDEN):
            foreign = True
        elif event == "open":
            foreign = not self.may_open(*arguments)
        elif event == "compile":
            foreign = True
        elif event == "exec":
            foreign = not str(arguments[0].co_filename).startswith((*_READABLE, "<frozen"))
        else:
            return
        if foreign:
            self.seen.append(f"{event}{arguments!r}"[:300])

    def may_open(self, path: Any, _: str | None, flags: int) -> bool:
        """Whether it is a file of the model or of a library, for reading."""
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            return False
        return isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith((self.folder, *_READABLE))


@pytest.fixture(scope="module")
def watch() -> Iterator[Watch]:
    watch = Watch()
    sys.meta_path.insert(0, watch)  # type: ignore[arg-type]
    yield watch
    sys.meta_path.remove(watch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "action",
    [
        lambda _: os.system("true"),
        lambda _: exec("1"),
        lambda _: __import__("this_is_nowhere"),
        lambda _: importlib.import_module("this_is_nowhere"),
        lambda folder: (folder / "new").write_text(""),
        lambda _: Path("/etc/passwd").read_text(),
        lambda _: __import__("socket").getaddrinfo("localhost", 1),
        lambda _: __import__("pickle").loads(__import__("pickle").dumps(Path("x"))),
    ],
    ids=["process", "code", "import", "importlib", "writing", "reading", "network", "pickle"],
)
def test_the_watch_sees(watch: Watch, tmp_path: Path, action: Callable[[Path], object]) -> None:
    """Or its silence would prove nothing."""
    with watch.over(tmp_path), suppress(ImportError):
        action(tmp_path)
    assert watch.seen


# the models -------------------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """A saved model, in a folder that a case may change and that is put right for the next."""

    folder: Path
    modules: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    settings: list[Any] = field(default_factory=list)
    decided: list[Tensor] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        values: dict[str, Any] = json.loads(self.files["config.json"])
        return values

    def keep(self, defense: ZePAD) -> Saved:
        defense.save_pretrained(self.folder)
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        self.state = {key: value.clone() for key, value in defense.state_dict().items()}
        self.settings, self.decided = settings_of(defense), decide(defense)
        return self

    def load(self) -> ZePAD:
        return ZePAD.from_pretrained(self.folder, **copy.deepcopy(self.modules))

    @contextmanager
    def changed(self, **files: bytes) -> Iterator[None]:
        """Other content in some files, by their names without suffix."""
        names = {name: next(full for full in self.files if full.startswith(f"{name}.")) for name in files}
        try:
            for name, content in files.items():
                (self.folder / names[name]).write_bytes(content)
            yield
        finally:
            for full in names.values():
                (self.folder / full).write_bytes(self.files[full])


def settings_of(defense: ZePAD) -> list[Any]:
    """All that decides beside the weights."""
    return [defense.fusion, *(defense.encoder(role).spec for role in ROLES)]


def decide(defense: ZePAD) -> list[Tensor]:
    return [defense.predict(IMAGES), defense.predict_proba(IMAGES), defense.detection_score(IMAGES)]


def _hardened(*encoders: Any, **arguments: Any) -> ZePAD:
    torch.manual_seed(0)
    defense = ZePAD.from_encoders(*encoders, **arguments)
    return defense.harden(BATCHES, HardenConfig(epochs=1, steps=1), progress=False)


def _fitted(*encoders: Any, **arguments: Any) -> ZePAD:
    defense = _hardened(*encoders, **arguments)
    defense.fit_benign(BATCHES, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    defense.class_names = ("a", "b", "c")
    return defense


PACKAGED = ("zepad:digits-barlow-twins", "zepad:digits-simclr")
TINY = {"victim": TinyEncoder(), "auxiliary": TinyEncoder()}


def _custom() -> ZePAD:
    return _fitted(TinyEncoder(), TinyEncoder(), preprocess=Preprocessing.imagenet(size=(12, 12)))


def _zero_shot() -> ZePAD:
    heads = {role: ZeroShotHead(torch.randn(3, 128), scale=10.0) for role in ROLES}
    return _hardened(*PACKAGED).fit_zero_shot(heads, class_names=["a", "b", "c"])


MODELS: dict[str, tuple[Callable[[], ZePAD], dict[str, Any]]] = {
    "custom": (_custom, TINY),
    "packaged": (lambda: _fitted(*PACKAGED), {}),
    "zero_shot": (_zero_shot, {}),
}
each_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def models(watch: Watch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Saved]]:
    """Every model; and every library has imported what it imports late, so that no import has that excuse."""
    saved = {}
    fusion.names()  # looks for the plug-ins of installed packages, which the first unknown name would do
    for name, (make, modules) in MODELS.items():
        torch.manual_seed(1)
        saved[name] = Saved(tmp_path_factory.mktemp(name) / "model", modules).keep(make())
    for spec in SPECS:
        values = saved["packaged"].config
        values["encoders"]["victim"]["spec"].update(spec)
        with saved["packaged"].changed(config=json.dumps(values).encode()), suppress(ZePADError):
            saved["packaged"].load()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield saved
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 2 * GIGABYTE


def check(watch: Watch, saved: Saved, *, vouched: bool = False) -> None:
    """Load what is in the folder now: refused in our own words, or the model that was saved.

    Args:
        watch: Sees to it that nothing else is done.
        saved: The model.
        vouched: The config vouches for other weights: then they are another model's, which nobody can tell.
    """
    loaded = None
    with watch.over(saved.folder), suppress(ZePADError):
        loaded = saved.load()
    assert watch.seen == []
    if loaded is None or vouched:
        return
    state = loaded.state_dict()
    assert state.keys() == saved.state.keys()
    for key, value in state.items():
        assert value.dtype == saved.state[key].dtype
        assert torch.equal(value, saved.state[key])
    # A valid setting of another value is another model; its images may be so large that nothing is decided here.
    if settings_of(loaded) == saved.settings:
        assert all(map(torch.equal, decide(loaded), saved.decided))


@each_model
def test_what_was_not_changed_loads(watch: Watch, models: dict[str, Saved], name: str) -> None:
    """Or every case below might be refused for another reason."""
    models[name].load()
    check(watch, models[name])


# config.json ------------------------------------------------------------------------------------------------------

_TRANSFORMER = {
    "hidden_size": 8,
    "image_size": 16,
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "patch_size": 8,
}
# What someone might write who wants more to happen than a model to be loaded.
SPECS: tuple[dict[str, Any], ...] = (
    {"source": "timm", "name": "test_resnet", "arguments": {}},
    {"source": "timm", "name": "test_resnet", "arguments": {"drop_rate": 0.5, "act_layer": "gelu"}},
    {"source": "timm", "name": "test_resnet", "arguments": {"act_layer": "os.system"}},
    {"source": "timm", "name": "test_resnet", "arguments": {"scriptable": True}},
    {"source": "timm", "name": "test_resnet", "arguments": {"checkpoint_path": "evil.pth"}},
    {"source": "timm", "name": "test_resnet", "arguments": {"pretrained": True}},
    {"source": "timm", "name": "test_resnet", "arguments": {"file": "/etc/passwd"}},
    {"source": "timm", "name": "resnet18", "arguments": {}},
    {"source": "timm", "name": "hf-hub:mallory/model", "arguments": {}},
    {"source": "timm", "name": "hf_hub:mallory/model", "arguments": {}},
    {"source": "timm", "name": "local-dir:/etc", "arguments": {}},
    {"source": "torchvision", "name": "squeezenet1_1", "arguments": {}},
    {"source": "torchvision", "name": "squeezenet1_1", "arguments": {"progress": False, "weights": "DEFAULT"}},
    {"source": "torchvision", "name": "fcn_resnet50", "arguments": {}},
    {"source": "open_clip", "name": "ViT-B-32", "arguments": {"force_image_size": 10**6}},
    {"source": "open_clip", "name": "ViT-B-32", "arguments": {"pretrained_image": True}},
    {"source": "open_clip", "name": "ViT-B-32", "arguments": {"load_weights": "evil.pt"}},
    {"source": "open_clip", "name": "hf-hub:mallory/model", "arguments": {}},
    {"source": "transformers", "name": "vit", "arguments": _TRANSFORMER},
    {"source": "transformers", "name": "vit", "arguments": {**_TRANSFORMER, "hidden_size": 2**16}},
    {"source": "transformers", "name": "vit", "arguments": {**_TRANSFORMER, "num_hidden_layers": 10**9}},
    {"source": "transformers", "name": "vit", "arguments": {**_TRANSFORMER, "auto_map": "mallory.Model"}},
    {"source": "transformers", "name": "vit", "arguments": {**_TRANSFORMER, "attn_implementation": "mallory"}},
    {"source": "transformers", "name": "vit", "arguments": {**_TRANSFORMER, "hidden_act": "os.system"}},
    {"source": "transformers", "name": "bert", "arguments": {}},
    {"source": "transformers", "name": "", "weights": "mallory/model"},
    {"source": "transformers", "name": "", "weights": "/etc"},
    {"source": "solo", "name": "resnet18", "arguments": {"stem": "solo"}},
    {"source": "solo", "name": "", "weights": "/etc/passwd"},
    {"source": "lightly", "name": "resnet18", "arguments": {}},
    {"source": "lightly", "name": "", "weights": "evil.ckpt"},
    {"source": "zepad", "name": "digits-simclr", "arguments": {}},
    {"source": "zepad", "name": "digits-simclr", "arguments": {"width": 10**9}},
    {"source": "zepad", "name": "../../etc/passwd", "arguments": {}},
    {"source": "custom", "name": "", "arguments": {}},
    {"source": "custom", "name": "os.system", "arguments": {}},
    {"source": "os", "name": "system", "arguments": {"command": "id"}},
)
_words = st.sampled_from(
    [
        *("hf-hub:x/y", "../../etc/passwd", "/etc/passwd", "os.system", "__import__('os').system('id')", "http://x/y"),
        *("custom", "zepad", "timm", "torchvision", "open_clip", "transformers", "solo", "digits-simclr", "resnet18"),
        *("built", "hardened", "fitted", "mlp", "zero_shot", "mean", "rfdm", "entropy", "bicubic", "class_token"),
        *("victim", "auxiliary", "benign", "victim.safetensors", "heads.safetensors", "x/y", "0" * 40, "0" * 64, ""),
    ]
)
_numbers = st.sampled_from(
    [0, 1, 2, 3, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.0, -0.5, 1e308, 1e999, float("nan")]
)
_plain = st.none() | st.booleans() | _words | _numbers
_hostile = _plain | st.lists(_plain, max_size=3) | st.dictionaries(_words, _plain, max_size=3) | st.sampled_from(SPECS)
_junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


def paths(values: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path for key, value in items for path in ((*prefix, key), *paths(value, (*prefix, key)))]


def at(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def put(owner: Any, key: Any, value: Any) -> None:
    if isinstance(owner, list):
        owner.insert(min(len(owner), key if isinstance(key, int) else 0), value)
    else:
        owner[str(key)] = value


def mutate(values: Any, draw_shared: Callable[[Any], Any]) -> None:
    """Change one thing somewhere."""

    def draw(strategy: st.SearchStrategy[Any]) -> Any:
        return copy.deepcopy(draw_shared(strategy))  # the next change may be inside of what was put in by this one

    path = draw(st.sampled_from(paths(values)))
    owner, key = at(values, path[:-1]), path[-1]
    value = _hostile | _junk
    match draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "duplicate", "swap", "spec"])):
        case "replace":
            owner[key] = draw(value)
        case "delete":
            del owner[key]
        case "add":
            put(owner, draw(_words | st.text(max_size=8)), draw(value))
        case "duplicate":
            put(owner, draw(_words), copy.deepcopy(owner[key]))
        case "swap":
            other = draw(st.sampled_from(paths(values)))
            depth = min(len(path), len(other))
            if path[:depth] != other[:depth]:  # nothing can trade places with a part of itself
                theirs = at(values, other[:-1])
                owner[key], theirs[other[-1]] = theirs[other[-1]], owner[key]
        case "spec":
            encoders = values.get("encoders")
            record = encoders.get(draw(st.sampled_from(ROLES))) if isinstance(encoders, dict) else None
            if isinstance(record, dict) and isinstance(record.get("spec"), dict):
                record["spec"].update(draw(st.sampled_from(SPECS)))


@each_model
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_config_of_another_structure(watch: Watch, models: dict[str, Saved], name: str, data: st.DataObject) -> None:
    values = models[name].config
    for _ in range(data.draw(st.sampled_from([1, 1, 2, 3]))):
        if paths(values):
            mutate(values, data.draw)
    with models[name].changed(config=json.dumps(values).encode()):
        check(watch, models[name])


@each_model
@given(data=st.data())
@settings(deadline=None, max_examples=120)
def test_a_config_of_other_bytes(watch: Watch, models: dict[str, Saved], name: str, data: st.DataObject) -> None:
    content = bytearray(models[name].files["config.json"])
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        end = start + data.draw(st.sampled_from([0, 1, 1, 2, 10, 100]))
        content[start:end] = data.draw(
            st.binary(max_size=4) | st.text('0123456789.-+eE[]{}",:ntfu\\', max_size=4).map(str.encode)
        )
    with models[name].changed(config=bytes(content)):
        check(watch, models[name])


# weight files -----------------------------------------------------------------------------------------------------


def vouch(saved: Saved, name: str, blob: bytes) -> bytes:
    """The config of someone who changed a weight file and can also write the config."""
    values = saved.config
    values["files"][f"{name}.safetensors"] = {"sha256": hashlib.sha256(blob).hexdigest(), "bytes": len(blob)}
    return json.dumps(values).encode()


_files = st.sampled_from([*ROLES, "heads"])


@each_model
@given(data=st.data(), file=_files)
@settings(deadline=None, max_examples=100)
def test_weights_of_other_bytes(
    watch: Watch, models: dict[str, Saved], name: str, data: st.DataObject, file: str
) -> None:
    saved = models[name]
    blob = bytearray(saved.files[f"{file}.safetensors"])
    vouched = data.draw(st.booleans())
    start = data.draw(st.integers(0, 2000 if vouched else len(blob)))  # the header is where a vouched change does harm
    end = start + data.draw(st.sampled_from([0, 1, 1, 2, 8, 10**9]))
    blob[start:end] = data.draw(st.binary(max_size=9))
    config = vouch(saved, file, bytes(blob)) if vouched else saved.files["config.json"]
    with saved.changed(config=config, **{file: bytes(blob)}):
        check(watch, saved, vouched=vouched)


@each_model
@given(data=st.data(), file=_files)
@settings(deadline=None, max_examples=100)
def test_weights_of_another_structure(
    watch: Watch, models: dict[str, Saved], name: str, data: st.DataObject, file: str
) -> None:
    saved = models[name]
    blob = saved.files[f"{file}.safetensors"]
    length = int.from_bytes(blob[:8], "little")
    header, tensors = json.loads(blob[8 : 8 + length]), blob[8 + length :]
    for _ in range(data.draw(st.sampled_from([1, 1, 2, 3]))):
        path = data.draw(st.sampled_from(paths(header)))
        owner, key = at(header, path[:-1]), path[-1]
        match data.draw(st.sampled_from(["dtype", "shape", "replace", "delete", "duplicate"])):
            case "dtype" if isinstance(owner, dict) and "dtype" in owner:
                owner["dtype"] = data.draw(
                    st.sampled_from(["F16", "BF16", "F64", "I32", "U8", "C64", "F8_E4M3", "BOOL"])
                )
            case "shape" if isinstance(owner, dict) and isinstance(owner.get("shape"), list):
                owner["shape"] = data.draw(st.sampled_from([[], [0], [*owner["shape"], 1], [1, *owner["shape"]]]))
            case "delete":
                del owner[key]
            case "duplicate":
                put(owner, data.draw(_words), copy.deepcopy(owner[key]))
            case _:
                owner[key] = copy.deepcopy(data.draw(_hostile))
        if not paths(header):
            break
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + tensors
    with saved.changed(config=vouch(saved, file, changed), **{file: changed}):
        check(watch, saved, vouched=True)


# what a load may take ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {"source": "timm", "name": "test_vit", "arguments": {"embed_dim": 10**9}},
        {"source": "timm", "name": "resnet18", "arguments": {"in_chans": 10**9}},
        {"source": "torchvision", "name": "squeezenet1_1", "arguments": {"num_classes": 10**9}},
        {"source": "open_clip", "name": "ViT-B-32", "arguments": {"force_image_size": 10**9}},
        {"source": "transformers", "name": "vit", "arguments": {"hidden_size": 10**9}},
        {"source": "transformers", "name": "vit", "arguments": {"hidden_size": 2**16}},
        {"source": "timm", "name": "test_vit", "arguments": {"embed_dim": 2**16}},
        {"source": "timm", "name": "vit_tiny_patch16_224", "arguments": {"depth": 2**16}},
        {"source": "torchvision", "name": "resnet18", "arguments": {"width_per_group": 2**16}},
    ],
    ids=lambda spec: f"{spec['source']} {spec['arguments']}",
)
def test_no_memory_is_asked_for_that_no_model_needs(models: dict[str, Saved], spec: dict[str, Any]) -> None:
    values = models["packaged"].config
    values["encoders"]["victim"]["spec"].update(spec)
    with models["packaged"].changed(config=json.dumps(values).encode()), pytest.raises(ZePADError) as caught:
        models["packaged"].load()
    assert "allocate" not in str(caught.value)


def test_a_dimension_that_no_tensor_can_have(models: dict[str, Saved]) -> None:
    saved = models["custom"]
    header = json.dumps({"x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}).encode()
    blob = len(header).to_bytes(8, "little") + header
    config = vouch(saved, "victim", blob)
    with saved.changed(config=config, victim=blob), pytest.raises(ZePADError, match="is no safetensors file"):
        saved.load()


# what else is read ------------------------------------------------------------------------------------------------
# Each file is read with 2 GiB of memory to spare and within a minute, by readers that have imported what they need.


class Late(BaseException):
    """It takes longer than a minute; no reader catches this."""


@contextmanager
def bounded() -> Iterator[None]:
    """Let what is done take 2 GiB of address space more than there is now, and a minute."""

    def late(*_: object) -> None:
        raise Late

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, alarm = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GIGABYTE, before[1]))
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, alarm)
        resource.setrlimit(resource.RLIMIT_AS, before)


linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
unwarned = pytest.mark.filterwarnings("ignore")  # numpy, Pillow and torch warn of what they find, and go on


def read(watch: Watch, folder: Path, reader: Callable[[], Any]) -> Any:
    """What a reader returns, or None where it refuses; nothing else is done meanwhile."""
    found = None
    with bounded(), watch.over(folder), suppress(ZePADError):
        found = reader()
    # numpy has Python parse the header of an array; what was parsed would be run in an event of its own.
    assert [event for event in watch.seen if not event.startswith("compile(")] == []
    return found


def damage(draw: Callable[[Any], Any], content: bytes) -> bytes:
    """Change, cut out or put in some bytes, at the beginning as often as anywhere."""
    damaged = bytearray(content)
    for _ in range(draw(st.sampled_from([1, 1, 2, 5]))):
        start = draw(st.integers(0, min(200, len(damaged))) | st.integers(0, len(damaged)))
        end = start + draw(st.sampled_from([0, 1, 1, 4, 100, 10**9]))
        damaged[start:end] = draw(st.binary(max_size=9) | st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(8)]))
    return bytes(damaged)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    codecs.lookup("cp437")  # of names in zip archives, imported when the first is damaged
    load_data("digits", "test")  # on its first call it has Python evaluate its own annotations
    return tmp_path_factory.mktemp("files")


# images


def _pictures() -> dict[str, bytes]:
    """Files of every format that is read, in several modes, and of some that are not."""
    colours = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = {}
    for form in ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "GIF", "EPS", "TGA", "ICO", "JPEG2000"):
        for mode in ("RGB", "L", "P", "CMYK", "RGBA", "1", "I;16"):
            file, options = io.BytesIO(), {"exif": exif} if form in ("JPEG", "PNG", "TIFF", "WEBP") else {}
            with suppress(OSError, ValueError, KeyError):  # not every format has every mode
                wide = Image.fromarray(colours[..., 0].astype(np.uint16) * 257)
                image = wide if mode == "I;16" else Image.fromarray(colours).convert(mode)
                image.save(file, form, **options)
                made[f"{form} {mode}"] = file.getvalue()
    frames, file = [Image.fromarray(np.roll(colours, shift, 0)) for shift in range(3)], io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return {**made, "WEBP of three frames": file.getvalue()}


PICTURES = _pictures()


@linux
@unwarned
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_an_image_of_other_bytes(watch: Watch, folder: Path, data: st.DataObject) -> None:
    """An image in [0, 1] or no image, and no program is started for it."""
    path = folder / data.draw(st.sampled_from(["picture.png", "picture.jpg"]))
    whole = PICTURES[data.draw(st.sampled_from(sorted(PICTURES)))]
    path.write_bytes(whole)
    read_image_or_refuse(path)  # imports what Pillow needs for this format
    path.write_bytes(damage(data.draw, whole))
    image = read(watch, folder, lambda: read_image(path))
    if image is not None:
        assert image.dtype == torch.float32
        assert image.ndim == 3
        assert image.shape[0] == 3
        assert 0 <= image.min() <= image.max() <= 1


def read_image_or_refuse(path: Path) -> None:
    with suppress(ZePADError):
        read_image(path)


# npz


_shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 10**6]), max_size=4).filter(lambda s: np.prod(s) < 10**7)
_dtypes = st.sampled_from(["u1", "i1", "<i8", ">i4", "u8", "f2", "<f4", ">f8", "c8", "b1", "U3", "S2", "m8[s]"])
_descriptions = st.sampled_from(
    ["|u1", "<i8", "<f4", "|O", "|S0", "|V0", "<U1000000", "<U536870911", "|V4", "<m8", "x", "", "(2,)u1", "u1,u1"]
)
_sizes = st.sampled_from([0, 1, 3, 5, -1, -3, 2**31, 2**40, 2**62, 2**63, 2**64])


def npy(draw: Callable[[Any], Any]) -> bytes:
    """An array of any kind, or one whose header claims anything."""
    file = io.BytesIO()
    if draw(st.booleans()):
        made = np.zeros(draw(_shapes), draw(_dtypes))
        if made.dtype.kind in "uif" and made.size:
            made.flat[0] = draw(st.sampled_from([1, 100, 2**7 - 1]))
        np.save(file, np.asfortranarray(made) if draw(st.booleans()) else made)
        return file.getvalue()
    shape = draw(st.lists(_sizes, max_size=4).map(tuple).map(str) | st.sampled_from(["3", "(" * 60, "(3", "('a',)"]))
    header = f"{{'descr': {draw(_descriptions)!r}, 'fortran_order': {draw(st.booleans())}, 'shape': {shape}, }}\n"
    version, length = draw(st.sampled_from([(1, 2), (2, 4), (3, 4), (9, 4)]))
    body = bytes(draw(st.sampled_from([0, 1, 24, 75, 1000])))
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(length, "little") + header.encode() + body


def npz(draw: Callable[[Any], Any]) -> bytes:
    """An archive of good arrays, of which one to three are others."""
    good = {"images": np.zeros((4, 5, 5), np.uint8), "labels": np.arange(4), "classes": np.array(["a", "b", "c", "d"])}
    joined = np.frombuffer(PICTURES["PNG RGB"] * 4, np.uint8)
    offsets = np.arange(5) * len(PICTURES["PNG RGB"])
    if draw(st.booleans()):
        good = {"encoded": joined, "offsets": offsets, **{key: good[key] for key in ("labels", "classes")}}
    members: list[tuple[str, bytes]] = []
    for key, array in good.items():
        file = io.BytesIO()
        np.save(file, array)
        members.append((key, file.getvalue()))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        place = draw(st.integers(0, len(members) - 1))
        member = (members[place][0], npy(draw))
        members[place : place + draw(st.sampled_from([0, 1, 1, 1]))] = [member]  # in its place, or beside it
    file = io.BytesIO()
    packing = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
    with zipfile.ZipFile(file, "w", packing) as archive:
        for key, content in members:
            archive.writestr(f"{key}.npy", content)
    return file.getvalue()


@linux
@unwarned
@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_an_npz_file_of_other_content(watch: Watch, folder: Path, data: st.DataObject) -> None:
    content = npz(data.draw)
    path = folder / "data.npz"
    path.write_bytes(damage(data.draw, content) if data.draw(st.booleans()) else content)
    found = read(watch, folder, lambda: [load_data(path, "all"), *load_data(path, "all", size=4)])
    if found is not None:
        dataset, *items = found
        assert all(isinstance(name, str) and name.encode() is not None for name in dataset.classes)
        assert all(0 <= label < len(dataset.classes) for _, label in items)
        assert all(image.shape == (3, 4, 4) and 0 <= image.min() <= image.max() <= 1 for image, _ in items)


# checkpoints of others


_WEIGHTS = {"backbone.weight": torch.arange(6.0).view(2, 3), "backbone.count": torch.tensor(7)}


def _saved(content: Any, **arguments: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **arguments)
    return file.getvalue()


CHECKPOINTS = {
    "zip": _saved({"epoch": 1, "state_dict": _WEIGHTS, "args": argparse.Namespace(lr=0.1)}),
    "bare": _saved(_WEIGHTS),
    "legacy": _saved({"epoch": 1, "state_dict": _WEIGHTS}, _use_new_zipfile_serialization=False),
    "safetensors": safetensors.torch.save(_WEIGHTS),
}
_NAMES = ("os\nsystem", "builtins\neval", "_codecs\nencode", "builtins\nbytearray", "torch\nTensor")
_NUMBERS = (b"K\x01", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\x7f" * 8)
_STRINGS = (b"X\x01\0\0\0a", b"X\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x7f", b"\x95" + b"\xff" * 8)
_SINGLE = [bytes([code]) for code in b"Rb\x81}])(t\x85\x86suaeQN\x88."]  # calls, containers, references, the end
_opcodes = st.lists(
    st.sampled_from([f"c{name}\n".encode() for name in _NAMES])
    | st.sampled_from([*_NUMBERS, *_STRINGS, b"q\x01", b"h\x01", b"\x80\x05", b"]" * 99])
    | st.sampled_from(_SINGLE),
    max_size=30,
).map(b"".join)
_keys = st.sampled_from(["state_dict", "a", 1])
_objects = st.recursive(
    st.sampled_from([None, 1, "a", float("nan"), 2**70])
    | st.sampled_from([torch.ones(2, 3), torch.zeros(0), torch.zeros(1).bool(), torch.zeros(2, dtype=torch.cfloat)])
    | st.sampled_from([torch.zeros(2, device="meta"), torch.zeros(1).expand(9, 9)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
)


def checkpoint(draw: Callable[[Any], Any]) -> bytes:
    """A checkpoint damaged somewhere, of another pickle, packing or content, or of hostile tensors."""
    whole = CHECKPOINTS[draw(st.sampled_from(sorted(CHECKPOINTS)))]
    match draw(st.sampled_from(["bytes", "pickle", "archive", "content", "start"])):
        case "bytes":
            return damage(draw, whole)
        case "content":
            return _saved(draw(_objects), _use_new_zipfile_serialization=draw(st.booleans()))
        case "start":
            return draw(st.sampled_from([CHECKPOINTS["legacy"][:15], b"PK\x03\x04", b"\x80\x02", b""])) + draw(_opcodes)
        case kind:
            packing = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED] if kind == "archive" else [0]))
            file, source = io.BytesIO(), zipfile.ZipFile(io.BytesIO(CHECKPOINTS["zip"]))
            with source, zipfile.ZipFile(file, "w", packing) as target:
                for entry in source.infolist():
                    content = source.read(entry)
                    if entry.filename.endswith("data.pkl") and kind == "pickle":
                        place = draw(st.integers(2, len(content)))
                        content = content[:place] + draw(_opcodes) + content[place:]
                    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2])) if kind == "archive" else 1):
                        target.writestr(entry.filename, content)
            return file.getvalue()


@linux
@unwarned
@given(data=st.data())
@settings(deadline=None, max_examples=450)
def test_a_checkpoint_of_others_of_other_content(watch: Watch, folder: Path, data: st.DataObject) -> None:
    for whole in CHECKPOINTS.values():  # torch imports some of itself when it first reads each kind
        (folder / "whole.ckpt").write_bytes(whole)
        read_checkpoint(folder / "whole.ckpt")
    path = folder / "weights.ckpt"
    path.write_bytes(checkpoint(data.draw))
    state = read(watch, folder, lambda: read_checkpoint(path))
    assert state is None or all(isinstance(key, str) for key in state)


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"backbone.{key}": value for key, value in build_resnet("resnet18", "solo").state_dict().items()}


_zeros = torch.zeros(64)
_tensors = (
    st.sampled_from([None, [1.0], {"weight": _zeros}, "weights", torch.zeros(64, device="meta"), _zeros.to_sparse()])
    | st.sampled_from([_zeros, _zeros - 1, _zeros / 0, _zeros.half(), _zeros.double() + 1e300, _zeros.cfloat()])
    | st.sampled_from([_zeros.long(), _zeros.bool(), _zeros[:0], _zeros[:1].expand(64), _zeros.to(torch.float8_e4m3fn)])
)


@unwarned
@given(data=st.data(), loader=st.sampled_from([load_solo, load_lightly]))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_encoder_of_others_of_other_tensors(
    resnet: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, data: st.DataObject, loader: Callable[[str], Encoder]
) -> None:
    """What is in the file, past its reader: an encoder whose features are finite, or none."""
    state: dict[str, Any] = dict(resnet)
    for _ in range(data.draw(st.sampled_from([0, 1, 1, 2]))):
        key = data.draw(st.sampled_from(sorted(resnet)))
        match data.draw(st.sampled_from(["replace", "delete", "rename", "nest"])):
            case "replace":
                state[key] = data.draw(_tensors)
            case "delete":
                state.pop(key, None)
            case "rename":
                state[data.draw(_words)] = state.pop(key, None)
            case "nest":
                state[f"{key}.{key}"] = state.get(key)
    for module in (solo, lightly):
        monkeypatch.setattr(module, "read_checkpoint", lambda _: state)
    encoder = None
    with suppress(ZePADError):
        encoder = loader("file.ckpt")
    if encoder is not None:
        with torch.no_grad():
            assert encoder(torch.rand(1, 3, 32, 32)).isfinite().all()


# checkpoints of training


TRAINED = HardenConfig(epochs=2, steps=1)


def _resume(folder: Path) -> Any:
    """Go on from a folder: all that is left to do is to install what it holds."""
    torch.manual_seed(0)
    branch, _ = harden_branch(
        TinyEncoder(), BATCHES, TRAINED, num_classes=3, checkpoint_dir=folder, resume=True, progress=False
    )
    return branch.state_dict()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, Tensor]]:
    """A folder with the last epoch of a training, the content of its file, and the weights."""
    folder = tmp_path_factory.mktemp("trained")
    state = _resume(folder)
    (folder / "epoch-0000.pt").unlink()
    return folder, (folder / "epoch-0001.pt").read_bytes(), state


@linux
@unwarned
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_training_checkpoint_of_other_bytes(
    watch: Watch, trained: tuple[Path, bytes, dict[str, Tensor]], data: st.DataObject
) -> None:
    folder, whole, _ = trained
    content = damage(data.draw, whole)
    (folder / "epoch-0001.pt").write_bytes(content)
    fingerprint = torch.load(io.BytesIO(whole), weights_only=True)["fingerprint"]
    state = read(watch, folder, lambda: load_latest(folder, fingerprint))
    assert (state is None) == (content != whole)


@unwarned
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_training_checkpoint_of_another_structure(
    trained: tuple[Path, bytes, dict[str, Tensor]], data: st.DataObject
) -> None:
    """As by someone who can also write its digest: refused, or weights that are finite."""
    folder, whole, _ = trained
    state = torch.load(io.BytesIO(whole), weights_only=True)
    for _ in range(data.draw(st.sampled_from([1, 1, 2, 3]))):
        path = data.draw(st.sampled_from(paths(state)))
        owner, key = at(state, path[:-1]), path[-1]
        if data.draw(st.booleans()):
            owner[key] = copy.deepcopy(data.draw(_hostile | _objects.map(copy.deepcopy)))
        else:
            del owner[key]
    if data.draw(st.booleans()):
        content = _saved(state)
        (folder / "epoch-0001.pt").write_bytes(content + hashlib.sha256(content).digest())
    else:
        content = damage(data.draw, whole[:-32])
        (folder / "epoch-0001.pt").write_bytes(content + hashlib.sha256(content).digest())
    resumed = None
    with bounded(), suppress(ZePADError):
        resumed = _resume(folder)
    if resumed is not None:
        assert all(value.isfinite().all() for value in resumed.values())
    for path in folder.glob("epoch-*.pt"):
        path.unlink()
