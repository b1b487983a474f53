"""Similarity of two recordings of speech: in content, and in voice.

Content is compared by mel cepstra with dynamic time warping, voices by pitch and mean spectrum.
Axes as in `echo_eqx.data.cepstra`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from echo_eqx.data.cepstra import RATE, frames_of, log_mel, resampled
from echo_eqx.errors import optional

DECIBELS = 10 * math.sqrt(2) / math.log(10)
"""Scales a distance of `mel_cepstra` to mel-cepstral distortion in dB (Kubichek 1993)."""
PITCH_RANGE = (60.0, 500.0)
# Typical variation of one voice between two short sentences.
_PITCH_SPREAD = 2.0  # semitones
_SPECTRUM_SPREAD = 4.0  # decibels


@dataclass(frozen=True)
class VoicePrint:
    """Characteristics that distinguish voices."""

    pitch: float
    """Median, in hertz; NaN if nothing is voiced."""
    spectrum: np.ndarray
    """(40,) by `mean_mel_spectrum`."""


def dtw_distances(a: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """(len(others),): distance of (f1, c) `a` to each of the (f2, c) in `others`.

    It is the mean Euclidean distance along the cheapest path of dynamic time warping (Sakoe & Chiba
    1978): all steps, by one frame in `a`, in `b` or in both, weigh the same.
    """
    costs_and_paths = (optional("librosa", "eval").sequence.dtw(a.T, b.T) for b in others)
    return np.array([costs[-1, -1] / len(path) for costs, path in costs_and_paths])


def median_pitch(audio: np.ndarray, rate: int) -> float:
    """Median pitch in hertz of the voiced frames of (samples,) `audio`; NaN if there are none."""
    pitches, _ = pitch_track(audio, rate)
    voiced = pitches[~np.isnan(pitches)]
    return float(np.median(voiced)) if len(voiced) else math.nan


def pitch_track(audio: np.ndarray, rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Pitch in hertz, NaN if unvoiced, and periodicity of each frame, (f,), of (samples,) `audio`.

    Periodicity is the highest normalized cross-correlation of a frame of 40 ms with the signal
    1/500 to 1/60 s later. A frame is voiced if it is loud and its periodicity at least 0.6.
    """
    audio = resampled(audio, rate)
    shortest, longest = (round(RATE / hertz) for hertz in reversed(PITCH_RANGE))
    size = RATE // 25
    frames = frames_of(audio, size + longest + 1)
    loud = np.sqrt((frames[:, :size] ** 2).mean(1))
    length = 1 << (2 * size + longest).bit_length()
    first = np.fft.rfft(frames[:, :size], length)
    products = np.fft.irfft(first.conj() * np.fft.rfft(frames, length), length)[:, : longest + 1]
    energy = np.cumsum(np.pad(frames**2, ((0, 0), (1, 0))), 1)
    energy = energy[:, size : size + longest + 1] - energy[:, : longest + 1]
    correlation = products / np.sqrt(energy[:, :1] * energy + 1e-12)
    periodicity = correlation[:, shortest:].max(1)
    pitches = np.full(len(correlation), np.nan)
    for i in np.flatnonzero((loud > 0.1 * loud.max(initial=1e-9)) & (periodicity >= 0.6)):
        row = correlation[i]
        # The first of the nearly highest peaks: later ones are multiples of the period.
        lag = shortest + int(np.argmax(row[shortest:] > 0.92 * periodicity[i]))
        while lag < longest and row[lag + 1] > row[lag]:
            lag += 1
        pitches[i] = RATE / (lag + _vertex(row[lag - 1 : lag + 2]))
    return pitches, periodicity


def _vertex(values: np.ndarray) -> float:
    """Where the parabola through a peak and its neighbors is highest, in -1/2 ... 1/2."""
    if len(values) < 3:
        return 0.0
    left, middle, right = values
    curve = left - 2 * middle + right
    return float(np.clip((left - right) / (2 * curve), -0.5, 0.5)) if curve < 0 else 0.0


def mean_mel_spectrum(audio: np.ndarray, rate: int) -> np.ndarray:
    """(40,) dB: mean over the louder half of the frames of (samples,) `audio`, minus its mean."""
    spectra = log_mel(audio, rate)
    level = spectra.mean(1)
    spectrum = 10 / math.log(10) * spectra[level >= np.median(level)].mean(0)
    return spectrum - spectrum.mean()


def voice_print(recordings: Sequence[tuple[np.ndarray, int]]) -> VoicePrint:
    """The mean voice of several recordings, each (samples,) and its rate."""
    pitches = [median_pitch(audio, rate) for audio, rate in recordings]
    spectra = [mean_mel_spectrum(audio, rate) for audio, rate in recordings]
    voiced = [pitch for pitch in pitches if not math.isnan(pitch)]
    return VoicePrint(float(np.median(voiced)) if voiced else math.nan, np.mean(spectra, 0))


def identify_voice(audio: np.ndarray, rate: int, references: Mapping[str, VoicePrint]) -> str:
    """Name of the voice nearest to that in (samples,) `audio`, by pitch and spectrum."""
    here = voice_print([(audio, rate)])

    def distance(name: str) -> float:
        there = references[name]
        semitones = 12 * math.log2(here.pitch / there.pitch)
        spectrum = np.sqrt(((here.spectrum - there.spectrum) ** 2).mean()) / _SPECTRUM_SPREAD
        pitch = 0.0 if math.isnan(semitones) else semitones / _PITCH_SPREAD
        return pitch**2 + float(spectrum) ** 2

    return min(references, key=distance)
