"""Transcribed recordings in tars (WebDataset) and Parquet files (Hugging Face), read in place."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from echo_eqx.data import tar
from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.data.text_file import decode
from echo_eqx.prepare.parquet import (
    ParquetRow,
    audio_column,
    parquet_errors,
    pyarrow_parquet,
    read_rows,
)
from echo_eqx.prepare.paths import nfc
from echo_eqx.prepare.records import (
    KEY_FIELDS,
    MAX_TEXT_BYTES,
    FileRange,
    Recording,
    Recordings,
    SkippedInput,
    parse_object,
    pop,
    stem,
    without_transcript,
)

Files = Sequence[tuple[str, Path]]
"""Names relative to the source, and paths."""


def read_tars(files: Files) -> Recordings:
    """`NAME.wav` with `NAME.json` (text, speaker, ...) or `NAME.txt`."""
    for name, path in files:
        yield from _read_tar(name, path)


def _read_tar(tar_name: str, path: Path) -> Recordings:
    samples: dict[str, dict[str, tar.Member]] = {}
    try:
        with path.open("rb") as file:
            for member in tar.read_members(file.fileno()):
                place = f"{tar_name}/{member.name}"
                posix = PurePosixPath(member.name)
                is_audio = posix.name.lower().endswith(AUDIO_SUFFIXES)
                kind = "audio" if is_audio else posix.suffix.lower()
                name = nfc(stem(str(posix)))
                if member.kind == tar.FOLDER:
                    continue
                if posix.is_absolute() or ".." in posix.parts or not posix.name:
                    yield SkippedInput("path", place, "expected a path inside the tar")
                elif member.kind != tar.FILE:
                    yield SkippedInput("path", place, f"expected a file, got a {member.kind}")
                elif kind not in ("audio", ".json", ".txt"):
                    detail = "expected audio, .json or .txt; not used"
                    yield SkippedInput("unread", place, detail)
                elif kind in samples.setdefault(name, {}):
                    yield SkippedInput("duplicate", place, "another member has the same name")
                else:
                    samples[name][kind] = member
    except (tar.TarError, OSError) as error:  # the members before the damage are good
        yield SkippedInput("manifest", tar_name, f"cannot be read as a tar: {str(error)[:150]}")
    for name, members in sorted(samples.items()):
        yield from _read_sample(f"{tar_name}/{name}", name, path, members)


def _read_sample(
    full_name: str, name: str, path: Path, members: dict[str, tar.Member]
) -> Recordings:
    """The recording made of the members with the same name, and those that are not used."""
    audio = members.get("audio")
    if audio is None:
        got = " and ".join(sorted(members))
        yield SkippedInput("audio", full_name, f"expected audio, got only {got}")
        return
    place = f"{full_name}{PurePosixPath(audio.name).suffix}"
    if len(members) == 1:
        audio_range = FileRange(path, audio.offset, audio.size)
        yield without_transcript(full_name, name, place, audio_range)
        return
    fields: dict[str, Any] = {}
    for kind in (".txt", ".json"):
        if kind not in members:
            continue
        member = members[kind]
        if member.size > MAX_TEXT_BYTES:
            detail = f"expected at most {MAX_TEXT_BYTES} bytes, got {member.size}"
            yield SkippedInput("manifest", full_name + kind, detail)
            return
        with FileRange(path, member.offset, member.size).open() as file:
            data = file.read()
        parsed = {"text": decode(data)} if kind == ".txt" else parse_object(data, full_name + kind)
        if isinstance(parsed, SkippedInput):
            yield parsed
            return
        if "text" in fields and "text" in parsed:
            detail = "not used, because the .json has the text"
            yield SkippedInput("duplicate", f"{full_name}.txt", detail)
        fields |= parsed
    yield Recording(full_name, name, place, FileRange(path, audio.offset, audio.size), fields)


def read_parquet(files: Files) -> Recordings:
    """A column of {bytes, path}, with text and more in the other columns.

    **Raises**: `EchoError` if pyarrow is missing.
    """
    pyarrow_parquet()
    for name, path in files:
        try:
            column = audio_column(path)
            if column is None:
                yield SkippedInput("manifest", name, "has no column of audio {bytes, path}")
                continue
            for number, (group, row, given, fields) in enumerate(read_rows(path, column)):
                key = pop(fields, KEY_FIELDS)
                place = full_name = f"{name}#{number}"
                if isinstance(key, str | int) and not isinstance(key, bool):
                    full_name = key = str(key)
                elif given:
                    posix = PurePosixPath(given)
                    key = stem(posix.name if posix.is_absolute() else str(posix))
                else:
                    key = f"{stem(name)}_{number:06d}"
                yield Recording(full_name, key, place, ParquetRow(path, column, group, row), fields)
        except parquet_errors() as error:
            yield SkippedInput("manifest", name, f"cannot be read as Parquet: {str(error)[:100]}")
