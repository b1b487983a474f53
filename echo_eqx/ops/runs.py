"""Run folders as the monitor sees them: which there are, how they fare, and their curves."""

import contextlib
import json
import os
import re
import threading
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np

FIELDS = (
    "loss",
    "eval_loss",
    "samples_per_second",
    "step_seconds",
    "data_wait",
    "gradient_norm",
    "learning_rate",
    "skipped_updates",
    "broken_records",
    "device_memory_bytes",
)
"""Of a line of metrics.jsonl, drawn each as a curve."""
MAX_BUCKETS = 1000
"""Of a curve. Each is drawn from its lowest to its highest value: two points."""
_CHUNK = 8 << 20
_LONG = 32 << 20
"""Bytes left to read above which a preview is shown until then."""
_GLANCES, _GLANCE = 256, 4 << 10
"""Places of a long file that its preview is made of, and bytes of each."""
_TAIL = 64 << 10
_SAMPLE_FILE = re.compile(r"(\d{1,6})(\.wav|\.ref\.wav|\.txt)")


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
        known = np.add.reduceat(np.isfinite(values).astype(np.int64), edges)
        means = np.add.reduceat(np.nan_to_num(values), edges) / np.where(known, known, np.nan)
        last = np.minimum(edges + stride, len(steps)) - 1
        found = {"start": start, "full": full, "stride": stride, "step": _plain(steps[last])}
        found["mean"] = _plain(means)
        if stride > 1:
            found["low"] = _plain(np.fmin.reduceat(values, edges))
            found["high"] = _plain(np.fmax.reduceat(values, edges))
        return found


def _plain(values: np.ndarray) -> list[float | None]:
    """To nine digits, for JSON, which knows no number that is not finite."""
    return [float(f"{x:.9g}") if x == x else None for x in values.tolist()]


Columns = dict[str, tuple[np.ndarray, np.ndarray]]


def read_lines(chunk: bytes) -> tuple[Columns, int]:
    """Steps and values by field, and how many of these whole lines could not be read."""
    if not chunk:
        return {}, 0
    try:
        return _read_at_once(chunk), 0
    except (ValueError, NotImplementedError):  # some line is not as it should be
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
        self._path = path
        self._lock = threading.Lock()
        self._version = int(time.time() * 1000)  # a restarted monitor is not taken for this one
        self._restart()

    def _restart(self) -> None:
        self._version += 1
        self._offset, self._last, self._unreadable = 0, b"", 0
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
        with contextlib.suppress(OSError), self._path.open("rb") as file:
            for start in np.linspace(0, size - _GLANCE, _GLANCES).astype(int).tolist():
                piece = os.pread(file.fileno(), _GLANCE, start)
                lines += piece[piece.find(b"\n") + 1 if start else 0 : piece.rfind(b"\n") + 1]
        for name, (steps, values) in read_lines(bytes(lines))[0].items():
            curves[name].extend(steps, values)
        return curves

    def _size(self) -> int:
        try:
            return self._path.stat().st_size if self._is_inside() else 0
        except OSError:
            return 0

    def _is_inside(self) -> bool:
        return self._path.resolve().is_relative_to(self._path.parent)

    def _advance(self, seconds: float) -> float:
        until = time.monotonic() + seconds
        try:
            if not self._is_inside():
                return 1.0
            with self._path.open("rb") as file:
                if self._was_cut(file):
                    self._restart()
                file.seek(self._offset)
                size = self._path.stat().st_size
                while chunk := _whole_lines(file):
                    self._take(chunk)
                    file.seek(self._offset)
                    if time.monotonic() > until:
                        return min(self._offset / size, 1.0) if size else 1.0
        except OSError:
            if self._offset:
                self._restart()
        return 1.0

    def _was_cut(self, file: Any) -> bool:
        """A resumed run cuts its last lines off and may soon be as long as before."""
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) != self._last

    def _take(self, chunk: bytes) -> None:
        columns, unreadable = read_lines(chunk)
        self._unreadable += unreadable
        for name, (steps, values) in columns.items():
            self._curves[name].extend(steps, values)
        self._offset += len(chunk)
        self._last = chunk[-256:]


def _whole_lines(file: Any) -> bytes:
    """The next lines up to their last end; a line that is still being written waits."""
    chunk = file.read(_CHUNK)
    end = chunk.rfind(b"\n") + 1
    while not end and len(chunk) % _CHUNK == 0 and (more := file.read(_CHUNK)):
        chunk += more
        end = chunk.rfind(b"\n") + 1
    return chunk[:end]


