"""A source of encoders from outside the package, from hardening to loading, and without its registration."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tiny import TinyEncoder, toy_data
from zepad import BenignConfig, Encoder, EncoderSpec, HardenConfig, HeadConfig, ZePAD
from zepad.encoders import build_encoder, register_source
from zepad.encoders.sources.registry import _SOURCES, is_registered, wrap_module
from zepad.encoders.spec import FORMS
from zepad.errors import CheckpointError, ConfigError

_file = importlib.util.spec_from_file_location("own_source", Path(__file__).with_name("own_source.py"))
assert _file is not None
assert _file.loader is not None
own_source = importlib.util.module_from_spec(_file)
_file.loader.exec_module(own_source)


def forget(name: str) -> None:
    _SOURCES.pop(name, None)
    FORMS.pop(name, None)


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    before = set(_SOURCES)
    yield
    for name in set(_SOURCES) - before:
        forget(name)


@pytest.fixture
def lab() -> None:
    own_source.register()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A defense on encoders of the source, with the detector that keeps a copy of the victim, and what it predicts."""
    folder = tmp_path_factory.mktemp("lab")
    own_source.register()
    images, labels = toy_data(24)
    loader = DataLoader(TensorDataset(images, labels), batch_size=12)
    auxiliary = EncoderSpec(source="lab", name="tiny", arguments={"width": 6})
    defense = ZePAD.from_encoders("lab:tiny", auxiliary, detector="features")
    defense.harden(loader, HardenConfig(epochs=1, steps=1), progress=False)
    defense.fit_benign(loader, BenignConfig(epochs=1), head_config=HeadConfig(epochs=1), progress=False)
    defense.save_pretrained(folder)
    predicted = defense.predict_proba(images)
    forget("lab")
    return folder, predicted


def spoil(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """Copy a saved model with another spec of its victim."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["encoders"]["victim"]["spec"].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.usefixtures("lab")
def test_a_model_comes_back_where_its_source_is_registered(saved: tuple[Path, torch.Tensor]) -> None:
    folder, predicted = saved
    spec = json.loads((folder / "config.json").read_text())["encoders"]["auxiliary"]["spec"]
    assert (spec["source"], spec["name"], spec["arguments"]) == ("lab", "tiny", {"width": 6})
    assert torch.equal(ZePAD.from_pretrained(folder).predict_proba(toy_data(24)[0]), predicted)


def test_where_it_is_not_the_error_names_the_remedy_and_nothing_is_imported(saved: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"no source 'lab' .*register_source\('lab', .*pass the module"):
        ZePAD.from_pretrained(saved[0])
    with pytest.raises(ConfigError, match="register_source"):
        ZePAD.from_encoders("lab:tiny", TinyEncoder())


def test_where_it_is_not_the_modules_will_do(saved: tuple[Path, torch.Tensor]) -> None:
    folder, predicted = saved
    loaded = ZePAD.from_pretrained(folder, victim=TinyEncoder(), auxiliary=TinyEncoder(6))
    assert torch.equal(loaded.predict_proba(toy_data(24)[0]), predicted)


def test_loading_asks_a_source_for_no_weights(
    saved: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def build(spec: EncoderSpec, *, pretrained: bool) -> Encoder:
        asked.append((pretrained, torch.empty(0).device.type))
        encoder: Encoder = own_source.build(spec, pretrained=pretrained)
        return encoder

    register_source("lab", build)
    ZePAD.from_pretrained(saved[0], branches=["victim"])
    assert asked == [(False, "meta"), (False, "cpu")], "first the shapes, without memory"


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../tiny"},
        {"name": "os.system"},
        {"arguments": {"width": 2**17}},
        {"arguments": {"width": "many"}},
        {"arguments": {"width": 9}},
        {"arguments": {"path": "weights"}},
        {"arguments": {"checkpoint": "weights"}},
        {"weights": "weights"},
        {"source": "os.path"},
        {"source": "torch"},
    ],
)
def test_a_saved_spec_is_checked_like_any(
    saved: tuple[Path, torch.Tensor], tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises((ConfigError, CheckpointError)):
        ZePAD.from_pretrained(spoil(saved[0], tmp_path, **changes))


@pytest.mark.parametrize("name", ["custom", "", "Lab", "my.lab", "my:lab", "1lab", "my lab", None])
def test_a_name_must_be_plain(name: Any) -> None:
    with pytest.raises(ConfigError, match="name must be lower-case"):
        register_source(name, own_source.build)


def test_a_name_is_given_once_but_a_function_may_be_defined_again() -> None:
    with pytest.raises(ConfigError, match=r"'timm' is registered already, by zepad\."):
        register_source("timm", own_source.build)
    assert _SOURCES["timm"].wrap is not None
    own_source.register()
    _file.loader.exec_module(own_source)  # type: ignore[union-attr]
    own_source.register()
    assert _SOURCES["lab"].build is own_source.build


def test_how_weights_are_named_is_one_of_four() -> None:
    with pytest.raises(ConfigError, match="weights must be one of"):
        register_source("lab", own_source.build, weights="url")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "text", "found"),
    [
        ("fixed", "lab:tiny", ("tiny", "")),
        ("tag", "lab:tiny@best", ("tiny", "best")),
        ("file", "lab:runs/tiny.pt", ("", "runs/tiny.pt")),
        ("repository", "lab:me/tiny", ("", "me/tiny")),
    ],
)
def test_a_string_reads_as_the_source_says(weights: Any, text: str, found: tuple[str, str]) -> None:
    register_source("lab", own_source.build, weights=weights)
    spec = EncoderSpec.parse(text)
    assert (spec.name, spec.weights, str(spec)) == (*found, text)


@pytest.mark.usefixtures("lab")
def test_what_a_source_returns_must_be_an_encoder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EncoderSpec.parse("lab:tiny")
    for wrong in (TinyEncoder(), Encoder(TinyEncoder())):
        monkeypatch.setattr(own_source, "build", lambda *_, wrong=wrong, **__: wrong)
        forget("lab")
        own_source.register()
        with pytest.raises(ConfigError, match=r"'lab' must return an Encoder\(\.\.\., spec=spec\)"):
            build_encoder(spec)


def test_a_failure_of_a_source_names_the_spec() -> None:
    def build(spec: EncoderSpec, *, pretrained: bool) -> Encoder:
        return Encoder(TinyEncoder(**spec.arguments), spec=spec)

    register_source("lab", build)
    with pytest.raises(ConfigError, match="lab:tiny could not be built with {'depth': 3}: TypeError"):
        build_encoder(EncoderSpec(source="lab", name="tiny", arguments={"depth": 3}))


def test_a_source_may_recognise_its_modules() -> None:
    class Own(TinyEncoder):
        pass

    def wrap(module: nn.Module) -> Encoder | None:
        return own_source.build(EncoderSpec.parse("lab:tiny"), pretrained=False) if isinstance(module, Own) else None

    register_source("lab", own_source.build, wrap=wrap)
    assert is_registered("lab")
    assert str(wrap_module(Own()).spec) == "lab:tiny"
    assert wrap_module(TinyEncoder()).spec.source == "custom"
