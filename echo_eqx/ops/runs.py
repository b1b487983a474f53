"""Run folders as the monitor sees them: which there are, how they fare, and their samples."""

import contextlib
import itertools
import json
import math
import os
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from echo_eqx.ops.curves import LARGEST_STEP, Metrics
from echo_eqx.ops.inside import Missing, Trouble, find_inside, open_inside, read_inside

SHOWN_SAMPLES = 64
"""Of a step, at most: more players would stop a browser."""
_TAIL = 256 << 10
_LARGEST_JSON = 4 << 20
_DEEPEST_JSON = 32
_STEP_FOLDER = re.compile(r"step_([0-9]{9,15})")
_SAMPLE_FILE = re.compile(r"([0-9]{1,6})(\.wav|\.original\.wav|\.ref\.wav|\.txt)")
_SAMPLE_PARTS = {".wav": "wav", ".original.wav": "original", ".ref.wav": "ref"}


class Run:
    """One run folder. Nothing is read through links that lead out of it.

    Whatever is in the folder, no method but `open_sample` fails: `status` says what is wrong.
    """

    def __init__(self, path: Path):
        self.path = path.resolve()
        self.metrics = Metrics(self.path / "metrics.jsonl")
        self._known: dict[str, tuple[tuple[int, ...], Any]] = {}

    def json(self, name: str) -> Any:
        """What a JSON file of this folder holds; None if it cannot be read."""
        return self._look([], name, self._read_json)

    def status(self) -> dict[str, Any]:
        """How the run fares: `step` of `num_steps`; seconds `every` report took and since the last
        one (`age`), and until the end (`left`); the last step with `samples`; `saved` if it was
        stopped and has saved; `trouble` in sentences."""
        trouble: list[str] = []
        config = self._look(trouble, "config.json", self._read_json)
        starts = self._look(trouble, "environment.json", self._read_json)
        if config is not None and not isinstance(config, dict):
            trouble.append(f"config.json: expected an object, got {type(config).__name__}")
        if starts is not None and not isinstance(starts, list):
            trouble.append(f"environment.json: expected a list, got {type(starts).__name__}")
        steps = self.sample_steps(trouble)
        newest = self._look(trouble, "metrics.jsonl", self._read_newest) or {}
        step, written, pace = (newest.get(name) for name in ("step", "written", "pace"))
        num_steps = _number(_get(config, "num_steps"))
        left = None
        if pace is not None and step is not None and num_steps is not None:
            left = pace * max(0.0, num_steps - step)
        last_start = starts[-1] if isinstance(starts, list) and starts else None
        return {
            "num_steps": num_steps,
            "step": step,
            "age": None if written is None else max(0.0, time.time() - written),
            "every": newest.get("every"),
            "left": left,
            "samples": steps[0] if steps else None,
            "saved": _get(_get(last_start, "end"), "step") is not None,
            "trouble": trouble,
        }

    def sample_steps(self, trouble: list[str] | None = None) -> list[int]:
        """Steps with samples, the newest first."""
        steps = []
        with _noting([] if trouble is None else trouble):
            for name in os.listdir(self._sample_folder()):
                match = _STEP_FOLDER.fullmatch(name)
                if match and name == _step_folder(int(match[1])):
                    steps.append(int(match[1]))
        return sorted(steps, reverse=True)

    def samples(self, step: int) -> tuple[list[dict[str, Any]], int]:
        """The first samples of a step by index, and how many there are: the text, and the sizes of
        `wav`, `original` and `ref` as far as there are such files."""
        names: dict[int, list[str]] = {}
        with _noting([]):
            for name in os.listdir(find_inside(self.path, "samples", _step_folder(step))):
                if match := _SAMPLE_FILE.fullmatch(name):
                    names.setdefault(int(match[1]), []).append(name)
        shown = sorted(names)[:SHOWN_SAMPLES]
        return [self._sample(step, index, names[index]) for index in shown], len(names)

    def _sample(self, step: int, index: int, names: list[str]) -> dict[str, Any]:
        row: dict[str, Any] = {"index": index}
        for name in names:
            with _noting([]), self.open_sample(step, name) as file:
                kind = _SAMPLE_PARTS.get(name.removeprefix(str(index)))
                if kind is not None:
                    row[kind] = os.fstat(file.fileno()).st_size
                elif name == f"{index}.txt":
                    row["text"] = file.read(10_000).decode(errors="replace").strip()
        return row

    def open_sample(self, step: int, name: str) -> BinaryIO:
        """A sample's .wav or .txt. **Raises**: `Trouble` for anything else."""
        if _SAMPLE_FILE.fullmatch(name) is None:
            raise Missing(f"{name} is not a sample")
        return open_inside(self.path, "samples", _step_folder(step), name)

    def _sample_folder(self) -> Path:
        folder = find_inside(self.path, "samples")
        if not folder.is_dir():
            raise Trouble("samples: expected a folder, got a file")
        return folder

    def _look(self, trouble: list[str], name: str, read: Callable[[str], Any]) -> Any:
        """What `read` says of a file, again only when the file has changed; None with trouble."""
        with _noting(trouble), open_inside(self.path, name) as file:
            stat = os.fstat(file.fileno())
            version = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._known.get(name, ((), None))[0] != version:
                try:
                    self._known[name] = version, read(name)
                except Trouble as found:
                    self._known[name] = version, found
            value = self._known[name][1]
            if isinstance(value, Trouble):
                raise value
            return value
        return None

    def _read_json(self, name: str) -> Any:
        data = read_inside(self.path, name, _LARGEST_JSON)
        try:
            return _plain(json.loads(data), name, _DEEPEST_JSON)
        except RecursionError:
            raise Trouble(f"{name} is nested too deeply to be read") from None
        except ValueError:
            raise Trouble(f"{name} is not valid JSON") from None

    def _read_newest(self, name: str) -> dict[str, Any]:
        """The last step; when it was reported; seconds of a report, and of a step."""
        with open_inside(self.path, name) as file:
            stat = os.fstat(file.fileno())
            file.seek(max(0, stat.st_size - _TAIL))
            tail = file.read(_TAIL)
        step, reports = None, []
        for line in tail[: tail.rfind(b"\n") + 1].split(b"\n"):
            try:
                row = json.loads(line)
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
            "written": stat.st_mtime,
            "every": between[-1][0] if between else None,
            # The median, since a run may have been interrupted.
            "pace": statistics.median(s / n for s, n in between) if between else None,
        }


