"""Reading and writing of files: a write replaces whole files, a read is bounded and opens nothing but files."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import ZePADError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, and put it in the place of `path` where the block succeeds.

    Readers see the old file or the new one, each whole, also after a crash or on a full disk. Where the block fails,
    the new file is deleted and the old one stays.

    Args:
        path: The file to write. Its folder exists. A symbolic link is replaced, not followed.

    Raises:
        OSError: If the file cannot be written, or `path` is a folder, a FIFO or a device.
    """
    require_replaceable(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
    try:
        partial.touch(exist_ok=False)
        yield partial
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def writing(name: Path | str, error: type[ZePADError]) -> Iterator[None]:
    """Say which file or folder cannot be written, and what to do, where a block fails to write it.

    Args:
        name: What is written, as the message names it.
        error: Kind of error to raise in the place of an `OSError`.
    """
    try:
        yield
    except OSError as caught:
        raise error(f"{name} cannot be written: {caught.strerror or caught}. Choose a writable folder.") from caught


def make_writable(folder: Path) -> None:
    """Create a folder and prove that files can be written in it, before long work whose results it will hold.

    Raises:
        OSError: If it cannot be created or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / ".writable"
    trial.touch()
    trial.unlink()


def write_bytes(path: Path, content: bytes | memoryview) -> None:
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


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files that belong together: none takes its place before all of them are on the disk.

    Args:
        folder: Folder of the files, created if it does not exist.
        contents: Content of each file by name.

    Raises:
        OSError: If a file cannot be written. A full disk leaves all of them as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as files:
        for name, content in contents.items():
            partial = files.enter_context(replacing(folder / name))
            partial.write_bytes(content)
            flush(partial)


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Return the content of a regular file. FIFOs and devices are not read, so that nothing blocks.

    Args:
        path: The file; a symbolic link is followed.
        limit: Largest size in bytes.

    Raises:
        OSError: If the file is missing, is no regular file, is larger or cannot be read.
    """
    with open_regular(path, limit=limit) as file:
        return read_opened(file, limit=limit)


def open_regular(path: Path, *, limit: int | None = None, follow: bool = True) -> BinaryIO:
    """Open a regular file for reading. FIFOs and devices are refused at once, so that nothing blocks.

    Args:
        path: The file.
        limit: Largest size in bytes; None is any.
        follow: Whether `path` may be a symbolic link.

    Raises:
        OSError: If the file is missing, is no regular file, is larger or cannot be opened.
    """
    if not follow and path.is_symlink():
        raise OSError(errno.ELOOP, "it is a symbolic link", str(path))
    own = getattr(os, "O_NONBLOCK", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | own))  # noqa: SIM115
    found = os.fstat(file.fileno())
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise OSError(0, "it is no regular file", str(path))
    if limit is not None and found.st_size > limit:
        file.close()
        raise _too_large(path, limit)
    return file


def read_opened(file: BinaryIO, *, limit: int) -> bytes:
    """Return the content of a file that `open_regular` opened.

    Args:
        file: The file, which is read from its beginning.
        limit: Largest size in bytes.

    Raises:
        OSError: If the file is larger or cannot be read.
    """
    file.seek(0)
    content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)  # which is what is allocated
    if len(content) > limit:
        raise _too_large(file.name, limit)
    return content


def _too_large(path: Path | str, limit: int) -> OSError:
    return OSError(0, f"it is larger than {limit} bytes", str(path))


def require_replaceable(path: Path) -> None:
    """Refuse to put a file in the place of a folder, a FIFO or a device.

    Raises:
        OSError: If `path` is one of them.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OSError(0, "it is no regular file", str(path))


def flush(path: Path) -> None:
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
