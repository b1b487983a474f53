"""Transcribed recordings inside tars and Parquet files, which are read where they are."""

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import snapshot_download

from echo_eqx.data.audio import AUDIO_SUFFIXES
from echo_eqx.errors import EchoError
from echo_eqx.prepare.formats import KEY_FIELDS
from echo_eqx.prepare.recordings import (
    MAX_TEXT_BYTES,
    Found,
    Member,
    Record,
    Refusal,
    Row,
    decode,
    parquet,
    parse_object,
    stem,
    take,
)

HUB = "hf://"
_HUB_SOURCE = re.compile(
    r"hf://datasets/(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[^/@]+))?(?:/(?P<folder>[^*?\[]+?))?/?"
)

Files = Sequence[tuple[str, Path]]
"""Names below the source, and where the files are."""


def from_tars(files: Files) -> Found:
    """WebDataset: `NAME.wav` with `NAME.json` (text, speaker, ...) or `NAME.txt`."""
    for name, path in files:
        yield from _from_tar(name, path)


def _from_tar(tar_name: str, path: Path) -> Found:
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                place = f"{tar_name}/{member.name}"
                posix = PurePosixPath(member.name)
                kind = "audio" if posix.name.lower().endswith(AUDIO_SUFFIXES) else posix.suffix
                if member.isdir():
                    continue
                if posix.is_absolute() or ".." in posix.parts or not posix.name:
                    yield Refusal("path", place, "is no path inside the tar")
                elif not member.isreg() or member.issparse():
                    yield Refusal("path", place, "is a link or no plain file")
                elif kind not in ("audio", ".json", ".txt"):
                    continue
                elif member.offset_data + member.size > end:
                    yield Refusal("audio", place, "is cut off by the end of the tar")
                elif kind in groups.setdefault(stem(str(posix)), {}):
                    yield Refusal("duplicate", place, "is the second of this name")
                else:
                    groups[stem(str(posix))][kind] = member
    except Exception as error:  # damaged headers fail in many ways; what came before is good
        yield Refusal("manifest", tar_name, f"cannot be read as a tar: {str(error)[:100]}")
    for name, members in sorted(groups.items()):
        yield _from_group(f"{tar_name}/{name}", name, path, members)


def _from_group(
    full_name: str, name: str, path: Path, members: dict[str, tarfile.TarInfo]
) -> Record | Refusal:
    audio = members.get("audio")
    if audio is None:
        return Refusal("audio", full_name, "a transcript without audio")
    place = f"{full_name}{PurePosixPath(audio.name).suffix}"
    fields: dict[str, Any] = {}
    for kind in (".txt", ".json"):
        if kind not in members:
            continue
        member = members[kind]
        if member.size > MAX_TEXT_BYTES:
            return Refusal("manifest", full_name + kind, f"has {member.size} bytes")
        with Member(path, member.offset_data, member.size).open() as file:
            data = file.read()
        if kind == ".txt":
            fields["text"] = decode(data)
            continue
        parsed = parse_object(data, full_name + kind)
        if isinstance(parsed, Refusal):
            return parsed
        fields |= parsed
    if len(members) == 1:
        return Refusal("orphan", place, "audio without a transcript")
    return Record(full_name, name, place, Member(path, audio.offset_data, audio.size), fields)


def from_parquet(files: Files) -> Found:
    """Hugging Face: a column of {bytes, path}, and text and more in the columns beside it.

    **Raises**: `EchoError` if pyarrow is missing.
    """
    parquet()
    for name, path in files:
        try:
            file = parquet().ParquetFile(path)
            column = _audio_column(file.schema_arrow)
            for group in range(file.num_row_groups if column else 0):
                yield from _from_rows(name, path, str(column), group, file)
        except (OSError, ValueError, NotImplementedError) as error:
            yield Refusal("manifest", name, f"cannot be read as Parquet: {str(error)[:100]}")
        else:
            if column is None:
                yield Refusal("manifest", name, "has no column of audio {bytes, path}")


def _audio_column(schema: Any) -> str | None:
    names = sorted(schema.names, key=lambda name: name != "audio")
    kinds = ((name, schema.field(name).type) for name in names)
    fields = ((name, {kind.field(i).name for i in range(kind.num_fields)}) for name, kind in kinds)
    return next((name for name, have in fields if {"bytes", "path"} <= have), None)


def _from_rows(name: str, path: Path, column: str, group: int, file: Any) -> Found:
    first = sum(file.metadata.row_group(i).num_rows for i in range(group))
    others = [other for other in file.schema_arrow.names if other != column]
    rows = file.read_row_group(group, columns=[*others, f"{column}.path"]).to_pylist()
    for number, fields in enumerate(rows):
        place = f"{name}#{first + number}"
        given = (fields.pop(column) or {}).get("path")
        key = take(fields, KEY_FIELDS)
        full_name = place
        if isinstance(key, str | int) and not isinstance(key, bool):
            full_name = key = str(key)
        elif given:
            posix = PurePosixPath(given)
            key = stem(posix.name if posix.is_absolute() else str(posix))
        else:
            key = f"{stem(name)}_{first + number:06d}"
        yield Record(full_name, key, place, Row(path, column, group, number), fields)


def download(source: str, cache: Path) -> Path:
    """Folder with the *.parquet of `hf://datasets/owner/name[@revision][/folder]`, below `cache`.

    **Raises**: `EchoError` if they cannot be had.
    """
    match = _HUB_SOURCE.fullmatch(source)
    if match is None:
        raise EchoError(f"{source} is no {HUB}datasets/owner/name[@revision][/folder]")
    repo, revision, folder = match["repo"], match["revision"], match["folder"]
    pattern = f"{folder}/*.parquet" if folder else "*.parquet"
    try:
        root = snapshot_download(
            repo,
            repo_type="dataset",
            revision=revision,
            cache_dir=cache,
            allow_patterns=pattern,
        )
    except Exception as error:  # the errors of the HTTP library below change between versions
        reason = next((line for line in str(error).splitlines() if line), type(error).__name__)
        raise EchoError(f"{source} cannot be downloaded: {reason}") from None
    return Path(root) / (folder or "")
