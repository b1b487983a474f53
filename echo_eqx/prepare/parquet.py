"""Audio in rows of Parquet files, read a few at a time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError

_KEPT_BYTES = 2**28
"""Of rows that were read on the way to another, in one row group."""


def pyarrow_parquet() -> Any:
    """The module `pyarrow.parquet`.

    **Raises**: `EchoError` if it is not installed.
    """
    try:
        import pyarrow.parquet  # optional, and few sources need it
    except ImportError:
        raise EchoError(
            "Parquet needs pyarrow, which is not installed; run pip install 'echo_eqx[parquet]'"
        ) from None
    return pyarrow.parquet


def parquet_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises for files that it cannot read."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError)


@dataclass(frozen=True)
class ParquetRow:
    """A row of column `column`, {bytes, path}, counted from the begin of a row group."""

    path: Path
    column: str
    group: int
    row: int

    def read(self) -> bytes:
        """The encoded audio.

        **Raises**: `EchoError` if there is none, the file cannot be read or pyarrow is missing.
        """
        pyarrow_parquet()
        try:
            data = _group(self.path, self.column, self.group).read(self.row)
        except parquet_errors() as error:
            raise EchoError(f"{self.path.name} cannot be read: {str(error)[:200]}") from None
        if data is None:
            raise EchoError("the row has no bytes of audio; expected {bytes, path}")
        return data


class _Group:
    """The audio of a row group, from the first row on.

    A group may hold more than memory does, and more than the 2 GiB of one Arrow array. Rows are
    mostly asked for in order; what was passed on the way to another is kept up to `_KEPT_BYTES`.
    """

    def __init__(self, path: Path, column: str, group: int):
        self._path, self._column, self._group = path, column, group
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, bytes | None] = OrderedDict()
        self._size = 0
        self._next = 0
        self._rows = self._from_first()

    def read(self, row: int) -> bytes | None:
        with self._lock:
            if row in self._kept:
                return self._kept[row]
            if row < self._next:
                self._next, self._rows = 0, self._from_first()
            try:
                while True:
                    data = next(self._rows)
                    self._next += 1
                    self._keep(self._next - 1, data)
                    if row < self._next:
                        return data
            except StopIteration:
                raise IndexError(f"its row group {self._group} has no row {row}") from None
            except BaseException:
                self._next, self._rows = 0, self._from_first()
                raise

    def _from_first(self) -> Iterator[bytes | None]:
        # Without a buffer a whole column is read at once.
        file = pyarrow_parquet().ParquetFile(self._path, buffer_size=2**20)
        name = f"{self._column}.bytes"
        facts = file.metadata.row_group(self._group)
        chunks = [facts.column(i) for i in range(facts.num_columns)]
        # No row is larger than its column, so that no batch reaches the limit of 2 GiB.
        size = sum(x.total_uncompressed_size for x in chunks if x.path_in_schema == name)
        count = max(1, min(64, (2**31 - 1) // max(1, size)))
        for batch in file.iter_batches(count, row_groups=[self._group], columns=[name]):
            for value in batch.column(0):
                audio = value.as_py()
                yield None if audio is None else audio["bytes"]

    def _keep(self, row: int, data: bytes | None) -> None:
        if row not in self._kept:
            self._kept[row] = data
            self._size += len(data or b"")
        while self._size > _KEPT_BYTES:
            _, old = self._kept.popitem(last=False)
            self._size -= len(old or b"")


@lru_cache(2)
def _group(path: Path, column: str, group: int) -> _Group:
    return _Group(path, column, group)


def rows_beside(path: Path, column: str) -> Iterator[tuple[int, int, str | None, dict[str, Any]]]:
    """ParquetRow group, row within it, path of the audio and the other fields, for every row.

    Columns of bytes are None: they are often other recordings, and no metadata.

    **Raises**: one of `parquet_errors`.
    """
    import pyarrow

    file = pyarrow_parquet().ParquetFile(path, buffer_size=2**20)
    others, blank, is_bytes = [], {}, pyarrow.types.is_binary
    for name in file.schema_arrow.names:
        kind = file.schema_arrow.field(name).type
        if name == column or _is_audio(kind):
            others.append(f"{name}.path")
        elif is_bytes(kind) or pyarrow.types.is_large_binary(kind):
            blank[name] = None
        else:
            others.append(name)
    for group in range(file.num_row_groups):
        number = 0
        for batch in file.iter_batches(256, row_groups=[group], columns=others):
            for fields in batch.to_pylist():
                audio = fields.pop(column) or {}
                yield group, number, audio.get("path"), fields | blank
                number += 1


def audio_column(path: Path) -> str | None:
    """The column of {bytes, path}: `audio`, if that is one.

    **Raises**: one of `parquet_errors`.
    """
    schema = pyarrow_parquet().ParquetFile(path).schema_arrow
    names = sorted(schema.names, key=lambda name: name != "audio")
    return next((name for name in names if _is_audio(schema.field(name).type)), None)


def _is_audio(kind: Any) -> bool:
    return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
