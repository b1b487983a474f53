"""Global batches on the mesh, from the rows that each host loads."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from echo_eqx.errors import UsageError
from echo_eqx.sharding.mesh import batch_sharding

logger = logging.getLogger(__name__)


def owned_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Sorted rows of a global batch that this process's devices hold."""
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
            f"--num_streams: expected a multiple of the {jax.process_count()} hosts, got "
            f"{num_streams}; set one, with at least as many shards"
        )
    return streams


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the mesh, the names of this host's rows, and the data cursor after the batch."""

    arrays: Any
    keys: list[str]
    cursor: dict[str, list[int]]


class DeviceLoader:
    """Puts the batches of `source` on the mesh, each as a `kind`, and measures the time waited.

    `source` is a `DataLoader` or `CropStream`: an endless iterator of `LoadedBatch`es, whose
    `examples` has, for each counter, a sentence about its first case.
    """

    def __init__(self, source: Any, kind: Callable[..., Any], mesh: Mesh, batch_size: int):
        self._source, self._kind = source, kind
        self._sharding = batch_sharding(mesh)
        self._rows = owned_rows(mesh, batch_size)
        self._batch_size = batch_size
        self.waited = 0.0
        """Seconds spent waiting for data."""
        self.counts: Mapping[str, int] = {}
        """Samples skipped or truncated so far, by their key in `metrics.jsonl`."""
        self._logged: set[str] = set()

    def next(self) -> DeviceBatch:
        started = time.perf_counter()
        loaded = next(self._source)
        self.waited += time.perf_counter() - started
        self.counts = loaded.counts
        arrays = {name: self._put(array) for name, array in loaded.batch._asdict().items()}
        return DeviceBatch(self._kind(**arrays), loaded.keys, loaded.cursor)

    def log_warnings(self, prefix: str = "") -> None:
        """Log an example of everything that the source has skipped or truncated, once per kind."""
        for name in list(self._source.examples):
            if name not in self._logged:
                logger.warning(f"{prefix}{self._source.examples[name]}")
                self._logged.add(name)

    def close(self) -> None:
        self._source.close()

    def _put(self, local: np.ndarray) -> jax.Array:
        """This process's rows of a global array. float16 is sent as it is and widened there."""
        shape = (self._batch_size, *local.shape[1:])
        shards = []
        for device, index in self._sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            start, stop, _ = index[0].indices(self._batch_size)
            first = int(np.searchsorted(self._rows, start))
            shard = jax.device_put(local[first : first + stop - start], device)
            shards.append(shard.astype(np.float32) if shard.dtype == np.float16 else shard)
        return jax.make_array_from_single_device_arrays(shape, self._sharding, shards)
