"""Speech by espeak-ng, a rule-based synthesizer, in four voices."""

import io
import itertools
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import soundfile as sf

from echo_eqx.errors import EchoError
from echo_eqx.voice.corpus import Line

PEAK = 0.5
SILENT = 1e-3
"""Samples at the ends below this fraction of the peak are trimmed."""
SILENCE_SECONDS = 0.08


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
    wav = run_espeak([*settings, "-b", "1", "--stdout"], text)
    try:
        audio, rate = sf.read(io.BytesIO(wav), dtype="float32")
    except sf.LibsndfileError as error:
        raise EchoError(f"espeak-ng returned no audio for {text!r}: {error}") from None
    loud = np.flatnonzero(np.abs(audio) > SILENT * np.abs(audio).max(initial=0.0))
    if not loud.size:
        raise EchoError(f"espeak-ng returned silence for {text!r}")
    audio = np.pad(audio[loud[0] : loud[-1] + 1], round(SILENCE_SECONDS * rate))
    return audio * np.float32(PEAK / np.abs(audio).max()), rate


def run_espeak(arguments: Sequence[str], text: str) -> bytes:
    """What espeak-ng writes to stdout for `text`.

    **Raises**: `EchoError` if it is not installed, or fails.
    """
    command = ["espeak-ng", *arguments, "--stdin"]
    try:
        return subprocess.run(command, input=text.encode(), capture_output=True, check=True).stdout
    except FileNotFoundError:
        raise EchoError("espeak-ng is not installed; run: apt install espeak-ng") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()[-200:]
        raise EchoError(f"espeak-ng failed on {text!r}: {said or error.returncode}") from None


def speak_as(text: str, name: str) -> tuple[np.ndarray, int]:
    """`speak` in the voice of this name."""
    return speak(text, next(voice for voice in VOICES if voice.name == name))


def corpus_lines(texts: Iterable[str]) -> Iterator[Line]:
    """`texts` in alternating voices."""
    for text, voice in zip(texts, itertools.cycle(VOICES), strict=False):
        yield Line(text, voice.name)
