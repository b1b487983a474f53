"""Batches from shards in an order that is a function of the seed and the position alone.

Shards are dealt to lanes once, for the whole run; a lane goes through its own at its own pace, each
epoch in another order, and through the records of each in another order. A global batch takes as
many samples of every lane, lane after lane, so it does not matter which host owns which lanes.
Where a lane stands is (epoch, shard, record), and the cursor is that of every lane.
"""

import json
import os
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from echo_eqx.data.fetch import CLOSE_WAIT, ShardCache
from echo_eqx.data.records import BrokenRecord, Entry, Sample, index_tar, latent_width, read_sample
from echo_eqx.data.shards import Listing, Shard
from echo_eqx.data.text import encode_text
from echo_eqx.errors import EchoError, UsageError

MAX_LANES = 64
AHEAD = 2
"""Batches built before they are asked for."""
ENOUGH_SEEN = 100
"""Records after which the share of broken ones says something."""
_DEAL, _SHARDS, _RECORDS, _CROP = range(4)


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


def _random(count: int, *entropy: int) -> np.ndarray:
    """(count,) uint64. Raw bits stay the same from one NumPy version to the next, which the
    methods of a generator need not."""
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)


def _permutation(count: int, *entropy: int) -> np.ndarray:
    return np.argsort(_random(count, *entropy), kind="stable")


class _Drawn(NamedTuple):
    shard: Shard
    key: str
    result: Sample | BrokenRecord
    place: tuple[int, int, int]
    """Index of the shard, epoch, and number of the record in its shard."""


