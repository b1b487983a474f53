"""How alike two recordings of speech are: in what is said, and in whose voice.

What is said is compared by mel cepstra along a warped time axis, a voice by its pitch and the mean
shape of its spectrum. Axes: `f` frame (100 a second), `c` cepstral coefficient.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import soxr

RATE = 16_000
WINDOW, HOP, FFT = 400, 160, 512
"""25 ms, 10 ms and the length of the transform, in samples at `RATE`."""
NUM_MELS, NUM_CEPSTRA = 40, 13
FLOOR = 1e-5
"""What is 50 dB below the mean power of a recording counts as silence."""
DECIBELS = 10 * math.sqrt(2) / math.log(10)
PITCH_RANGE = (60.0, 500.0)
# Recordings that are compared at once, for speed alone.
_TOGETHER = 8
# How far one voice strays from itself between two short sentences, about.
_PITCH_SPREAD = 2.0  # semitones
_SPECTRUM_SPREAD = 4.0  # decibels


@dataclass(frozen=True)
class VoicePrint:
    """What tells a voice from another."""

    pitch: float
    """Median, in hertz; not a number where nothing is voiced."""
    spectrum: np.ndarray
    """(40,) as `mean_mel_spectrum` gives it."""


def mel_cepstra(audio: np.ndarray, rate: int, normalise: bool = False) -> np.ndarray:
    """(f, 13) float64: cepstral coefficients 1 to 13 of (samples,) `audio`.

    They are scaled so that the natural logarithm of a frame's mel amplitudes is `c0` and the sum of
    `c[m] cos(pi m (k + 1/2) / 40)` over `m`. Loudness is `c0`, which is left out. With `normalise`
    each has mean 0 over the recording, which takes away much of the voice and the channel.
    """
    cepstra = _log_mel(audio, rate) @ _cosines()
    return cepstra - cepstra.mean(0) if normalise else cepstra


def warped_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean Euclidean distance of (f1, c) and (f2, c) along the cheapest way through both.

    A step goes on by one frame in `a`, in `b` or in both, and all weigh the same; the sum over the
    way is divided by its number of frames (dynamic time warping, Sakoe & Chiba 1978).
    """
    return float(warped_distances(a, [b])[0])


