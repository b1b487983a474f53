"""Reference recordings of a voice: speech is found, checked, cleaned and set to a loudness."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr

from echo_eqx.data.channels import SILENT_PEAK, mix_down
from echo_eqx.data.decode import decode
from echo_eqx.data.ffmpeg import AudioSource
from echo_eqx.errors import EchoError

MIN_SECONDS, MIN_SPEECH_SECONDS = 0.5, 0.3
MAX_SEARCH_SECONDS = 600.0
"""How far into a recording to look for speech."""
CLIPPED_SHARE, CLIPPED_TOLD = 0.01, 0.001
"""Shares of samples at the ceiling of a recording: more than the first is refused. Clean speech of
61 voices stayed below 0.0007, the same 3.5 dB above full scale reached 0.0006 to 0.011."""
_LOWEST_HERTZ, _LOWEST_OF_SPEECH = 20.0, 80.0
# Activity is measured in blocks of 10 ms. A block far below the loudest half second, or barely
# above the quietest fifth of the two seconds around it, is not speech. In decibels:
_BLOCK = 0.01
_RANGE_DB, _ABOVE_FLOOR_DB, _ALWAYS_DB, _BELOW_PEAK_DB = 26.0, 6.0, 6.0, 50.0
_FLOOR_BLOCKS, _FLOOR_PERCENTILE = 201, 20
_DENSITY_BLOCKS, _DENSITY = 31, 1 / 3
"""Shorter sounds, such as clicks, are not speech."""
_STEADY_DB = 6.0
_BEFORE, _AFTER = 10, 30
"""Blocks kept before and after speech. Longer pauses are shortened to their sum."""


@dataclass(frozen=True)
class Reference:
    """The speech of a recording."""

    speech: np.ndarray
    """(samples,) float32, mono."""
    clipped_share: float
    """Share of the recording's samples at its ceiling, if more than `CLIPPED_TOLD`; or else 0."""
    is_whole: bool
    """Whether all of the recording's speech is in it."""


def load_reference(path: str | Path, sample_rate: int, max_seconds: float) -> np.ndarray:
    """`read_reference(...).speech` of a file."""
    return read_reference(Path(path), str(path), sample_rate, max_seconds).speech


def read_reference(
    source: AudioSource, name: str, sample_rate: int, max_seconds: float
) -> Reference:
    """The speech of a recording at `sample_rate`, up to `max_seconds`.

    See `extract_speech` for what counts as speech. The first ten minutes are searched.

    **Raises**: `EchoError` naming `name` if it cannot be read, or as `extract_speech` does.
    """
    seconds = max_seconds + 10.0
    while True:
        seconds = min(seconds, MAX_SEARCH_SECONDS)
        channels, rate = decode(source, name, sample_rate, 0.0, seconds)
        is_end = len(channels) < int(seconds * rate)
        at_end = is_end or seconds == MAX_SEARCH_SECONDS
        try:
            # Before resampling, which smooths clipped edges.
            check_reference(channels, rate, name)
            resampled = soxr.resample(channels, rate, sample_rate)
            speech = extract_speech(resampled, sample_rate, name)
        except EchoError:
            if at_end:
                raise
        else:
            samples = round(max_seconds * sample_rate)
            if at_end or (len(speech) >= samples and not _is_steady(speech)):
                clipped = _clipped_share(np.abs(channels), CLIPPED_TOLD)
                kept = speech[:samples].astype(np.float32)
                return Reference(kept, clipped, is_end and len(speech) <= samples)
        seconds *= 4


def extract_speech(audio: np.ndarray, sample_rate: int, name: str) -> np.ndarray:
    """(samples,): the speech in (samples,) or (samples, channels), joined.

    A constant offset and rumble below 20 Hz are removed, and channels mixed by `mix_down`. Silence
    and steady noise are removed at the start, at the end, and in pauses longer than 0.4 s.

    **Raises**: `EchoError` naming `name` if the recording is too short, silent or clipped, or has
    too little speech.
    """
    from scipy import ndimage  # slow to import

    check_reference(audio, sample_rate, name)
    audio = mix_down(_highpass(audio.reshape(len(audio), -1), sample_rate, _LOWEST_HERTZ))
    active = _active_blocks(audio, sample_rate)
    block = round(_BLOCK * sample_rate)
    kept = np.convolve(active, np.ones(_BEFORE + _AFTER + 1), "full")[_BEFORE:] > 0.5
    kept = np.repeat(kept[: len(active)], block)
    speech = audio[: len(kept)][kept]
    # Gaps inside words count as speech.
    spoken = _BLOCK * ndimage.grey_closing(active.astype(np.int8), _DENSITY_BLOCKS).sum()
    if spoken < MIN_SPEECH_SECONDS:
        silent = ", ".join(f"{start:.1f} to {end:.1f} s" for start, end in _stretches(~active)[:4])
        raise EchoError(
            f"{name}: expected at least {MIN_SPEECH_SECONDS} s of speech, got {spoken:.2f} s; it "
            f"is silent or steady noise from {silent}"
        )
    return speech


