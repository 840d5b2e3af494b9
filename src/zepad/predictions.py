"""Predictions on many images: batch by batch, and as a table that is kept while it grows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .arguments import checked
from .data import ImageList
from .data.images import resize
from .digests import shortened
from .errors import CheckpointError, ConfigError, InputError
from .evaluation import weights_digest
from .evaluation.identity import digest
from .files import flush, read_bytes, replacing, writing
from .model import ZePAD
from .progress import stage
from .schema import STRICT, describe

_LARGEST_TABLE = 2**34  # bytes
_ROUNDED = 6  # digits of a probability or a score


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A row of a table.

    Attributes:
        image: Name of the image.
        label: Name of the predicted class; None if the image could not be read.
        probability: Probability of that class in [0, 1]; None if the image could not be read.
        attacked: Whether the detection score is above the threshold; None without a threshold.
        score: Detection score; None if the detector is not calibrated.
        error: Why the image could not be read; None if it was.
        model: Digest of the model and of how it was given its images.
    """

    __pydantic_config__: ClassVar[Any] = STRICT

    image: str
    label: str | None
    probability: float | None
    attacked: bool | None
    score: float | None
    error: str | None
    model: str


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What `predict_table` did.

    Attributes:
        rows: Number of rows of the table.
        found: Number of images whose prediction was there before.
        failed: Names of the images that could not be read.
    """

    rows: int
    found: int
    failed: tuple[str, ...]


@checked
def predict_images(
    defense: ZePAD,
    images: ImageList,
    *,
    batch_size: int = 128,
    workers: int = 0,
    size: int | tuple[int, int] | None = None,
) -> Iterator[list[Prediction]]:
    """Iterate over the predictions on images, batch by batch and in their order.

    Images of several sizes are welcome: those of one size are predicted together.

    Args:
        defense: A fitted model.
        images: The images.
        batch_size: Number of images that are read and predicted at once.
        workers: Number of processes that read images; 0 reads them in this one.
        size: Height and width that every image is stretched to, or one number for both; None keeps the images' own.

    Raises:
        StageError: If the model is not fitted.
        ConfigError: If a setting is out of range.
    """
    model = identify(defense, size)
    yield from _predict(defense, images, range(len(images)), model, batch_size, workers, size)


@checked
def predict_table(
    defense: ZePAD,
    images: ImageList,
    path: str | Path,
    *,
    batch_size: int = 128,
    workers: int = 0,
    size: int | tuple[int, int] | None = None,
    progress: bool = True,
) -> Progress:
    """Write the predictions on images as a table, and go on where an earlier call was interrupted.

    Until the table is whole, its rows are kept in a file beside it, whose name ends in `.part`. Images whose prediction
    is in either file already are not predicted again, except those that could not be read.

    Args:
        defense: A fitted model.
        images: The images.
        path: File to write: `.csv`, `.jsonl` (one JSON object a line) or `.parquet`. Rows that it has are kept.
        batch_size: Number of images that are read and predicted at once.
        workers: Number of processes that read images; 0 reads them in this one.
        size: Height and width that every image is stretched to, or one number for both; None keeps the images' own.
        progress: Whether to show progress.

    Returns:
        How many rows there are now, and how many of them were there before. An image that cannot be read is a row too,
        with the reason under `error`.

    Raises:
        StageError: If the model is not fitted.
        ConfigError: If the suffix is another, or a package is missing.
        CheckpointError: If the file is damaged or holds predictions of another model, or cannot be written.
    """
    path = Path(path)
    read, write = _format(path)
    model = identify(defense, size)
    journal = path.with_name(path.name + ".part")
    kept = {row.image: row for row in [*(read(path) if path.exists() else []), *_read_journal(journal)]}
    foreign = next((row for row in kept.values() if row.model != model), None)
    if foreign is not None:
        raise CheckpointError(
            f"{path} holds predictions of another model, or of images of another size: {foreign.image} was predicted "
            f"by {foreign.model}, and this is {model}. Delete it, or choose another file."
        )
    done = {name for name, row in kept.items() if row.error is None}
    todo = [index for index, name in enumerate(images.names) if name not in done]
    found = len(images) - len(todo)
    with writing(path, CheckpointError), stage("predict", total=len(images), done=found, shown=progress) as bar:
        with journal.open("a", encoding="utf-8") as lines:
            for rows in _predict(defense, images, todo, model, batch_size, workers, size):
                lines.writelines(_line(row) for row in rows)
                lines.flush()
                kept |= {row.image: row for row in rows}
                bar.advance(steps=len(rows))
        ordered = [*(row for name, row in kept.items() if name not in set(images.names)), *map(kept.get, images.names)]
        table = [row for row in ordered if row is not None]
        with replacing(path) as partial:
            write(partial, table)
        journal.unlink()
    return Progress(rows=len(table), found=found, failed=tuple(row.image for row in table if row.error is not None))


def check_table(path: str | Path) -> None:
    """Refuse a file that `predict_table` could not write.

    Raises:
        ConfigError: If the suffix is another, or a package is missing.
    """
    _format(Path(path))


def identify(defense: ZePAD, size: int | tuple[int, int] | None = None) -> str:
    """Return a short digest of a model: weights, fusion rule, detector, threshold, class names and size of images."""
    return shortened(digest([weights_digest(defense), defense.threshold, defense.class_names, size]))


class _Readable(Dataset[tuple[str, "Tensor | None", "str | None"]]):
    """Images by name, or why they cannot be read: one bad file of thousands must not end a night's work."""

    def __init__(self, images: ImageList, size: tuple[int, int] | None) -> None:
        self._images, self._size = images, size

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str | None]:
        name = self._images.names[index]
        try:
            image = self._images[index]
        except InputError as error:
            return name, None, str(error)
        return name, image if self._size is None else resize(image, self._size), None


