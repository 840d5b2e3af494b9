"""Thousands of damaged and hostile files of an evaluation: each is refused in zepad's own words, or means something.

The files are report.json, evaluation.json, attackers.json, the state of an attacker and a batch, a universal
perturbation, and the record of a bank of adversarial examples.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny import colour_ensemble, toy_data
from zepad.attacks import PGD, UniversalPerturbation
from zepad.errors import ZePADError
from zepad.evaluation import Attacker, EvalReport, evaluate, universal_attacker
from zepad.evaluation.rendering import comparison_html, comparison_markdown, markdown_tables
from zepad.evaluation.rendering.page import html_page
from zepad.evaluation.rendering.picture import overview_png
from zepad.evaluation.state import check_recipe
from zepad.sealed import read_sealed, seal
from zepad.training.bank.bank import _Record

pytestmark = pytest.mark.exhaustive

IMAGES, LABELS = toy_data(6, size=4)
LOADER = list(zip(IMAGES.split(4), LABELS.split(4), strict=True))
STATE = "attacker-00-batch-00001.safetensors"

_numbers = st.sampled_from(
    [0, 1, -1, 7, 2**31, 2**63, 2**64, 10**30, 10**400, 0.0, -0.5, 0.5, 1e308, 1e999, float("nan")]
)
_words = st.sampled_from(
    ["", "all", "fused", "white-box", "linf", "patch", "PGD", "\ud800", "\x1b[2J", "<script>", "x" * 999]
)
_plain = st.none() | st.booleans() | _words | _numbers | st.text(max_size=6)
_deep = st.sampled_from([10, 300, 5000]).map(lambda depth: json.loads("[" * min(depth, 300) + "]" * min(depth, 300)))
_values = (
    _plain | _deep | st.lists(_plain, max_size=3) | st.dictionaries(_words | st.text(max_size=4), _plain, max_size=3)
)


def run(folder: Path | None, *, resume: bool = True) -> EvalReport:
    pgd = Attacker(name="PGD", threat_model="white-box", attack=PGD(eps=0.2, steps=1))
    return evaluate(
        colour_ensemble(), LOADER, [pgd], folder=folder, resume=resume, sanity=False, progress=False, samples=1
    )


def paths(values: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [path for key, value in items for path in ((*prefix, key), *paths(value, (*prefix, key)))]


def mutate(values: Any, draw: Callable[[Any], Any]) -> None:
    """Change one thing somewhere."""
    known = paths(values)
    path = draw(st.sampled_from(known))
    owner = values
    for key in path[:-1]:
        owner = owner[key]
    match draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "empty"])):
        case "replace":
            owner[path[-1]] = copy.deepcopy(draw(_values))
        case "delete":
            del owner[path[-1]]
        case "add" if isinstance(owner, dict):
            owner[draw(_words | st.text(max_size=4))] = copy.deepcopy(draw(_values))
        case "add":
            owner.insert(0, copy.deepcopy(draw(_values)))
        case _:
            owner[path[-1]] = type(owner[path[-1]])()


def damaged(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Other bytes in a few places."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(changed)))
        end = start + draw(st.sampled_from([0, 1, 1, 2, 10, 10**9]))
        changed[start:end] = draw(
            st.binary(max_size=4) | st.text('0123456789.-+eE[]{}",:ntfu\\', max_size=4).map(str.encode)
        )
    return bytes(changed)


def restructured(text: str | bytes, draw: Callable[[Any], Any]) -> str:
    values = json.loads(text)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        if paths(values):
            mutate(values, draw)
    return json.dumps(values)


def changed(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """A text of another structure, or other bytes."""
    return restructured(content, draw).encode() if draw(st.booleans()) else damaged(content, draw)


def show(report: EvalReport) -> None:
    """Whatever the library does with a report that was read."""
    report.summary()
    assert EvalReport.from_json(report.to_json()) == report
    for text in (markdown_tables(report), html_page(report), comparison_markdown([report]), comparison_html([report])):
        assert "<script" not in text
        text.encode()


def fuzz(count: int) -> Callable[[Any], Any]:
    def wrap(test: Any) -> Any:
        unchecked = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
        return given(data=st.data())(settings(deadline=None, max_examples=count, suppress_health_check=unchecked)(test))

    return wrap


@pytest.fixture(scope="module")
def report() -> bytes:
    return run(None, resume=False).to_json().encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    run(folder, resume=False)
    return folder


@pytest.fixture(scope="module")
def held(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@fuzz(200)
def test_reports(report: bytes, data: st.DataObject) -> None:
    with suppress(ZePADError):
        show(EvalReport.from_json(changed(report, data.draw).decode("utf-8", "surrogateescape")))


@fuzz(8)
def test_pictures_of_reports(report: bytes, data: st.DataObject) -> None:
    with suppress(ZePADError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that a font lacks
        overview_png(EvalReport.from_json(restructured(report, data.draw)))


@fuzz(130)
def test_records_of_evaluations(folder: Path, held: dict[str, bytes], data: st.DataObject) -> None:
    file = folder / "evaluation.json"
    file.write_bytes(changed(held[file.name], data.draw))
    try:
        with suppress(ZePADError):
            run(folder)
            assert json.loads(file.read_bytes()) == json.loads(held[file.name])
    finally:
        file.write_bytes(held[file.name])


@fuzz(100)
def test_what_attackers_are_made_from(folder: Path, held: dict[str, bytes], data: st.DataObject) -> None:
    parts = {"eps": "0.1", "public encoders": "victim 0123"}
    file = folder / "attackers.json"
    content = changed(json.dumps({"made_from": parts}).encode(), data.draw)
    file.write_bytes(content)
    try:
        with suppress(ZePADError):
            check_recipe(folder, parts)
            assert json.loads(content) == {"made_from": parts}
    finally:
        file.unlink()


@fuzz(130)
def test_files_of_the_state_with_other_bytes(folder: Path, held: dict[str, bytes], data: st.DataObject) -> None:
    content = damaged(held[STATE], data.draw)
    (folder / STATE).write_bytes(content)
    try:
        with suppress(ZePADError):
            run(folder)
            assert content == held[STATE]
    finally:
        (folder / STATE).write_bytes(held[STATE])


def forged(content: bytes, draw: Callable[[Any], Any], file: Path) -> bytes:
    """A file of another structure, by someone who knows how it is sealed."""
    file.write_bytes(content)
    read = read_sealed(file, limit=1 << 20)
    record, tensors = json.loads(read.record), dict(read.tensors)
    del record["sha256"]
    if draw(st.booleans()):
        record = json.loads(restructured(json.dumps(record), draw))
    if draw(st.booleans()):
        name = draw(st.sampled_from(sorted(tensors)))
        shapes = [[], [0], [1], [2, 3], [0, 3, 4, 4], [2, 3, 4, 4], [1, 3, 4, 4], [4, 2], [2]]
        dtype = draw(
            st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8])
        )
        filled = draw(st.sampled_from([0.0, 1.0, -3.0, 1e30, float("nan"), float("inf")]))
        shape = draw(st.sampled_from([*shapes, list(tensors[name].shape)]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tensors[draw(_words) if draw(st.booleans()) else name] = torch.full(shape, filled).to(dtype)
    try:
        return seal(tensors, record)
    except (ValueError, UnicodeError):  # JSON and safetensors hold no NaN and no lone surrogate
        return content


@fuzz(130)
def test_files_of_the_state_that_are_sealed(folder: Path, held: dict[str, bytes], data: st.DataObject) -> None:
    (folder / STATE).write_bytes(forged(held[STATE], data.draw, folder / STATE))
    try:
        with suppress(ZePADError):
            run(folder).to_json()
    finally:
        (folder / STATE).write_bytes(held[STATE])


@pytest.fixture(scope="module")
def perturbation(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    file = tmp_path_factory.mktemp("perturbation") / "one.safetensors"
    record = {"attack": "noise", "settings": {"epochs": 3, "rates": [0.1, 0.2]}, "encoders": ["a", "b"]}
    UniversalPerturbation(delta=torch.rand(1, 3, 4, 4) * 0.1, eps=0.1, provenance=record).save(file)
    return file, file.read_bytes()


@fuzz(200)
def test_perturbations(perturbation: tuple[Path, bytes], data: st.DataObject) -> None:
    file, content = perturbation
    forge = data.draw(st.booleans())
    changed = forged(content, data.draw, file) if forge else damaged(content, data.draw)
    file.write_bytes(changed)
    with suppress(ZePADError):
        read = UniversalPerturbation.load(file)
        assert forge or changed == content
        assert (read.apply(IMAGES) - IMAGES).abs().max() <= read.eps + 1e-6
        attacker = universal_attacker(read)
        json.dumps(attacker.settings, allow_nan=False)
        report = evaluate(colour_ensemble(), LOADER, [attacker], sanity=False, progress=False, samples=0)
        show(report)


@fuzz(130)
def test_records_of_a_bank(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    file = tmp_path_factory.getbasetemp() / "bank.json"
    record = _Record(file, "0" * 64)
    record.write(3, "1" * 64)
    content = changed(file.read_bytes(), data.draw)
    file.write_bytes(content)
    done, residuals = record.read()
    said = json.loads(content) if (done, residuals) != (0, "") else {"chunks": 0, "residuals": ""}
    assert done == max(said["chunks"], 0)
    assert residuals == said["residuals"]
