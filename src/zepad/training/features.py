"""Features of frozen encoders, computed once: in memory, or memory-mapped on disk past a limit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..errors import InputError


class FeatureCache:
    """A table of rows that are appended batch by batch, then read at random.

    Rows beyond a limit are spilled to a temporary file. Use the cache as a context manager: the file is deleted when
    the block ends.

    Args:
        limit: Number of bytes that are kept in memory.

    Examples:
        >>> import torch
        >>> with FeatureCache(limit=0) as cache:
        ...     cache.append(torch.eye(2))
        ...     cache.append(torch.zeros(1, 2))
        ...     cache.rows()[torch.tensor([2, 0])]
        tensor([[0., 0.],
                [1., 0.]])
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._chunks: list[Tensor] = []
        self._bytes = 0
        self._count = 0
        self._width = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._chunks.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def append(self, rows: Tensor) -> None:
        """Append rows `(N, D)`, kept as float32.

        Raises:
            InputError: If the temporary folder has no room for them.
        """
        rows = rows.detach().float().cpu().contiguous()
        self._chunks.append(rows)
        self._bytes += rows.nbytes
        self._count += len(rows)
        self._width = rows.shape[1]
        if self._bytes > self._limit:
            self._spill()

    def rows(self) -> Tensor:
        """Return all rows, float32 `(N, D)`, memory-mapped if they were spilled."""
        if self._folder is None:
            return torch.cat(self._chunks)
        size = self._count * self._width
        return torch.from_file(str(self._path), shared=False, size=size).view(self._count, self._width)

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "features.f32"

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="zepad-features-", ignore_cleanup_errors=True)
        try:
            with self._path.open("ab") as file:
                for chunk in self._chunks:
                    file.write(chunk.numpy().tobytes())
        except OSError as error:
            raise InputError(
                f"features cannot be kept in {self._folder.name}: {error.strerror}. Name a folder with more room in "
                "the environment variable TMPDIR, or raise HeadConfig.cache_bytes."
            ) from error
        self._chunks.clear()
        self._bytes = 0


def shuffled_batches(rows: Tensor, targets: Tensor, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Iterate once over rows and targets in random order, drawn from torch's global generator.

    Args:
        rows: Features `(N, D)`.
        targets: Labels `(N,)`.
        size: Number of rows in a batch.
    """

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.randperm(len(rows)).split(size):
            # Sorted reads stay sequential on a memory-mapped file; order within a batch does not matter.
            index = index.sort().values
            yield rows[index], targets[index]

    return batches()
