"""Assign clips to shards, and to each sample the clips that are its reference.

A sample's reference is made of other recordings of its speaker. To encode each recording only once,
without communication between machines, a speaker's recordings are assigned to shards in clusters,
and references come from the same cluster.

Clips can be added later: each run that finds new clips first writes them to `clips-N.json`. Shards
are assigned from each of these lists alone, so existing shards never change.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.errors import EchoError
from echo_eqx.prepare.clips import Clip
from echo_eqx.prepare.index import FORMAT, write_json
from echo_eqx.prepare.parquet import ParquetRow
from echo_eqx.prepare.records import AudioLocation

CLUSTER = 8
"""Approximate number of a speaker's recordings that are assigned together."""


@dataclass(frozen=True)
class ShardEntry:
    """A clip in its shard, and the indices of the shard's clips that make up its reference."""

    clip: Clip
    reference_indices: tuple[int, ...]


def assign(clips: Sequence[Clip], *, seed: int, per_shard: int) -> list[list[ShardEntry]]:
    """All clips in shards of about `per_shard`, the same on every machine.

    Clips without a speaker stay together with the others from the same recording.
    """
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: clip.key):
        source = clip.metadata["source"]
        groups[f"speaker {clip.speaker}" if clip.speaker else f"recording {source}"].append(clip)
    clusters: list[list[Clip]] = []
    for name, members in sorted(groups.items()):
        # Nearly equal clusters; no clip is alone unless its speaker has no other.
        count, order = max(1, len(members) // CLUSTER), _shuffled(members, seed, name)
        clusters += [order[start::count] for start in range(count)]
    shards: list[list[list[Clip]]] = [[]]
    for cluster in _shuffled(clusters, seed, "clusters"):
        if sum(map(len, shards[-1])) >= per_shard:
            shards.append([])
        shards[-1].append(cluster)
    return [_entries(shard, seed) for shard in shards if shard]


def _entries(clusters: list[list[Clip]], seed: int) -> list[ShardEntry]:
    clips = [clip for cluster in clusters for clip in cluster]
    order = _shuffled(clips, seed, "order")
    indices = {clip.key: index for index, clip in enumerate(order)}
    cluster_of = {clip.key: cluster for cluster in clusters for clip in cluster}
    entries = []
    for clip in order:
        others = [other for other in cluster_of[clip.key] if other.key != clip.key]
        others = _shuffled(others, seed, clip.key)
        entries.append(ShardEntry(clip, tuple(indices[other.key] for other in others)))
    return entries


def _shuffled(items: Sequence, seed: int, name: str) -> list:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    raw = np.random.Philox(np.random.SeedSequence(list(digest[:16]))).random_raw(len(items))
    return [items[i] for i in np.argsort(raw, kind="stable")]


# --- Additions ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListedClip:
    """A clip as an earlier run listed it."""

    key: str
    speaker: str | None
    source: str
    """Name of its recording."""
    digest: str
    """Hash of its text, times and other fields, and of its audio."""

    @classmethod
    def of(cls, clip: Clip) -> "ListedClip":
        fields = [clip.text, clip.start, clip.stop, round(clip.seconds, 3), clip.language]
        fields += [_fingerprint(clip.audio), clip.metadata]
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        return cls(clip.key, clip.speaker, clip.metadata["source"], digest[:16])

    def placeholder(self) -> Clip:
        """Takes the place of a missing clip, so that the others keep theirs."""
        metadata = {"source": self.source}
        return Clip(self.key, "", Path(), 0.0, None, 0.0, self.speaker, None, metadata)


@dataclass(frozen=True)
class ShardPlan:
    """All shards of a folder, in numerical order."""

    shards: list[list[ShardEntry]]
    added: int
    """Clips that no earlier run listed; 0 in the first run."""
    missing: frozenset[str]
    """Keys of listed clips that are gone, or whose speaker has changed."""
    changed: frozenset[str]
    """Keys of listed clips that have changed since they were listed."""


def plan_shards(folder: Path, clips: Sequence[Clip], *, seed: int, per_shard: int) -> ShardPlan:
    """The shards of `folder`: first the shards of earlier runs, then shards of new clips.

    **Raises**: `EchoError` if the list of an earlier run cannot be read, and `OSError`.
    """
    by_key = {clip.key: clip for clip in clips}
    here = {key: ListedClip.of(clip) for key, clip in sorted(by_key.items())}
    runs = _read_lists(folder)
    listed = {item.key: item for run in runs for item in run}
    new = [item for key, item in here.items() if key not in listed]
    if new:
        path = folder / f"clips-{len(runs):03d}.json"
        rows = [list(vars(item).values()) for item in new]
        write_json(path, {"format": FORMAT, "kind": "clips", "clips": rows})
        runs.append(_read_list(path))
    missing = frozenset(
        key for key, item in listed.items() if key not in here or here[key].speaker != item.speaker
    )
    changed = frozenset(
        key for key, item in listed.items() if key not in missing and here[key] != item
    )
    shards = []
    for run in runs:
        members = [x.placeholder() if x.key in missing else by_key[x.key] for x in run]
        shards += assign(members, seed=seed, per_shard=per_shard)
    return ShardPlan(shards, len(new) if listed else 0, missing, changed)


def listed_sources(folder: Path) -> set[str]:
    """Names of the recordings that earlier runs listed for `folder`."""
    return {item.source for run in _read_lists(folder) for item in run}


def _fingerprint(audio: AudioLocation) -> str | None:
    """Hash of the size and of 16 evenly spaced blocks of 4 KiB.

    It reveals a recording that was replaced by another of the same size, and unlike the time of
    modification it survives copying. Rows of Parquet have none: reading one is slow.
    """
    if isinstance(audio, ParquetRow):
        return None
    with audio.open("rb") if isinstance(audio, Path) else audio.open() as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256(str(size).encode())
        for number in range(16):
            file.seek(number * max(0, size - 4096) // 15)
            digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def _read_lists(folder: Path) -> list[list[ListedClip]]:
    paths = sorted(folder.glob("clips-[0-9][0-9][0-9].json"))
    expected = [f"clips-{number:03d}.json" for number in range(len(paths))]
    if [path.name for path in paths] != expected:
        gap = sorted(set(expected) - {path.name for path in paths})[0]
        raise EchoError(f"{folder / gap}: expected the clips of an earlier run, got no file")
    return [_read_list(path) for path in paths]


def _read_list(path: Path) -> list[ListedClip]:
    try:
        rows: Any = json.loads(path.read_bytes())["clips"]
        if not all(x is None or isinstance(x, str) for row in rows for x in row):
            raise ValueError("a value that is not a string")
        return [ListedClip(*row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EchoError(f"{path}: expected the clips of an earlier run, got {error}") from None
