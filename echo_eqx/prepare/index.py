"""The index of the shards in a folder, `index-I-of-N.json`: one file for each part of the work.

A shard that the index of its part lists is complete. Any other shard is made again, with the same
bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError, printable
from echo_eqx.files import write_whole

FORMAT = "echo_eqx"


class PartIndex:
    """The index of one part: its complete shards, and the settings they were made with.

    **Raises**: `EchoError` if the folder was prepared with other settings.
    """

    def __init__(
        self, folder: Path, part: int, parts: int, codec: dict[str, Any], settings: dict[str, Any]
    ):
        self.part, self.parts, self.codec = part, parts, codec
        self.path = folder / f"index-{part:03d}-of-{parts:03d}.json"
        self._head = {"format": FORMAT, "kind": "shards", "codec": codec, "settings": settings}
        self.shards: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, list[dict[str, str]]] = {}
        self.cuts: dict[str, Any] = {}
        indexes = sorted(folder.glob("index-*-of-*.json"))
        if not indexes and not list(folder.glob("clips-*.json")):
            for path in sorted(folder.glob(f"{'[0-9]' * 6}.tar")):
                raise EchoError(
                    f"{path} would be replaced, but no index lists it, so this command may not "
                    "have made it; give another --output"
                )
        for path in indexes:
            found = _read(path)
            for name in ("codec", "settings"):
                if found.get(name) != self._head[name]:
                    difference = _difference(found.get(name), self._head[name])
                    raise EchoError(
                        f"{path}: expected the same {name} as before, but {difference}; give the "
                        "same, or another --output"
                    )
            if path == self.path:
                self.shards, self.skipped = found["shards"], found.get("skipped", {})

    def is_done(self, shard: Path) -> bool:
        listed = self.shards.get(shard.name)
        return listed is not None and (shard.is_file() or not listed["samples"])

    def add(self, shard: Path, summary: dict[str, Any], skipped: list[dict[str, str]]) -> None:
        self.shards[shard.name] = summary
        self.skipped[shard.name] = skipped
        self.save()

    def save(self) -> None:
        content = {"shards": self.shards, "skipped": self.skipped, "cuts": self.cuts}
        write_json(self.path, {**self._head, **content})


def write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"))


def parse_index(data: bytes, counts: Sequence[str] = ()) -> dict[str, Any] | None:
    """The content of an index; None if it is JSON of another kind.

    For each shard, `sha256` and the `counts` (such as `samples`) are checked.

    **Raises**: `ValueError` with the reason if it is damaged.
    """
    try:
        index = json.loads(data)
        if (index["format"], index["kind"]) != (FORMAT, "shards"):
            return None
        for name, listed in index["shards"].items():
            are_counts = all(type(listed[x]) is int and 0 <= listed[x] < 2**53 for x in counts)
            if not are_counts or not isinstance(listed["sha256"], str):
                raise ValueError(f"{name[:50]!r} is not described as a shard")
        for name, items in index.get("skipped", {}).items():
            for item in items:
                if not all(isinstance(item[key], str) for key in ("kind", "name", "detail")):
                    raise ValueError(f"{name[:50]!r} has a skipped input that is not text")
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__})") from None
    return index


def _read(path: Path) -> dict[str, Any]:
    try:
        found = parse_index(path.read_bytes(), ("samples", "frames", "with_reference"))
        if found is None:
            raise ValueError("it is of another kind")
        return found
    except (OSError, ValueError) as error:
        raise EchoError(
            f"{path}: expected an index of shards, got another file ({str(error)[:200]}); move it "
            "away, or give another --output"
        ) from None


def _difference(there: Any, here: dict[str, Any]) -> str:
    for name in sorted({*there, *here}) if isinstance(there, dict) else ():
        if there.get(name) != here.get(name):
            ours, theirs = str(here.get(name))[:100], str(there.get(name))[:100]
            return printable(f"{name[:50]} was {theirs}, is {ours} now")
    return "they differ"
