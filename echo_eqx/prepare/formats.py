"""Transcribed recordings as they lie in a folder, an LJSpeech list or a manifest."""

import csv
import glob
import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.prepare.recordings import (
    MAX_TEXT_BYTES,
    Found,
    Record,
    Refusal,
    decode,
    parse_object,
    stem,
    take,
)

AUDIO_FIELDS = ("audio", "audio_filepath", "path", "file", "file_name")
TEXT_FIELDS = ("text", "transcript", "transcription", "sentence")
KEY_FIELDS = ("key", "id")


def from_folder(folder: Path) -> Found:
    """`NAME.txt` beside `NAME.wav`; the speaker is the folder it lies in, if there are several."""
    names = [
        Path(name).as_posix()
        for name in sorted(glob.glob("**/*", root_dir=folder, recursive=True))
        if (folder / name).is_file()
    ]
    texts = {stem(name): name for name in names if name.lower().endswith(".txt")}
    audios = [name for name in names if name.lower().endswith(AUDIO_SUFFIXES)]
    for name in sorted(texts.keys() - {stem(name) for name in audios}):
        yield Refusal("audio", texts[name], "a transcript without audio")
    for name in audios:
        text = texts.get(stem(name))
        if text is None:
            yield Refusal("orphan", name, "audio without a transcript")
            continue
        try:
            with (folder / text).open("rb") as file:
                fields: dict[str, Any] = {"text": decode(file.read(MAX_TEXT_BYTES))}
        except OSError as error:
            yield Refusal("text", text, f"cannot be read: {error.strerror}")
            continue
        if "/" in name:
            fields["speaker"] = PurePosixPath(name).parent.name
        yield Record(stem(name), stem(name), name, folder / name, fields)


def from_ljspeech(path: Path) -> Found:
    """Lines `id|raw|normalised` for the recordings in `wavs/`."""
    audios: dict[str, str] = {}
    for name in sorted(glob.glob("wavs/*", root_dir=path.parent)):
        if name.lower().endswith(AUDIO_SUFFIXES):
            audios.setdefault(stem(name).removeprefix("wavs/"), name)
    named = set()
    for number, line in enumerate(decode(path.read_bytes()).split("\n"), start=1):
        place = f"{path.name}:{number}"
        parts = [part.strip() for part in line.split("|")]
        if parts == [""]:
            continue
        if len(parts) not in (2, 3):
            yield Refusal("manifest", place, f"has {len(parts)} fields; wanted id|raw|normalised")
            continue
        name = parts[0]
        named.add(name)
        if name not in audios:
            yield Refusal("audio", place, f"wavs/ has no audio for {name!r}")
            continue
        fields = {"text": parts[-1] or parts[1]}
        yield Record(name, name, audios[name], path.parent / audios[name], fields)
    for name in sorted(audios.keys() - named):
        yield Refusal("orphan", audios[name], "audio without a transcript")


def from_manifest(path: Path) -> Found:
    """Lines of JSON, or rows of CSV under a heading; paths are relative to the manifest."""
    rows: list[tuple[str, dict[str, Any], Path]] = []
    here = path.parent.absolute()
    for place, row in _csv_rows(path) if path.suffix.lower() == ".csv" else _json_rows(path):
        if isinstance(row, Refusal):
            yield row
            continue
        audio = take(row, AUDIO_FIELDS)
        if not isinstance(audio, str) or not audio or "\0" in audio:
            yield Refusal("manifest", place, f"has no path of audio in {', '.join(AUDIO_FIELDS)}")
            continue
        given = Path(audio)
        is_below = given.is_absolute() and given.is_relative_to(here)
        rows.append((place, row, given.relative_to(here) if is_below else given))
    # Where things are mounted is no part of a name: elsewhere they are named from what they share.
    elsewhere = [given.parent for _, _, given in rows if given.is_absolute()]
    shared = os.path.commonpath(elsewhere) if elsewhere else here
    for place, row, given in rows:
        source = (given.relative_to(shared) if given.is_absolute() else given).as_posix()
        text = take(row, TEXT_FIELDS)
        row["text"] = text
        key = take(row, KEY_FIELDS)
        if key is None or key == "":
            start = row.get("start", row.get("offset"))
            name = key = stem(source) + (f"_{start}" if start not in (None, "") else "")
        elif isinstance(key, str | int) and not isinstance(key, bool):
            name = key = str(key)
        else:
            yield Refusal("key", place, f"its key is a {type(key).__name__}; wanted a string")
            continue
        try:
            is_there = (path.parent / given).is_file()
        except OSError:
            is_there = False
        if is_there:
            yield Record(name, key, source, path.parent / given, row)
        else:
            yield Refusal("audio", place, f"{source} does not exist")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Refusal]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path.name}:{number}"
                yield place, parse_object(line, place)


def csv_heading(rows: Iterator[list[str]]) -> list[str]:
    """The names in the first of `rows`; none where it is no CSV."""
    try:
        return [name.strip() for name in next(rows, [])]
    except csv.Error:
        return []


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Refusal]]:
    rows = csv.reader(io.StringIO(decode(path.read_bytes()), newline=""))
    heading = csv_heading(rows)
    while True:
        place = f"{path.name}:{rows.line_num + 1}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, Refusal("manifest", place, f"is no CSV: {error}")
            continue
        if len(row) == len(heading):
            yield place, {name: value for name, value in zip(heading, row, strict=True) if value}
        elif row:
            detail = f"has {len(row)} fields; wanted {len(heading)}"
            yield place, Refusal("manifest", place, detail)
