"""The curves of a run: `metrics.jsonl`, followed as it grows, in buckets that a page can draw."""

import contextlib
import json
import math
import os
import threading
import time
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from echo_eqx.ops.inside import Trouble, open_inside

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
"""Of a line of metrics.jsonl, drawn each as a curve."""
LARGEST_STEP = 2**53
"""From here on a browser rounds whole numbers."""
MAX_BUCKETS = 1000
"""Of a curve. Each is drawn from its lowest to its highest value: two points."""
_CHUNK = 2 << 20
"""Bytes read at once; a line as long as that is none of the trainer's."""
_LONG = 32 << 20
"""Bytes left to read above which a preview is shown until then."""
_GLANCES, _GLANCE = 256, 4 << 10
"""Places of a long file that its preview is made of, and bytes of each."""


class Curve:
    """The values of one field by step, all of them, and drawn in buckets of `stride` values.

    The stride is a power of two and grows with the curve, so a full bucket stays what it is until
    the next doubling, and whoever has it need not get it again.
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

    def buckets(self, have_stride: int, have: int) -> dict[str, Any] | None:
        """What someone lacks who has the first `have` buckets of `have_stride`; None if nothing.

        `start` is the number of the first bucket given and `full` how many will not change.
        """
        stride, size = self.stride, len(self._values)
        full = size // stride
        start = have if have_stride == stride and 0 <= have <= full else 0
        first = start * stride
        if first == size:
            return None
        steps = np.frombuffer(self._steps[first:])
        values = np.frombuffer(self._values[first:]).copy()
        values[~np.isfinite(values)] = np.nan
        edges = np.arange(0, len(values), stride)
        last = np.minimum(edges + stride, len(steps)) - 1
        known = np.add.reduceat(np.isfinite(values).astype(np.int64), edges)
        # Divided before they are summed, since sums of large values overflow.
        shares = np.nan_to_num(values) / np.repeat(np.maximum(known, 1), last + 1 - edges)
        means = np.where(known, np.add.reduceat(shares, edges), np.nan)
        found = {"start": start, "full": full, "stride": stride, "step": _plain(steps[last])}
        found["mean"] = _plain(means)
        if stride > 1:
            found["low"] = _plain(np.fmin.reduceat(values, edges))
            found["high"] = _plain(np.fmax.reduceat(values, edges))
        return found


def _plain(values: np.ndarray) -> list[float | None]:
    """To nine digits, for JSON, which knows no number that is not finite."""
    return [float(f"{x:.9g}") if math.isfinite(x) else None for x in values.tolist()]


Columns = dict[str, tuple[np.ndarray, np.ndarray]]


def read_lines(chunk: bytes) -> tuple[Columns, int]:
    """Steps and values by field, and how many of these whole lines could not be read."""
    if not chunk:
        return {}, 0
    try:
        return _read_at_once(chunk), 0
    except Exception:  # of many kinds between versions: some line is not as it should be
        return _read_one_by_one(chunk)


def _read_at_once(chunk: bytes) -> Columns:
    """Several times as fast as the json module.

    **Raises**: `ValueError` if a line is not a JSON object with numbers for the step and fields.
    """
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


def _read_one_by_one(chunk: bytes) -> tuple[Columns, int]:
    found: dict[str, list[tuple[float, float]]] = {}
    lines = chunk.split(b"\n")[:-1]
    unreadable = 0
    for line in lines:
        try:
            row = json.loads(line)
            step = float(row["step"])
            if not abs(step) < LARGEST_STEP:
                raise ValueError("a step out of range")
            values = {name: float(row[name]) for name in FIELDS if row.get(name) is not None}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
            unreadable += 1
            continue
        for name, value in values.items():
            found.setdefault(name, []).append((step, value))
    arrays = {name: np.array(pairs, np.float64).T for name, pairs in found.items()}
    return {name: (steps, values) for name, (steps, values) in arrays.items()}, unreadable


class Metrics:
    """Follows one `metrics.jsonl`: what was read is not read again, unless the file was cut."""

    def __init__(self, path: Path):
        self._root, self._name = path.parent.resolve(), path.name
        self._lock = threading.Lock()
        self._version = int(time.time() * 1000)  # a restarted monitor is not taken for this one
        self._restart()

    def _restart(self) -> None:
        self._version += 1
        self._offset, self._last, self._unreadable = 0, b"", 0
        self._in_long_line = False
        self._curves = {name: Curve() for name in FIELDS}

    def read_on(self, seconds: float) -> bool:
        """Read for `seconds`; True once all is read."""
        with self._lock:
            return self._advance(seconds) == 1

    def news(self, version: int, have: dict[str, tuple[int, int]], seconds: float) -> dict:
        """Read on for `seconds`, then return what someone with `have` of `version` lacks.

        `have` gives the stride and the number of full buckets by field. `read` in the result is
        the part of the file that has been read. Of a long file there is a preview at once, with
        the negative version, and then nothing until all is read.
        """
        size = self._size()
        if abs(version) != self._version and size - self._offset > _LONG:
            # Without the lock, which whoever reads on has for a while.
            return self._news(-self._version, self._offset / size, self._preview(size), {})
        with self._lock:
            read = self._advance(seconds)
            if version == -self._version and read < 1:
                return self._news(version, read, {}, {})
            known = have if version == self._version else {}
            return self._news(self._version, read, self._curves, known)

    def _news(
        self,
        version: int,
        read: float,
        curves: dict[str, Curve],
        have: dict[str, tuple[int, int]],
    ) -> dict[str, Any]:
        found = {name: curve.buckets(*have.get(name, (0, 0))) for name, curve in curves.items()}
        return {
            "version": version,
            "read": read,
            "unreadable": self._unreadable,
            "curves": {name: news for name, news in found.items() if news is not None},
        }

    def _preview(self, size: int) -> dict[str, Curve]:
        """Curves from a few lines at places all over the file, up to its end."""
        curves = {name: Curve() for name in FIELDS}
        lines = bytearray()
        with contextlib.suppress(OSError, Trouble), self._open() as file:
            for start in np.linspace(0, size - _GLANCE, _GLANCES).astype(int).tolist():
                piece = os.pread(file.fileno(), _GLANCE, start)
                lines += piece[piece.find(b"\n") + 1 if start else 0 : piece.rfind(b"\n") + 1]
        for name, (steps, values) in read_lines(bytes(lines))[0].items():
            curves[name].extend(steps, values)
        return curves

    def _open(self) -> BinaryIO:
        return open_inside(self._root, self._name)

    def _size(self) -> int:
        try:
            with self._open() as file:
                return os.fstat(file.fileno()).st_size
        except (OSError, Trouble):
            return 0

    def _advance(self, seconds: float) -> float:
        """The part of the file that has been read after `seconds`; 1 if there is nothing to read.

        What keeps it from being read is told by `Run.status`.
        """
        until = time.monotonic() + seconds
        try:
            with self._open() as file:
                if self._was_cut(file):
                    self._restart()
                file.seek(self._offset)
                while self._take(file.read(_CHUNK)):
                    file.seek(self._offset)
                    if time.monotonic() > until:
                        size = os.fstat(file.fileno()).st_size
                        return min(self._offset / size, 1.0) if size else 1.0
        except (OSError, Trouble):
            if self._offset:
                self._restart()
        return 1.0

    def _was_cut(self, file: BinaryIO) -> bool:
        """A resumed run cuts its last lines off and may soon be as long as before."""
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) != self._last

    def _take(self, chunk: bytes) -> int:
        """Take whole lines from the next bytes; how many bytes. A line still being written waits,
        and one that fills a chunk is passed over, so that memory is bounded."""
        start, end = 0, chunk.rfind(b"\n") + 1
        if self._in_long_line:
            start = chunk.find(b"\n") + 1
            self._in_long_line = not end
        elif not end and len(chunk) == _CHUNK:
            self._unreadable += 1
            self._in_long_line = True
        if self._in_long_line:
            start = end = len(chunk)
        columns, unreadable = read_lines(chunk[start:end])
        self._unreadable += unreadable
        for name, (steps, values) in columns.items():
            self._curves[name].extend(steps, values)
        self._offset += end
        if end:
            self._last = chunk[max(0, end - 256) : end]
        return end
