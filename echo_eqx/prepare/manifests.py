"""Transcribed recordings as they lie in a folder, a list or a manifest."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.data.text_file import JSON_LINES, decode, lines_of
from echo_eqx.errors import EchoError
from echo_eqx.prepare.paths import AudioFiles, bare, nfc
from echo_eqx.prepare.records import (
    AUDIO_FIELDS,
    KEY_FIELDS,
    MAX_TEXT_BYTES,
    TEXT_FIELDS,
    Recording,
    Recordings,
    SkippedInput,
    parse_object,
    pop,
    printable,
    stem,
)
from echo_eqx.prepare.tables import read_list


def read_folder(folder: Path, names: Sequence[str]) -> Recordings:
    """`NAME.txt` beside `NAME.wav`; the speaker is the folder it lies in, if there are several.

    `names` are those of the files below `folder`, sorted.
    """
    texts = {nfc(name[:-4]): name for name in names if name.lower().endswith(".txt")}
    audios = [name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]
    choices = {name: [t for t in _transcripts(nfc(stem(name))) if t in texts] for name in audios}
    for key in sorted(texts.keys() - {key for found in choices.values() for key in found}):
        yield SkippedInput("audio", texts[key], "a transcript without audio")
    for name, found in choices.items():
        if not found:
            yield SkippedInput("orphan", name, "audio without a transcript")
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
    """Where the transcript of a recording may be, the best place first."""
    yield name
    yield f"{name}.normalized"  # LibriTTS
    yield f"{name}.original"
    _, _, below = name.partition("/")  # VCTK: wav48/p225/p225_001_mic1, txt/p225/p225_001
    yield f"txt/{below}"
    yield f"txt/{re.sub(r'_mic[12]$', '', below)}"


def read_manifest(path: Path, say: Callable[[str], object] = lambda _: None) -> Recordings:
    """Lines of JSON, or rows of a list; paths are relative to it.

    `say` is told how a list is read.

    **Raises**: `EchoError` if it cannot be told which columns a list has.
    """
    audio = AudioFiles(path.parent.absolute())
    rows: list[tuple[str, str, dict[str, Any]]] = []
    try:
        if path.suffix.lower() in JSON_LINES:
            given_rows = _json_rows(path)
        else:
            given_rows = read_list(path, audio.count, say)
        for place, row in given_rows:
            given = row if isinstance(row, SkippedInput) else pop(row, AUDIO_FIELDS)
            if isinstance(given, SkippedInput):
                yield given
            elif not isinstance(given, str) or not given or "\0" in given:
                detail = f"has no path of audio in {', '.join(AUDIO_FIELDS[:7])}"
                yield SkippedInput("manifest", place, detail)
            elif not isinstance(row, SkippedInput):
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
        count = sum(file is not None for file in found.values())
        say(
            f"{path.name}: {count} files below {printable(moved[0])} are not there; those in "
            f"{audio.folder / moved[1]} are used"
        )
    yield from _records(path, audio, rows, files)
    for name in audio.unused(file for file in files.values() if file is not None):
        yield SkippedInput("orphan", name, "audio without a transcript")


def _records(
    path: Path,
    audio: AudioFiles,
    rows: Sequence[tuple[str, str, dict[str, Any]]],
    files: dict[str, str | None],
) -> Recordings:
    # Where things are mounted is no part of a name: elsewhere they are named from what they share.
    places = {given: _below(audio.folder, Path(file or given)) for given, file in files.items()}
    elsewhere = [place.parent for place in places.values() if place.is_absolute()]
    shared = os.path.commonpath(elsewhere) if elsewhere else audio.folder
    for place, given, row in rows:
        file = places[given]
        source = (file.relative_to(shared) if file.is_absolute() else file).as_posix()
        row["text"] = pop(row, TEXT_FIELDS)
        key = pop(row, KEY_FIELDS)
        if key is None or key == "":
            start = row.get("start", row.get("offset"))
            is_id = "/" not in given and "\\" not in given
            name = bare(given) if is_id else stem(source)
            name = key = name + (f"_{start}" if start not in (None, "") else "")
        elif isinstance(key, str | int) and not isinstance(key, bool):
            name = key = str(key)
        else:
            detail = f"expected a string as its key, got a {type(key).__name__}"
            yield SkippedInput("key", place, detail)
            continue
        if files[given] is None:
            looked = f"(looked for below {path.parent.name or path.parent}/)"
            yield SkippedInput("audio", place, f"{source[:200]} does not exist {looked}")
        else:
            yield Recording(name, key, source, audio.folder / file, row)


def _below(folder: Path, file: Path) -> Path:
    """`file` from `folder` on, if it is below it."""
    is_below = file.is_absolute() and file.is_relative_to(folder)
    return file.relative_to(folder) if is_below else file


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | SkippedInput]]:
    """A JSON object a line, or all of them in one array."""
    head = next((line for line in lines_of(path) if line is None or line.strip()), None) or ""
    if path.suffix.lower() == ".json" and head.lstrip().startswith("["):
        yield from _json_array(path)
        return
    for number, line in enumerate(lines_of(path), start=1):
        place = f"{path.name}:{number}"
        if line is None:
            yield place, SkippedInput("manifest", place, "is too long for a line of JSON")
        elif line.strip():
            yield place, parse_object(line, place)


def _json_array(path: Path) -> Iterator[tuple[str, dict[str, Any] | SkippedInput]]:
    try:
        rows = json.loads(decode(path.read_bytes()))
    except (ValueError, RecursionError, MemoryError) as error:
        raise EchoError(
            f"{path}: expected JSON, got what cannot be parsed ({str(error)[:100]})"
        ) from None
    for number, row in enumerate(rows):
        place = f"{path.name}[{number}]"
        detail = f"is a {type(row).__name__}; expected a JSON object"
        yield place, row if isinstance(row, dict) else SkippedInput("manifest", place, detail)
