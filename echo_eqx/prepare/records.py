"""Recordings as a source lists them: where the audio is, its other fields, and what is skipped."""

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from echo_eqx.data.audio import AudioSource
from echo_eqx.data.text_file import decode
from echo_eqx.prepare.parquet import ParquetRow

MAX_TEXT_BYTES = 2**24
# Sources use different names for the same field. If several are present, the first one is used.
AUDIO_FIELDS = (
    *("audio", "audio_filepath", "audio_file", "audio_path", "path", "file", "file_name"),
    *("filename", "file_path", "filepath", "wav", "wav_path", "wav_file", "wav_filename"),
)
TEXT_FIELDS = (
    *("text", "transcript", "transcription", "sentence"),
    *("normalized_text", "text_normalized", "normalized_transcription", "raw_text"),
)
KEY_FIELDS = ("key", "id")
SPEAKER_FIELDS = ("speaker", "speaker_id", "client_id", "speaker_name", "spk", "spk_id", "sid")
LANGUAGE_FIELDS = ("language", "lang", "locale")


@dataclass(frozen=True)
class FileRange:
    """Bytes [offset, offset + size) of a file: a member of a tar."""

    path: Path
    offset: int
    size: int

    def open(self) -> io.BufferedReader:
        """The bytes as a seekable file.

        **Raises**: `OSError`.
        """
        return io.BufferedReader(_RangeReader(self.path, self.offset, self.size))


class _RangeReader(io.RawIOBase):
    """A byte range of a file, readable as if it were a file of its own."""

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


AudioLocation = Path | FileRange | ParquetRow


@contextlib.contextmanager
def open_audio(audio: AudioLocation) -> Iterator[AudioSource]:
    """The audio in a form that can be decoded.

    **Raises**: `EchoError`, and `OSError` for a file range.
    """
    if isinstance(audio, FileRange):
        with audio.open() as file:
            yield file
    else:
        yield audio.read() if isinstance(audio, ParquetRow) else audio


@dataclass(frozen=True)
class Recording:
    """A recording and its fields as the source lists them; nothing has been checked yet."""

    name: str
    """Identifies the recording: two with the same name are duplicates."""
    key: str
    """The base of its clips' keys."""
    source: str
    """Path as in `SkippedInput.name`, but without the line if the audio is a file."""
    audio: AudioLocation
    fields: dict[str, Any]
    """`text` and all other fields that the source gives."""


@dataclass(frozen=True)
class SkippedInput:
    """An input that is not used, and why."""

    kind: str
    """Category by which skipped inputs are counted."""
    name: str
    """Path relative to the source, with the line, member or row."""
    detail: str
    recording: Recording | None = field(default=None, repr=False)
    """What can be used where no text is needed."""


def without_transcript(name: str, key: str, source: str, audio: AudioLocation) -> SkippedInput:
    """A recording of which only the audio is there."""
    recording = Recording(name, key, source, audio, {})
    return SkippedInput("orphan", source, "audio without a transcript", recording)


Recordings = Iterator[Recording | SkippedInput]
"""The items that every reader of a source yields."""


def pop(fields: dict[str, Any], names: Sequence[str]) -> Any:
    """Remove and return the first of `names` in `fields`, or None.

    Names match in any case (`Text`, `TEXT`), but an exact match comes first.
    """
    found = next((name for name in names if name in fields), None)
    if found is None:
        lower = {name.strip().lower(): name for name in fields}
        found = next((lower[name] for name in names if name in lower), None)
    return None if found is None else fields.pop(found)


def stem(name: str) -> str:
    """`name` without the suffix of its last part."""
    return str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).name else name


def parse_object(data: bytes | str, place: str) -> dict[str, Any] | SkippedInput:
    """A JSON object, or why `data` is not one."""
    try:
        fields = json.loads(decode(data) if isinstance(data, bytes) else data)
    except (ValueError, RecursionError, MemoryError) as error:
        return SkippedInput("manifest", place, f"is not JSON: {str(error)[:100]}")
    return checked_object(fields, place)


def checked_object(fields: Any, place: str) -> dict[str, Any] | SkippedInput:
    if isinstance(fields, dict):
        return fields
    detail = f"expected a JSON object, got a {type(fields).__name__}"
    return SkippedInput("manifest", place, detail)