@contextlib.contextmanager
def _noting(trouble: list[str]) -> Iterator[None]:
    """What is wrong with a file is noted; one that is missing is no trouble."""
    try:
        yield
    except Missing:
        pass
    except Trouble as found:
        trouble.append(str(found))
    except OSError as error:
        trouble.append(f"{error.filename or 'a file'} cannot be read: {error.strerror}")


def _step_folder(step: int) -> str:
    return f"step_{step:09d}"


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _number(value: Any) -> int | float | None:
    """A number that a browser has too; JSON knows larger ones, and Python's also infinity."""
    return value if type(value) in (int, float) and abs(value) < LARGEST_STEP else None


def _plain(value: Any, name: str, depth: int) -> Any:
    """JSON values that every reader takes: numbers out of a browser's range become text."""
    if depth == 0:
        raise Trouble(f"{name} is nested too deeply to be shown")
    if isinstance(value, dict):
        return {_text(key): _plain(item, name, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, name, depth - 1) for item in value]
    if isinstance(value, str):
        return _text(value)
    if type(value) is int and abs(value) >= LARGEST_STEP:
        return str(value)
    return str(value) if type(value) is float and not math.isfinite(value) else value


def _text(text: str) -> str:
    """Without halves of surrogate pairs, which are not valid text."""
    return text.encode("utf-8", "backslashreplace").decode()


class Shared:
    """What `make` returns, made once for all who ask at the same time, and anew for the next."""

    def __init__(self, make: Callable[[], Any]):
        self._make, self._made, self._value = make, -math.inf, None
        self._lock = threading.Lock()

    def __call__(self) -> Any:
        asked = time.monotonic()
        with self._lock:
            if self._made < asked:  # nobody has begun to make it since
                self._made = time.monotonic()
                self._value = self._make()
            return self._value


class Runs:
    """The runs of a folder: itself if it is one, and its sub-folders."""

    def __init__(self, root: Path):
        self.root = root.resolve()
        self._runs: dict[str, Run] = {}
        self._asked = 0.0
        self._look = Shared(self._find)

    def all(self) -> dict[str, Run]:
        """By name. Looks anew, since runs may begin at any time."""
        self._asked = time.monotonic()
        return self._look()

    def _find(self) -> dict[str, Run]:
        known = {run.path: run for run in self._runs.values()}
        found: dict[str, Run] = {}
        for path in self._folders():
            # Bytes that are not UTF-8 are escaped, after which two names may be the same.
            name = shown = os.fsencode(path.name).decode(errors="backslashreplace")
            number = 2
            while shown in found:
                shown, number = f"{name} ({number})", number + 1
            found[shown] = known.get(path) or Run(path)
        self._runs = found
        return found

    def read_ahead(self) -> None:
        """Read the runs there are, while no page asks for them, so that one finds them read."""
        unread = list(self.all().values())
        while unread:
            unread = [run for run in unread if not run.metrics.read_on(0.1)]
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
            names = ("config.json", "metrics.jsonl")
            return within and path.is_dir() and any(os.path.lexists(path / f) for f in names)
        except (OSError, RuntimeError):
            return False
