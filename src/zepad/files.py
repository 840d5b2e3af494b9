"""Reading and writing of files: a write replaces whole files, a read is bounded and opens nothing but files."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, and put it in the place of `path` where the block succeeds.

    Readers see the old file or the new one, each whole, also after a crash or on a full disk. Where the block fails,
    the new file is deleted and the old one stays.

    Args:
        path: The file to write. Its folder exists. A symbolic link is replaced, not followed.

    Raises:
        OSError: If the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        partial.touch(exist_ok=False)
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does.

    Raises:
        OSError: If the file cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 as `replacing` does.

    Raises:
        OSError: If the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Return the content of a regular file. FIFOs and devices are not opened for reading, so that nothing blocks.

    Args:
        path: The file; a symbolic link is followed.
        limit: Largest size in bytes.

    Raises:
        OSError: If the file is missing, is no regular file, is larger or cannot be read.
    """
    with open_regular(path, limit=limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:  # it has grown, or is of a file system that states no sizes
        raise _too_large(path, limit)
    return content


def open_regular(path: Path, *, limit: int) -> BinaryIO:
    """Open a regular file for reading. FIFOs and devices are refused at once, so that nothing blocks.

    Args:
        path: The file; a symbolic link is followed.
        limit: Largest size in bytes.

    Raises:
        OSError: If the file is missing, is no regular file, is larger or cannot be opened.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "it is no regular file", str(path))
        if found.st_size > limit:
            raise _too_large(path, limit)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _too_large(path: Path, limit: int) -> OSError:
    return OSError(0, f"it is larger than {limit} bytes", str(path))


def _flush(path: Path) -> None:
    """Have the disk hold a file or a folder, where the system can say so."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # a full disk can show here at the earliest; some file systems do not flush folders
            raise
    finally:
        os.close(handle)