def warped_distances(a: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """(len(others),): `warped_distance` of (f1, c) `a` to each of the (f2, c) in `others`."""
    parts = (others[i : i + _TOGETHER] for i in range(0, len(others), _TOGETHER))
    return np.array([distance for part in parts for distance in _warped(a, part)])


def _warped(a: np.ndarray, others: Sequence[np.ndarray]) -> list[float]:
    rows, columns = len(a), max(len(b) for b in others)
    # Row i is moved right by i, so that what is a diagonal in `costs` is a column in `skewed`; it
    # is as if the padded rows were written one after another and read with one column less.
    width = rows + columns
    costs = np.full((len(others), rows, width), np.inf)
    for cost, b in zip(costs, others, strict=True):
        squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
        cost[:, : len(b)] = np.sqrt(np.maximum(squares, 0.0))
    skewed = costs.reshape(len(others), -1)[:, : rows * (width - 1)]
    # sums[i + j + 2, :, i + 1] is the cost of the cheapest way to (i, j), itself included.
    sums = np.full((width + 1, len(others), rows + 1), np.inf)
    sums[2:, :, 1:] = skewed.reshape(len(others), rows, -1).transpose(2, 0, 1)
    sums[0, :, 0] = 0.0
    for d in range(2, width + 1):
        best = np.minimum(sums[d - 1, :, :-1], sums[d - 1, :, 1:])
        sums[d, :, 1:] += np.minimum(best, sums[d - 2, :, :-1], out=best)
    return [_mean_along(sums[:, n], rows, len(b)) for n, b in enumerate(others)]


def _mean_along(sums: np.ndarray, i: int, j: int) -> float:
    """Mean cost of the cheapest way, which is followed back from its end to count its frames."""
    total, steps = sums[i + j, i], 1
    while i > 1 or j > 1:
        both, one, other = sums[i + j - 2, i - 1], sums[i + j - 1, i - 1], sums[i + j - 1, i]
        if both <= one and both <= other:
            i, j = i - 1, j - 1
        elif one <= other:
            i -= 1
        else:
            j -= 1
        steps += 1
    return float(total / steps)


def mel_cepstral_distance(a: np.ndarray, b: np.ndarray) -> float:
    """`warped_distance` of two `mel_cepstra` in decibels (Kubichek 1993), after warping.

    Same speech is 0; it is the RMS difference of both smoothed mel spectra without their level.
    """
    return DECIBELS * warped_distance(a, b)


def retrieval(generated: Sequence[np.ndarray], originals: Sequence[np.ndarray]) -> list[int]:
    """Which of the `mel_cepstra` in `originals` is nearest to each of those in `generated`."""
    return [int(np.argmin(warped_distances(cepstra, originals))) for cepstra in generated]


def median_pitch(audio: np.ndarray, rate: int) -> float:
    """Hertz, over the voiced frames of (samples,) `audio`; not a number where there are none.

    A frame is voiced where it is loud and resembles itself 1/500 to 1/60 s later (normalised
    cross-correlation).
    """
    audio = _resampled(audio, rate)
    shortest, longest = (round(RATE / hertz) for hertz in reversed(PITCH_RANGE))
    size = RATE // 25
    frames = _frames(audio, size + longest + 1)
    loud = np.sqrt((frames[:, :size] ** 2).mean(1))
    frames = frames[loud > 0.1 * loud.max(initial=1e-9)]
    length = 1 << (2 * size + longest).bit_length()
    first = np.fft.rfft(frames[:, :size], length)
    products = np.fft.irfft(first.conj() * np.fft.rfft(frames, length), length)[:, : longest + 1]
    energy = np.cumsum(np.pad(frames**2, ((0, 0), (1, 0))), 1)
    energy = energy[:, size : size + longest + 1] - energy[:, : longest + 1]
    alike = products / np.sqrt(energy[:, :1] * energy + 1e-12)
    pitches = []
    for row in alike:
        peak = row[shortest:].max()
        if peak < 0.6:
            continue
        # The first peak that is nearly as high: later ones are whole multiples of the period.
        lag = shortest + int(np.argmax(row[shortest:] > 0.92 * peak))
        while lag < longest and row[lag + 1] > row[lag]:
            lag += 1
        pitches.append(RATE / lag)
    return float(np.median(pitches)) if pitches else math.nan


def mean_mel_spectrum(audio: np.ndarray, rate: int) -> np.ndarray:
    """(40,) decibels: mean over the louder half of the frames of (samples,) `audio`; sums to 0."""
    log_mel = _log_mel(audio, rate)
    level = log_mel.mean(1)
    spectrum = 10 / math.log(10) * log_mel[level >= np.median(level)].mean(0)
    return spectrum - spectrum.mean()


def voice_print(recordings: Sequence[tuple[np.ndarray, int]]) -> VoicePrint:
    """The voice of several recordings, each (samples,) and its rate, in the mean."""
    pitches = [median_pitch(audio, rate) for audio, rate in recordings]
    spectra = [mean_mel_spectrum(audio, rate) for audio, rate in recordings]
    voiced = [pitch for pitch in pitches if not math.isnan(pitch)]
    return VoicePrint(float(np.median(voiced)) if voiced else math.nan, np.mean(spectra, 0))


def nearest_voice(audio: np.ndarray, rate: int, references: Mapping[str, VoicePrint]) -> str:
    """Name of the voice that speaks in (samples,) `audio`: the nearest in pitch and spectrum."""
    here = voice_print([(audio, rate)])

    def distance(name: str) -> float:
        there = references[name]
        semitones = 12 * math.log2(here.pitch / there.pitch)
        spectrum = np.sqrt(((here.spectrum - there.spectrum) ** 2).mean()) / _SPECTRUM_SPREAD
        pitch = 0.0 if math.isnan(semitones) else semitones / _PITCH_SPREAD
        return pitch**2 + float(spectrum) ** 2

    return min(references, key=distance)


def _log_mel(audio: np.ndarray, rate: int) -> np.ndarray:
    """(f, 40) natural logarithms of power in mel bands from 0 to 8000 Hz."""
    frames = _frames(_resampled(audio, rate), WINDOW) * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, FFT)) ** 2 @ _mel_bands()
    return np.log(np.maximum(power, FLOOR * power.mean() + 1e-12))


def _resampled(audio: np.ndarray, rate: int) -> np.ndarray:
    return np.asarray(audio if rate == RATE else soxr.resample(audio, rate, RATE), np.float64)


def _frames(audio: np.ndarray, size: int) -> np.ndarray:
    """(f, size): stretches of `audio` every 10 ms, the last one filled up with zeros."""
    audio = np.pad(audio, (0, max(size - len(audio), -(len(audio) - size) % HOP)))
    return np.lib.stride_tricks.sliding_window_view(audio, size)[::HOP]


@cache
def _mel_bands() -> np.ndarray:
    """(257, 40): triangles at equal distances in mel."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, NUM_MELS + 2) / 2595) - 1)
    hertz = np.arange(FFT // 2 + 1)[:, None] * RATE / FFT
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    return np.maximum(np.minimum(rising, falling), 0.0)


@cache
def _cosines() -> np.ndarray:
    """(40, 13): of a DCT-II. The logarithm of amplitude is half that of power: 1/40, not 2/40."""
    k, m = np.arange(NUM_MELS)[:, None], np.arange(1, NUM_CEPSTRA + 1)
    return np.cos(np.pi * m * (k + 0.5) / NUM_MELS) / NUM_MELS
