"""Clips of audio joined while they are being decoded."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float

from echo_eqx.speech.joining import CROSSFADE_SECONDS, EDGE_SECONDS


class Joiner:
    """`crossfade` and `fade_edges` of clips that come one after the other, in pieces."""

    def __init__(self, sample_rate: int):
        self._fade = int(CROSSFADE_SECONDS * sample_rate)
        self._edge = int(EDGE_SECONDS * sample_rate)
        self._tail = np.zeros(0, np.float32)
        """What follows the end of the last clip, fading out."""
        self._held = np.zeros(0, np.float32)
        """The last samples, which fade out if nothing follows."""
        self._is_first = True

    def join(
        self, pieces: Iterable[np.ndarray], end: int, is_last: bool
    ) -> Iterator[Float[np.ndarray, " samples"]]:
        """Samples that are final, given the pieces of a clip whose speech ends before sample
        `end`. Samples that the clip does not have count as silence."""
        total = end + (0 if is_last else self._fade)
        gain, added = np.ones(total, np.float32), np.zeros(end + self._fade, np.float32)
        ramp = np.linspace(0, 1, self._fade, endpoint=False, dtype=np.float32)
        gain[end:] *= 1 - ramp[: len(gain) - end]
        if self._tail.size:
            gain[: self._fade] *= ramp[:total]
            added[: len(self._tail)] = self._tail
        shaped, position = added[:total], 0
        for piece in pieces:
            stop = min(position + len(piece), total)
            shaped[position:stop] += piece[: stop - position] * gain[position:stop]
            if position < end:
                yield self._hold_back(shaped[position : min(stop, end)])
            position = stop
        if position < end:
            yield self._hold_back(shaped[position:end])
        self._tail = shaped[end:].copy()
        if is_last:
            yield self._fade_out()

    def _hold_back(self, samples: np.ndarray) -> np.ndarray:
        """`samples` after those that were held, without the new last ones."""
        out = np.concatenate([self._held, samples])
        if self._is_first and len(out) > 2 * self._edge:
            out[: self._edge] *= _rise(self._edge)
            self._is_first = False
        keep = 2 * self._edge if self._is_first else self._edge
        cut = max(0, len(out) - keep)
        self._held = out[cut:]
        return out[:cut]

    def _fade_out(self) -> np.ndarray:
        out, length = self._held, min(self._edge, len(self._held) // 2)
        if self._is_first:  # it is as short as the fades
            out[:length] *= _rise(length)
        length = length if self._is_first else min(self._edge, len(out))
        out[len(out) - length :] *= _rise(length)[::-1]
        self._held = np.zeros(0, np.float32)
        return out


def _rise(length: int) -> np.ndarray:
    """A raised cosine from 0."""
    return np.sin(np.linspace(0, math.pi / 2, length, endpoint=False, dtype=np.float32)) ** 2
