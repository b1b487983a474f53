"""What a codec keeps of recordings: spectrum, pitch, periodicity, waveform."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echo_eqx.data.cepstra import cepstra_of, log_mel
from echo_eqx.data.quality import signal_to_distortion
from echo_eqx.errors import EchoError, optional
from echo_eqx.files import write_whole
from echo_eqx.voice.similarity import DECIBELS, pitch_track

LOUD_DECIBELS = 40
"""Frames this far below the loudest do not count."""


@dataclass(frozen=True)
class Reconstruction:
    """A decoded recording beside the original, frame by frame without warping."""

    mel_db: float
    """Mean absolute difference in 40 mel bands to 8 kHz."""
    mcd_db: float
    """Mean mel-cepstral distortion, coefficients 1 to 13 (Kubichek, 1993)."""
    f0_cents: float
    """Median absolute difference of the pitch, where both are voiced; NaN if nothing is."""
    voiced: float
    """Share of the original's voiced frames that are voiced."""
    periodicity: float
    """Median over the original's voiced frames, as a share of the original's."""
    si_sdr_db: float
    """Scale-invariant signal-to-distortion ratio."""


NAMES = tuple(field.name for field in dataclasses.fields(Reconstruction))


def compare(decoded: np.ndarray, audio: np.ndarray, rate: int) -> Reconstruction:
    """`decoded` (samples,) beside the original `audio` (samples,)."""
    ours, theirs = log_mel(decoded, rate), log_mel(audio, rate)
    level = theirs.max(1)
    loud = level > level.max() - LOUD_DECIBELS * np.log(10) / 10
    difference = (ours - theirs)[loud]
    our_pitch, our_periodicity = pitch_track(decoded, rate)
    pitch, periodicity = pitch_track(audio, rate)
    voiced = ~np.isnan(pitch)
    both = voiced & ~np.isnan(our_pitch)
    cents = 1200 * np.abs(np.log2(our_pitch[both] / pitch[both]))
    return Reconstruction(
        mel_db=10 / math.log(10) * float(np.abs(difference).mean()),
        mcd_db=DECIBELS * float(np.linalg.norm(cepstra_of(difference), axis=1).mean()),
        f0_cents=_median(cents),
        voiced=float(both.sum() / voiced.sum()) if voiced.any() else math.nan,
        periodicity=_median(our_periodicity[voiced]) / _median(periodicity[voiced]),
        si_sdr_db=signal_to_distortion(decoded, audio),
    )


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else math.nan


def plot_spectrograms(
    pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], rate: int, path: Path
) -> None:
    """Draw for each (name, original, decoded) both spectrograms, one above the other.

    **Raises**: `EchoError` if matplotlib is not installed, or `path` cannot be written.
    """
    size = (6.5 * len(pairs), 6.5)
    figure = optional("matplotlib.figure", "plots").Figure(figsize=size, layout="constrained")
    axes = figure.subplots(2, len(pairs), squeeze=False, sharex="col", sharey=True)
    for column, (name, *both) in zip(axes.T, pairs, strict=True):
        for axis, kind, audio in zip(column, ("original", "decoded"), both, strict=True):
            axis.specgram(audio + 1e-5, NFFT=1024, Fs=rate, noverlap=768, vmin=-140, vmax=-30)
            axis.set(title=f"{name}, {kind}", ylabel="Hz", xlabel="s")
            axis.label_outer()
    try:
        write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    except OSError as error:
        raise EchoError(f"cannot write {path}: {error.strerror}") from None
