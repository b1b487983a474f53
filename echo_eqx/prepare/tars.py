"""Transcribed recordings inside tars and Parquet files, which are read where they are."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download

from echo_eqx.data import tar
from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.data.text_file import decode
from echo_eqx.hub import HubDataset, hub_errors
from echo_eqx.prepare.parquet import (
    ParquetRow,
    audio_column,
    parquet_errors,
    pyarrow_parquet,
    rows_beside,
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
)

Files = Sequence[tuple[str, Path]]
"""Names below the source, and where the files are."""


def read_tars(files: Files) -> Recordings:
    """WebDataset: `NAME.wav` with `NAME.json` (text, speaker, ...) or `NAME.txt`."""
    for name, path in files:
        yield from _from_tar(name, path)


def _from_tar(tar_name: str, path: Path) -> Recordings:
    groups: dict[str, dict[str, tar.Member]] = {}
    try:
        with path.open("rb") as file:
            for member in tar.read_members(file.fileno()):
                place = f"{tar_name}/{member.name}"
                posix = PurePosixPath(member.name)
                lower = posix.suffix.lower()
                kind = "audio" if posix.name.lower().endswith(AUDIO_SUFFIXES) else lower
                name = nfc(stem(str(posix)))
                if member.kind == tar.FOLDER:
                    continue
                if posix.is_absolute() or ".." in posix.parts or not posix.name:
                    yield SkippedInput("path", place, "is no path inside the tar")
                elif member.kind != tar.FILE:
                    yield SkippedInput("path", place, f"is a {member.kind}; expected a file")
                elif kind not in ("audio", ".json", ".txt"):
                    detail = "expected audio, .json or .txt; not used"
                    yield SkippedInput("unread", place, detail)
                elif kind in groups.setdefault(name, {}):
                    yield SkippedInput("duplicate", place, "is the second of this name")
                else:
                    groups[name][kind] = member
    except (tar.TarError, OSError) as error:  # what came before is good
        yield SkippedInput("manifest", tar_name, f"cannot be read as a tar: {str(error)[:150]}")
    for name, members in sorted(groups.items()):
        yield from _from_group(f"{tar_name}/{name}", name, path, members)


def _from_group(
    full_name: str, name: str, path: Path, members: dict[str, tar.Member]
) -> Recordings:
    """The members of one name: a recording, and what of them is not used."""
    audio = members.get("audio")
    if audio is None:
        got = " and ".join(sorted(members))
        yield SkippedInput("audio", full_name, f"expected audio, got only {got}")
        return
    place = f"{full_name}{PurePosixPath(audio.name).suffix}"
    fields: dict[str, Any] = {}
    for kind in (".txt", ".json"):
        if kind not in members:
            continue
        member = members[kind]
        if member.size > MAX_TEXT_BYTES:
            yield SkippedInput("manifest", full_name + kind, f"has {member.size} bytes")
            return
        with FileRange(path, member.offset, member.size).open() as file:
            data = file.read()
        if kind == ".txt":
            fields["text"] = decode(data)
            continue
        parsed = parse_object(data, full_name + kind)
        if isinstance(parsed, SkippedInput):
            yield parsed
            return
        if "text" in fields and "text" in parsed:
            detail = "not used, because the .json has the text"
            yield SkippedInput("duplicate", f"{full_name}.txt", detail)
        fields |= parsed
    if len(members) == 1:
        yield SkippedInput("orphan", place, "audio without a transcript")
    else:
        yield Recording(full_name, name, place, FileRange(path, audio.offset, audio.size), fields)


def read_parquet(files: Files) -> Recordings:
    """Hugging Face: a column of {bytes, path}, and text and more in the columns beside it.

    **Raises**: `EchoError` if pyarrow is missing.
    """
    pyarrow_parquet()
    for name, path in files:
        try:
            column = audio_column(path)
            if column is None:
                yield SkippedInput("manifest", name, "has no column of audio {bytes, path}")
                continue
            for number, (group, row, given, fields) in enumerate(rows_beside(path, column)):
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


def download(source: str, cache: Path) -> Path:
    """Folder with the *.parquet of `hf://datasets/owner/name[@revision][/folder]`, below `cache`.

    **Raises**: `EchoError` if they cannot be had.
    """
    dataset = HubDataset.parse(source)
    with hub_errors(f"cannot download {source}"):
        root = snapshot_download(
            dataset.repo,
            repo_type="dataset",
            revision=dataset.revision,
            cache_dir=cache,
            allow_patterns=f"{dataset.folder}/*.parquet" if dataset.folder else "*.parquet",
        )
    return Path(root) / (dataset.folder or "")
