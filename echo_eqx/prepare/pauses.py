"""Find pauses in speech by energy."""

import numpy as np

RATE = 16_000
"""Sample rate at which speech is analyzed."""
MIN_PAUSE = 0.2
"""In seconds; shorter gaps occur within words as often as between them."""
_FRAME = 320


def find_pauses(audio: np.ndarray) -> list[tuple[float, float]]:
    """(start, end) in seconds of each pause in `audio`, (samples,) float32 at `RATE`.

    A frame is speech if it is above a third of the way, in dB, from noise level to speech level.
    """
    frames = audio[: len(audio) // _FRAME * _FRAME].reshape(-1, _FRAME)
    level = 10 * np.log10(np.mean(np.square(frames, dtype=np.float64), axis=1) + 1e-10)
    noise, speech = np.percentile(level, (5, 95)) if len(level) else (0.0, 0.0)
    is_speech = level > noise + (speech - noise) / 3
    edges = np.flatnonzero(np.diff(np.concatenate([[True], is_speech, [True]])))
    pauses = [(a * _FRAME / RATE, b * _FRAME / RATE) for a, b in edges.reshape(-1, 2).tolist()]
    return [(a, b) for a, b in pauses if b - a >= MIN_PAUSE]
