"""Which recordings go into which shard, and which of them show each other's voice.

A sample's reference is made of other recordings of its speaker. So that each recording is encoded
once, and machines need not talk, a speaker's recordings are dealt to shards in clusters, and
references are taken from the cluster.
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echo_eqx.prepare.clips import Clip

CLUSTER = 8
"""Recordings of a speaker that stay together, about."""


@dataclass(frozen=True)
class ShardEntry:
    """A clip in its shard, and the places in the shard of those that show its voice, in order."""

    clip: Clip
    reference_indices: tuple[int, ...]


def assign(clips: Sequence[Clip], *, seed: int, per_shard: int) -> list[list[ShardEntry]]:
    """All clips in shards of about `per_shard`, the same on every machine.

    Clips without a speaker keep together with others cut from the same recording.
    """
    groups: dict[str, list[Clip]] = defaultdict(list)
    for clip in sorted(clips, key=lambda clip: clip.key):
        groups[_voice(clip)].append(clip)
    clusters = [
        cluster
        for voice, members in sorted(groups.items())
        for cluster in _split(_shuffled(members, seed, voice))
    ]
    shards: list[list[list[Clip]]] = [[]]
    for cluster in _shuffled(clusters, seed, "clusters"):
        if sum(map(len, shards[-1])) >= per_shard:
            shards.append([])
        shards[-1].append(cluster)
    return [_arranged(shard, seed) for shard in shards if shard]


def _voice(clip: Clip) -> str:
    return f"speaker {clip.speaker}" if clip.speaker else f"recording {clip.metadata['source']}"


def _split(members: list[Clip]) -> list[list[Clip]]:
    """Nearly equal clusters; none is left with a single clip that could have had company."""
    count = max(1, len(members) // CLUSTER)
    return [members[start::count] for start in range(count)]


def _arranged(clusters: list[list[Clip]], seed: int) -> list[ShardEntry]:
    clips = [clip for cluster in clusters for clip in cluster]
    order = _shuffled(clips, seed, "order")
    places = {clip.key: place for place, clip in enumerate(order)}
    company = {clip.key: cluster for cluster in clusters for clip in cluster}
    dealt = []
    for clip in order:
        others = [other for other in company[clip.key] if other.key != clip.key]
        others = _shuffled(others, seed, clip.key)
        dealt.append(ShardEntry(clip, tuple(places[other.key] for other in others)))
    return dealt


def _shuffled(items: Sequence, seed: int, name: str) -> list:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    raw = np.random.Philox(np.random.SeedSequence(list(digest[:16]))).random_raw(len(items))
    return [items[i] for i in np.argsort(raw, kind="stable")]
