"""The records of a tar shard, the offsets of their files, and members that belong to no record.

A record `key` has the members `key.npy`, `key.json` and optionally `key.ref.npy`. As in WebDataset,
a key ends at the first dot of the file name, and suffixes are case-insensitive. A key may contain
dots if it has both `.npy` and `.json`, and the part before its first dot is not a key.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from echo_eqx.data.tar import FILE, FOLDER, HARD_LINK, TarError, read_members

_PARTS = {"npy": "latents", "ref.npy": "reference", "json": "json"}
_MAX_NAME = 4096
"""Longest path on Linux in bytes. Longer names are not worth the time."""


@dataclass(slots=True)
class RecordEntry:
    """Offset and size in bytes of each file of a record in its shard.

    `damage` says why the rest of the shard could not be read; nothing else is then set.
    """

    key: str
    latents: tuple[int, int] | None = None
    reference: tuple[int, int] | None = None
    json: tuple[int, int] | None = None
    damage: str | None = None


class Skipped(NamedTuple):
    """A member of a shard that belongs to no record."""

    name: str
    kind: str
    """One of "member" (data may be lost), "duplicate" (a later member replaces it), "extra" (a
    further file of a record, such as `key.flac`)."""
    detail: str
    """Why it is skipped; for an extra, its suffix."""


def index_tar(source: Path | int, skipped: list[Skipped] | None = None) -> list[RecordEntry]:
    """All records of a shard in file order; a last one with `damage` if the shard is damaged.

    `source` is a path or the descriptor of an open file, which stays open. Members that belong to
    no record are added to `skipped`.

    **Raises**: `OSError` if the file cannot be read.
    """
    skipped = [] if skipped is None else skipped
    if isinstance(source, int):
        return _index(source, skipped)
    with source.open("rb") as file:
        return _index(file.fileno(), skipped)


def _index(descriptor: int, skipped: list[Skipped]) -> list[RecordEntry]:
    entries: dict[str, RecordEntry] = {}
    files: dict[str, tuple[int, int]] = {}
    dotted: dict[str, list[str]] = {}  # members of each key with dots
    others: list[str] = []
    damage = None
    try:
        for member in read_members(descriptor):
            name = member.name
            place = (member.offset, member.size) if member.kind == FILE else None
            if member.kind == FOLDER:
                continue
            if member.kind == HARD_LINK:
                place = files.get(member.target.removeprefix("./"))
            if place is None or len(name) > _MAX_NAME:
                skipped.append(Skipped(name[:_MAX_NAME], "member", _why(member.kind, place)))
                continue
            files[name.removeprefix("./")] = place
            key, part = _key_and_part(name)
            if part is None:
                others.append(name)
                continue
            if "." in key.rpartition("/")[2]:
                dotted.setdefault(key, []).append(name)
            entry = entries.setdefault(key, RecordEntry(key))
            if getattr(entry, part) is not None:
                skipped.append(Skipped(name, "duplicate", "a later member has the same key"))
            setattr(entry, part, place)
    except TarError as error:
        damage = str(error)
    for key in [key for key in dotted if not _is_record(entries[key], entries)]:
        detail = _why_not_dotted(key, entries)
        skipped.extend(Skipped(name, "member", detail) for name in dotted[key])
        del entries[key]
    skipped.extend(_other(name, entries) for name in others)
    found = list(entries.values())
    if damage is not None:
        found.append(RecordEntry("", damage=damage))
    return found


def _key_and_part(name: str) -> tuple[str, str | None]:
    """The key of a member, and which file of the record it is; None if it is none of them."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    part = _PARTS.get(suffix.lower())
    if stem and part is None:
        ends = (end for end in ("ref.npy", "npy", "json") if file.lower().endswith(f".{end}"))
        if (suffix := next(ends, "")) and len(file) > len(suffix) + 1:
            stem, part = file[: -len(suffix) - 1], _PARTS[suffix]
    return f"{folder}{slash}{stem}", part if stem else None


def _first_key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _is_record(entry: RecordEntry, entries: dict[str, RecordEntry]) -> bool:
    """Whether a key with dots is a record: `k.mean.npy` next to `k.npy` belongs to k."""
    complete = entry.latents is not None and entry.json is not None
    return complete and _first_key(entry.key) not in entries


def _why(kind: str, place: tuple[int, int] | None) -> str:
    if place is not None:
        return f"its name is longer than {_MAX_NAME} characters"
    if kind == HARD_LINK:
        return "a hard link to no earlier member"
    return f"a {kind}; expected a file (tar --dereference stores what links point to)"


def _why_not_dotted(key: str, entries: dict[str, RecordEntry]) -> str:
    if (first := _first_key(key)) in entries:
        return f"{first} is a key as well, so {key} may belong to it; expected keys without dots"
    return f"its key has a dot; expected both {key}.npy and {key}.json, or keys without dots"


def _other(name: str, entries: dict[str, RecordEntry]) -> Skipped:
    folder, slash, file = name.rpartition("/")
    if file.startswith("._"):  # metadata of macOS
        return Skipped(name, "extra", "._*")
    stem, _, suffix = file.rpartition(".")
    if _first_key(name) in entries or f"{folder}{slash}{stem}" in entries:
        return Skipped(name, "extra", f".{suffix}")
    return Skipped(name, "member", "expected KEY.npy, KEY.ref.npy or KEY.json")
