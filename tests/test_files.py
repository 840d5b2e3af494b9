"""A write leaves the old file or the new one; a read is bounded and opens nothing but files."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zepad.files import read_bytes, replacing, write_bytes, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="half-way"), replacing(path) as partial:
        partial.write_bytes(b"ne")
        raise RuntimeError("half-way")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@given(content=st.binary(max_size=200), limit=st.integers(0, 250))
@settings(max_examples=50)
def test_what_was_written_is_read_unless_it_is_too_large(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, limit: int
) -> None:
    path = tmp_path_factory.mktemp("files") / "some.bin"
    write_bytes(path, content)
    if len(content) <= limit:
        assert read_bytes(path, limit=limit) == content
    else:
        with pytest.raises(OSError, match="larger than"):
            read_bytes(path, limit=limit)


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path: Path) -> None:
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.write_text("kept")
    link.symlink_to(target)
    write_text(link, "new")
    assert target.read_text() == "kept"
    assert not link.is_symlink()


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(OSError, match="regular file|directory"):
        read_bytes(path, limit=10)


def test_the_mode_is_that_of_an_ordinary_file(tmp_path: Path) -> None:
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    write_text(tmp_path / "written", "text")
    assert (tmp_path / "written").stat().st_mode == ordinary.stat().st_mode
