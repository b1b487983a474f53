"""Batches of samples from shards, in an order that depends only on the seed and the position.

A global batch takes the same number of samples from every stream, in the order of the streams, so
its content does not depend on which host reads which streams.
"""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from echo_eqx.data.fetch import CLOSE_WAIT, ShardCache
from echo_eqx.data.record_log import RecordLog
from echo_eqx.data.records import Sample, latent_width
from echo_eqx.data.sample_stream import (
    ASSIGN,
    CROP,
    NoUsableRecord,
    ReadResult,
    SampleStream,
    check_cursor,
    permutation,
    random_bits,
)
from echo_eqx.data.shards import ShardIndex
from echo_eqx.data.tar_index import index_tar
from echo_eqx.data.text import encode_text
from echo_eqx.errors import EchoError, UsageError, printable

MAX_STREAMS = 64
PREFETCH = 2
"""Batches built ahead of the one being used."""


@dataclass(frozen=True)
class SequenceLengths:
    """Lengths that every sample is truncated or padded to; frames are latent frames."""

    latent_dim: int
    max_frames: int
    max_text_bytes: int
    max_speaker_frames: int
    patch_size: int


class HostBatch(NamedTuple):
    """This host's rows of a `Batch` (`echo_eqx.flow.objective`), as NumPy arrays with its fields.

    Axes as in `echo_eqx.config`.
    """

    latents: np.ndarray
    """(b, t, c), the recording, padded with silence: float16 where that is exact, else float32."""
    frame_mask: np.ndarray
    """(b, t) bool, true on frames of the recording."""
    text_ids: np.ndarray
    """(b, s) int32."""
    text_mask: np.ndarray
    """(b, s) bool."""
    speaker_latents: np.ndarray
    """(b, r, c), of the dtype of `latents`."""
    speaker_mask: np.ndarray
    """(b, r) bool, all false where there is no reference."""


class LoadedBatch(NamedTuple):
    """A batch, the "shard:key" of each row, and the cursor after the batch."""

    batch: Any
    """`HostBatch`, or another named tuple of arrays (b, ...)."""
    keys: list[str]
    cursor: dict[str, list[int]]
    counts: Mapping[str, int] = {}
    """Samples skipped or truncated so far in this process, by their key in `metrics.jsonl`."""


def choose_num_streams(batch_size: int, num_shards: int, given: int | None = None) -> int:
    """`given`, or else the largest number of streams that get (nearly) the same number of shards.

    **Raises**: `UsageError` if `given` does not divide the batch or exceeds the shards.
    """
    if given is not None:
        if given < 1 or batch_size % given:
            raise UsageError(
                f"--num_streams: expected a divisor of the batch size {batch_size}, got {given}"
            )
        if given > num_shards:
            raise UsageError(
                f"--num_streams: expected at most one for each of {num_shards} shards, got {given}"
            )
        return given
    return max(
        count
        for count in range(1, min(batch_size, MAX_STREAMS) + 1)
        if batch_size % count == 0 and (num_shards % count == 0 or num_shards >= 8 * count)
    )


def first_width(shard_index: ShardIndex) -> int | None:
    """Latent width of the first readable record in the first shard; None if there is none, or the
    shard is not on this machine."""
    path = shard_index.shards[0].path
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            widths = (latent_width(file.fileno(), entry) for entry in index_tar(file.fileno()))
            return next((width for width in widths if width is not None), None)
    except OSError as error:
        raise EchoError(f"cannot read {path}: {error.strerror}") from None


