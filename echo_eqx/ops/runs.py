"""Run folders as the monitor shows them: status and samples."""

import contextlib
import itertools
import json
import os
import re
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from echo_eqx.ops.curves import LARGEST_STEP, MetricsFile
from echo_eqx.ops.run_files import find_inside, open_inside

MAX_SAMPLES = 64
"""Samples shown per step; more players would freeze a browser."""
_TAIL_BYTES = 256 << 10
_MAX_JSON_BYTES = 4 << 20
_STEP_FOLDER = re.compile(r"step_([0-9]{9}|[1-9][0-9]{9,14})")
_SAMPLE_FILE = re.compile(r"(0|[1-9][0-9]{0,5})(\.wav|\.original\.wav|\.ref\.wav|\.txt)")
_KINDS = {"text": ".txt", "wav": ".wav", "original": ".original.wav", "ref": ".ref.wav"}

T = TypeVar("T")


class Run:
    """One run folder. Nothing is read through a link out of it.

    Whatever the folder contains, only `open_sample` raises; `status` reports the problems.
    """

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self._newest: tuple[tuple[int, int], dict[str, Any]] = (0, 0), {}

    def text(self, name: str) -> str | None:
        """The content of a JSON file of this folder; None if it cannot be read."""
        data = _attempt([], name, lambda: self._read(name))
        return data if data is None else data.decode(errors="replace")

    def status(self) -> dict[str, Any]:
        """Progress and problems of the run, for the page.

        `step` of `num_steps`; seconds between reports (`every`), since the last one (`age`) and
        until the end (`left`); the last step with `samples`; `saved` if the run was stopped and has
        saved; and `problems` as sentences.
        """
        problems: list[str] = []
        config = self._read_json(problems, "config.json", dict) or {}
        starts = self._read_json(problems, "environment.json", list) or [{}]
        steps = self.sample_steps(problems)
        newest = _attempt(problems, "metrics.jsonl", self._read_newest) or {}
        step, written, pace = (newest.get(name) for name in ("step", "written", "pace"))
        num_steps, left = _number(config.get("num_steps")), None
        if pace is not None and step is not None and num_steps is not None:
            left = pace * max(0.0, num_steps - step)
        return {
            "num_steps": num_steps,
            "step": step,
            "age": None if written is None else max(0.0, time.time() - written),
            "every": newest.get("every"),
            "left": left,
            "samples": steps[0] if steps else None,
            "saved": isinstance(starts[-1], dict) and bool(starts[-1].get("end")),
            "problems": problems,
        }

    def sample_steps(self, problems: list[str] | None = None) -> list[int]:
        """Steps with samples, the newest first."""
        names = self._sample_files([] if problems is None else problems)
        matches = (_STEP_FOLDER.fullmatch(name) for name in names)
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def samples(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """The first samples of a step, and how many there are.

        Each has its `index` and `text`, and the sizes of `wav`, `original` and `ref` if these files
        exist.
        """
        names = self._sample_files([], _step_folder(step))
        matches = (_SAMPLE_FILE.fullmatch(name) for name in names)
        indices = sorted({int(match[1]) for match in matches if match})
        return [self._sample(step, index) for index in indices[:MAX_SAMPLES]], len(indices)

    def _sample_files(self, problems: list[str], *parts: str) -> list[str]:
        def names() -> list[str]:
            return os.listdir(find_inside(self.path, "samples", *parts))

        return _attempt(problems, "samples", names) or []

    def _sample(self, step: int, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"index": index}
        for kind, ending in _KINDS.items():
            with contextlib.suppress(OSError), self.open_sample(step, f"{index}{ending}") as file:
                if kind == "text":
                    row[kind] = file.read(10_000).decode(errors="replace").strip()
                else:
                    row[kind] = os.fstat(file.fileno()).st_size
        return row

    def open_sample(self, step: int, name: str) -> BinaryIO:
        """A .wav or .txt file of a sample. **Raises**: `OSError` for anything else."""
        if _SAMPLE_FILE.fullmatch(name) is None:
            raise FileNotFoundError(f"{name} is not a sample")
        return open_inside(self.path, "samples", _step_folder(step), name)

    def _read(self, name: str) -> bytes:
        with open_inside(self.path, name) as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES >> 20} MiB")
        return data

    def _read_json(self, problems: list[str], name: str, kind: type[T]) -> T | None:
        def read() -> T:
            value = json.loads(self._read(name))
            if not isinstance(value, kind):
                raise ValueError(f"expected a {kind.__name__}, got a {type(value).__name__}")
            return value

        return _attempt(problems, name, read)

    def _read_newest(self) -> dict[str, Any]:
        """The last step, when it was written, and seconds of a report and of a step."""
        with open_inside(self.path, "metrics.jsonl") as file:
            stat = os.fstat(file.fileno())
            version = stat.st_size, stat.st_mtime_ns
            if self._newest[0] != version:
                file.seek(max(0, stat.st_size - _TAIL_BYTES))
                lines = file.read(_TAIL_BYTES).split(b"\n")[:-1]
                self._newest = version, {"written": stat.st_mtime, **_pace(lines)}
        return self._newest[1]


def _pace(lines: list[bytes]) -> dict[str, Any]:
    step, reports = None, []
    for line in lines:
        try:
            row = json.loads(line)
            found, moment = _number(row.get("step")), _number(row.get("time"))
        except (ValueError, AttributeError, RecursionError):
            continue
        if found is not None and found == int(found):
            step = int(found)
            if moment is not None:
                reports.append((step, moment))
    between = [
        (later[1] - earlier[1], later[0] - earlier[0])
        for earlier, later in itertools.pairwise(reports)
        if later[1] > earlier[1] and later[0] > earlier[0]
    ]
    return {
        "step": step,
        "every": between[-1][0] if between else None,
        # The median, since a run may have been interrupted.
        "pace": statistics.median(s / n for s, n in between) if between else None,
    }


def _attempt(problems: list[str], name: str, read: Callable[[], T]) -> T | None:
    """What `read` returns; None if it fails, which is a problem unless the file is missing."""
    try:
        return read()
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"cannot read {name}: {getattr(error, 'strerror', None) or error}")
    return None


def _step_folder(step: int) -> str:
    return f"step_{step:09d}"


def _number(value: Any) -> int | float | None:
    return value if type(value) in (int, float) and abs(value) < LARGEST_STEP else None


class Runs:
    """The runs in a folder: the folder itself if it is one, and its subfolders that are."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._runs: dict[Path, Run] = {}
        self._lock = threading.Lock()

    def all(self) -> dict[str, Run]:
        """Runs by name, listed again at each call, because runs may begin at any time."""
        with self._lock:
            self._runs = {path: self._runs.get(path) or Run(path) for path in self._folders()}
            # Bytes that are not UTF-8 are escaped.
            return {
                os.fsencode(path.name).decode(errors="backslashreplace"): run
                for path, run in self._runs.items()
            }

    def _folders(self) -> list[Path]:
        try:
            return [path for path in (self.root, *sorted(self.root.iterdir())) if _is_run(path)]
        except OSError:
            return []


def _is_run(path: Path) -> bool:
    names = ("config.json", "metrics.jsonl")
    return not path.is_symlink() and any(os.path.lexists(path / name) for name in names)
