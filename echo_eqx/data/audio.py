"""Reading audio files as mono at a given rate, and writing them atomically."""

import io
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from echo_eqx.data.channels import SILENT_PEAK, mix_down
from echo_eqx.data.decode import decode
from echo_eqx.data.ffmpeg import HEADERLESS, AudioSource
from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole

# The usual suffixes of every readable kind, for searching folders.
SOUNDFILE_SUFFIXES = (
    *(".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3"),
    *(".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".sph", ".nist"),
)
FFMPEG_SUFFIXES = (
    *(".m4a", ".m4b", ".mp4", ".m4v", ".mov", ".3gp", ".3g2", ".aac", ".adts", ".latm", ".webm"),
    *(".mka", ".mkv", ".wma", ".wmv", ".asf", ".xwma", ".amr", ".awb", ".ac3", ".eac3", ".ec3"),
    *(".dts", ".avi", ".flv", ".mpg", ".mpeg", ".vob", ".ts", ".m2ts", ".mts"),
    *(".nut", ".spx", ".ogv", ".ogx", ".mp2", ".mpga", ".voc", ".ape", ".wv", ".tta", ".tak"),
    *(".mpc", ".ra", ".rm", ".qcp", ".oma", ".dsf", ".dff", ".8svx", ".sox"),
    *HEADERLESS,
)
AUDIO_SUFFIXES = SOUNDFILE_SUFFIXES + FFMPEG_SUFFIXES
_MIN_SOUND = 0.05
"""Least sound in a recording of speech, in seconds."""


class SilentAudioError(EchoError):
    """A silent recording where speech was expected."""


def load_audio(path: str | Path, sample_rate: int, max_seconds: float | None = None) -> np.ndarray:
    """(samples,) float32, mono, at `sample_rate`; at most the first `max_seconds`.

    Channels are mixed by `mix_down`; audio above full scale is scaled down to it.

    **Raises**: `EchoError` naming the file if it is missing, of no known kind, damaged, truncated,
    without samples, not finite, or too long to decode in one go.
    """
    return decode_audio(Path(path), str(path), sample_rate, stop=max_seconds)


def decode_audio(
    source: AudioSource,
    name: str,
    sample_rate: int,
    start: float = 0.0,
    stop: float | None = None,
    *,
    reject_silence: bool = False,
) -> np.ndarray:
    """`load_audio` of the seconds [start, stop); only these are held in memory.

    Kinds that libsndfile cannot read are decoded by `ffmpeg` if it is installed. If only the suffix
    identifies a kind, as for g722, `name` must have that suffix.

    **Raises**: `EchoError` naming `name` as `load_audio` does, and if there is no audio after
    `start`; `SilentAudioError` if it is silent and `reject_silence`.
    """
    audio, rate = decode(source, name, sample_rate, start, stop)
    if reject_silence:
        _check_sound(audio, rate, name)
    audio = mix_down(audio)
    audio = audio / max(1.0, float(np.abs(audio).max()))
    return soxr.resample(audio, rate, sample_rate).astype(np.float32)


def _check_sound(audio: np.ndarray, rate: int, name: str) -> None:
    """Reject (samples, channels) audio that is silent or nearly silent."""
    block = max(1, rate // 100)
    whole = audio[: len(audio) // block * block].reshape(-1, block, audio.shape[1])
    ranges = np.ptp(whole, axis=1).max(axis=1, initial=0.0)
    sound = block / rate * np.count_nonzero(ranges >= 2 * SILENT_PEAK)
    if sound < _MIN_SOUND:
        what = "silent" if np.abs(audio).max() < SILENT_PEAK else "constant or silent"
        raise SilentAudioError(
            f"{name} is {what}: expected speech, got sound in {sound:.2f} of "
            f"{len(audio) / rate:.2f} s; record it again or leave it out"
        )


def save_audio(path: str | Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write 16-bit wav or flac, by suffix. Audio above full scale is scaled down to it.

    **Raises**: `EchoError` if the file cannot be written.
    """
    path = Path(path)
    audio = audio / max(1.0, float(np.abs(audio).max(initial=0.0)))
    if not np.isfinite(audio).all():
        raise EchoError(f"cannot write {path}: the audio has values that are not finite")
    encoded = io.BytesIO()
    sf.write(encoded, audio, sample_rate, format=audio_kind(path), subtype="PCM_16")
    try:
        write_whole(path, lambda temporary: temporary.write_bytes(encoded.getbuffer()))
    except OSError as error:
        raise EchoError(f"cannot write {path}: {error}") from None


def audio_kind(path: Path) -> str:
    """WAV or FLAC, from the suffix."""
    kind = {".wav": "WAV", ".flac": "FLAC"}.get(path.suffix.lower())
    if kind is None:
        raise EchoError(f"output {path}: expected .wav or .flac, got {path.suffix!r}")
    return kind
