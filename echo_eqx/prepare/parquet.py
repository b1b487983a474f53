"""Audio in the rows of Parquet files, read a few rows at a time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError, optional

_CACHE_BYTES = 2**28
"""Limit of the cached rows of one row group."""


def pyarrow_parquet() -> Any:
    """The module `pyarrow.parquet`.

    **Raises**: `EchoError` if it is not installed.
    """
    return optional("pyarrow.parquet", "parquet")


def parquet_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises for files that it cannot read."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)


@dataclass(frozen=True)
class ParquetRow:
    """The audio {bytes, path} in one row of a column."""

    path: Path
    column: str
    group: int
    row: int
    """Index within the row group."""

    def read(self) -> bytes:
        """The encoded audio.

        **Raises**: `EchoError` if there is none, the file cannot be read or pyarrow is missing.
        """
        pyarrow_parquet()
        try:
            data = _row_group(self.path, self.column, self.group).read(self.row)
        except parquet_errors() as error:
            raise EchoError(f"{self.path.name} cannot be read: {str(error)[:200]}") from None
        if data is None:
            raise EchoError("expected audio as {bytes, path}, got a row without bytes")
        return data


class _RowGroup:
    """The audio of one row group.

    A row group may be larger than memory, and than the 2 GiB limit of an Arrow array, so rows are
    streamed. Most are asked for in order; rows that were skipped stay in a cache.
    """

    def __init__(self, path: Path, column: str, group: int):
        self._path, self._column, self._group = path, column, group
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, bytes | None] = OrderedDict()
        self._cached_bytes = 0
        self._restart()

    def read(self, row: int) -> bytes | None:
        with self._lock:
            if row in self._cache:
                return self._cache[row]
            if row < self._next:
                self._restart()
            try:
                for data in self._rows:
                    self._store(self._next, data)
                    self._next += 1
                    if row < self._next:
                        return data
            except BaseException:
                self._restart()
                raise
            raise IndexError(f"row group {self._group} has no row {row}")

    def _restart(self) -> None:
        self._next, self._rows = 0, self._stream()

    def _stream(self) -> Iterator[bytes | None]:
        # Without a buffer, pyarrow reads the whole column at once.
        file = pyarrow_parquet().ParquetFile(self._path, buffer_size=2**20)
        name = f"{self._column}.bytes"
        metadata = file.metadata.row_group(self._group)
        chunks = [metadata.column(i) for i in range(metadata.num_columns)]
        # No row is larger than its column, so with this many rows no batch reaches 2 GiB.
        size = sum(x.total_uncompressed_size for x in chunks if x.path_in_schema == name)
        count = max(1, min(64, (2**31 - 1) // max(1, size)))
        for batch in file.iter_batches(count, row_groups=[self._group], columns=[name]):
            for value in batch.column(0):
                audio = value.as_py()
                yield None if audio is None else audio["bytes"]

    def _store(self, row: int, data: bytes | None) -> None:
        if row not in self._cache:
            self._cache[row] = data
            self._cached_bytes += len(data or b"")
        while self._cached_bytes > _CACHE_BYTES:
            _, old = self._cache.popitem(last=False)
            self._cached_bytes -= len(old or b"")


@lru_cache(2)
def _row_group(path: Path, column: str, group: int) -> _RowGroup:
    return _RowGroup(path, column, group)


def read_rows(path: Path, column: str) -> Iterator[tuple[int, int, str | None, dict[str, Any]]]:
    """Row group, row within it, path of the audio and the other fields, for every row.

    The fields of bytes columns are None: they often hold more audio, not metadata.

    **Raises**: one of `parquet_errors`.
    """
    import pyarrow

    file = pyarrow_parquet().ParquetFile(path, buffer_size=2**20)
    columns, blank, is_bytes = [], {}, pyarrow.types.is_binary
    for name in file.schema_arrow.names:
        kind = file.schema_arrow.field(name).type
        if name == column or _is_audio(kind):
            columns.append(f"{name}.path")
        elif is_bytes(kind) or pyarrow.types.is_large_binary(kind):
            blank[name] = None
        else:
            columns.append(name)
    for group in range(file.num_row_groups):
        number = 0
        for batch in file.iter_batches(256, row_groups=[group], columns=columns):
            for fields in batch.to_pylist():
                audio = fields.pop(column) or {}
                yield group, number, audio.get("path"), fields | blank
                number += 1


def audio_column(path: Path) -> str | None:
    """The column of {bytes, path}; `audio` if there are several.

    **Raises**: one of `parquet_errors`.
    """
    schema = pyarrow_parquet().ParquetFile(path).schema_arrow
    names = sorted(schema.names, key=lambda name: name != "audio")
    return next((name for name in names if _is_audio(schema.field(name).type)), None)


def _is_audio(kind: Any) -> bool:
    return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