class DataLoader:
    """An endless iterator over this host's rows of global batches: those that `streams` fill.

    Closing it closes `cache` too. `log` counts what is skipped or truncated.
    """

    def __init__(
        self,
        shard_index: ShardIndex,
        lengths: SequenceLengths,
        silence: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        num_streams: int,
        streams: Sequence[int],
        cache: ShardCache,
        cursor: dict[str, list[int]] | None = None,
        max_broken: float = 0.01,
        broken_log: Path | None = None,
        skip_longer: bool = False,
    ):
        """`batch_size` is global. `silence` (n, c) pads recordings; its last frame is repeated.

        To resume, pass as `cursor` the one of a `LoadedBatch`, or the merged cursors of all hosts.
        More than a fraction `max_broken` of broken records is an error; each is listed once in
        `broken_log`, a JSON Lines file. Samples that are too long are truncated, or left out with
        `skip_longer`.

        **Raises**: `EchoError` if cursor or silence do not fit, or the shards that are open at once
        exceed the cache. Errors of the background thread are raised while iterating.
        """
        choose_num_streams(batch_size, len(shard_index.shards), num_streams)
        if seed < 0:
            raise UsageError(f"--seed: expected 0 or more, got {seed}")
        if silence.ndim != 2 or silence.shape[1] != lengths.latent_dim or not len(silence):
            raise EchoError(
                f"silence: expected shape (frames, {lengths.latent_dim}), got {silence.shape}"
            )
        self.log = RecordLog(shard_index.source, max_broken, broken_log)
        self._skip_longer = skip_longer
        order = permutation(len(shard_index.shards), seed, ASSIGN).tolist()
        callbacks = self._accepts, self.log.add_skipped
        self._streams = [
            SampleStream(n, order[n::num_streams], shard_index, seed, *callbacks)
            for n in sorted(streams)
        ]
        remote = [0 if shard.path else shard.size for shard in shard_index.shards]
        cache.check_fits(sum(max(remote[i] for i in s.shards) for s in self._streams))
        if cursor is not None:
            check_cursor(cursor, num_streams, self._streams)
            for stream in self._streams:
                stream.seek(cursor[str(stream.number)])
        self.lengths, self.cache = lengths, cache
        self._seed = seed
        self._rows_per_stream = batch_size // num_streams
        self._padding = silence[np.minimum(np.arange(lengths.max_frames), len(silence) - 1)]
        with np.errstate(over="ignore"):
            half = self._padding.astype(np.float16)
        self._padding = half if (half == self._padding).all() else self._padding
        self._dtype = self._padding.dtype
        self._ready: queue.Queue[LoadedBatch | BaseException] = queue.Queue(PREFETCH)
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def examples(self) -> dict[str, str]:
        """For each counter, a sentence about its first case."""
        return self.log.examples

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self

    def __next__(self) -> LoadedBatch:
        while not self._closed.is_set():
            if self._failure is not None:
                raise self._failure
            try:
                ready = self._ready.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(ready, LoadedBatch):
                return ready
            self._failure = ready
        raise StopIteration

    def close(self) -> None:
        """Stop the threads and release the shards."""
        self._closed.set()
        self.cache.close()
        self._thread.join(CLOSE_WAIT)
        if not self._thread.is_alive():
            for stream in self._streams:
                stream.close()

    def _run(self) -> None:
        try:
            for stream in self._streams:
                self.cache.request(stream.current_shard())
            while not self._closed.is_set():
                self._put(self._build())
        except BaseException as error:  # raised in the thread that iterates
            self._put(error)

    def _put(self, item: LoadedBatch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _build(self) -> LoadedBatch:
        batch = _empty_batch(len(self._streams) * self._rows_per_stream, self.lengths, self._dtype)
        keys = []
        for stream in self._streams:
            if stream.next_shard is not None:
                self.cache.request(stream.next_shard)
            for _ in range(self._rows_per_stream):
                read, sample = self._next_used(stream)
                if np.result_type(self._dtype, sample.dtype) != self._dtype:
                    self._dtype = sample.dtype  # the first float32 recording: float32 from now on
                    latents, speaker = batch.latents, batch.speaker_latents
                    batch = batch._replace(
                        latents=latents.astype(sample.dtype),
                        speaker_latents=speaker.astype(sample.dtype),
                    )
                self._fill(batch, len(keys), read, sample)
                keys.append(f"{read.shard.name}:{read.key}")
        cursor = {str(stream.number): stream.position for stream in self._streams}
        return LoadedBatch(batch, keys, cursor, self.log.counts)

    def _fill(self, batch: HostBatch, row: int, read: ReadResult, sample: Sample) -> None:
        """Write a sample into an empty row."""
        lengths = self.lengths
        frames = min(len(sample.latents), lengths.max_frames)
        batch.latents[row, :frames] = sample.latents[:frames]
        batch.latents[row, frames:] = self._padding[: lengths.max_frames - frames]
        batch.frame_mask[row, :frames] = True
        text = encode_text(sample.text)[: lengths.max_text_bytes]
        batch.text_ids[row, : len(text)] = text
        batch.text_mask[row, : len(text)] = True
        if sample.reference is not None:
            have = len(sample.reference)
            length = min(have, lengths.max_speaker_frames)
            start = 0
            if have > length:
                random = int(random_bits(1, self._seed, CROP, *read.place)[0])
                start = random % (have - length + 1)
            length -= length % lengths.patch_size
            batch.speaker_latents[row, :length] = sample.reference[start : start + length]
            batch.speaker_mask[row, :length] = True

    def _count_cuts(self, read: ReadResult, sample: Sample) -> None:
        """Count what is cut to the lengths."""
        lengths = self.lengths

        def count(kind: str, sentence: str) -> None:
            self.log.count(kind, f"{printable(f'{read.shard.name}:{read.key}')} {sentence}")

        if len(sample.latents) > lengths.max_frames:
            count(
                "cut_recordings",
                f"has {len(sample.latents)} frames and is cut to {lengths.max_frames}, "
                "while its text stays whole; raise --max_frames, or leave such samples out with "
                "--skip_longer",
            )
        if (length := len(encode_text(sample.text))) > lengths.max_text_bytes:
            count(
                "cut_texts",
                f"has a text of {length} bytes with the leading byte, and is cut to "
                f"{lengths.max_text_bytes}; raise --max_text_bytes, or leave such samples out with "
                "--skip_longer",
            )
        have = 0 if sample.reference is None else len(sample.reference)
        if have > lengths.max_speaker_frames:
            count(
                "cropped_references",
                f"has a reference of {have} frames, more than --max_speaker_frames "
                f"{lengths.max_speaker_frames}; a random crop is used each time",
            )

    def _next_used(self, stream: SampleStream) -> tuple[ReadResult, Sample]:
        while True:
            try:
                read = stream.read(self.cache, self.lengths.latent_dim)
            except NoUsableRecord:
                what = (
                    f"none of the {len(stream.shards)} shards of stream {stream.number} has a "
                    "usable record"
                )
                raise EchoError(self.log.nothing_used(what)) from None
            self.log.add(read)
            if read.is_used and isinstance(read.result, Sample):
                self._count_cuts(read, read.result)
                return read, read.result
            if isinstance(read.result, Sample):
                name = printable(f"{read.shard.name}:{read.key}")
                self.log.count(
                    "left_out",
                    f"{name} is longer than {self.lengths.max_frames} frames or "
                    f"{self.lengths.max_text_bytes} bytes of text; --skip_longer leaves it out",
                )

    def _accepts(self, sample: Sample) -> bool:
        return not self._skip_longer or (
            len(sample.latents) <= self.lengths.max_frames
            and len(encode_text(sample.text)) <= self.lengths.max_text_bytes
        )


def _empty_batch(rows: int, lengths: SequenceLengths, dtype: np.dtype) -> HostBatch:
    text, reference = lengths.max_text_bytes, lengths.max_speaker_frames
    return HostBatch(
        np.empty((rows, lengths.max_frames, lengths.latent_dim), dtype),
        np.zeros((rows, lengths.max_frames), bool),
        np.zeros((rows, text), np.int32),
        np.zeros((rows, text), bool),
        np.zeros((rows, reference, lengths.latent_dim), dtype),
        np.zeros((rows, reference), bool),
    )
