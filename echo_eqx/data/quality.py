"""How good recordings of a voice are: noise and changes of the voice (estimates), distortion."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from echo_eqx.data.cepstra import RATE, cepstra_of, log_mel, resampled

_LOWEST = 80.0
_QUIET_PERCENTILE, _LOUD_PERCENTILE = 5, 50
# Segments of 5 s of speech, which overlap by half; of a shorter recording, all of it.
SEGMENT_SECONDS, MIN_SEGMENT_SECONDS = 5.0, 2.2
_KEPT = 0.7
"""Share of the frames, the loudest ones, that are compared."""
VOICE_CHANGE = 780.0
"""Least `_Gaussian.distance` of segments of different voices. In recordings of 30 s by 57 voices
of espeak-ng, and of 4 people, the largest distance within a voice was 788, and 95 % of recordings
stayed below 660; in 100 s by 8 of these voices it was 761. Between three of the people, men, it was
770, 1059 and 1119, and 1329 or more between them and the woman, each in another room."""


@dataclass(frozen=True)
class VoiceChange:
    """Two segments that sound like different voices, or microphones."""

    recordings: tuple[int, int]
    spans: tuple[tuple[float, float], tuple[float, float]]
    """Start and end of each, in seconds of the speech of its recording."""


def signal_to_noise(audio: np.ndarray, sample_rate: int) -> float:
    """Signal-to-noise ratio in dB of speech (samples,), from its quietest and its louder 10 ms.

    Within 1 dB for white noise of 5 to 30 dB; noise below 80 Hz is not counted. Reverberation,
    music and other voices are no noise to it.
    """
    from scipy import ndimage, signal  # slow to import

    sections = signal.butter(2, _LOWEST, "highpass", fs=sample_rate, output="sos")
    audio = signal.sosfiltfilt(sections, audio)
    block = sample_rate // 100
    power = np.square(audio[: len(audio) // block * block]).reshape(-1, block).mean(axis=1)
    power = ndimage.uniform_filter1d(power, 3)
    noise = float(np.percentile(power, _QUIET_PERCENTILE))
    loud = float(power[power >= np.percentile(power, _LOUD_PERCENTILE)].mean())
    return float(10 * np.log10(max(loud - noise, 1e-12) / (noise + 1e-12)))


def find_voice_change(recordings: Sequence[np.ndarray], sample_rate: int) -> VoiceChange | None:
    """The two most different segments in the speech (samples,) of `recordings`, None if all could
    be one voice.

    Segments are compared as Gaussians of mel cepstra, by the generalized likelihood ratio (Gish,
    Siu and Rohlicek 1991). Not found are voices with the same vocal tract, which differ in pitch
    alone, turns much shorter than a segment, and voices at the same time. A change of the
    microphone or the room counts as a change of the voice.
    """
    segments = [
        (i, span, _Gaussian.of(frames))
        for i, speech in enumerate(recordings)
        for span, frames in _segments(speech, sample_rate)
    ]
    largest, found = VOICE_CHANGE, None
    for (i, a, one), (j, b, other) in itertools.combinations(segments, 2):
        if i == j and b[0] < a[1]:
            continue  # they overlap
        distance = one.distance(other)
        if distance > largest:
            largest, found = distance, VoiceChange((i, j), (a, b))
    return found


def _segments(speech: np.ndarray, sample_rate: int) -> list[tuple[tuple[float, float], np.ndarray]]:
    """Start and end in seconds, and mel cepstra (f, c) of the louder frames, of each segment."""
    speech = resampled(speech, sample_rate)
    size = int(SEGMENT_SECONDS * RATE)
    if len(speech) < MIN_SEGMENT_SECONDS * RATE:
        return []
    starts = range(0, max(1, len(speech) - size + 1), size // 2)
    spectra = [log_mel(speech[start : start + size], RATE) for start in starts]
    kept = []
    for start, spectrum in zip(starts, spectra, strict=True):
        level = spectrum.mean(axis=1)
        louder = spectrum[level >= np.quantile(level, 1 - _KEPT)]
        end = min(start + size, len(speech))
        kept.append(((start / RATE, end / RATE), cepstra_of(louder)))
    return kept


@dataclass(frozen=True)
class _Gaussian:
    """Moments of cepstra (f, c)."""

    count: int
    sum: np.ndarray
    products: np.ndarray

    @classmethod
    def of(cls, frames: np.ndarray) -> "_Gaussian":
        return cls(len(frames), frames.sum(axis=0), frames.T @ frames)

    @property
    def log_determinant(self) -> float:
        mean = self.sum / self.count
        covariance = self.products / self.count - np.outer(mean, mean)
        return float(np.linalg.slogdet(covariance + 1e-3 * np.eye(len(mean)))[1])

    def distance(self, other: "_Gaussian") -> float:
        """The log-likelihood ratio per frame, times the frames of the shorter segment: within a
        voice it hardly depends on the lengths."""
        both = _Gaussian(
            self.count + other.count, self.sum + other.sum, self.products + other.products
        )
        apart = self.count * self.log_determinant + other.count * other.log_determinant
        per_frame = both.log_determinant - apart / both.count
        return per_frame * min(self.count, other.count)


def signal_to_distortion(decoded: np.ndarray, audio: np.ndarray) -> float:
    """SI-SDR in dB (Le Roux et al., 2019, arXiv:1811.02508): the part of `decoded` that is a
    multiple of `audio`, relative to the rest."""
    decoded, audio = decoded - decoded.mean(), audio - audio.mean()
    target = audio * (decoded @ audio) / (audio @ audio + 1e-12)
    rest = decoded - target
    return 10 * math.log10((target @ target + 1e-12) / (rest @ rest + 1e-12))
