"""Speech by espeak-ng, a rule-based synthesizer, in four voices."""

import io
import itertools
import json
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
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

MANIFEST = "manifest.jsonl"
PEAK = 0.5
SILENT = 1e-3
"""Samples at the ends below this fraction of the peak are trimmed."""
SILENCE_SECONDS = 0.08
SAVE_EVERY = 500
"""The manifest is saved after this many clips; if the process is killed, you lose at most these."""


@dataclass(frozen=True)
class Voice:
    """Settings of espeak-ng."""

    name: str
    espeak: str
    """Name of the voice in espeak-ng, with its variant."""
    speed: int
    """Words per minute."""
    pitch: int
    """0 to 99."""


REFERENCE_TEXT = "The quick brown fox jumps over the lazy dog."
"""Text of the reference recording of each voice."""
VOICES = (
    Voice("anna", "en-us+f3", speed=165, pitch=30),
    Voice("ben", "en-us", speed=160, pitch=78),
    Voice("clara", "en-us+f5", speed=170, pitch=65),
    Voice("david", "en+m3", speed=175, pitch=36),
)


def speak(text: str, voice: Voice) -> tuple[np.ndarray, int]:
    """Speech (samples,) float32 and its rate, with peak 0.5 and 0.08 s of silence at both ends.

    **Raises**: `EchoError` if espeak-ng is not installed, fails, or returns no speech.
    """
    settings = ["-v", voice.espeak, "-s", str(voice.speed), "-p", str(voice.pitch)]
    command = ["espeak-ng", *settings, "-b", "1", "--stdin", "--stdout"]
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    except FileNotFoundError:
        raise EchoError("espeak-ng is not installed; run: apt install espeak-ng") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[-200:]
        raise EchoError(f"espeak-ng failed on {text!r}: {said or error.returncode}") from None
    try:
        audio, rate = sf.read(io.BytesIO(done.stdout), dtype="float32")
    except sf.LibsndfileError as error:
        raise EchoError(f"espeak-ng returned no audio for {text!r}: {error}") from None
    loud = np.flatnonzero(np.abs(audio) > SILENT * np.abs(audio).max(initial=0.0))
    if not loud.size:
        raise EchoError(f"espeak-ng returned silence for {text!r}")
    audio = np.pad(audio[loud[0] : loud[-1] + 1], round(SILENCE_SECONDS * rate))
    return audio * np.float32(PEAK / np.abs(audio).max()), rate


def speak_corpus(
    texts: Iterable[str],
    folder: Path,
    *,
    count: int,
    max_seconds: float = 5.0,
    workers: int = 2,
) -> list[dict[str, Any]]:
    """Record the first `count` of `texts` that last at most `max_seconds`, in alternating voices.

    Text number `n` becomes `folder/NNNNNN.wav`, 16 bit. Each line of `folder/manifest.jsonl` has
    `audio`, `text` (normalized), `speaker` and `duration`; these rows are returned. Clips that the
    manifest already lists are kept if they are unchanged. The same texts give the same files.

    **Raises**: `EchoError` as `speak` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = _read_manifest(folder / MANIFEST)
    rows: list[dict[str, Any]] = []

    def clip(numbered: tuple[int, str]) -> dict[str, Any] | None:
        number, text = numbered
        voice = VOICES[number % len(VOICES)]
        path = folder / f"{number:06d}.wav"
        row = {"audio": path.name, "text": normalize_text(text), "speaker": voice.name}
        before = known.get(path.name, {})
        if row.items() <= before.items() and path.is_file():
            return before if before["duration"] <= max_seconds else None
        audio, rate = speak(text, voice)
        if len(audio) > max_seconds * rate:
            return None
        write_whole(path, lambda file: sf.write(file, audio, rate, "PCM_16", format="WAV"))
        return row | {"duration": round(len(audio) / rate, 4)}

    numbered = enumerate(texts)
    bar = tqdm(total=count, unit="clip", disable=not on_terminal())
    with ThreadPoolExecutor(workers) as pool, bar:
        while batch := list(itertools.islice(numbered, min(SAVE_EVERY, count - len(rows)))):
            for row in pool.map(clip, batch):
                if row is not None:
                    rows.append(row)
                    bar.update()
            so_far = known | {row["audio"]: row for row in rows}
            _write_manifest(folder / MANIFEST, [so_far[name] for name in sorted(so_far)])
    _write_manifest(folder / MANIFEST, rows)
    return rows


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of a manifest by the name of their audio."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {row["audio"]: row for row in rows}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError):
        raise EchoError(f"{path}: expected a manifest of recordings; delete it") from None


def _write_manifest(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(path, lambda file: file.write_text(text, "utf-8"))
