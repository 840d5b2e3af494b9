"""Checkpoints of unknown origin: no code in them is run, and an error names what is not a checkpoint."""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import os
import pickle
import re
import subprocess
import sys
import tarfile
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from zepad.encoders import checkpoints
from zepad.encoders.checkpoints import read_checkpoint
from zepad.errors import CheckpointError

quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.ckpt"


def weights() -> dict[str, Tensor]:
    return {"backbone.weight": torch.arange(6.0).view(2, 3), "backbone.count": torch.tensor(7)}


def saved(content: object, **arguments: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **arguments)
    return buffer.getvalue()


FORMATS = {
    "zip": lambda: saved({"epoch": 1, "state_dict": weights()}),
    "legacy": lambda: saved({"epoch": 1, "state_dict": weights()}, _use_new_zipfile_serialization=False),
    "safetensors": lambda: safetensors.torch.save(weights()),
}


def assert_weights(state: dict[str, Any]) -> None:
    expected = weights()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


# what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_tensors(kind: str, path: Path) -> None:
    path.write_bytes(FORMATS[kind]())
    assert_weights(read_checkpoint(str(path)))


def test_a_bare_state_dict_is_read(path: Path) -> None:
    torch.save(weights(), path)
    assert_weights(read_checkpoint(path))


def test_the_prefix_of_a_parallel_wrapper_is_taken_away_once_and_only_where_every_key_has_it(path: Path) -> None:
    wrapped = {f"module.{key}": value for key, value in weights().items()}
    torch.save({"state_dict": wrapped}, path)
    assert_weights(read_checkpoint(path))
    torch.save({f"module.{key}": value for key, value in wrapped.items()}, path)
    assert read_checkpoint(path).keys() == wrapped.keys()
    torch.save(wrapped | {"queue": torch.zeros(1)}, path)
    assert read_checkpoint(path).keys() == {*wrapped, "queue"}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 1, "model": {"a": torch.zeros(1)}}, "the entries epoch, model"),
        ({"state_dict": {}}, "the entries "),
        ({"state_dict": 3}, "a int"),
        ([torch.zeros(1)], "a list"),
        (torch.zeros(1), "a Tensor"),
    ],
)
def test_a_file_without_a_state_dict_is_refused_with_what_it_holds(content: Any, found: str, path: Path) -> None:
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"holds {found}; expected tensors by name"):
        read_checkpoint(path)


