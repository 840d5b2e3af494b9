"""A write leaves the old file or the new one; a read is bounded and opens nothing but files."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zepad.files import open_regular, read_bytes, replacing, write_bytes, write_text, write_together


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


def test_files_that_belong_together_change_together_or_not_at_all(tmp_path: Path) -> None:
    write_together(tmp_path / "out", {"a.txt": b"old", "b.txt": b"old"})
    (tmp_path / "out" / "c.txt").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        write_together(tmp_path / "out", {"a.txt": b"new", "b.txt": b"new", "c.txt": b"new"})
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.txt", "b.txt", "c.txt"}
    assert [(tmp_path / "out" / name).read_bytes() for name in ("a.txt", "b.txt")] == [b"old", b"old"]


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_no_file_takes_the_place_of_what_is_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    os.mkfifo(path) if kind == "fifo" else path.mkdir()
    before = path.stat().st_mode
    with pytest.raises(OSError, match="regular file|directory"):
        write_bytes(path, b"content")
    assert path.stat().st_mode == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert open_and_read(tmp_path / "link", follow=True) == b"content"
    assert open_and_read(tmp_path / "file", follow=False) == b"content"
    with pytest.raises(OSError, match="symbolic link"):
        open_and_read(tmp_path / "link", follow=False)


def open_and_read(path: Path, *, follow: bool) -> bytes:
    with open_regular(path, follow=follow) as file:
        return file.read()
