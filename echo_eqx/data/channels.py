"""Mixing channels to mono."""

import numpy as np

SILENT_PEAK = 1e-3
_EMPTY_CHANNEL = 0.1
"""Channels below this fraction of the loudest channel's level are ignored."""
_CANCELLED = 0.3
"""Channels cancel if their mean is below this fraction of the loudest channel's level."""


def mix_down(audio: np.ndarray) -> np.ndarray:
    """(samples,): the mean of the non-empty channels of (samples, channels).

    If they cancel each other, the loudest channel is used. A constant offset does not count.
    """
    if audio.shape[1] == 1:
        return audio[:, 0]
    levels = audio.std(axis=0, dtype=np.float64)
    loudest = levels.max()
    if loudest < SILENT_PEAK:
        return audio.mean(axis=1)
    mono = audio[:, levels >= _EMPTY_CHANNEL * loudest].mean(axis=1)
    return audio[:, levels.argmax()] if mono.std() < _CANCELLED * loudest else mono
