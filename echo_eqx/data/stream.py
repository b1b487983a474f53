"""Batches of samples from shards, in an order that depends on the seed and the position alone.

A global batch takes as many samples of every lane, lane after lane, so it does not matter which
host owns which lanes.
"""

import os
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from echo_eqx.data.fetch import CLOSE_WAIT, ShardCache
from echo_eqx.data.lanes import (
    CROP,
    DEAL,
    BarrenLane,
    Drawn,
    Lane,
    check_cursor,
    permutation,
    random_bits,
)
from echo_eqx.data.record_log import RecordLog
from echo_eqx.data.records import Sample, latent_width
from echo_eqx.data.shard_index import index_tar
from echo_eqx.data.shards import Listing
from echo_eqx.data.text import encode_text
from echo_eqx.errors import EchoError, UsageError, printable

MAX_LANES = 64
AHEAD = 2
"""Batches built before they are asked for."""


@dataclass(frozen=True)
class Window:
    """Sizes that every sample is cut or padded to; frames are latent frames."""

    latent_dim: int
    max_frames: int
    max_text_bytes: int
    max_speaker_frames: int
    patch_size: int


class Batch(NamedTuple):
    """Rows of a batch; axes as in `echo_eqx.config`."""

    latents: np.ndarray
    """(b, t, c) float32, the recording and then silence."""
    frame_mask: np.ndarray
    """(b, t) bool, true where the recording is."""
    text_ids: np.ndarray
    """(b, s) int32."""
    text_mask: np.ndarray
    """(b, s) bool."""
    speaker_latents: np.ndarray
    """(b, r, c) float32."""
    speaker_mask: np.ndarray
    """(b, r) bool, all false where there is no reference."""


class Step(NamedTuple):
    """One batch, "shard:key" of each row, and where the lanes stand after it."""

    batch: Batch
    keys: list[str]
    cursor: dict[str, list[int]]
    counts: Mapping[str, int] = {}
    """What was skipped or cut up to here, since this start, by its name in `metrics.jsonl`."""


def check_lanes(batch_size: int, num_shards: int, lanes: int) -> None:
    """**Raises**: `UsageError` if `lanes` does not divide the batch or exceeds the shards."""
    if lanes < 1 or batch_size % lanes:
        raise UsageError(f"--lanes is {lanes}; wanted a divisor of the batch of {batch_size}")
    if lanes > num_shards:
        raise UsageError(f"--lanes is {lanes}; wanted at most one for each of {num_shards} shards")


def num_lanes(batch_size: int, num_shards: int, wanted: int | None = None) -> int:
    """`wanted` if that can be, else the most lanes of equal or nearly equal numbers of shards.

    **Raises**: `UsageError` if `wanted` does not divide the batch or exceeds the shards.
    """
    if wanted is not None:
        check_lanes(batch_size, num_shards, wanted)
        return wanted
    return max(
        lanes
        for lanes in range(1, min(batch_size, MAX_LANES) + 1)
        if batch_size % lanes == 0 and (num_shards % lanes == 0 or num_shards >= 8 * lanes)
    )


def first_width(listing: Listing) -> int | None:
    """Latent width of the first record whose header can be read, None if it is not on this machine.

    Only the first shard is looked into.
    """
    path = listing.shards[0].path
    if path is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise EchoError(f"{path} cannot be opened: {error.strerror}") from None
    try:
        widths = (latent_width(descriptor, entry) for entry in index_tar(descriptor))
        return next((width for width in widths if width is not None), None)
    finally:
        os.close(descriptor)