class Run:
    """One run folder. Nothing is read through links that lead out of it."""

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.metrics = Metrics(self.path / "metrics.jsonl")
        self._tail: tuple[Any, dict[str, Any]] = (None, {})

    def file(self, *parts: str) -> Path | None:
        """A regular file of this folder, or None."""
        try:
            path = self.path.joinpath(*parts).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            return None
        return path if path.is_relative_to(self.path) and path.is_file() else None

    def json(self, name: str) -> Any:
        """What a JSON file of this folder holds; None if it cannot be read."""
        path = self.file(name)
        try:
            return json.loads(path.read_bytes(), parse_constant=str) if path else None
        except (OSError, ValueError):
            return None

    def status(self) -> dict[str, Any]:
        """The last step, seconds since it was reported, and between such reports."""
        path = self.file("metrics.jsonl")
        config = self.json("config.json")
        status: dict[str, Any] = {"num_steps": _get(config, "num_steps"), "step": None}
        if path is None:
            return status
        try:
            stat = path.stat()
            if self._tail[0] != (stat.st_mtime_ns, stat.st_size):
                self._tail = ((stat.st_mtime_ns, stat.st_size), _newest(path, stat.st_size))
        except OSError:
            return status
        return status | self._tail[1] | {"age": max(0.0, time.time() - stat.st_mtime)}

    def sample_steps(self) -> list[int]:
        """Steps with samples, the newest first."""
        try:
            names = [entry.name for entry in (self.path / "samples").iterdir()]
        except OSError:
            return []
        found = (re.fullmatch(r"step_(\d{1,18})", name) for name in names)
        return sorted({int(match[1]) for match in found if match}, reverse=True)

    def samples(self, step: int) -> list[dict[str, Any]]:
        """By index: the text, and which of `wav` and `ref` there are, with their sizes."""
        folder = self.path / "samples" / f"step_{step:09d}"
        rows: dict[int, dict[str, Any]] = {}
        try:
            names = sorted(entry.name for entry in folder.iterdir())
        except OSError:
            return []
        for name in names:
            path = self.sample_file(step, name)
            if path is None:
                continue
            index, kind = _SAMPLE_FILE.fullmatch(name).groups()  # pyright: ignore
            row = rows.setdefault(int(index), {"index": int(index)})
            try:
                if kind == ".txt":
                    with path.open("rb") as file:
                        row["text"] = file.read(10_000).decode(errors="replace").strip()
                else:
                    row["wav" if kind == ".wav" else "ref"] = path.stat().st_size
            except OSError:
                continue
        return [rows[index] for index in sorted(rows)]

    def sample_file(self, step: int, name: str) -> Path | None:
        """A sample's .wav or .txt, or None for all else."""
        if _SAMPLE_FILE.fullmatch(name) is None:
            return None
        return self.file("samples", f"step_{step:09d}", name)


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _newest(path: Path, size: int) -> dict[str, Any]:
    """The last step of the file, and the seconds between its last two reports."""
    with path.open("rb") as file:
        file.seek(max(0, size - _TAIL))
        tail = file.read(_TAIL)
    step, times = None, []
    for line in tail[: tail.rfind(b"\n") + 1].splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(_get(row, "step"), int):
            step = row["step"]
        if isinstance(_get(row, "time"), int | float):
            times.append(row["time"])
    every = times[-1] - times[-2] if len(times) > 1 else None
    return {"step": step, "every": every}


class Runs:
    """The runs of a folder: itself if it is one, and its sub-folders."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._runs: dict[str, Run] = {}
        self._asked = 0.0
        self._lock = threading.Lock()

    def all(self) -> dict[str, Run]:
        """By name. Looks anew, since runs may begin at any time."""
        self._asked = time.monotonic()
        with self._lock:
            found = {}
            for path in self._folders():
                known = self._runs.get(path.name)
                found[path.name] = known if known and known.path == path else Run(path)
            self._runs = found
            return found

    def read_ahead(self) -> None:
        """Read the runs there are, while no page asks for them, so that one finds them read."""
        for run in self.all().values():
            while not run.metrics.read_on(0.1):
                time.sleep(0.001)
                while time.monotonic() - self._asked < 1.0:
                    time.sleep(0.1)

    def _folders(self) -> list[Path]:
        try:
            inner = sorted(self.root.iterdir())
        except OSError:
            inner = []
        return [path for path in (self.root, *inner) if self._is_run(path)]

    def _is_run(self, path: Path) -> bool:
        try:
            within = path.resolve() == self.root / path.relative_to(self.root)
            return within and any((path / f).is_file() for f in ("config.json", "metrics.jsonl"))
        except (OSError, RuntimeError):
            return False
