"""Run folders as the monitor shows them: their state and their samples."""

import itertools
import json
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from echo_eqx.ops.curves import LARGEST_STEP, Metrics
from echo_eqx.ops.run_files import FileMissing, FileProblem, find_inside, open_inside

MAX_SAMPLES = 64
"""Samples of a step that are shown; more players would stop a browser."""
_TAIL_BYTES = 256 << 10
_MAX_JSON_BYTES = 4 << 20
_STEP_FOLDER = re.compile(r"step_([0-9]{9}|[1-9][0-9]{9,14})")
_SAMPLE_FILE = re.compile(r"(0|[1-9][0-9]{0,5})(\.wav|\.original\.wav|\.ref\.wav|\.txt)")

T = TypeVar("T")


class Run:
    """One run folder. Nothing is read through a link out of it.

    Whatever is in the folder, only `open_sample` raises: `status` reports the problems.
    """

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.metrics = Metrics(self.path / "metrics.jsonl")
        self._newest: tuple[tuple[int, int], dict[str, Any]] = (0, 0), {}

    def json(self, name: str) -> Any:
        """The content of a JSON file of this folder; None if it cannot be read."""
        return _attempt([], lambda: self._read_json(name, object))

    def status(self) -> dict[str, Any]:
        """Where the run is.

        `step` of `num_steps`; seconds `every` report takes, since the last one (`age`) and until
        the end (`left`); the last step with `samples`; `saved` if it was stopped and has saved; and
        `problems` in sentences.
        """
        problems: list[str] = []
        config = _attempt(problems, lambda: self._read_json("config.json", dict)) or {}
        starts = _attempt(problems, lambda: self._read_json("environment.json", list)) or [{}]
        steps = self.sample_steps(problems)
        newest = _attempt(problems, self._read_newest) or {}
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
            "saved": _get(_get(starts[-1], "end"), "step") is not None,
            "problems": problems,
        }

    def sample_steps(self, problems: list[str] | None = None) -> list[int]:
        """Steps with samples, the newest first."""
        names = self._sample_files([] if problems is None else problems)
        matches = (_STEP_FOLDER.fullmatch(name) for name in names)
        return sorted((int(match[1]) for match in matches if match), reverse=True)

    def samples(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """The first samples of a step, and how many there are.

        Each has its `index` and `text`, and the sizes of `wav`, `original` and `ref` where there
        are such files.
        """
        names = self._sample_files([], _step_folder(step))
        matches = (_SAMPLE_FILE.fullmatch(name) for name in names)
        indices = sorted({int(match[1]) for match in matches if match})
        return [self._sample(step, index) for index in indices[:MAX_SAMPLES]], len(indices)

    def _sample_files(self, problems: list[str], *parts: str) -> list[str]:
        found = _attempt(problems, lambda: os.listdir(find_inside(self.path, "samples", *parts)))
        return found or []

    def _sample(self, step: int, index: int) -> dict[str, Any]:
        row = {
            "index": index,
            "text": _attempt([], lambda: self._sample_text(step, index)),
            "wav": _attempt([], lambda: self._sample_bytes(step, f"{index}.wav")),
            "original": _attempt([], lambda: self._sample_bytes(step, f"{index}.original.wav")),
            "ref": _attempt([], lambda: self._sample_bytes(step, f"{index}.ref.wav")),
        }
        return {name: value for name, value in row.items() if value is not None}

    def _sample_text(self, step: int, index: int) -> str:
        with self.open_sample(step, f"{index}.txt") as file:
            return file.read(10_000).decode(errors="replace").strip()

    def _sample_bytes(self, step: int, name: str) -> int:
        with self.open_sample(step, name) as file:
            return os.fstat(file.fileno()).st_size

    def open_sample(self, step: int, name: str) -> BinaryIO:
        """A .wav or .txt file of a sample. **Raises**: `FileProblem` for anything else."""
        if _SAMPLE_FILE.fullmatch(name) is None:
            raise FileMissing(f"{name} is not a sample")
        return open_inside(self.path, "samples", _step_folder(step), name)

    def _read_json(self, name: str, kind: type) -> Any:
        with open_inside(self.path, name) as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise FileProblem(f"{name}: expected at most {_MAX_JSON_BYTES >> 20} MiB, got more")
        try:
            value = _parse_json(data)
        except RecursionError:
            raise FileProblem(f"{name} is nested too deeply to be read") from None
        except ValueError:
            raise FileProblem(f"{name} is not valid JSON") from None
        if not isinstance(value, kind):
            expected = {dict: "an object", list: "a list"}[kind]
            raise FileProblem(f"{name}: expected {expected}, got {type(value).__name__}")
        return value

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
            row = _parse_json(line)
        except (ValueError, RecursionError):
            continue
        found, moment = _number(_get(row, "step")), _number(_get(row, "time"))
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


def _attempt(problems: list[str], read: Callable[[], T]) -> T | None:
    """What `read` returns; None if it fails, which is a problem unless the file is missing."""
    try:
        return read()
    except FileMissing:
        pass
    except FileProblem as problem:
        problems.append(str(problem))
    except OSError as error:
        problems.append(f"cannot read {Path(error.filename or 'a file').name}: {error.strerror}")
    return None


def _step_folder(step: int) -> str:
    return f"step_{step:09d}"


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _number(value: Any) -> int | float | None:
    return value if type(value) in (int, float) and abs(value) < LARGEST_STEP else None


def _parse_json(data: bytes) -> Any:
    """JSON in which numbers that a browser cannot hold become text."""
    return json.loads(data, parse_float=_float, parse_int=_int, parse_constant=str)


def _float(text: str) -> float | str:
    return value if math.isfinite(value := float(text)) else text


def _int(text: str) -> int | str:
    return int(text) if len(text) <= 15 else text


class Runs:
    """The runs of a folder: itself if it is one, and those of its sub-folders that are."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()

    def all(self) -> dict[str, Run]:
        """By name, listed anew at each call, since runs may begin at any time."""
        with self._lock:
            known = {run.path: run for run in self._runs.values()}
            self._runs = {}
            for path in self._folders():
                # Bytes that are not UTF-8 are escaped, after which two names may be equal.
                name = unique = os.fsencode(path.name).decode(errors="backslashreplace")
                for number in itertools.count(2):
                    if unique not in self._runs:
                        break
                    unique = f"{name} ({number})"
                self._runs[unique] = known.get(path) or Run(path)
            return self._runs

    def _folders(self) -> list[Path]:
        try:
            return [path for path in (self.root, *sorted(self.root.iterdir())) if _is_run(path)]
        except OSError:
            return []


def _is_run(path: Path) -> bool:
    names = ("config.json", "metrics.jsonl")
    return not path.is_symlink() and any(os.path.lexists(path / name) for name in names)