# what is no checkpoint ------------------------------------------------------------------------------------------


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with ZipFile(buffer, "w") as file:
            file.writestr("model.ckpt", FORMATS["zip"]())
    else:
        with tarfile.open(fileobj=buffer, mode=kind) as file:  # type: ignore[call-overload]
            file.addfile(tarfile.TarInfo("model.ckpt"))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty. Download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html><title>Sign in</title>", "is a web page.*login"),
        (b"\n <HTML><body>404", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
        (archive("w:"), "is a packed archive. Unpack it"),
        # The name must not hold the bytes: gzip writes the time into them, and workers must agree on names.
        pytest.param(archive("w:gz"), "is a packed archive. Unpack it", id="tar.gz"),
        (archive("w:xz"), "is a packed archive. Unpack it"),
        (archive("zip"), "is a zip archive that torch.save did not write. Unpack it"),
        (FORMATS["zip"]()[:-1], "is damaged or cut short.*download or copy it again"),
        (FORMATS["legacy"]()[:-1], "damaged, cut short or no checkpoint"),
        (FORMATS["safetensors"]()[:-1], "damaged, cut short or no checkpoint"),
        (b"Entry not found", "no checkpoint: it does not begin as torch.save and safetensors do"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_for_what_it_is(content: bytes, message: str, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{path.name} .*{message}"):
        read_checkpoint(path)


def test_a_path_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*missing.ckpt. Check the path"):
        read_checkpoint(tmp_path / "missing.ckpt")
    with pytest.raises(CheckpointError, match="is a folder. Name the checkpoint file in it"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint("a\0b")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_at_any_byte_is_refused(kind: str, path: Path) -> None:
    whole = FORMATS[kind]()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
@quick
def test_a_damaged_byte_is_survived(kind: str, path: Path, data: st.DataObject) -> None:
    content = bytearray(FORMATS[kind]())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        state = read_checkpoint(path)
        if kind == "zip":  # the others have no checksums, so that a changed weight cannot be told
            assert_weights(state)


def test_a_table_of_contents_of_another_age_is_damage(path: Path) -> None:
    """What Python's zipfile says by NotImplementedError; found by the test above."""
    content = bytearray(FORMATS["zip"]())
    content[content.rindex(b"PK\x01\x02") + 6] = 64  # the version needed to read the last entry
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(path)


@given(st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", FORMATS["legacy"]()[:80]]), st.binary())
@example(b"\x10\0\0\0\0\0\0\0{", b'"a": [1], "b": 2')
@example(b"", b"\x80\x02]q\x00(K\x01K\x02e.")
@quick
def test_any_bytes_are_a_checkpoint_error_and_nothing_else(path: Path, start: bytes, rest: bytes) -> None:
    path.write_bytes(start + rest)
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


# what takes no memory -------------------------------------------------------------------------------------------


def repacked(content: bytes, packing: int = ZIP_STORED, **changed: bytes) -> bytes:
    """An archive again, packed in another way or with other entries."""
    buffer = io.BytesIO()
    with ZipFile(io.BytesIO(content)) as source, ZipFile(buffer, "w", packing) as target:
        for entry in source.infolist():
            own = entry.filename.rpartition("/")[2].partition(".")[0]
            target.writestr(entry.filename, changed.get(own, source.read(entry)))
    return buffer.getvalue()


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(path: Path) -> None:
    path.write_bytes(repacked(saved({"state_dict": {"a": torch.zeros(2**22)}}), ZIP_DEFLATED))
    assert path.stat().st_size < 2**18  # and would take 64 times as much
    with pytest.raises(CheckpointError, match="is compressed, which torch.save never does"):
        read_checkpoint(path)


def test_entries_that_overlap_are_refused(path: Path) -> None:
    """Each entry claims all of the file, so that n entries would take n times its size."""
    content = bytearray(saved({f"key{i}": torch.zeros(50) + i for i in range(9)}))
    for name in (b"data/0", b"data/1", b"data/2", b"data/3", b"data/4", b"data/5", b"data/6", b"data/7", b"data/8"):
        header = content.rindex(b"PK\x01\x02", 0, content.rindex(name))
        content[header + 20 : header + 28] = (len(content) - 300).to_bytes(4, "little") * 2
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is compressed, which torch.save never does|damaged"):
        read_checkpoint(path)


def test_an_oversized_pickle_is_refused_before_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_MAX_PICKLE", 10_000)  # a true one takes too long to write
    monkeypatch.setattr(checkpoints._Legacy, "_left", 10_000)
    small = {"state_dict": weights() | {"note": "x" * 5_000}}
    large = {"state_dict": weights() | {"note": "x" * 20_000}}
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        path.write_bytes(saved(small, **options))
        assert_weights({key: value for key, value in read_checkpoint(path).items() if key != "note"})
        path.write_bytes(saved(large, **options))
        with pytest.raises(CheckpointError, match="its pickle is larger than 10000 bytes"):
            read_checkpoint(path)


def test_large_tensors_are_no_oversized_pickle(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_MAX_PICKLE", 10_000)
    monkeypatch.setattr(checkpoints._Legacy, "_left", 10_000)
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        path.write_bytes(saved({"a": torch.arange(10_000)}, **options))
        assert torch.equal(read_checkpoint(path)["a"], torch.arange(10_000))


def test_an_archive_that_readers_can_see_differently_is_refused(path: Path) -> None:
    whole = FORMATS["zip"]()
    buffer = io.BytesIO(whole)
    with warnings.catch_warnings(), ZipFile(buffer, "a") as file:
        warnings.simplefilter("ignore")
        file.writestr(file.namelist()[0], b"again")
    for content in (buffer.getvalue(), whole[:30] + whole):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="two readers can see different content|damaged"):
            read_checkpoint(path)


def test_what_is_no_file_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    for name in (path, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="cannot be read: it is no regular file. Name a checkpoint file"):
            read_checkpoint(name)


def test_names_that_are_no_strings_are_refused_unread(path: Path) -> None:
    torch.save({1: torch.zeros(1), "1": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="holds the entries a int, 1; expected strings for names"):
        read_checkpoint(path)


# what is never run ----------------------------------------------------------------------------------------------


class Payload:
    """Pickled as a call, which an ordinary unpickler makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(canary: Path) -> dict[str, Payload]:
    """Calls that would leave a file behind, by what they ask for."""
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    hub = functools.partial(torch.hub.load, str(canary.parent), "entry", source="local")
    return {
        "posix.system": Payload(os.system, command),
        "check_call": Payload(subprocess.check_call, ["touch", str(canary)]),
        "builtins.eval": Payload(eval, code),
        "builtins.exec": Payload(exec, code),
        "torch.hub.load": Payload(hub),
        "system": Payload(functools.partial(os.system, command)),
        # Asks for nothing but what training records hold: a path, and getattr.
        "damaged|PosixPath": Payload(canary.touch),
    }


WRITERS = {
    "zip": saved,
    "legacy": lambda content: saved(content, _use_new_zipfile_serialization=False),
    "zip, protocol 4": lambda content: saved(content, pickle_protocol=4),
    "pickle 0": lambda content: pickle.dumps(content, 0),
    "pickle 2": lambda content: pickle.dumps(content, 2),
    "pickle 5": lambda content: pickle.dumps(content, 5),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", payloads(Path()))
def test_a_hostile_file_is_refused_and_runs_nothing(name: str, writer: str, path: Path) -> None:
    canary = path.with_name("canary")
    path.with_name("hubconf.py").write_text(f"def entry():\n    open({str(canary)!r}, 'w').close()\n")
    payload = payloads(canary)[name]
    pickle.loads(pickle.dumps(payload))
    assert canary.exists()  # the payload is a live one
    canary.unlink()
    path.write_bytes(WRITERS[writer]({"state_dict": weights(), "callbacks": payload}))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert not canary.exists()
    assert "Re-running" not in "".join(traceback.format_exception(caught.value))  # as torch advises, without protection
    if writer == "zip":
        assert re.search(name, str(caught.value))


def test_what_a_file_asks_for_is_listed_with_what_to_do(path: Path) -> None:
    torch.save({"state_dict": weights(), "model": torch.nn.Sequential(torch.nn.Linear(1, 1))}, path)
    with pytest.raises(CheckpointError, match=r"torch.nn.modules.container.Sequential, .*Linear .*state_dict alone"):
        read_checkpoint(path)


def test_torch_is_never_asked_to_read_more_than_weights(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(FORMATS["zip"]())
    asked: list[dict[str, Any]] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *paths, **options: asked.append(options) or load(*paths, **options))
    read_checkpoint(path)
    assert asked == [{"map_location": "cpu", "weights_only": True}]


# records of training --------------------------------------------------------------------------------------------
# The names are those that Lightning 1.4, 1.5, 1.6, 1.9, 2.1 and 2.6 wrote for real: ModelCheckpoint as a key in every
# checkpoint of solo-learn 1.0.2, the optimiser behind a partial and getattr in SimSiam's, omegaconf's with hydra.


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes classes of packages that are not installed, and forgets them before anything is read."""
    with monkeypatch.context() as patch:

        def make(full_name: str, base: type = object) -> Any:
            module, _, name = full_name.rpartition(".")
            made = type(name, (base,), {"__module__": module})
            package = ""
            for part in module.split("."):
                package = f"{package}.{part}".strip(".")
                patch.setitem(sys.modules, package, types.ModuleType(package))
            setattr(sys.modules[module], name, made)
            return made

        yield make


def with_state(cls: type, **state: Any) -> Any:
    made = cls()
    made.__dict__.update(state)
    return made


def test_records_of_training_are_skipped_and_import_nothing(path: Path, pretend: Callable[..., Any]) -> None:
    dict_config, container = pretend("omegaconf.dictconfig.DictConfig"), pretend("omegaconf.base.ContainerMetadata")
    node = with_state(pretend("omegaconf.nodes.AnyNode"), _val=1)
    cache = collections.defaultdict(dict, {"now": {"a": 1}})
    metadata = with_state(container, ref_type=Any, object_type=dict, element_type=int, resolver_cache=cache)
    attributes = pretend("pytorch_lightning.utilities.parsing.AttributeDict", dict)
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    content = {
        "state_dict": weights(),
        "callbacks": {pretend("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"): {"best": None}},
        "hyper_parameters": {
            "cfg": with_state(dict_config, _metadata=metadata, _content={"lr": node}),
            "args": argparse.Namespace(path=Path("x"), scale=np.float64(0.5), sizes=np.arange(3)),
            "more": attributes(a=1),
        },
        "hparams_type": dict_config,
        "lr_schedulers": [{"get_lr": functools.partial(sgd.zero_grad, set_to_none=True)}],
    }
    torch.save(content, path)
    allowed = torch.serialization.get_safe_globals()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("omegaconf", "pytorch_lightning")]:
        del sys.modules[name]
    assert_weights(read_checkpoint(path))
    assert not {"omegaconf", "pytorch_lightning"} & set(sys.modules)
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_a_record_outside_the_known_packages_is_refused(path: Path, pretend: Callable[..., Any]) -> None:
    torch.save({"state_dict": weights(), "extra": pretend("omegaconfig.DictConfig")()}, path)
    with pytest.raises(CheckpointError, match=r"asks for omegaconfig.DictConfig to be run or built"):
        read_checkpoint(path)


def test_a_state_dict_must_be_a_true_one(path: Path, pretend: Callable[..., Any]) -> None:
    torch.save({"state_dict": pretend("solo.Weights", dict)(weights())}, path)
    with pytest.raises(CheckpointError, match="damaged, cut short or no checkpoint"):
        read_checkpoint(path)
