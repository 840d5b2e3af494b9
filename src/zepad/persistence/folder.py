"""The folder of a saved model, whose files change all at once.

A save writes its files into a hidden folder inside that of the model, and renames it: from then on the model is the new
one. Then the files move into place one by one. Whoever reads looks for each file in the renamed folder first, so that
moving a file changes nothing for a reader, and neither does a process that dies in between: the next save moves what
is left. An empty file there says that the model no longer has a file of that name.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from ..errors import CheckpointError
from ..files import flush, open_regular, read_opened, require_replaceable, writing
from .config import CARD_FILE, CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHT_FILES, SavedConfig, parse_config

_FILES = (CONFIG_FILE, CARD_FILE, *WEIGHT_FILES)
_NEXT = ".zepad-next"  # files of a save that is being written; none reads them
_SAVED = ".zepad-saved"  # files of a whole save that are not in their places yet

_TRIES = 100  # a save would have to end within the same fraction of a millisecond each time


@contextmanager
def replacing_model(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, whose files take the place of the model in `folder` where the block succeeds.

    Readers see the old model or the new one, each whole, also after a crash or on a full disk. Weight files that the
    new model has not are deleted, and files that are no model's stay. Another save into the folder waits, except on
    Windows and on network file systems that cannot lock a folder: save from one process at a time there.

    Args:
        folder: Folder of the model, created if it does not exist. Symbolic links in it are replaced, not followed.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    with _committed(folder) as new:
        yield new
        for name in WEIGHT_FILES:
            if os.path.lexists(folder / name) and not (new / name).exists():
                (new / name).touch()  # marks a file that is to go


def write_card(folder: Path, card: str) -> Path:
    """Write a card beside a saved model.

    Args:
        folder: Folder of the model.
        card: Text that `model_card` returned.

    Returns:
        The path of the card.

    Raises:
        CheckpointError: If the folder cannot be written.
    """
    with _committed(folder) as new:
        (new / CARD_FILE).write_text(card, encoding="utf-8")
    return folder / CARD_FILE


@contextmanager
def _committed(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, whose files take the place of those in `folder` all at once where the block succeeds."""
    new = folder / _NEXT
    with writing(folder, CheckpointError):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _move_into_place(folder)
            if os.path.lexists(new):  # a save that was interrupted left it
                shutil.rmtree(new)
            new.mkdir()
            try:
                yield new
                for file in new.iterdir():
                    require_replaceable(folder / file.name)
                    flush(file)
                flush(new)
                new.rename(folder / _SAVED)
                flush(folder)
            finally:
                shutil.rmtree(new, ignore_errors=True)
            _move_into_place(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes and threads, where the system can. A process that dies unlocks it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a process that was forked meanwhile holds the lock too
        os.close(handle)


def _move_into_place(folder: Path) -> None:
    """Finish the save that was renamed, if there is one."""
    saved = _saved_folder(folder)
    if saved is None:
        return
    for name in _FILES:
        try:
            marks_removal = (saved / name).lstat().st_size == 0
        except FileNotFoundError:
            continue
        if marks_removal:
            (folder / name).unlink(missing_ok=True)
            (saved / name).unlink()
        else:
            (saved / name).replace(folder / name)
    flush(folder)
    shutil.rmtree(saved)


def _saved_folder(folder: Path) -> Path | None:
    """Return the folder of a save that is not in place, if there is one. A link is none, since no save makes links."""
    try:
        is_folder = stat.S_ISDIR((folder / _SAVED).lstat().st_mode)
    except OSError:
        return None
    return folder / _SAVED if is_folder else None


def read_config(path: Path) -> SavedConfig:
    """Read the config.json of a saved model strictly: every field is present and of its type, and none is unknown.

    Args:
        path: The file. While a save is being put in place, or where that was interrupted, it is the one of that save.

    Raises:
        CheckpointError: If the file is missing or damaged, or of a format that this version does not read.
    """
    with OpenedFolder(path.parent) as opened:
        return opened.config


class OpenedFolder:
    """The files of one save, opened together. A context manager, which closes them.

    The files stay those of that save, whatever is saved into the folder meanwhile.

    Args:
        folder: Folder of a saved model.
        follow: Whether files may be symbolic links, as in the cache of the Hub client.

    Raises:
        CheckpointError: If the folder holds no whole config.json.
    """

    def __init__(self, folder: Path, *, follow: bool = True) -> None:
        self._path = folder
        self._files, self._opened = _open_all(folder, follow)
        try:
            self.config = self._read_config()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> OpenedFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._opened.close()

    def has(self, name: str) -> bool:
        """Return whether the save has a file of this name."""
        return not isinstance(self._files[name], FileNotFoundError)

    def open(self, name: str) -> BinaryIO:
        """Return a file, which is closed with the folder.

        Raises:
            CheckpointError: If the file is missing, is no regular file or cannot be read.
        """
        file = self._files[name]
        if isinstance(file, OSError):
            linked = file.errno == errno.ELOOP
            remedy = "Put a copy of what it points at in its place" if linked else "Save or download the model again"
            raise CheckpointError(f"{self._path / name} cannot be read: {file.strerror}. {remedy}.") from file
        return file

    def read(self, name: str, *, limit: int) -> bytes:
        """Return the content of a file.

        Args:
            name: Name of the file.
            limit: Largest size in bytes.

        Raises:
            CheckpointError: If the file is missing, is no regular file, is larger or cannot be read.
        """
        file = self.open(name)
        try:
            return read_opened(file, limit=limit)
        except OSError as error:
            raise CheckpointError(
                f"{file.name} cannot be read: {error.strerror}. Save or download the model again."
            ) from error

    def _read_config(self) -> SavedConfig:
        file = self._files[CONFIG_FILE]
        if isinstance(file, FileNotFoundError):
            raise CheckpointError(
                f"{self._path} holds no {CONFIG_FILE}: it is not a saved ZePAD, or saving was interrupted. "
                "Save it again."
            ) from file
        return parse_config(self.read(CONFIG_FILE, limit=MAX_CONFIG_BYTES), str(self._path / CONFIG_FILE))


def _open_all(folder: Path, follow: bool) -> tuple[dict[str, BinaryIO | OSError], ExitStack]:
    """Return all files of one save by name, or the reason why one cannot be opened, and what closes them.

    If config.json is the same file before and after, no other save took its place in between.
    """
    for _ in range(_TRIES):
        with ExitStack() as opened:
            files = {name: _open(folder, name, follow, opened) for name in _FILES}
            if _identity(files[CONFIG_FILE]) == _identity(_open(folder, CONFIG_FILE, follow, opened)):
                return files, opened.pop_all()
    raise CheckpointError(f"{folder} is saved over and over. Wait until that is done, and load it again.")


def _open(folder: Path, name: str, follow: bool, opened: ExitStack) -> BinaryIO | OSError:
    saved = _saved_folder(folder)
    for place in [folder] if saved is None else [saved, folder]:
        try:
            file = opened.enter_context(open_regular(place / name, follow=follow))
        except FileNotFoundError:
            continue
        except OSError as error:
            return error
        if place == saved and os.fstat(file.fileno()).st_size == 0:
            break
        return file
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / name))


def _identity(file: BinaryIO | OSError) -> tuple[int, int] | None:
    if isinstance(file, OSError):
        return None
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino
