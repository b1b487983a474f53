"""What a set of shards holds, and what of it is broken.

Every record is read once. Memory holds only the key and two lengths per record, and what is broken.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

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

DEFAULT_WIDTH = 128
"""Expected channels where no record says how many there are."""


@dataclass
class Report:
    """Counts over the usable records of `source`; `broken` are not among them."""

    source: str
    revision: str | None
    shards: int
    frames: Int[np.ndarray, " samples"] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Length of each sample in latent frames."""
    text_bytes: Int[np.ndarray, " samples"] = field(default_factory=lambda: np.zeros(0, np.int32))
    """Length of each text in bytes of UTF-8."""
    fitting: int = 0
    """Samples whose recording and text fit uncut."""
    longer_recordings: int = 0
    """Samples whose audio training cuts."""
    frames_cut: int = 0
    """Frames of theirs that are cut off."""
    longer_texts: int = 0
    """Samples whose text training cuts."""
    references: int = 0
    """Samples with a reference."""
    longer_references: int = 0
    """Samples with a reference that training crops."""
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
    """Of each latent channel, over all frames; no channels where there is no sample."""
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
    def hours(self) -> float:
        return float(self.frames.sum(dtype=np.int64)) / self.frame_rate / 3600

    @property
    def kinds(self) -> dict[str, int]:
        """Number of broken records by kind."""
        return dict(Counter(broken.kind for broken in self.broken).most_common())

    @property
    def overall(self) -> tuple[float, float]:
        """Mean and standard deviation of all latent values."""
        mean = float(self.mean.mean())
        return mean, float(np.sqrt(np.mean(self.std**2 + (self.mean - mean) ** 2)))


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
    def std(self) -> Float[np.ndarray, " c"]:
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
    """Read every record, and compare its lengths with those a model is trained at.

    `max_text_bytes` counts the leading byte. `progress` gets the number of shards done and the
    total. The expected latent width is the most frequent one of the first shard that has records;
    records of another width are broken.

    **Raises**: `EchoError` if a shard cannot be fetched or read.
    """
    report = Report(shard_index.source, shard_index.revision, len(shard_index.shards))
    broken: list[Broken] = []
    sidecars, report.unseen = list_sidecars(shard_index)
    sums, indexed, report.indexes = read_indexes(sidecars, cache, broken)
    silence = first_silence(sidecars)
    rate = find_frame_rate(sidecars, cache, broken)
    report.frame_rate, report.has_frame_rate = rate or FRAME_RATE, rate is not None
    frames, text_bytes = array("i"), array("i")
    seen: dict[str, int] = {}
    speakers: set[str] = set()
    languages: Counter[str] = Counter()
    extras: Counter[str] = Counter()
    width: int | None = None
    moments: Moments | None = None
    for number, shard in enumerate(shard_index.shards):
        if number + 1 < len(shard_index.shards):
            cache.request(shard_index.shards[number + 1])
        with opened(cache, shard) as descriptor:
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
                moments = moments or Moments(sample.latents.shape[1])
                moments.add(sample.latents)
                num_frames, num_text = len(sample.latents), len(encode_text(sample.text))
                num_reference = 0 if sample.reference is None else len(sample.reference)
                frames.append(num_frames)
                text_bytes.append(num_text - 1)
                report.fitting += num_frames <= max_frames and num_text <= max_text_bytes
                report.longer_recordings += num_frames > max_frames
                report.frames_cut += max(0, num_frames - max_frames)
                report.longer_texts += num_text > max_text_bytes
                report.references += num_reference > 0
                report.longer_references += num_reference > max_speaker_frames
                speaker, language = _labels(descriptor, entry)
                if speaker is not None:
                    speakers.add(speaker)
                    report.with_speaker += 1
                if language is not None:
                    languages[language] += 1
        if progress is not None:
            progress(number + 1, len(shard_index.shards))
    if is_complete(shard_index):
        for name in sorted(set(sums) - {shard.name for shard in shard_index.shards}):
            broken.append(Broken(name, "", "missing", "an index lists it, but it does not exist"))
    if silence is not None and silence.path is not None and moments is not None:
        try:
            load_silence(silence.path, len(moments.mean))
        except EchoError as error:
            broken.append(Broken(silence.name, "", "silence", str(error)))
    if moments is not None:
        report.mean, report.std = moments.mean, moments.std
    report.frames = np.array(frames, np.int32)
    report.text_bytes = np.array(text_bytes, np.int32)
    report.silence = None if silence is None else silence.name
    report.extras, report.languages = dict(extras.most_common()), dict(languages.most_common())
    report.speakers, report.broken = len(speakers), tuple(broken)
    return report


def find_sample(shard_index: ShardIndex, cache: ShardCache, key: str) -> Sample:
    """The first record with this key, of any width.

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
                    return read_sample(descriptor, entry, width or DEFAULT_WIDTH)
                except BrokenRecord as error:
                    raise EchoError(f"{key!r} of {shard.name} is broken ({error})") from None
    expected = "" if example is None else f"; expected a key such as {example!r}"
    raise EchoError(f"{shard_index.source} has no record {key!r}{expected}")


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
