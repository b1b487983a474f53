"""Variations of recordings: speed, tone, room, noise and level."""

import numpy as np
import soxr

MAX_SPEED = 1.25
SHARE = 0.3
"""Probability of each of another tone, a room, and noise."""
DECIBELS_OF_TONE = 6.0
REVERBERATION_SECONDS = (0.1, 0.6)
DECIBELS_OF_ECHOES = (-25.0, -8.0)
DECIBELS_OF_NOISE = (-50.0, -15.0)
DECIBELS_OF_LEVEL = (-30.0, 0.0)
_BANDS = 8


def draw_speed(rng: np.random.Generator) -> float:
    """How much faster to play a recording, log-uniform in 1 / `MAX_SPEED` ... `MAX_SPEED`."""
    return MAX_SPEED ** rng.uniform(-1, 1)


def change_length(audio: np.ndarray, samples: int) -> np.ndarray:
    """Played faster or slower, with the pitch, so that it has `samples`."""
    if len(audio) == samples:
        return audio
    changed = soxr.resample(audio, len(audio), samples)[:samples]
    return np.pad(changed, (0, samples - len(changed)))


def vary(audio: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """(samples,) quieter, and some with another tone, a room, or noise.

    Silence stays silent, pauses are not made louder, and no sample exceeds 1.
    """
    if not np.any(audio):
        return audio
    if rng.random() < SHARE:
        audio = _tone(audio, sample_rate, rng)
    if rng.random() < SHARE:
        audio = _room(audio, sample_rate, rng)
    if rng.random() < SHARE:
        audio = _noise(audio, rng)
    gain = 10 ** (rng.uniform(*DECIBELS_OF_LEVEL) / 20) / max(1.0, np.abs(audio).max())
    return (gain * audio).astype(np.float32)


def _tone(audio: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """As another microphone hears it: a smooth random gain over log frequency."""
    bands = np.geomspace(60, sample_rate / 2, _BANDS)
    hertz = np.fft.rfftfreq(len(audio), 1 / sample_rate)
    decibels = rng.uniform(-DECIBELS_OF_TONE, DECIBELS_OF_TONE, _BANDS)
    curve = np.interp(np.log(hertz + 1), np.log(bands + 1), decibels)
    return np.fft.irfft(np.fft.rfft(audio) * 10 ** (curve / 20), len(audio))


def _room(audio: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """With echoes: noise that falls by 60 dB within the reverberation time."""
    seconds = rng.uniform(*REVERBERATION_SECONDS)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    echoes = rng.standard_normal(len(time)) * 10 ** (-3 * time / seconds)
    echoes *= 10 ** (rng.uniform(*DECIBELS_OF_ECHOES) / 20) / np.linalg.norm(echoes)
    echoes[0] = 1
    length = len(audio) + len(echoes)
    spectrum = np.fft.rfft(audio, length) * np.fft.rfft(echoes, length)
    return np.fft.irfft(spectrum, length)[: len(audio)]


def _noise(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With stationary noise, white to brown."""
    spectrum = np.fft.rfft(rng.standard_normal(len(audio)))
    spectrum[1:] /= np.arange(1, len(spectrum)) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, len(audio))
    level = 10 ** (rng.uniform(*DECIBELS_OF_NOISE) / 20)
    return audio + noise * level * np.linalg.norm(audio) / np.linalg.norm(noise)
