"""What a set of shards holds, and what of it is broken.

Every record is read once. In memory stay the key and two lengths of each, and all that is broken.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.records import (
    BrokenRecord,
    Sample,
    latent_width,
    load_silence,
    read_sample,
)
from echo_eqx.data.shards import FRAME_RATE, ShardIndex
from echo_eqx.data.tar_index import RecordEntry, Skipped, index_tar
from echo_eqx.data.text import encode_text
from echo_eqx.errors import EchoError
from echo_eqx.prepare.sidecars import (
    Broken,
    find_frame_rate,
    first_silence,
    folder_of,
    is_complete,
    list_sidecars,
    opened,
    read_indexes,
    sha256,
)

USUAL_WIDTH = 128
"""Channels that are wanted where no record says how many there are."""


@dataclass(frozen=True)
class Report:
    """Counts over the records of `source` that can be trained on; `broken` are not among them."""

    source: str
    revision: str | None
    shards: int
    frames: Int[np.ndarray, " samples"]
    """Length of each sample in latent frames."""
    text_bytes: Int[np.ndarray, " samples"]
    """Length of each text in bytes of UTF-8."""
    fitting: int
    """Samples that fit the window with sound and text."""
    longer_recordings: int
    """Samples with more frames than the window, whose audio training cuts."""
    frames_cut: int
    """Frames of theirs that are outside the window."""
    longer_texts: int
    """Samples with more bytes of text than the window, whose text training cuts."""
    references: int
    """Samples with a reference."""
    longer_references: int
    """Samples with a reference longer than what training takes at a time."""
    extras: dict[str, int]
    """Further members of records, which training does not read, by suffix."""
    frame_rate: float
    """Latent frames a second, by codec.json beside the shards."""
    has_frame_rate: bool
    """Whether there is such a file; without one the rate is the usual one."""
    speakers: int
    """Different speakers."""
    with_speaker: int
    """Samples that name one."""
    languages: dict[str, int]
    """Samples of each language, the most frequent first."""
    mean: Float[np.ndarray, " c"]
    """Of each channel of the latents, over all frames; no channels where there is no sample."""
    deviation: Float[np.ndarray, " c"]
    """Standard deviation of each channel."""
    silence: str | None
    """Name of the file of silence beside the shards."""
    indexes: tuple[str, ...]
    """Names of the files that list checksums."""
    compared: int
    """Shards whose checksum was compared with an index."""
    unseen: str | None
    """Why the files beside the shards could not be looked at."""
    broken: tuple[Broken, ...]

    @property
    def samples(self) -> int:
        return len(self.frames)

    @property
    def hours(self) -> float:
        return float(self.frames.sum(dtype=np.int64)) / self.frame_rate / 3600

    @property
    def kinds(self) -> dict[str, int]:
        """How many are broken, by kind."""
        return dict(Counter(broken.kind for broken in self.broken).most_common())

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation of all values of the latents."""
        mean = float(self.mean.mean())
        return mean, float(np.sqrt(np.mean(self.deviation**2 + (self.mean - mean) ** 2)))


class Moments:
    """Mean and variance of each channel, merged sample by sample in float64 (Chan et al., 1979)."""

    def __init__(self, num_channels: int):
        self.count = 0
        self.mean = np.zeros(num_channels)
        self._squares = np.zeros(num_channels)

    def add(self, latents: Float[np.ndarray, "t c"]) -> None:
        values = latents.astype(np.float64)
        mean = values.mean(axis=0)
        values -= mean[None]
        delta, total = mean - self.mean, self.count + len(values)
        self._squares += np.einsum("tc,tc->c", values, values)
        self._squares += delta**2 * (self.count * len(values) / total)
        self.mean += delta * (len(values) / total)
        self.count = total

    @property
    def deviation(self) -> Float[np.ndarray, " c"]:
        return np.sqrt(self._squares / self.count)


