"""Sample streams: the records of some shards, in an order that depends only on the seed.

Shards are assigned to streams once per run. A stream reads its own shards at its own pace, in a new
order each epoch, and the records of each shard in a new order. The position of a stream is (epoch,
shard, record); the cursor of a run is the position of every stream.

No library is used, because resuming must give the same samples in the same order on any number of
hosts, without replaying what was read before.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.records import BrokenRecord, Sample, read_sample
from echo_eqx.data.shards import Shard, ShardIndex
from echo_eqx.data.tar_index import RecordEntry, Skipped, index_tar
from echo_eqx.errors import EchoError

ASSIGN, SHARDS, RECORDS, CROP = range(4)
"""Uses of random numbers; each has seeds of its own."""


def random_bits(count: int, *entropy: int) -> np.ndarray:
    """(count,) uint64. Raw bits are stable across NumPy versions; a generator's methods are not."""
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)


def permutation(count: int, *entropy: int) -> np.ndarray:
    return np.argsort(random_bits(count, *entropy), kind="stable")


class NoUsableRecord(Exception):
    """A whole epoch had no usable record."""


class ReadResult(NamedTuple):
    shard: Shard
    key: str
    result: Sample | BrokenRecord
    is_used: bool
    """Whether `result` is a sample that the stream's `accepts` accepted."""
    place: tuple[int, int, int]
    """Index of the shard, epoch, and index of the record in its shard."""


class SampleStream:
    """The records of the shards with indices `shards`. Not thread-safe.

    Samples that `accepts` rejects are skipped. Each time a shard is opened, `on_skipped` is called
    with its members that belong to no record.
    """

    def __init__(
        self,
        number: int,
        shards: Sequence[int],
        shard_index: ShardIndex,
        seed: int,
        accepts: Callable[[Sample], bool],
        on_skipped: Callable[[Shard, list[Skipped]], object],
    ):
        self.number, self.shards, self._shard_index, self._seed = number, shards, shard_index, seed
        self._accepts, self._on_skipped = accepts, on_skipped
        self.epoch = self.shard = self.record = 0
        self.next_shard: Shard | None = None
        """The shard after the one being read; None until one is read."""
        self._last_epoch_empty = False
        self._found_in_epoch = False
        """Whether a record of this epoch was used, or may have been before the cursor."""
        self._descriptor: int | None = None
        self._index = 0
        self._entries: list[RecordEntry] = []
        self._order = np.zeros(0, np.int64)

    @property
    def position(self) -> list[int]:
        """Epoch, shard and record of the next read."""
        return [self.epoch, self.shard, self.record]

    def seek(self, position: Sequence[int]) -> None:
        """Continue from `position`; no shard may be open."""
        self.epoch, self.shard, self.record = position
        self._found_in_epoch = self.shard + self.record > 0

    def _index_at(self, epoch: int, shard: int) -> int:
        order = permutation(len(self.shards), self._seed, SHARDS, self.number, epoch)
        return self.shards[int(order[shard])]

    def current_shard(self) -> Shard:
        return self._shard_index.shards[self._index_at(self.epoch, self.shard)]

    def read(self, cache: ShardCache, latent_dim: int) -> ReadResult:
        """The next record, good or broken.

        **Raises**: `EchoError` if a shard cannot be fetched or read; `NoUsableRecord` after a whole
        epoch without a usable record.
        """
        while self._descriptor is None:
            if self._last_epoch_empty:
                raise NoUsableRecord
            self._open(cache)
        shard = self._shard_index.shards[self._index]
        number = int(self._order[self.record])
        entry = self._entries[number]
        try:
            result = read_sample(self._descriptor, entry, latent_dim)
        except BrokenRecord as error:
            result = error
        except OSError as error:
            raise _unreadable(shard, error) from None
        is_used = isinstance(result, Sample) and self._accepts(result)
        self._found_in_epoch |= is_used
        place = (self._index, self.epoch, number)
        self.record += 1
        if self.record == len(self._order):
            self._leave()
        return ReadResult(shard, entry.key, result, is_used, place)

    def _open(self, cache: ShardCache) -> None:
        self._index = self._index_at(self.epoch, self.shard)
        shard = self._shard_index.shards[self._index]
        self._descriptor = cache.open(shard)
        skipped: list[Skipped] = []
        try:
            self._entries = index_tar(self._descriptor, skipped)
        except OSError as error:
            raise _unreadable(shard, error) from None
        self._on_skipped(shard, skipped)
        self._order = permutation(len(self._entries), self._seed, RECORDS, self._index, self.epoch)
        self.next_shard = self._shard_index.shards[self._index_at(*self._after())]
        if self.record >= max(len(self._entries), 1):
            raise EchoError(
                f"cursor of stream {self.number}: expected a record below {len(self._entries)} in "
                f"shard {shard.name}, got {self.record}; check that the shards did not change"
            )
        if not self._entries:
            self._leave()

    def _after(self) -> tuple[int, int]:
        """Epoch and shard that come next."""
        is_last = self.shard + 1 == len(self.shards)
        return (self.epoch + 1, 0) if is_last else (self.epoch, self.shard + 1)

    def _leave(self) -> None:
        self.close()
        self.epoch, self.shard = self._after()
        self.record = 0
        if self.shard == 0:
            self._last_epoch_empty = not self._found_in_epoch
            self._found_in_epoch = False

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _unreadable(shard: Shard, error: OSError) -> EchoError:
    return EchoError(f"cannot read shard {shard.name}: {error.strerror}")


def check_cursor(
    cursor: dict[str, list[int]], num_streams: int, streams: list[SampleStream]
) -> None:
    """Check that `cursor` has an existing position for these streams, or for all streams."""
    all_streams = {str(number) for number in range(num_streams)}
    if set(cursor) not in (all_streams, {str(stream.number) for stream in streams}):
        raise EchoError(
            f"cursor: expected streams 0 to {num_streams - 1}, got "
            f"{', '.join(sorted(map(str, cursor)))[:100]}; resume with --num_streams {len(cursor)} "
            "and the --batch_size of the first start"
        )
    for stream in streams:
        position: Any = cursor[str(stream.number)]
        is_position = isinstance(position, list | tuple) and len(position) == 3
        if not is_position or not all(type(value) is int and value >= 0 for value in position):
            raise EchoError(
                f"cursor of stream {stream.number}: expected [epoch, shard, record], got "
                f"{str(position)[:100]}"
            )
        if position[1] >= len(stream.shards):
            raise EchoError(
                f"cursor of stream {stream.number}: expected a shard below {len(stream.shards)}, "
                f"got {position[1]}; check that the cursor belongs to this data"
            )
