"""Recordings in a folder next to their transcripts, or named by a manifest or table."""

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.data.text_file import JSON_LINES, decode, lines_of
from echo_eqx.errors import EchoError, printable
from echo_eqx.prepare.paths import AudioFiles, nfc, without_audio_suffix
from echo_eqx.prepare.records import (
    AUDIO_FIELDS,
    KEY_FIELDS,
    MAX_TEXT_BYTES,
    TEXT_FIELDS,
    Recording,
    Recordings,
    SkippedInput,
    checked_object,
    parse_object,
    pop,
    stem,
    without_transcript,
)
from echo_eqx.prepare.tables import read_table

logger = logging.getLogger(__name__)


def read_folder(folder: Path, names: Sequence[str]) -> Recordings:
    """`NAME.wav` with `NAME.txt`; in subfolders, the speaker is the name of the folder.

    `names` are the sorted names of all files below `folder`.
    """
    texts = {nfc(name[:-4]): name for name in names if name.lower().endswith(".txt")}
    audios = [name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]
    choices = {name: [t for t in _transcripts(nfc(stem(name))) if t in texts] for name in audios}
    for key in sorted(texts.keys() - {key for found in choices.values() for key in found}):
        yield SkippedInput("audio", texts[key], "transcript without audio")
    for name, found in choices.items():
        if not found:
            yield without_transcript(stem(name), stem(name), name, folder / name)
            continue
        text = texts[found[0]]
        try:
            with (folder / text).open("rb") as file:
                fields: dict[str, Any] = {"text": decode(file.read(MAX_TEXT_BYTES))}
        except OSError as error:
            yield SkippedInput("text", text, f"cannot be read: {error.strerror}")
            continue
        if "/" in name:
            fields["speaker"] = PurePosixPath(name).parent.name
        yield Recording(stem(name), stem(name), name, folder / name, fields)


def _transcripts(name: str) -> Iterator[str]:
    """Where the transcript of a recording may be, most likely first."""
    yield name
    yield f"{name}.normalized"  # LibriTTS
    yield f"{name}.original"
    _, _, below = name.partition("/")  # VCTK: wav48/p225/p225_001_mic1, txt/p225/p225_001
    yield f"txt/{below}"
    yield f"txt/{re.sub(r'_mic[12]$', '', below)}"


def read_manifest(path: Path) -> Recordings:
    """The recordings of a JSON manifest or a table; paths are relative to the file.

    **Raises**: `EchoError` if the columns of a table cannot be determined.
    """
    audio = AudioFiles(path.parent.absolute())
    is_json = path.suffix.lower() in JSON_LINES
    rows: list[tuple[str, str, dict[str, Any]]] = []
    try:
        for place, row in _json_rows(path) if is_json else read_table(path, audio.count):
            if isinstance(row, SkippedInput):
                yield row
                continue
            given = pop(row, AUDIO_FIELDS)
            if not isinstance(given, str) or not given or "\0" in given:
                detail = f"expected the path of audio in one of {', '.join(AUDIO_FIELDS[:7])}"
                yield SkippedInput("manifest", place, detail)
            else:
                rows.append((place, given, row))
    except UnicodeDecodeError as error:
        raise EchoError(
            f"{path}: expected text, got bytes that are not {error.encoding}; save it as UTF-8"
        ) from None
    files = {given: audio.find(given) for _, given, _ in rows}
    missing = [given for given, file in files.items() if file is None]
    if missing and (moved := audio.moved(missing)):
        found = {given: audio.find_moved(given, *moved) for given in missing}
        files |= found
        logger.info(
            "%s: %d files below %s do not exist; using those in %s",
            path.name,
            sum(file is not None for file in found.values()),
            printable(moved[0]),
            audio.folder / moved[1],
        )
    yield from _recordings(path, audio.folder, rows, files)
    for name in audio.unused(file for file in files.values() if file is not None):
        yield SkippedInput("orphan", name, "audio without a transcript")


def _recordings(
    path: Path,
    folder: Path,
    rows: Sequence[tuple[str, str, dict[str, Any]]],
    files: dict[str, str | None],
) -> Recordings:
    # Names must not depend on where files are mounted. Outside the folder, they are relative to the
    # deepest folder that all of them share.
    places = {given: Path(file or given) for given, file in files.items()}
    places = {
        given: place.relative_to(folder) if place.is_relative_to(folder) else place
        for given, place in places.items()
    }
    elsewhere = [place.parent for place in places.values() if place.is_absolute()]
    shared = os.path.commonpath(elsewhere) if elsewhere else folder
    for place, given, row in rows:
        file = places[given]
        source = (file.relative_to(shared) if file.is_absolute() else file).as_posix()
        row["text"] = pop(row, TEXT_FIELDS)
        key = pop(row, KEY_FIELDS)
        if key is None or key == "":
            start = row.get("start", row.get("offset"))
            is_id = "/" not in given and "\\" not in given
            name = without_audio_suffix(given) if is_id else stem(source)
            name += f"_{start}" if start not in (None, "") else ""
        elif isinstance(key, str | int) and not isinstance(key, bool):
            name = str(key)
        else:
            detail = f"expected a string as key, got a {type(key).__name__}"
            yield SkippedInput("key", place, detail)
            continue
        if files[given] is None:
            looked = f"(looked for below {path.parent.name or path.parent}/)"
            yield SkippedInput("audio", place, f"{source[:200]} does not exist {looked}")
        else:
            yield Recording(name, name, source, folder / file, row)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | SkippedInput]]:
    """One JSON object per line, or an array of objects."""
    head = next((line for line in lines_of(path) if line is None or line.strip()), None) or ""
    if path.suffix.lower() == ".json" and head.lstrip().startswith("["):
        try:
            rows = json.loads(decode(path.read_bytes()))
        except (ValueError, RecursionError, MemoryError) as error:
            raise EchoError(f"{path}: expected JSON ({str(error)[:100]})") from None
        for number, row in enumerate(rows):
            place = f"{path.name}[{number}]"
            yield place, checked_object(row, place)
        return
    for number, line in enumerate(lines_of(path), start=1):
        place = f"{path.name}:{number}"
        if line is None:
            yield place, SkippedInput("manifest", place, "is too long for a line of JSON")
        elif line.strip():
            yield place, parse_object(line, place)
