"""Which clips a folder of shards is made of, so that later runs can add to it.

Each run that finds new clips writes `clips-N.json` with them, before it makes their shards. Shards
are dealt from those lists alone: they stay the same whatever is added or taken away later.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole
from echo_eqx.prepare.assign import ShardEntry, assign
from echo_eqx.prepare.clips import Clip
from echo_eqx.prepare.records import FileRange


@dataclass(frozen=True)
class _Known:
    """A clip as an earlier run listed it."""

    key: str
    speaker: str | None
    source: str
    """The recording it is from."""
    facts: str
    """Digest of its text, times and size."""


@dataclass(frozen=True)
class Plan:
    """All shards of a folder, in the order of their numbers."""

    shards: list[list[ShardEntry]]
    added: int
    """Clips that no earlier run listed; 0 in the first run."""
    vanished: frozenset[str]
    """Keys of clips that earlier runs listed and that are gone, or are of another speaker now."""
    changed: frozenset[str]
    """Keys of clips that are not what they were."""


def known_sources(folder: Path) -> set[str]:
    """The recordings that earlier runs put into `folder`."""
    return {known.source for earlier in _read_all(folder) for known in earlier}


def plan_shards(folder: Path, clips: Sequence[Clip], *, seed: int, per_shard: int) -> Plan:
    """The shards of `folder`: those of earlier runs first, then those of new clips.

    **Raises**: `EchoError` if a list of an earlier run cannot be read, and `OSError`.
    """
    here = {clip.key: clip for clip in clips}
    runs = _read_all(folder)
    listed = {known.key: known for run in runs for known in run}
    new = [_known(clip) for key, clip in sorted(here.items()) if key not in listed]
    if new:
        path = folder / f"clips-{len(runs):03d}.json"
        _write(path, new)
        runs.append(_read(path))
    vanished, changed = set(), set()
    for key, known in listed.items():
        clip = here.get(key)
        if clip is None or _known(clip).speaker != known.speaker:
            vanished.add(key)
        elif _known(clip) != known:
            changed.add(key)
    shards = []
    for run in runs:
        dealt = [here[k.key] if _is_there(k, here) else _placeholder(k) for k in run]
        shards += assign(dealt, seed=seed, per_shard=per_shard)
    return Plan(shards, len(new) if listed else 0, frozenset(vanished), frozenset(changed))


def _is_there(known: _Known, here: dict[str, Clip]) -> bool:
    clip = here.get(known.key)
    return clip is not None and _known(clip).speaker == known.speaker


def _placeholder(known: _Known) -> Clip:
    """Keeps the place of a clip that is gone, so that others stay in theirs."""
    metadata = {"source": known.source}
    return Clip(known.key, "", Path(), 0.0, None, 0.0, known.speaker, None, metadata)


def _known(clip: Clip) -> _Known:
    size = None
    if isinstance(clip.audio, FileRange):
        size = clip.audio.size
    elif isinstance(clip.audio, Path):
        size = clip.audio.stat().st_size
    facts = [clip.text, clip.start, clip.stop, round(clip.seconds, 3), clip.language, size]
    digest = hashlib.sha256(json.dumps([*facts, clip.metadata], sort_keys=True).encode())
    return _Known(clip.key, clip.speaker, clip.metadata["source"], digest.hexdigest()[:16])


def _write(path: Path, clips: list[_Known]) -> None:
    rows = (json.dumps(list(vars(clip).values()), ensure_ascii=False) for clip in clips)
    text = '{"format": "echo_eqx", "kind": "clips", "clips": [\n' + ",\n".join(rows) + "\n]}\n"
    data = text.encode("utf-8", "surrogateescape")
    write_whole(path, lambda temporary: temporary.write_bytes(data))


def _read_all(folder: Path) -> list[list[_Known]]:
    paths = sorted(folder.glob("clips-[0-9][0-9][0-9].json"))
    expected = [f"clips-{number:03d}.json" for number in range(len(paths))]
    if [path.name for path in paths] != expected:
        missing = sorted(set(expected) - {path.name for path in paths})[0]
        raise EchoError(f"{folder / missing}: expected the clips of an earlier run, got no file")
    return [_read(path) for path in paths]


def _read(path: Path) -> list[_Known]:
    try:
        content: Any = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
        return [_Known(*map(_checked, row)) for row in content["clips"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EchoError(f"{path}: expected the clips of an earlier run, got {error}") from None


def _checked(value: Any) -> Any:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} instead of a string")
    return value
