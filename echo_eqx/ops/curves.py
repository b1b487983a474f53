"""The curves of a run: `metrics.jsonl`, read as it grows, in buckets that a page can draw."""

import math
import os
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.ops.run_files import open_inside

FIELDS = (
    "loss",
    "eval_loss",
    "samples_per_second",
    "step_time_s",
    "data_wait_fraction",
    "grad_norm",
    "lr",
    "skipped_updates",
    "broken_records",
    "peak_memory_bytes",
)
"""Keys of metrics.jsonl, each drawn as a curve."""
LARGEST_STEP = 2**53
"""Browsers round larger integers."""
LARGEST_VALUE = 1e100
"""Larger values, infinities and NaN become gaps: they would hide the other runs' curves."""
MAX_BUCKETS = 1000
"""Buckets per curve. Each is drawn as two points, its lowest and its highest value."""
_CHUNK_BYTES = 2 << 20
"""Bytes read at a time. The trainer never writes a line this long."""


class Curve:
    """All values of one key, drawn in buckets of `stride` values.

    The stride is a power of two that grows with the curve. A full bucket does not change before the
    stride doubles, so it is sent only once.
    """

    def __init__(self) -> None:
        self._steps, self._values = array("d"), array("d")

    def extend(self, steps: np.ndarray, values: np.ndarray) -> None:
        self._steps.frombytes(steps.astype(np.float64).tobytes())
        self._values.frombytes(values.astype(np.float64).tobytes())

    @property
    def stride(self) -> int:
        stride = 1
        while len(self._values) > stride * MAX_BUCKETS:
            stride *= 2
        return stride

    def buckets(self, known_stride: int = 0, known: int = 0) -> dict[str, Any] | None:
        """The buckets that are new to a page with the first `known` buckets of `known_stride`.

        None if there are none. `start` is the index of the first bucket returned; the first `full`
        buckets of the curve will not change.
        """
        stride, size = self.stride, len(self._values)
        full = size // stride
        start = known if known_stride == stride and known <= full else 0
        first = start * stride
        if first == size:
            return None
        steps = np.frombuffer(self._steps[first:])
        values = np.frombuffer(self._values[first:]).copy()
        values[~(np.abs(values) < LARGEST_VALUE)] = np.nan
        edges = np.arange(0, len(values), stride)
        last = np.minimum(edges + stride, len(steps)) - 1
        counts = np.add.reduceat(np.isfinite(values).astype(np.float64), edges)
        counts[counts == 0] = np.nan
        means = np.add.reduceat(np.nan_to_num(values), edges) / counts
        found = {"start": start, "full": full, "stride": stride}
        found |= {"step": _to_json(steps[last]), "mean": _to_json(means)}
        if stride > 1:
            found["low"] = _to_json(np.fmin.reduceat(values, edges))
            found["high"] = _to_json(np.fmax.reduceat(values, edges))
        return found


def _to_json(values: np.ndarray) -> list[float | None]:
    """Values rounded to nine digits; NaN and infinities, which JSON lacks, become null."""
    return [float(f"{x:.9g}") if math.isfinite(x) else None for x in values.tolist()]


Columns = dict[str, tuple[np.ndarray, np.ndarray]]


def read_lines(chunk: bytes) -> tuple[list[Columns], int]:
    """Steps and values by key, in parts, and the number of lines that could not be read.

    `chunk` consists of complete lines.
    """
    try:
        return [_read_all(chunk)], 0
    except Exception:  # pyarrow raises many kinds; some line is malformed
        lines = chunk.splitlines(keepends=True)
    if len(lines) < 2:
        return [], 1
    middle = len(lines) // 2
    first, unreadable = read_lines(b"".join(lines[:middle]))
    second, more = read_lines(b"".join(lines[middle:]))
    return first + second, unreadable + more


def _read_all(chunk: bytes) -> Columns:
    """**Raises**: if a line is not a JSON object with numbers for the step and fields."""
    import pyarrow.json  # optional: only the monitor reads so many lines

    columns = [(name, pyarrow.float64()) for name in ("step", *FIELDS)]
    table = pyarrow.json.read_json(
        pyarrow.py_buffer(chunk),
        pyarrow.json.ReadOptions(block_size=1 << 20),
        pyarrow.json.ParseOptions(pyarrow.schema(columns), unexpected_field_behavior="ignore"),
    )
    steps = table["step"]
    if steps.null_count or len(steps) != chunk.count(b"\n"):
        raise ValueError("a line without a step")
    if not (np.abs(steps.to_numpy()) < LARGEST_STEP).all():
        raise ValueError("a step out of range")
    found = {}
    for name in FIELDS:
        values = table[name]
        if values.null_count == 0:
            found[name] = steps.to_numpy(), values.to_numpy()
        elif values.null_count < len(values):
            found[name] = steps.filter(values.is_valid()).to_numpy(), values.drop_null().to_numpy()
    return found


class MetricsFile:
    """Follows one `metrics.jsonl`. Lines are read only once, unless the file was truncated."""

    def __init__(self, path: Path):
        self._root, self._name = path.parent.resolve(), path.name
        self._lock = threading.Lock()
        self._version = int(time.time() * 1000)  # a restarted monitor has other versions
        self._reset()

    def _reset(self) -> None:
        self._version += 1
        self._offset, self._last_bytes, self._unreadable = 0, b"", 0
        self._curves = {name: Curve() for name in FIELDS}

    def update(
        self, version: int, known: dict[str, tuple[int, int]], seconds: float
    ) -> dict[str, Any]:
        """Read on for up to `seconds`, and return the buckets that are new to a page.

        The page has the buckets `known` of `version`: stride and number of full buckets by key. In
        the result, `read` is the fraction of the file that has been read.
        """
        with self._lock:
            read = self._read_more(time.monotonic() + seconds)
            if version != self._version:
                known = {}
            found = {
                name: curve.buckets(*known.get(name, (0, 0)))
                for name, curve in self._curves.items()
            }
            return {
                "version": self._version,
                "read": read,
                "unreadable": self._unreadable,
                "curves": {name: buckets for name, buckets in found.items() if buckets},
            }

    def _read_more(self, deadline: float) -> float:
        """Read until the end or `deadline`; returns the fraction of the file that has been read."""
        try:
            with open_inside(self._root, self._name) as file:
                # A resumed run truncates the file, which may soon be as long as before.
                file.seek(self._offset - len(self._last_bytes))
                if file.read(len(self._last_bytes)) != self._last_bytes:
                    self._reset()
                while True:
                    file.seek(self._offset)
                    if not self._add(file.read(_CHUNK_BYTES)):
                        return 1.0
                    if time.monotonic() > deadline:
                        return min(self._offset / max(1, os.fstat(file.fileno()).st_size), 1.0)
        except OSError:  # which `Run.status` reports
            if self._offset:
                self._reset()
        return 1.0

    def _add(self, chunk: bytes) -> int:
        """Add the complete lines in the next bytes; returns how many bytes they were.

        A line that is still being written waits, unless it fills a chunk: then it is unreadable.
        """
        end = chunk.rfind(b"\n") + 1
        if end:
            parts, unreadable = read_lines(chunk[:end])
            self._unreadable += unreadable
            for name, (steps, values) in (item for part in parts for item in part.items()):
                self._curves[name].extend(steps, values)
        elif len(chunk) == _CHUNK_BYTES:
            end = len(chunk)
            self._unreadable += 1
        if end:
            self._offset += end
            self._last_bytes = chunk[max(0, end - 256) : end]
        return end
