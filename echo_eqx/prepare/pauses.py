"""Find pauses in speech: with silero-vad if it is installed, else by energy."""

import importlib.metadata
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16_000
"""Sample rate that speech is analysed at."""
MIN_PAUSE = 0.2
"""Seconds; shorter gaps are within words as often as between them."""
_ENERGY_FRAME = 320
_VAD_FRAME, _VAD_CONTEXT = 512, 64
_SPEECH_PROBABILITY = 0.4


def detector() -> str:
    """The detector in use, with its version: `silero-vad 6.2.3` or `energy`."""
    model = _vad_model()
    return "energy" if model is None else f"silero-vad {importlib.metadata.version('silero-vad')}"


def find_pauses(audio: np.ndarray) -> list[tuple[float, float]]:
    """(start, end) in seconds of each pause in `audio`, (samples,) float32 at `RATE`."""
    if _vad_model() is None:
        is_speech, frame = _by_energy(audio), _ENERGY_FRAME
    else:
        is_speech, frame = _by_vad(audio), _VAD_FRAME
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_speech, [True]])))
    pauses = [(a * frame / RATE, b * frame / RATE) for a, b in edges.reshape(-1, 2).tolist()]
    return [(a, min(b, len(audio) / RATE)) for a, b in pauses if b - a >= MIN_PAUSE]


def _by_energy(audio: np.ndarray) -> np.ndarray:
    """Whether each frame is above a third of the way, in dB, from noise level to speech level."""
    count = len(audio) // _ENERGY_FRAME
    frames = audio[: count * _ENERGY_FRAME].reshape(count, _ENERGY_FRAME)
    level = 10 * np.log10(np.mean(np.square(frames, dtype=np.float64), axis=1) + 1e-10)
    noise, speech = np.percentile(level, (5, 95)) if count else (0.0, 0.0)
    return level > noise + (speech - noise) / 3


def _by_vad(audio: np.ndarray) -> np.ndarray:
    session = _session()
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros(_VAD_CONTEXT, np.float32)
    rate = np.array(RATE, np.int64)
    speech = []
    for start in range(0, len(audio) - _VAD_FRAME + 1, _VAD_FRAME):
        frame = np.concatenate([context, audio[start : start + _VAD_FRAME]])
        inputs = {"input": frame[None], "state": state, "sr": rate}
        probability, state = session.run(None, inputs)
        speech.append(probability.item() > _SPEECH_PROBABILITY)
        context = frame[-_VAD_CONTEXT:]
    return np.array(speech, bool)


@lru_cache(1)
def _vad_model() -> Path | None:
    """The ONNX file in the package silero-vad, whose Python code is not run: it imports torch."""
    found = importlib.util.find_spec("silero_vad")
    if found is None or found.origin is None or importlib.util.find_spec("onnxruntime") is None:
        return None
    path = Path(found.origin).parent / "data" / "silero_vad.onnx"
    return path if path.is_file() else None


@lru_cache(1)
def _session() -> Any:
    import onnxruntime  # optional

    options = onnxruntime.SessionOptions()
    # One thread, so that sums are in the same order and results are reproducible.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        str(_vad_model()), options, providers=["CPUExecutionProvider"]
    )
