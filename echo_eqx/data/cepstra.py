"""Mel cepstra of speech. Axes: `f` frame (100 per second), `c` cepstral coefficient."""

import math
from functools import cache

import numpy as np
import soxr

RATE = 16_000
WINDOW, HOP, FFT = 400, 160, 512
"""25 ms, 10 ms and the length of the FFT, in samples at `RATE`."""
NUM_MELS, NUM_CEPSTRA = 40, 13
FLOOR = 1e-5
"""Power is floored at 50 dB below the mean of the recording."""


def mel_cepstra(audio: np.ndarray, rate: int) -> np.ndarray:
    """(f, 13) float64: cepstral coefficients 1 to 13 of (samples,) `audio`.

    Scaled so that the natural logarithm of a frame's mel amplitudes is `c0` plus the sum of
    `c[m] cos(pi m (k + 1/2) / 40)` over `m`. The level `c0` is left out.
    """
    return cepstra_of(log_mel(audio, rate))


def cepstra_of(spectra: np.ndarray) -> np.ndarray:
    """`mel_cepstra` of (f, 40) log-mel spectra."""
    from scipy.fft import dct  # slow to import

    # 2 / 40 for the inverse DCT, / 2 from power to amplitude, / 2 because scipy doubles the sum.
    cepstra = np.asarray(dct(spectra, axis=1))
    return cepstra[:, 1 : NUM_CEPSTRA + 1] / (2 * NUM_MELS)


def log_mel(audio: np.ndarray, rate: int) -> np.ndarray:
    """(f, 40): natural logarithm of the power in mel bands from 0 to 8000 Hz."""
    frames = frames_of(resampled(audio, rate), WINDOW) * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2 @ _mel_bands()
    return np.log(np.maximum(power, FLOOR * power.mean() + 1e-12))


def resampled(audio: np.ndarray, rate: int) -> np.ndarray:
    """`audio` at `RATE`, float64."""
    return np.asarray(audio if rate == RATE else soxr.resample(audio, rate, RATE), np.float64)


def frames_of(audio: np.ndarray, size: int) -> np.ndarray:
    """(f, size): frames of `audio` every 10 ms, the last one padded with zeros."""
    audio = np.pad(audio, (0, max(size - len(audio), -(len(audio) - size) % HOP)))
    return np.lib.stride_tricks.sliding_window_view(audio, size)[::HOP]


@cache
def _mel_bands() -> np.ndarray:
    """(257, 40): triangular filters equally spaced in mel, 2595 log10(1 + f / 700)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, NUM_MELS + 2) / 2595) - 1)
    bins = np.linspace(0, RATE / 2, FFT // 2 + 1)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return np.maximum(0.0, np.minimum(rising, falling))
