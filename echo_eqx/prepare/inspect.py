"""What a set of shards holds, and what of it is broken.

Every record is read once. In memory stay the key and two lengths of each, and all that is broken.
"""

import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from huggingface_hub import HfApi, hf_hub_url
from jaxtyping import Float, Int

from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.records import (
    BrokenRecord,
    Entry,
    Sample,
    index_tar,
    latent_width,
    load_silence,
    read_sample,
)
from echo_eqx.data.shards import Listing, Shard
from echo_eqx.data.text import encode_text
from echo_eqx.errors import EchoError

FRAME_RATE = 25
"""Latent frames a second."""
USUAL_WIDTH = 128
"""Channels that are wanted where no record says how many there are."""
SILENCE = ("silence.safetensors", "silence.npy")
_INDEX = re.compile(r"index[^/]*\.json")


@dataclass(frozen=True)
class Broken:
    """A record, or with an empty `key` a shard or a file beside, that cannot be used.

    `kind` is one of `BrokenRecord`, or duplicate (the key is in an earlier shard); of a shard
    sha256 (not what its index says), unlisted (not in the index beside it) or lost (listed there,
    but gone); of another file index or silence (unreadable).
    """

    shard: str
    key: str
    kind: str
    detail: str


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
    references: int
    """Samples with a reference."""
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
        return float(self.frames.sum(dtype=np.int64)) / FRAME_RATE / 3600

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
    listing: Listing,
    cache: ShardCache,
    *,
    max_frames: int = 768,
    max_text_bytes: int = 768,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every record. A window is `max_frames` latent frames and `max_text_bytes` of text with
    its leading byte; `progress` is called with shards done and in all.

    The latents' width is the usual one of the first shard that has any; records of another are
    broken.

    **Raises**: `EchoError` if a shard cannot be had or read.
    """
    broken: list[Broken] = []
    beside, unseen = _files_beside(listing)
    sums, indexed, indexes = _read_indexes(beside, cache, broken)
    silence = _first_silence(beside)
    frames, text_bytes = array("i"), array("i")
    seen: dict[str, int] = {}
    speakers: set[str] = set()
    languages: Counter[str] = Counter()
    width: int | None = None
    moments: Moments | None = None
    fitting = references = with_speaker = compared = 0
    for number, shard in enumerate(listing.shards):
        if number + 1 < len(listing.shards):
            cache.request(listing.shards[number + 1])
        with _opened(cache, shard) as descriptor:
            if shard.name in sums:
                compared += 1
                digest = _sha256(descriptor)
                if digest != sums[shard.name]:
                    detail = f"{digest}; the index has {sums[shard.name]}"
                    broken.append(Broken(shard.name, "", "sha256", detail))
            elif _folder(shard.name) in indexed:
                broken.append(Broken(shard.name, "", "unlisted", "no index beside it has it"))
            entries = index_tar(descriptor)
            width = width or _usual_width(descriptor, entries)
            for entry in entries:
                try:
                    if entry.damage is None:
                        first = seen.setdefault(entry.key, number)
                        if first != number:
                            name = listing.shards[first].name
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
                references += sample.reference is not None and len(sample.reference) > 0
                speaker, language = _labels(descriptor, entry)
                if speaker is not None:
                    speakers.add(speaker)
                    with_speaker += 1
                if language is not None:
                    languages[language] += 1
        if progress is not None:
            progress(number + 1, len(listing.shards))
    if _is_whole(listing):
        there = {shard.name for shard in listing.shards}
        for name in sorted(set(sums) - there):
            broken.append(Broken(name, "", "lost", "an index has it, but it is not there"))
    if silence is not None and silence.path is not None and moments is not None:
        try:
            load_silence(silence.path, len(moments.mean))
        except EchoError as error:
            broken.append(Broken(silence.name, "", "silence", str(error)))
    return Report(
        source=listing.source,
        revision=listing.revision,
        shards=len(listing.shards),
        frames=np.array(frames, np.int32),
        text_bytes=np.array(text_bytes, np.int32),
        fitting=fitting,
        references=references,
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


def find_sample(listing: Listing, cache: ShardCache, key: str) -> Sample:
    """The first record `key`, of any width.

    **Raises**: `EchoError` if there is none, or it is broken.
    """
    example = None
    for shard in listing.shards:
        with _opened(cache, shard) as descriptor:
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
    raise EchoError(f"{listing.source} has no record {key!r}{wanted}")


@contextmanager
def _opened(cache: ShardCache, shard: Shard) -> Iterator[int]:
    descriptor = cache.open(shard)
    try:
        yield descriptor
    except OSError as error:
        raise EchoError(f"{shard.name} cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


def _usual_width(descriptor: int, entries: list[Entry]) -> int | None:
    widths = Counter(filter(None, (latent_width(descriptor, entry) for entry in entries)))
    return widths.most_common(1)[0][0] if widths else None


def _labels(descriptor: int, entry: Entry) -> tuple[str | None, str | None]:
    """Speaker and language of a record that has been read without an error."""
    assert entry.json is not None
    offset, size = entry.json
    fields = json.loads(os.pread(descriptor, size, offset))
    labels = (fields.get("speaker"), fields.get("language"))
    speaker, language = (
        str(label) if isinstance(label, str | int) and label != "" else None for label in labels
    )
    return speaker, language


# --- Files beside the shards --------------------------------------------------------------------


def _folder(name: str) -> str:
    return PurePosixPath(name).parent.as_posix()


def _is_whole(listing: Listing) -> bool:
    """Whether the listing has all shards of a folder, not a part picked by a glob or name."""
    return listing.shards[0].path is None or Path(listing.source).expanduser().is_dir()


def _files_beside(listing: Listing) -> tuple[list[Shard], str | None]:
    """Indexes and silence in the folders of shards and above all, as files the cache can open, and
    why they cannot be listed."""
    folders = sorted({".", *(_folder(shard.name) for shard in listing.shards)})
    first = listing.shards[0]
    found = []
    if first.path is not None:
        root = first.path.parents[len(Path(first.name).parts) - 1]
        try:
            for folder in folders:
                for path in sorted((root / folder).iterdir()):
                    if _is_beside(path.name) and path.is_file():
                        name = path.relative_to(root).as_posix()
                        found.append(Shard(name, path.stat().st_size, path=path))
        except OSError as error:
            return [], f"{error.filename} cannot be read: {error.strerror}"
        return found, None
    match = re.match(r"hf://datasets/([^/@]+/[^/@]+)", listing.source)
    assert match is not None
    options = {"repo_type": "dataset", "revision": listing.revision}
    try:
        for folder in folders:
            path = None if folder == "." else folder
            for file in HfApi().list_repo_tree(match[1], path, **options):
                size = getattr(file, "size", None)  # folders have none
                name = file.path
                if size is None or _folder(name) != folder or not _is_beside(Path(name).name):
                    continue
                url = hf_hub_url(match[1], name, **options)
                found.append(Shard(name, size, url=url))
    except Exception as error:  # the errors of the HTTP library below change between versions
        return [], next((line for line in str(error).splitlines() if line), type(error).__name__)
    return sorted(found, key=lambda file: file.name), None


def _is_beside(name: str) -> bool:
    return name in SILENCE or _INDEX.fullmatch(name) is not None


def _first_silence(beside: list[Shard]) -> Shard | None:
    """The one that is taken for training: in the folder above all."""
    named = {file.name: file for file in beside}
    return next((named[name] for name in SILENCE if name in named), None)


def _read_indexes(
    beside: list[Shard], cache: ShardCache, broken: list[Broken]
) -> tuple[dict[str, str], set[str], tuple[str, ...]]:
    """SHA-256 of each shard that is listed, the folders with an index, and the indexes' names."""
    sums: dict[str, str] = {}
    folders, names = set(), []
    for file in beside:
        if not file.name.endswith(".json"):
            continue
        with _opened(cache, file) as descriptor, open(descriptor, "rb", closefd=False) as content:
            data = content.read()
        try:
            fields = json.loads(data)
            if (fields["format"], fields["kind"]) != ("echo_eqx", "shards"):
                continue
            listed = {str(name): str(facts["sha256"]) for name, facts in fields["shards"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:100]}"
            broken.append(Broken(file.name, "", "index", f"it cannot be read ({reason})"))
            continue
        folder = _folder(file.name)
        folders.add(folder)
        names.append(file.name)
        sums |= {(PurePosixPath(folder) / name).as_posix(): listed[name] for name in listed}
    return sums, folders, tuple(names)


def _sha256(descriptor: int) -> str:
    with open(descriptor, "rb", closefd=False) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()