def check_reference(audio: np.ndarray, sample_rate: int, name: str) -> None:
    """Check a recording, (samples,) or (samples, channels).

    **Raises**: `EchoError` naming it if it is too short, silent or clipped.
    """
    seconds = len(audio) / sample_rate
    if seconds < MIN_SECONDS:
        raise EchoError(f"{name}: expected at least {MIN_SECONDS} s of speech, got {seconds:.2f} s")
    peak = float(np.abs(audio - audio.mean(axis=0)).max())
    if peak < SILENT_PEAK:
        raise EchoError(
            f"{name} is silent from 0 to {seconds:.1f} s (peak {peak:.1e} of full scale); "
            "expected speech"
        )
    if clipped := _clipped_share(np.abs(audio), CLIPPED_SHARE):
        raise EchoError(
            f"{name} is clipped ({clipped:.0%} of its samples at its ceiling); expected clean "
            "speech, recorded at a lower level"
        )


def _clipped_share(level: np.ndarray, least: float) -> float:
    """Share of the absolute samples `level` at the ceiling of a recording, 0 up to `least`.

    The ceiling is the recording's own peak, or full scale, because a lossy decoder rings around the
    level of clipping. A float file that is only louder than full scale goes far beyond it.
    """
    peak = float(level.max())
    for ceiling in {max(peak, 0.9), min(max(peak, 0.9), 1.0)}:
        share = float(np.mean(level >= 0.98 * ceiling))
        if share > least and np.mean(level > 1.2 * ceiling) < share / 10:
            return share
    return 0.0


def _highpass(audio: np.ndarray, sample_rate: int, hertz: float) -> np.ndarray:
    """(samples, channels) without frequencies below `hertz` (zero-phase Butterworth)."""
    from scipy import signal  # slow to import

    sections = signal.butter(2, hertz, "highpass", fs=sample_rate, output="sos")
    return signal.sosfiltfilt(sections, audio, axis=0).astype(np.float32)


def _active_blocks(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """(blocks,) bool: whether somebody speaks in each 10 ms of (samples,)."""
    from scipy import ndimage

    audio = _highpass(audio[:, None], sample_rate, _LOWEST_OF_SPEECH)[:, 0]
    block = round(_BLOCK * sample_rate)
    power = np.square(audio[: len(audio) // block * block]).reshape(-1, block).mean(axis=1)
    decibels = 10 * np.log10(ndimage.uniform_filter1d(power, 2) + 1e-12)
    loudest = np.sort(decibels)[-min(50, len(decibels) // 2 + 1)]
    floor = ndimage.percentile_filter(decibels, _FLOOR_PERCENTILE, _FLOOR_BLOCKS, mode="nearest")
    threshold = np.minimum(floor + _ABOVE_FLOOR_DB, loudest - _ALWAYS_DB)
    least = max(loudest - _RANGE_DB, decibels.max() - _BELOW_PEAK_DB)
    loud = decibels >= np.maximum(threshold, least)
    density = ndimage.uniform_filter1d(loud.astype(np.float32), _DENSITY_BLOCKS, mode="constant")
    return loud & (density >= _DENSITY)


def _is_steady(audio: np.ndarray) -> bool:
    """Whether the level of (samples,) is nearly constant, as in noise but not in speech."""
    blocks = audio[: len(audio) // 1000 * 1000].reshape(-1, 1000)
    levels = 10 * np.log10(np.mean(np.square(blocks), axis=1) + 1e-12)
    return float(np.percentile(levels, 95) - np.percentile(levels, 10)) < _STEADY_DB


def _stretches(blocks: np.ndarray) -> list[tuple[float, float]]:
    """Start and end in seconds of each run of true values, the longest first."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], blocks.astype(np.int8), [0]])))
    runs = [(start * _BLOCK, end * _BLOCK) for start, end in edges.reshape(-1, 2).tolist()]
    return sorted(runs, key=lambda run: run[0] - run[1])


def set_loudness(audio: np.ndarray, sample_rate: int, lufs: float) -> np.ndarray:
    """`audio` at an integrated loudness (ITU-R BS.1770), or lower so that it does not clip.

    Less than 0.4 s, in which no loudness can be measured, is returned as it is.
    """
    import pyloudnorm  # slow to import, and few commands need it

    if len(audio) < 0.4 * sample_rate:
        return audio
    loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(audio)
    if not np.isfinite(loudness):
        return audio
    gain = 10 ** ((lufs - loudness) / 20)
    return (audio * min(gain, 1 / float(np.abs(audio).max()))).astype(np.float32)
