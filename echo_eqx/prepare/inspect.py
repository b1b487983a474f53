"""What a set of shards contains, and what in them is broken.

Every record is read once. Only the key and three lengths per record, and descriptions of what is
broken, are kept in memory.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from echo_eqx.config import DiTConfig
from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.pace import frames_per_byte
from echo_eqx.data.records import BrokenRecord, Sample, latent_width, load_silence, read_sample
from echo_eqx.data.shards import FRAME_RATE, ShardIndex
from echo_eqx.data.tar_index import RecordEntry, Skipped, index_tar
from echo_eqx.errors import EchoError
from echo_eqx.prepare.sidecars import (
    Broken,
    find_frame_rate,
    folder_of,
    list_sidecars,
    open_shard,
    read_indexes,
    sha256,
)

DEFAULT_WIDTH = 128
"""Channels to expect if no record says how many there are."""


@dataclass
class Report:
    """Counts over the usable records of `source`, without the `broken` ones."""

    source: str
    revision: str | None
    shards: int
    frames: Int[np.ndarray, " samples"] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Length of each sample in latent frames."""
    text_bytes: Int[np.ndarray, " samples"] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Length of each text in bytes of UTF-8."""
    speaker_frames: Int[np.ndarray, " samples"] = field(
        default_factory=lambda: np.zeros(0, np.int32)
    )
    """Length of each reference in latent frames; 0 if there is none."""
    extras: dict[str, int] = field(default_factory=dict)
    """Further members of records, which training does not read, by suffix."""
    frame_rate: float = FRAME_RATE
    """Latent frames per second."""
    has_frame_rate: bool = False
    """Whether a codec.json gives the frame rate; otherwise it is that of the published codec."""
    speakers: int = 0
    """Different speakers."""
    with_speaker: int = 0
    """Samples that name a speaker."""
    languages: dict[str, int] = field(default_factory=dict)
    """Samples per language, the most frequent first."""
    mean: Float[np.ndarray, " c"] = field(default_factory=lambda: np.zeros(0))
    """Mean of each latent channel over all frames; empty if there are no samples."""
    std: Float[np.ndarray, " c"] = field(default_factory=lambda: np.zeros(0))
    silence: str | None = None
    """Name of the silence file next to the shards."""
    indexes: tuple[str, ...] = ()
    """Names of the files that list checksums."""
    compared: int = 0
    """Shards whose checksum was compared with an index."""
    unseen: str | None = None
    """Why the files next to the shards could not be listed."""
    broken: tuple[Broken, ...] = ()

    @property
    def samples(self) -> int:
        return len(self.frames)

    @property
    def references(self) -> int:
        """Samples with a reference."""
        return int(np.count_nonzero(self.speaker_frames))

    @property
    def hours(self) -> float:
        return float(self.frames.sum(dtype=np.int64)) / self.frame_rate / 3600

    @property
    def frames_per_byte(self) -> float | None:
        """See `echo_eqx.data.pace`."""
        return frames_per_byte(self.frames, self.text_bytes)

    @property
    def kinds(self) -> dict[str, int]:
        """Number of broken records by kind."""
        return dict(Counter(broken.kind for broken in self.broken).most_common())

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation of all latent values."""
        mean = float(self.mean.mean())
        return mean, float(np.sqrt(np.mean(self.std**2 + (self.mean - mean) ** 2)))

    def fit(self, config: DiTConfig) -> dict[str, int]:
        """How many samples fit a model untruncated, and how much training cuts off the others."""
        longer = self.frames > config.max_frames
        longer_texts = self.text_bytes >= config.max_text_bytes  # one byte goes in front
        return {
            "fitting": int((~longer & ~longer_texts).sum()),
            "longer_recordings": int(longer.sum()),
            "frames_cut": int((self.frames[longer] - config.max_frames).sum()),
            "longer_texts": int(longer_texts.sum()),
            "longer_references": int((self.speaker_frames > config.max_speaker_frames).sum()),
        }