def inspect_shards(
    shard_index: ShardIndex,
    cache: ShardCache,
    *,
    max_frames: int = 768,
    max_text_bytes: int = 768,
    max_speaker_frames: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every record. The window is `max_frames` latent frames and `max_text_bytes` of text with
    its leading byte, and `max_speaker_frames` of reference; `progress` is called with shards done
    and in all.

    The latents' width is the usual one of the first shard that has any; records of another are
    broken.

    **Raises**: `EchoError` if a shard cannot be had or read.
    """
    broken: list[Broken] = []
    sidecars, unseen = list_sidecars(shard_index)
    sums, indexed, indexes = read_indexes(sidecars, cache, broken)
    silence = first_silence(sidecars)
    rate = find_frame_rate(sidecars, cache, broken)
    frames, text_bytes = array("i"), array("i")
    seen: dict[str, int] = {}
    speakers: set[str] = set()
    languages: Counter[str] = Counter()
    width: int | None = None
    moments: Moments | None = None
    extras: Counter[str] = Counter()
    fitting = references = with_speaker = compared = 0
    longer_recordings = frames_cut = longer_texts = longer_references = 0
    for number, shard in enumerate(shard_index.shards):
        if number + 1 < len(shard_index.shards):
            cache.request(shard_index.shards[number + 1])
        with opened(cache, shard) as descriptor:
            if shard.name in sums:
                compared += 1
                digest = sha256(descriptor)
                if digest != sums[shard.name]:
                    detail = f"{digest}; the index has {sums[shard.name]}"
                    broken.append(Broken(shard.name, "", "sha256", detail))
            elif folder_of(shard.name) in indexed:
                broken.append(Broken(shard.name, "", "unlisted", "no index beside it has it"))
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
                    sample = read_sample(descriptor, entry, width or USUAL_WIDTH)
                except BrokenRecord as error:
                    broken.append(Broken(shard.name, entry.key, error.kind, error.detail))
                    continue
                moments = moments or Moments(sample.latents.shape[1])
                moments.add(sample.latents)
                num_text = len(encode_text(sample.text))
                frames.append(len(sample.latents))
                text_bytes.append(num_text - 1)
                fitting += len(sample.latents) <= max_frames and num_text <= max_text_bytes
                longer_recordings += len(sample.latents) > max_frames
                frames_cut += max(0, len(sample.latents) - max_frames)
                longer_texts += num_text > max_text_bytes
                num_reference = 0 if sample.reference is None else len(sample.reference)
                references += num_reference > 0
                longer_references += num_reference > max_speaker_frames
                speaker, language = _labels(descriptor, entry)
                if speaker is not None:
                    speakers.add(speaker)
                    with_speaker += 1
                if language is not None:
                    languages[language] += 1
        if progress is not None:
            progress(number + 1, len(shard_index.shards))
    if is_complete(shard_index):
        there = {shard.name for shard in shard_index.shards}
        for name in sorted(set(sums) - there):
            broken.append(Broken(name, "", "missing", "an index lists it, but it does not exist"))
    if silence is not None and silence.path is not None and moments is not None:
        try:
            load_silence(silence.path, len(moments.mean))
        except EchoError as error:
            broken.append(Broken(silence.name, "", "silence", str(error)))
    return Report(
        source=shard_index.source,
        revision=shard_index.revision,
        shards=len(shard_index.shards),
        frames=np.array(frames, np.int32),
        text_bytes=np.array(text_bytes, np.int32),
        fitting=fitting,
        longer_recordings=longer_recordings,
        frames_cut=frames_cut,
        longer_texts=longer_texts,
        references=references,
        longer_references=longer_references,
        extras=dict(extras.most_common()),
        frame_rate=rate or FRAME_RATE,
        has_frame_rate=rate is not None,
        speakers=len(speakers),
        with_speaker=with_speaker,
        languages=dict(languages.most_common()),
        mean=np.zeros(0) if moments is None else moments.mean,
        deviation=np.zeros(0) if moments is None else moments.deviation,
        silence=None if silence is None else silence.name,
        indexes=indexes,
        compared=compared,
        unseen=unseen,
        broken=tuple(broken),
    )


def find_sample(shard_index: ShardIndex, cache: ShardCache, key: str) -> Sample:
    """The first record `key`, of any width.

    **Raises**: `EchoError` if there is none, or it is broken.
    """
    example = None
    for shard in shard_index.shards:
        with opened(cache, shard) as descriptor:
            for entry in index_tar(descriptor):
                if entry.damage is not None:
                    continue
                example = example or entry.key
                if entry.key != key:
                    continue
                try:
                    width = latent_width(descriptor, entry)
                    return read_sample(descriptor, entry, width or USUAL_WIDTH)
                except BrokenRecord as error:
                    raise EchoError(f"{key!r} of {shard.name} is broken ({error})") from None
    wanted = "" if example is None else f"; wanted a key such as {example!r}"
    raise EchoError(f"{shard_index.source} has no record {key!r}{wanted}")


def _usual_width(descriptor: int, entries: list[RecordEntry]) -> int | None:
    widths = Counter(filter(None, (latent_width(descriptor, entry) for entry in entries)))
    return widths.most_common(1)[0][0] if widths else None


def _labels(descriptor: int, entry: RecordEntry) -> tuple[str | None, str | None]:
    """Speaker and language of a record that has been read without an error."""
    assert entry.json is not None
    offset, size = entry.json
    fields = json.loads(os.pread(descriptor, size, offset))
    labels = (fields.get("speaker"), fields.get("language"))
    speaker, language = (
        str(label) if isinstance(label, str | int) and label != "" else None for label in labels
    )
    return speaker, language