class _Lane:
    """A walk through the shards with indices `shards`; used by one thread at a time."""

    def __init__(self, number: int, shards: Sequence[int], listing: Listing, seed: int):
        self.number, self.shards, self.listing, self.seed = number, shards, listing, seed
        self.epoch = self.shard = self.record = 0
        self.ahead: Shard | None = None
        """The shard after the one being read, once one is."""
        self._had_good = True  # of the epoch a cursor leads into, not all was seen
        self._descriptor: int | None = None
        self._index = 0
        self._entries: list[Entry] = []
        self._order = np.zeros(0, np.int64)

    @property
    def position(self) -> list[int]:
        """Epoch, shard and record of what is read next."""
        return [self.epoch, self.shard, self.record]

    def all_shards(self) -> list[Shard]:
        return [self.listing.shards[index] for index in self.shards]

    def index_at(self, epoch: int, shard: int) -> int:
        """Index in the listing of the shard that is visited there."""
        order = _permutation(len(self.shards), self.seed, _SHARDS, self.number, epoch)
        return self.shards[int(order[shard])]

    def current(self) -> Shard:
        return self.listing.shards[self.index_at(self.epoch, self.shard)]

    def read(self, cache: ShardCache, latent_dim: int) -> _Drawn:
        """The next record, good or broken.

        **Raises**: `EchoError` if a shard cannot be had or read, or a whole epoch had none good.
        """
        while self._descriptor is None:
            self._open(cache)
        shard = self.listing.shards[self._index]
        number = int(self._order[self.record])
        entry = self._entries[number]
        try:
            result = read_sample(self._descriptor, entry, latent_dim)
            self._had_good = True
        except BrokenRecord as error:
            result = error
        except OSError as error:
            raise EchoError(f"shard {shard.name} cannot be read: {error.strerror}") from None
        place = (self._index, self.epoch, number)
        self.record += 1
        if self.record == len(self._order):
            self._leave()
        return _Drawn(shard, entry.key, result, place)

    def _open(self, cache: ShardCache) -> None:
        self._index = self.index_at(self.epoch, self.shard)
        shard = self.listing.shards[self._index]
        self._descriptor = cache.open(shard)
        try:
            self._entries = index_tar(self._descriptor)
        except OSError as error:
            raise EchoError(f"shard {shard.name} cannot be read: {error.strerror}") from None
        self._order = _permutation(len(self._entries), self.seed, _RECORDS, self._index, self.epoch)
        self.ahead = self.listing.shards[self.index_at(*self._next_shard())]
        if self.record >= max(len(self._entries), 1):
            raise EchoError(
                f"the cursor of lane {self.number} is at record {self.record} of shard "
                f"{shard.name}, which has {len(self._entries)}"
            )
        if not self._entries:
            self._leave()

    def _next_shard(self) -> tuple[int, int]:
        last = self.shard + 1 == len(self.shards)
        return (self.epoch + 1, 0) if last else (self.epoch, self.shard + 1)

    def _leave(self) -> None:
        self.close()
        self.epoch, self.shard = self._next_shard()
        self.record = 0
        if self.shard == 0:
            if not self._had_good:
                raise EchoError(
                    f"lane {self.number} went through all of its {len(self.shards)} shards without "
                    "one good record"
                )
            self._had_good = False

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Stream:
    """Endless batches of the rows that `lanes` have in the global batch, lane after lane.

    It closes `cache` along with itself. `broken` counts the records skipped by kind, and `seen` all
    that were read; both run ahead of the batches handed out.
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
    ):
        """Global `batch_size`; `silence` (n, c) pads a recording, its last frame repeated.

        `cursor` is one of a `Step`, or those of all hosts merged. More than `max_broken` of the
        records broken is an error; each is noted once in `broken_log`, a file of JSON lines.

        **Raises**: `EchoError` if cursor or silence do not fit, or the lanes' shards exceed the
        cache. While iterating also whatever the background meets.
        """
        check_lanes(batch_size, len(listing.shards), num_lanes)
        if seed < 0:
            raise UsageError(f"--seed is {seed}; wanted 0 or more")
        if silence.ndim != 2 or silence.shape[1] != window.latent_dim or not len(silence):
            raise EchoError(f"silence is {silence.shape}; wanted (frames, {window.latent_dim})")
        deal = _permutation(len(listing.shards), seed, _DEAL).tolist()
        self._lanes = [_Lane(n, deal[n::num_lanes], listing, seed) for n in sorted(lanes)]
        largest = [
            max(0 if shard.path else shard.size for shard in lane.all_shards())
            for lane in self._lanes
        ]
        cache.check_fits(sum(largest))
        if cursor is not None:
            _check_cursor(cursor, num_lanes, self._lanes)
            for lane in self._lanes:
                lane.epoch, lane.shard, lane.record = cursor[str(lane.number)]
        self.window, self.cache = window, cache
        self.max_broken, self.broken_log = max_broken, broken_log
        self.broken: Counter[str] = Counter()
        self.seen = 0
        self._seed = seed
        self._rows_per_lane = batch_size // num_lanes
        self._padding = silence[np.minimum(np.arange(window.max_frames), len(silence) - 1)]
        self._logged = _read_log(broken_log)
        self._ready: queue.Queue[Step | BaseException] = queue.Queue(AHEAD)
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

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
        return Step(batch, keys, {str(lane.number): lane.position for lane in self._lanes})

    def _fill(self, batch: Batch, row: int, lane: _Lane) -> str:
        """Put the next good record of `lane` into a fresh row; "shard:key" of it."""
        while True:
            drawn = lane.read(self.cache, self.window.latent_dim)
            self.seen += 1
            sample = drawn.result
            if isinstance(sample, BrokenRecord):
                self._note(drawn, sample)
            self._check_share()
            if isinstance(sample, Sample):
                break
        frames = min(len(sample.latents), self.window.max_frames)
        batch.latents[row, :frames] = sample.latents[:frames]
        batch.latents[row, frames:] = self._padding[: self.window.max_frames - frames]
        batch.frame_mask[row, :frames] = True
        text = encode_text(sample.text)[: self.window.max_text_bytes]
        batch.text_ids[row, : len(text)] = text
        batch.text_mask[row, : len(text)] = True
        if sample.reference is not None:
            have = len(sample.reference)
            length = min(have, self.window.max_speaker_frames)
            start = 0
            if have > length:
                start = int(_random(1, self._seed, _CROP, *drawn.place)[0]) % (have - length + 1)
            length -= length % self.window.patch_size
            batch.speaker_latents[row, :length] = sample.reference[start : start + length]
            batch.speaker_mask[row, :length] = True
        return f"{drawn.shard.name}:{drawn.key}"

    def _note(self, drawn: _Drawn, broken: BrokenRecord) -> None:
        self.broken[broken.kind] += 1
        name = (drawn.shard.name, drawn.key)
        if self.broken_log is not None and name not in self._logged:
            self._logged.add(name)
            fields = {"shard": name[0], "key": name[1], "kind": broken.kind}
            line = json.dumps({**fields, "detail": broken.detail}) + "\n"
            try:
                with self.broken_log.open("a") as file:
                    file.write(line)
            except OSError as error:
                raise EchoError(f"{self.broken_log} cannot be written: {error.strerror}") from None

    def _check_share(self) -> None:
        total = self.broken.total()
        if self.seen >= ENOUGH_SEEN and total > self.max_broken * self.seen:
            kinds = ", ".join(f"{kind} {count}" for kind, count in self.broken.most_common())
            raise EchoError(
                f"{total} of {self.seen} records are broken ({kinds}); wanted at most "
                f"{self.max_broken:.1%}"
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


def _read_log(path: Path | None) -> set[tuple[str, str]]:
    """What an earlier run has noted as broken, so that it is not noted twice."""
    noted = set()
    if path is not None and path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                fields = json.loads(line)
                noted.add((fields["shard"], fields["key"]))
            except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
                continue
    return noted


def _check_cursor(cursor: dict[str, list[int]], num_lanes: int, lanes: list[_Lane]) -> None:
    """A cursor of these lanes, or of all there are, with positions that exist."""
    every = {str(number) for number in range(num_lanes)}
    if set(cursor) not in (every, {str(lane.number) for lane in lanes}):
        raise EchoError(
            f"the cursor has lanes {', '.join(sorted(map(str, cursor)))[:100]}; wanted "
            f"0 to {num_lanes - 1}"
        )
    for lane in lanes:
        position: Any = cursor[str(lane.number)]
        is_position = isinstance(position, list | tuple) and len(position) == 3
        if not is_position or not all(type(value) is int and value >= 0 for value in position):
            raise EchoError(
                f"the cursor of lane {lane.number} is {str(position)[:100]}; wanted "
                "[epoch, shard, record]"
            )
        if position[1] >= len(lane.shards):
            raise EchoError(
                f"the cursor of lane {lane.number} is at shard {position[1]} of "
                f"{len(lane.shards)}; is it that of other data?"
            )
