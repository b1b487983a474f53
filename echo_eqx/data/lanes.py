"""Lanes: walks through shards whose order is a function of the seed and the position alone.

Shards are dealt to lanes once, for the whole run; a lane goes through its own at its own pace, each
epoch in another order, and through the records of each in another order. Where a lane stands is
(epoch, shard, record), and the cursor is that of every lane.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.records import BrokenRecord, Sample, read_sample
from echo_eqx.data.shard_index import Entry, Skipped, index_tar
from echo_eqx.data.shards import Listing, Shard
from echo_eqx.errors import EchoError

DEAL, SHARDS, RECORDS, CROP = range(4)
"""What random numbers are for; a part of their entropy."""


def random_bits(count: int, *entropy: int) -> np.ndarray:
    """(count,) uint64. Raw bits stay the same from one NumPy version to the next, which the
    methods of a generator need not."""
    return np.random.Philox(np.random.SeedSequence(entropy)).random_raw(count)


def permutation(count: int, *entropy: int) -> np.ndarray:
    return np.argsort(random_bits(count, *entropy), kind="stable")


class BarrenLane(Exception):
    """A whole epoch without one record that is used."""


class Drawn(NamedTuple):
    shard: Shard
    key: str
    result: Sample | BrokenRecord
    used: bool
    """Whether it is a sample that the reader accepts."""
    place: tuple[int, int, int]
    """Index of the shard, epoch, and number of the record in its shard."""


class Lane:
    """A walk through the shards with indices `shards`; used by one thread at a time.

    Samples that `accepts` refuses are passed over. `on_skipped` is told of the members of each
    shard that are in no record, whenever it is opened.
    """

    def __init__(
        self,
        number: int,
        shards: Sequence[int],
        listing: Listing,
        seed: int,
        accepts: Callable[[Sample], bool],
        on_skipped: Callable[[Shard, list[Skipped]], object],
    ):
        self.number, self.shards, self.listing, self.seed = number, shards, listing, seed
        self._accepts, self._on_skipped = accepts, on_skipped
        self.epoch = self.shard = self.record = 0
        self.ahead: Shard | None = None
        """The shard after the one being read, once one is."""
        self._barren = False
        """Whether the epoch before had no record that was used."""
        self._had_good = False
        """Whether a record of this epoch was used, or may have been before the cursor."""
        self._descriptor: int | None = None
        self._index = 0
        self._entries: list[Entry] = []
        self._order = np.zeros(0, np.int64)

    @property
    def position(self) -> list[int]:
        """Epoch, shard and record of what is read next."""
        return [self.epoch, self.shard, self.record]

    def go_to(self, position: Sequence[int]) -> None:
        """Read on from a position; no shard may be open."""
        self.epoch, self.shard, self.record = position
        self._had_good = self.shard + self.record > 0

    def all_shards(self) -> list[Shard]:
        return [self.listing.shards[index] for index in self.shards]

    def index_at(self, epoch: int, shard: int) -> int:
        """Index in the listing of the shard that is visited there."""
        order = permutation(len(self.shards), self.seed, SHARDS, self.number, epoch)
        return self.shards[int(order[shard])]

    def current(self) -> Shard:
        return self.listing.shards[self.index_at(self.epoch, self.shard)]

    def read(self, cache: ShardCache, latent_dim: int) -> Drawn:
        """The next record, good or broken.

        **Raises**: `EchoError` if a shard cannot be had or read; `BarrenLane` if none of a whole
        epoch was used.
        """
        while self._descriptor is None:
            if self._barren:
                raise BarrenLane
            self._open(cache)
        shard = self.listing.shards[self._index]
        number = int(self._order[self.record])
        entry = self._entries[number]
        try:
            result = read_sample(self._descriptor, entry, latent_dim)
        except BrokenRecord as error:
            result = error
        except OSError as error:
            raise EchoError(f"shard {shard.name} cannot be read: {error.strerror}") from None
        used = isinstance(result, Sample) and self._accepts(result)
        self._had_good |= used
        drawn = Drawn(shard, entry.key, result, used, (self._index, self.epoch, number))
        self.record += 1
        if self.record == len(self._order):
            self._leave()
        return drawn

    def _open(self, cache: ShardCache) -> None:
        self._index = self.index_at(self.epoch, self.shard)
        shard = self.listing.shards[self._index]
        self._descriptor = cache.open(shard)
        skipped: list[Skipped] = []
        try:
            self._entries = index_tar(self._descriptor, skipped)
        except OSError as error:
            raise EchoError(f"shard {shard.name} cannot be read: {error.strerror}") from None
        self._on_skipped(shard, skipped)
        self._order = permutation(len(self._entries), self.seed, RECORDS, self._index, self.epoch)
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
            self._barren = not self._had_good
            self._had_good = False

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def check_cursor(cursor: dict[str, list[int]], num_lanes: int, lanes: list[Lane]) -> None:
    """A cursor of these lanes, or of all there are, with positions that exist."""
    every = {str(number) for number in range(num_lanes)}
    if set(cursor) not in (every, {str(lane.number) for lane in lanes}):
        raise EchoError(
            f"the cursor has lanes {', '.join(sorted(map(str, cursor)))[:100]}; wanted "
            f"0 to {num_lanes - 1}; --lanes {len(cursor)} and the --batch_size from before go on"
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