def _as_list(batch: list[Any]) -> list[Any]:
    return batch


def _predict(
    defense: ZePAD,
    images: ImageList,
    indices: Sequence[int],
    model: str,
    batch_size: int,
    workers: int,
    size: int | tuple[int, int] | None,
) -> Iterator[list[Prediction]]:
    stretched = (size, size) if isinstance(size, int) else size
    data = Subset(_Readable(images, stretched), indices)
    for batch in DataLoader(data, batch_size=batch_size, num_workers=workers, collate_fn=_as_list):
        rows: dict[str, Prediction] = {}
        groups: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name, image, error in batch:
            if image is None:
                rows[name] = Prediction(
                    image=name, label=None, probability=None, attacked=None, score=None, error=error, model=model
                )
            else:
                groups.setdefault(image.shape, []).append((name, image))
        for group in groups.values():
            rows |= _decide(defense, group, model)
        yield [rows[name] for name, _, _ in batch]


def _decide(defense: ZePAD, group: Sequence[tuple[str, Tensor]], model: str) -> dict[str, Prediction]:
    """Return the predictions on images of one size, by name."""
    report = defense.inspect(torch.stack([image for _, image in group]))
    labels, probabilities = report.labels.tolist(), report.probabilities.tolist()
    flagged = [None] * len(group) if report.flagged is None else report.flagged.tolist()
    scores = None if report.scores is None else report.scores.tolist()
    return {
        name: Prediction(
            image=name,
            label=report.name(labels[i]),
            probability=round(probabilities[i], _ROUNDED),
            attacked=flagged[i],
            score=None if scores is None else round(scores[i], _ROUNDED),
            error=None,
            model=model,
        )
        for i, (name, _) in enumerate(group)
    }


# tables -------------------------------------------------------------------------------------------------------------

_COLUMNS = tuple(field.name for field in fields(Prediction))
_Reader = Callable[[Path], list[Prediction]]
_Writer = Callable[[Path, Sequence[Prediction]], None]


def _format(path: Path) -> tuple[_Reader, _Writer]:
    formats: dict[str, tuple[_Reader, _Writer]] = {
        ".csv": (_read_csv, _write_csv),
        ".jsonl": (_read_lines, _write_lines),
        ".parquet": (_read_parquet, _write_parquet),
    }
    if path.suffix.lower() not in formats:
        raise ConfigError(f"predictions are written as {', '.join(formats)}; got {path.name!r}.")
    if path.suffix.lower() == ".parquet":
        _parquet()
    return formats[path.suffix.lower()]


def _line(row: Prediction) -> str:
    return json.dumps(asdict(row)) + "\n"


def _read_journal(path: Path) -> list[Prediction]:
    """Return the rows of an unfinished table. A line that was being written when the process ended is cut off."""
    if not path.exists():
        return []
    with _reading(path):
        content = read_bytes(path, limit=_LARGEST_TABLE)
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with writing(path, CheckpointError), path.open("r+b") as file:
            file.truncate(whole)
    return _checked_rows(path, map(json.loads, content[:whole].splitlines()))


def _read_lines(path: Path) -> list[Prediction]:
    with _reading(path):
        content = read_bytes(path, limit=_LARGEST_TABLE)
    return _checked_rows(path, map(json.loads, content.splitlines()))


def _write_lines(path: Path, rows: Sequence[Prediction]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(_line(row) for row in rows)


def _read_csv(path: Path) -> list[Prediction]:
    with _reading(path):
        text = read_bytes(path, limit=_LARGEST_TABLE).decode()
    kinds: dict[str, Callable[[str], Any]] = {
        "probability": float,
        "score": float,
        "attacked": {"True": True, "False": False}.__getitem__,
    }

    def values(row: dict[str, str]) -> dict[str, Any]:
        return {
            key: (None if text == "" else kinds.get(key, str)(text)) if key in _COLUMNS else text
            for key, text in row.items()
        }

    return _checked_rows(path, map(values, csv.DictReader(io.StringIO(text, newline=""))))


def _write_csv(path: Path, rows: Sequence[Prediction]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("a .parquet needs pyarrow. Install it: pip install 'zepad[parquet]'.") from error
    return pyarrow, parquet


def _read_parquet(path: Path) -> list[Prediction]:
    pyarrow, parquet = _parquet()
    with _reading(path):
        content = read_bytes(path, limit=_LARGEST_TABLE)
    try:
        rows = parquet.read_table(pyarrow.BufferReader(content)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, str(error).partition("\n")[0]) from error
    return _checked_rows(path, rows)


def _write_parquet(path: Path, rows: Sequence[Prediction]) -> None:
    pyarrow, parquet = _parquet()
    kinds = {"probability": pyarrow.float64(), "score": pyarrow.float64(), "attacked": pyarrow.bool_()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in _COLUMNS])
    parquet.write_table(pyarrow.Table.from_pylist([asdict(row) for row in rows], schema=schema), path)
    flush(path)


def _checked_rows(path: Path, rows: Iterable[Any]) -> list[Prediction]:
    try:
        return [_ROW.validate_json(json.dumps(row)) for row in rows]
    except ValidationError as error:
        raise _damaged(path, describe(error)) from error
    except (ValueError, KeyError) as error:
        raise _damaged(path, str(error)) from error


_ROW = TypeAdapter(Prediction)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} holds no predictions of zepad, or is damaged: {reason}. Choose another file.")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}. Choose another file.") from error
    except UnicodeDecodeError as error:
        raise _damaged(path, "it is no text in UTF-8") from error