class Stream:
    """Endless batches of the rows that `lanes` have in the global batch, lane after lane.

    It closes `cache` along with itself. `log` counts what is skipped or cut.
    """

    def __init__(
        self,
        listing: Listing,
        window: Window,
        silence: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        num_lanes: int,
        lanes: Sequence[int],
        cache: ShardCache,
        cursor: dict[str, list[int]] | None = None,
        max_broken: float = 0.01,
        broken_log: Path | None = None,
        skip_longer: bool = False,
    ):
        """Global `batch_size`; `silence` (n, c) pads a recording, its last frame repeated.

        `cursor` is one of a `Step`, or those of all hosts merged. More than `max_broken` of the
        records broken is an error; each is listed once in `broken_log`, a file of JSON lines.
        Recordings and texts longer than the window are cut, or left out with `skip_longer`.

        **Raises**: `EchoError` if cursor or silence do not fit, or the lanes' shards exceed the
        cache. While iterating also whatever the background meets.
        """
        check_lanes(batch_size, len(listing.shards), num_lanes)
        if seed < 0:
            raise UsageError(f"--seed is {seed}; wanted 0 or more")
        if silence.ndim != 2 or silence.shape[1] != window.latent_dim or not len(silence):
            raise EchoError(f"silence is {silence.shape}; wanted (frames, {window.latent_dim})")
        self.log = RecordLog(listing.source, max_broken, broken_log)
        self._skip_longer = skip_longer
        deal = permutation(len(listing.shards), seed, DEAL).tolist()
        self._lanes = [
            Lane(n, deal[n::num_lanes], listing, seed, self._accepts, self.log.add_skipped)
            for n in sorted(lanes)
        ]
        largest = [
            max(0 if shard.path else shard.size for shard in lane.all_shards())
            for lane in self._lanes
        ]
        cache.check_fits(sum(largest))
        if cursor is not None:
            check_cursor(cursor, num_lanes, self._lanes)
            for lane in self._lanes:
                lane.go_to(cursor[str(lane.number)])
        self.window, self.cache = window, cache
        self._seed = seed
        self._rows_per_lane = batch_size // num_lanes
        self._padding = silence[np.minimum(np.arange(window.max_frames), len(silence) - 1)]
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(AHEAD)
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def broken(self) -> Counter[str]:
        """Records that could not be read, by kind."""
        return self.log.broken

    @property
    def first(self) -> dict[str, str]:
        """A sentence on the first case of everything counted."""
        return self.log.first

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        while not self._closed.is_set():
            if self._failure is not None:
                raise self._failure
            try:
                ready = self._ready.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(ready, Step):
                return ready
            self._failure = ready
        raise StopIteration

    def close(self) -> None:
        """Stop the threads and let go of the shards."""
        self._closed.set()
        self.cache.close()
        self._thread.join(CLOSE_WAIT)
        if not self._thread.is_alive():
            for lane in self._lanes:
                lane.close()

    def _run(self) -> None:
        try:
            for lane in self._lanes:
                self.cache.request(lane.current())
            while not self._closed.is_set():
                self._hand_out(self._build())
        except BaseException as error:  # raised in the thread that iterates
            self._hand_out(error)

    def _hand_out(self, item: Step | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def _build(self) -> Step:
        batch = _empty_batch(len(self._lanes) * self._rows_per_lane, self.window)
        keys = []
        for lane in self._lanes:
            if lane.ahead is not None:
                self.cache.request(lane.ahead)
            for _ in range(self._rows_per_lane):
                keys.append(self._fill(batch, len(keys), lane))
        cursor = {str(lane.number): lane.position for lane in self._lanes}
        return Step(batch, keys, cursor, self.log.counts)

    def _fill(self, batch: Batch, row: int, lane: Lane) -> str:
        """Put the next sample of `lane` into a fresh row; "shard:key" of it."""
        drawn = self._next_used(lane)
        sample, window = drawn.result, self.window
        assert isinstance(sample, Sample)
        name = f"{drawn.shard.name}:{drawn.key}"
        frames = min(len(sample.latents), window.max_frames)
        batch.latents[row, :frames] = sample.latents[:frames]
        batch.latents[row, frames:] = self._padding[: window.max_frames - frames]
        batch.frame_mask[row, :frames] = True
        if len(sample.latents) > frames:
            self.log.count(
                "cut_recordings",
                f"{printable(name)} has {len(sample.latents)} frames and the window {frames}: such "
                "audio is cut there and its text stays whole; a larger --frames takes all of it, "
                "--skip_longer leaves it out",
            )
        text = encode_text(sample.text)
        if len(text) > window.max_text_bytes:
            self.log.count(
                "cut_texts",
                f"{printable(name)} has a text longer than the window, {len(text)} bytes with the "
                f"leading one of {window.max_text_bytes}: such texts are cut there; a larger "
                "--text_bytes takes all of it, --skip_longer leaves it out",
            )
        text = text[: window.max_text_bytes]
        batch.text_ids[row, : len(text)] = text
        batch.text_mask[row, : len(text)] = True
        if sample.reference is not None:
            have = len(sample.reference)
            length = min(have, window.max_speaker_frames)
            start = 0
            if have > length:
                start = int(random_bits(1, self._seed, CROP, *drawn.place)[0]) % (have - length + 1)
                self.log.count(
                    "cropped_references",
                    f"{printable(name)} has a reference of {have} frames, longer than the {length} "
                    "of --ref_frames: each time another part of it is taken at random",
                )
            length -= length % window.patch_size
            batch.speaker_latents[row, :length] = sample.reference[start : start + length]
            batch.speaker_mask[row, :length] = True
        return name

    def _next_used(self, lane: Lane) -> Drawn:
        while True:
            try:
                drawn = lane.read(self.cache, self.window.latent_dim)
            except BarrenLane:
                what = (
                    f"lane {lane.number} went through all of its {len(lane.shards)} shards without "
                    "one good record"
                )
                raise EchoError(self.log.nothing_used(what)) from None
            self.log.add(drawn)
            if drawn.used:
                return drawn
            if isinstance(drawn.result, Sample):
                name = printable(f"{drawn.shard.name}:{drawn.key}")
                self.log.count(
                    "left_out",
                    f"{name} is longer than the window of {self.window.max_frames} frames and "
                    f"{self.window.max_text_bytes} bytes of text: --skip_longer leaves it out",
                )

    def _accepts(self, sample: Sample) -> bool:
        return not self._skip_longer or (
            len(sample.latents) <= self.window.max_frames
            and len(encode_text(sample.text)) <= self.window.max_text_bytes
        )


def _empty_batch(rows: int, window: Window) -> Batch:
    frames, text, reference = window.max_frames, window.max_text_bytes, window.max_speaker_frames
    return Batch(
        np.empty((rows, frames, window.latent_dim), np.float32),
        np.zeros((rows, frames), bool),
        np.zeros((rows, text), np.int32),
        np.zeros((rows, text), bool),
        np.zeros((rows, reference, window.latent_dim), np.float32),
        np.zeros((rows, reference), bool),
    )
