"""What a source of recordings is made of: where audio lies, records of it, and refusals."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from echo_eqx.data.audio import AudioSource
from echo_eqx.prepare.rows import Row

MAX_TEXT_BYTES = 2**24


@dataclass(frozen=True)
class Member:
    """Bytes [offset, offset + size) of a tar."""

    path: Path
    offset: int
    size: int

    def open(self) -> io.BufferedReader:
        """The bytes as a file that can seek.

        **Raises**: `OSError`.
        """
        return io.BufferedReader(_Part(self.path, self.offset, self.size))


class _Part(io.RawIOBase):
    """A stretch of a file, as a file."""

    def __init__(self, path: Path, offset: int, size: int):
        self._file = path.open("rb", buffering=0)
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(view)
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


Audio = Path | Member | Row


@contextlib.contextmanager
def opened(audio: Audio) -> Iterator[AudioSource]:
    """The audio in a form that can be decoded.

    **Raises**: `EchoError`, and `OSError` for a tar.
    """
    if isinstance(audio, Member):
        with audio.open() as file:
            yield file
    else:
        yield audio.read() if isinstance(audio, Row) else audio


@dataclass(frozen=True)
class Refusal:
    """Something that is not used, and why: `kind` is what it is counted under."""

    kind: str
    name: str
    """Where it is: a path below the source, with the line, member or row."""
    detail: str


@dataclass(frozen=True)
class Record:
    """A transcribed recording before anything about it is checked."""

    name: str
    """Which one it is: two records of one name are the same thing twice."""
    key: str
    """What its key is made from."""
    source: str
    """Where it is, as in `Refusal.name`, and for the audio alone where that is a file."""
    audio: Audio
    fields: dict[str, Any]
    """`text` and what else came along."""


Found = Iterator[Record | Refusal]
"""What a kind of source yields."""


def take(fields: dict[str, Any], names: Sequence[str]) -> Any:
    """Remove and return the first of `names` that is in `fields`, or None."""
    found = next((name for name in names if name in fields), None)
    return None if found is None else fields.pop(found)


def decode(data: bytes) -> str:
    """Text whose bytes that are no UTF-8 are kept as surrogates, for the check of the transcript
    to find."""
    return data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def stem(name: str) -> str:
    """`name` without the suffix of its last part."""
    return str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).name else name


def parse_object(data: bytes, place: str) -> dict[str, Any] | Refusal:
    """A JSON object with text keys."""
    try:
        fields = json.loads(decode(data))
    except (ValueError, RecursionError) as error:
        return Refusal("manifest", place, f"is no JSON: {str(error)[:100]}")
    if not isinstance(fields, dict):
        return Refusal("manifest", place, f"is a {type(fields).__name__}; wanted a JSON object")
    return fields
