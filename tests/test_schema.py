"""Strict reading: every deviation from the schema is rejected with an error that names the field."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zepad.errors import CheckpointError
from zepad.schema import STRICT, parse_json, read_bounded


@dataclass(frozen=True, kw_only=True)
class Inner:
    __pydantic_config__: ClassVar[Any] = STRICT

    rate: float = 1.0
    many: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate must be zero or more; got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    __pydantic_config__: ClassVar[Any] = STRICT

    name: str
    count: int
    parts: dict[str, Inner]
    first: Inner | None = None


finite = st.floats(min_value=0, max_value=1e300)
inner = st.builds(Inner, rate=finite, many=st.lists(finite, max_size=3).map(tuple))
outer = st.builds(
    Outer,
    name=st.text(st.characters(exclude_categories=["Cs"])),
    count=st.integers(-(2**60), 2**60),
    parts=st.dictionaries(st.text("abc"), inner, max_size=3),
    first=st.none() | inner,
)


@given(outer)
def test_what_is_written_comes_back(value: Outer):
    assert parse_json(Outer, json.dumps(asdict(value)), origin="x") == value


@given(outer, st.data())
def test_a_field_that_is_missing_anywhere_is_named(value: Outer, data: st.DataObject):
    values = asdict(value)
    holders = [(values, ""), *((part, f"parts.{name}.") for name, part in values["parts"].items())]
    holder, path = data.draw(st.sampled_from(holders))
    name = data.draw(st.sampled_from(sorted(holder)))
    del holder[name]
    with pytest.raises(CheckpointError, match="x is damaged") as caught:
        parse_json(Outer, json.dumps(values), origin="x")
    assert path + name in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"count": True}, "count"),
        ({"count": 1.0}, "count"),
        ({"name": 3}, "name"),
        ({"first": {"rate": -1.0, "many": []}}, "rate must be zero or more"),
        ({"first": {"rate": 1.0, "many": [], "other": 1}}, "first.other"),
        ({"parts": {"a": {"rate": float("nan"), "many": []}}}, "parts.a.rate"),
        ({"parts": []}, "parts"),
        ({"surprise": None}, "surprise"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], named: str):
    values = {"name": "n", "count": 1, "parts": {}, "first": None, **change}
    with pytest.raises(CheckpointError, match=named):
        parse_json(Outer, json.dumps(values), origin="x")


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"{", b"[" * 100_000, b'{"name": "\\ud800"}', b"null"])
def test_what_is_no_such_json_is_refused(text: bytes):
    with pytest.raises(CheckpointError, match="x is damaged"):
        parse_json(Outer, text, origin="x")


def test_no_more_is_read_than_allowed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(CheckpointError, match="larger than 4 bytes"):
        read_bounded(path, 4)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_bounded(tmp_path / "none", 4)