def inspect_shards(
    shard_index: ShardIndex,
    cache: ShardCache,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every record.

    `progress` gets the number of shards done and the total. The expected latent width is the most
    frequent one of the first shard that has records; records of another width are broken.

    **Raises**: `EchoError` if a shard cannot be fetched or read.
    """
    report = Report(shard_index.source, shard_index.revision, len(shard_index.shards))
    broken: list[Broken] = []
    sidecars, report.unseen = list_sidecars(shard_index)
    sums, indexed, report.indexes = read_indexes(sidecars, cache, broken)
    rate = find_frame_rate(sidecars, cache, broken)
    report.frame_rate, report.has_frame_rate = rate or FRAME_RATE, rate is not None
    lengths = array("i")
    seen: dict[str, int] = {}
    speakers: Counter[str | None] = Counter()
    languages: Counter[str | None] = Counter()
    extras: Counter[str] = Counter()
    width: int | None = None
    # Sums are of differences from the first sample's mean; otherwise they would lose precision.
    shift, sums_of_powers = np.zeros(0), np.zeros((2, 0))
    for number, shard in enumerate(shard_index.shards):
        if number + 1 < len(shard_index.shards):
            cache.request(shard_index.shards[number + 1])
        with open_shard(cache, shard) as descriptor:
            if shard.name in sums:
                report.compared += 1
                digest = sha256(descriptor)
                if digest != sums[shard.name]:
                    detail = f"the index lists {sums[shard.name]}, got {digest}"
                    broken.append(Broken(shard.name, "", "sha256", detail))
            elif folder_of(shard.name) in indexed:
                broken.append(Broken(shard.name, "", "unlisted", "not in the index next to it"))
            skipped: list[Skipped] = []
            entries = index_tar(descriptor, skipped)
            for member in skipped:
                if member.kind == "extra":
                    extras[member.detail] += 1
                else:
                    broken.append(Broken(shard.name, member.name, member.kind, member.detail))
            width = width or _usual_width(descriptor, entries)
            for entry in entries:
                try:
                    if entry.damage is None:
                        first = seen.setdefault(entry.key, number)
                        if first != number:
                            name = shard_index.shards[first].name
                            raise BrokenRecord("duplicate", f"{name} has it too")
                    sample = read_sample(descriptor, entry, width or DEFAULT_WIDTH)
                except BrokenRecord as error:
                    broken.append(Broken(shard.name, entry.key, error.kind, error.detail))
                    continue
                latents = sample.latents.astype(np.float64)
                if not lengths:
                    shift = latents.mean(axis=0)
                    sums_of_powers = np.zeros((2, len(shift)))
                latents -= shift[None]
                sums_of_powers += latents.sum(axis=0), np.einsum("tc,tc->c", latents, latents)
                num_reference = 0 if sample.reference is None else len(sample.reference)
                lengths.extend((len(latents), len(sample.text.encode()), num_reference))
                speaker, language = _labels(descriptor, entry)
                speakers[speaker] += 1
                languages[language] += 1
        if progress is not None:
            progress(number + 1, len(shard_index.shards))
    # A glob or a single file picks some of a folder's shards; otherwise all must exist.
    if shard_index.shards[0].path is None or Path(shard_index.source).expanduser().is_dir():
        for name in sorted(set(sums) - {shard.name for shard in shard_index.shards}):
            broken.append(Broken(name, "", "missing", "an index lists it, but it does not exist"))
    report.frames, report.text_bytes, report.speaker_frames = (
        np.array(lengths, np.int32).reshape(-1, 3).T
    )
    if lengths:
        mean, square = sums_of_powers / report.frames.sum(dtype=np.int64)
        report.mean, report.std = shift + mean, np.sqrt(np.maximum(square - mean**2, 0))
    by_name = {file.name: file for file in sidecars}
    silence = by_name.get("silence.safetensors") or by_name.get("silence.npy")
    report.silence = silence and silence.name
    if silence is not None and silence.path is not None and lengths:
        try:
            load_silence(silence.path, len(report.mean))
        except EchoError as error:
            broken.append(Broken(silence.name, "", "silence", str(error)))
    report.with_speaker = report.samples - speakers.pop(None, 0)
    report.speakers, report.broken = len(speakers), tuple(broken)
    report.extras = dict(extras.most_common())
    report.languages = {name: count for name, count in languages.most_common() if name is not None}
    return report


def find_sample(shard_index: ShardIndex, cache: ShardCache, key: str) -> Sample:
    """The first record with this key, of any width.

    **Raises**: `EchoError` if there is none, or it is broken.
    """
    example = None
    for shard in shard_index.shards:
        with open_shard(cache, shard) as descriptor:
            for entry in index_tar(descriptor):
                if entry.damage is not None:
                    continue
                example = example or entry.key
                if entry.key != key:
                    continue
                try:
                    width = latent_width(descriptor, entry)
                    return read_sample(descriptor, entry, width or DEFAULT_WIDTH)
                except BrokenRecord as error:
                    raise EchoError(f"{key!r} of {shard.name} is broken ({error})") from None
    expected = "" if example is None else f"; expected a key such as {example!r}"
    raise EchoError(f"{shard_index.source} has no record {key!r}{expected}")


def _usual_width(descriptor: int, entries: list[RecordEntry]) -> int | None:
    widths = Counter(filter(None, (latent_width(descriptor, entry) for entry in entries)))
    return widths.most_common(1)[0][0] if widths else None


def _labels(descriptor: int, entry: RecordEntry) -> tuple[str | None, ...]:
    """Speaker and language of a record that has been read without an error."""
    assert entry.json is not None
    offset, size = entry.json
    fields = json.loads(os.pread(descriptor, size, offset))
    labels = map(fields.get, ("speaker", "language"))
    return tuple(str(x) if isinstance(x, str | int) and x != "" else None for x in labels)
