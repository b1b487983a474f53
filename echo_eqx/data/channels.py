"""Several channels to one."""

import numpy as np

SILENT_PEAK = 1e-3
_EMPTY_CHANNEL = 0.1
"""A channel below this part of the loudest one's level does not count."""
_CANCELLED = 0.3
"""A mean below this part of the loudest channel's level has lost it."""


def mix_down(audio: np.ndarray) -> np.ndarray:
    """(samples,): the mean of the channels of (samples, channels) that are not empty.

    Where they cancel each other, the loudest channel is taken. A constant is no level.
    """
    if audio.shape[1] == 1:
        return audio[:, 0]
    levels = audio.std(axis=0, dtype=np.float64)
    loudest = levels.max()
    if loudest < SILENT_PEAK:
        return audio.mean(axis=1)
    mono = audio[:, levels >= _EMPTY_CHANNEL * loudest].mean(axis=1)
    return audio[:, levels.argmax()] if mono.std() < _CANCELLED * loudest else mono
