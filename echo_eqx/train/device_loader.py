"""From a host's rows of the stream to global batches on the mesh."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from echo_eqx.errors import UsageError
from echo_eqx.sharding.mesh import batch_sharding


def owned_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Rows of a global batch that devices of this process work on, in order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    rows = {row for index in indices if index for row in range(*index[0].indices(batch_size))}
    return np.array(sorted(rows))


def owned_streams(mesh: Mesh, batch_size: int, num_streams: int) -> Sequence[int]:
    """Sample streams that this process reads.

    **Raises**: `UsageError` if the rows of one stream would be split between two hosts.
    """
    per_stream = batch_size // num_streams
    rows = owned_rows(mesh, batch_size)
    streams = sorted(set((rows // per_stream).tolist()))
    if len(rows) != len(streams) * per_stream:
        raise UsageError(
            f"{num_streams} streams do not divide over {jax.process_count()} hosts; set "
            "--num_streams to a multiple of that, with at least as many shards"
        )
    return streams


@runtime_checkable
class Source(Protocol):
    """Endless batches: arrays by name, names of this host's rows, the cursor behind them, and
    counts of what was skipped or cut."""

    @property
    def first(self) -> Mapping[str, str]:
        """A sentence on the first case of what is counted."""
        ...

    def __next__(self) -> Any: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the mesh, with the names of this host's rows and the cursor behind it."""

    batch: Any
    keys: list[str]
    cursor: dict[str, list[int]]


class DeviceLoader:
    """Batches of a source, put on the mesh as a `kind`, and how long the loop has waited for
    them."""

    def __init__(self, source: Source, kind: Callable[..., Any], mesh: Mesh, batch_size: int):
        self._source, self._kind = source, kind
        self._sharding = batch_sharding(mesh)
        self._rows = owned_rows(mesh, batch_size)
        self._batch_size = batch_size
        self.waited = 0.0
        self.counts: Mapping[str, int] = {}
        """What was skipped or cut up to the last batch, by its name in `metrics.jsonl`."""
        self._told: set[str] = set()

    def next(self) -> DeviceBatch:
        started = time.perf_counter()
        step = next(self._source)
        self.waited += time.perf_counter() - started
        self.counts = step.counts
        device_batch = {name: self._place(array) for name, array in step.batch._asdict().items()}
        return DeviceBatch(self._kind(**device_batch), step.keys, step.cursor)

    def news(self) -> list[str]:
        """Sentences on the first case of what is counted, each once."""
        found = {name: self._source.first[name] for name in list(self._source.first)}
        fresh = [sentence for name, sentence in found.items() if name not in self._told]
        self._told |= set(found)
        return fresh

    def close(self) -> None:
        self._source.close()

    def _place(self, local: np.ndarray) -> jax.Array:
        def rows(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self._batch_size)
            first = int(np.searchsorted(self._rows, start))
            return local[first : first + stop - start]

        shape = (self._batch_size, *local.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, rows)
