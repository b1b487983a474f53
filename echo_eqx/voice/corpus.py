"""A folder of recordings by a teacher, which is a synthesizer, with manifests for `prepare`."""

import contextlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from tqdm import tqdm

from echo_eqx.cli import on_terminal
from echo_eqx.data.text import normalize_text
from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole

MANIFEST, HELD_OUT, LEFT_OUT = FILES = ("manifest.jsonl", "held_out.jsonl", "left_out.jsonl")
"""Recordings to train on, recordings of held-out speakers, and clips that could not be used."""
SAVE_SECONDS = 30.0
"""The manifests are saved this often; if the process is killed, you lose at most these seconds."""
_TOO_LONG = "longer than"
Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """What is recorded."""

    text: str
    speaker: str
    held_out: bool = False
    """Whether it goes into `HELD_OUT` instead of `MANIFEST`."""


class BrokenClip(Exception):
    """Speech that cannot be used. The message is the reason, in a few words."""


@dataclass(frozen=True)
class Corpus:
    """The rows of each manifest, in the order of the lines."""

    rows: list[Row]
    held_out: list[Row]
    left_out: list[Row]
    new_seconds: float
    """Duration of the recordings that were made now, and not before."""

    @property
    def reasons(self) -> dict[str, int]:
        """Number of clips left out for each reason, the most frequent first."""
        return dict(Counter(row["reason"] for row in self.left_out).most_common())


def record_corpus(
    lines: Iterable[Line],
    speak: Callable[[str, str], tuple[np.ndarray, int]],
    folder: Path,
    *,
    count: int,
    pool: Executor,
    workers: int = 2,
    max_seconds: float = 5.0,
) -> Corpus:
    """Record the first `count` of `lines` that can be used and last at most `max_seconds`.

    `speak` is the teacher: it returns the speech (samples,) float32 of a text and a speaker, and
    its rate, or raises `BrokenClip`. `pool` has `workers` that run it, and is shut down at the end.

    Line number `n` becomes `folder/NNNNNN.wav`, 16 bit. Each line of the manifests has `audio`,
    `text` (normalized), `speaker`, `duration`, and if it was left out `reason`. Clips that they
    already list are kept if they are unchanged. The same lines give the same files, whatever the
    number of workers.

    **Raises**: `EchoError` as `speak` does, or if a process of `pool` dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {file: _read_rows(folder / file) for file in FILES}
    rows_before = {name: row for rows in known.values() for name, row in rows.items()}
    found: dict[str, dict[str, Row]] = {file: {} for file in FILES}
    waiting: deque[tuple[bool, Row, Future[tuple[np.ndarray, int]] | None]] = deque()
    kept, new_seconds, saved = 0, 0.0, time.monotonic()
    numbered = enumerate(lines)

    def start(number: int, line: Line) -> None:
        name = f"{number:06d}.wav"
        row = {"audio": name, "text": normalize_text(line.text), "speaker": line.speaker}
        before = rows_before.get(name, {})
        speech = None
        if row.items() <= before.items() and ("reason" in before or (folder / name).is_file()):
            row = before
        else:
            speech = pool.submit(speak, line.text, line.speaker)
        waiting.append((line.held_out, row, speech))

    with tqdm(total=count, unit="clip", disable=not on_terminal()) as bar, _ended(pool):
        while kept < count:
            while len(waiting) < min(2 * workers, count - kept):
                start(*next(numbered))
            held_out, row, speech = waiting.popleft()
            if speech is not None:
                row = row | _write_clip(speech, folder / row["audio"], max_seconds)
            if row.get("duration", 0.0) > max_seconds:
                row = row | {"reason": f"{_TOO_LONG} {max_seconds:g} s"}
            file = LEFT_OUT if "reason" in row else HELD_OUT if held_out else MANIFEST
            found[file][row["audio"]] = row
            if file != LEFT_OUT:
                kept += 1
                new_seconds += 0.0 if speech is None else float(row["duration"])
            bar.update(kept - bar.n)
            if time.monotonic() > saved + SAVE_SECONDS:
                _write_rows(folder, {file: known[file] | found[file] for file in FILES})
                saved = time.monotonic()
    _write_rows(folder, found)
    return Corpus(*(list(found[file].values()) for file in FILES), new_seconds=new_seconds)


@contextlib.contextmanager
def _ended(pool: Executor) -> Iterator[None]:
    """Shut `pool` down at the end. **Raises**: `EchoError` if one of its processes died."""
    try:
        yield
    except BrokenExecutor:
        raise EchoError(
            "a process of the teacher died, perhaps for lack of memory; run the same command "
            "again to continue, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_clip(
    speech: Future[tuple[np.ndarray, int]], path: Path, max_seconds: float
) -> dict[str, Any]:
    """Write the clip unless it is broken or too long. Returns its `duration` or the `reason`."""
    try:
        audio, rate = speech.result()
    except BrokenClip as broken:
        return {"reason": str(broken)}
    if len(audio) <= max_seconds * rate:
        write_whole(path, lambda file: sf.write(file, audio, rate, "PCM_16", format="WAV"))
    return {"duration": round(len(audio) / rate, 4)}


def _read_rows(path: Path) -> dict[str, Row]:
    """Rows of a manifest by the name of their audio. What was too long may not be so now."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {
            row["audio"]: row for row in rows if not row.get("reason", "").startswith(_TOO_LONG)
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise EchoError(f"{path}: expected a manifest of recordings; delete it") from None


def _write_rows(folder: Path, manifests: dict[str, dict[str, Row]]) -> None:
    for name, rows in manifests.items():
        text = "".join(json.dumps(rows[audio]) + "\n" for audio in sorted(rows))
        if text or name == MANIFEST or (folder / name).exists():
            write_whole(folder / name, lambda file, text=text: file.write_text(text, "utf-8"))
