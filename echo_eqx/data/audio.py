"""Audio files: read to mono at a given rate, and written whole or not at all."""

import io
import re
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole

READABLE = "wav, flac, ogg, opus or mp3"
SILENT_PEAK = 1e-3
CLIPPED_SHARE = 0.01
MIN_SECONDS = 0.5


def load_audio(path: str | Path, sample_rate: int, max_seconds: float | None = None) -> np.ndarray:
    """(samples,) float32, mono, at `sample_rate`; at most the first `max_seconds`.

    Channels are averaged; louder than full scale is brought down to it.

    **Raises**: `EchoError` naming the file if it is missing, of no known kind, damaged, truncated,
    without samples or with values that are not finite.
    """
    return _mono(*_read(Path(path), max_seconds), sample_rate)


def load_reference(path: str | Path, sample_rate: int, max_seconds: float) -> np.ndarray:
    """`load_audio` for a recording of a voice.

    **Raises**: `EchoError` also if it is too short, silent or clipped.
    """
    audio, rate = _read(Path(path), max_seconds)
    # As decoded: resampling smooths the edges of what is clipped.
    check_reference(audio, rate, str(path))
    return _mono(audio, rate, sample_rate)


def _read(path: Path, max_seconds: float | None) -> tuple[np.ndarray, int]:
    """Samples (n, channels) as decoded, and their rate."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except (OSError, ValueError) as error:
        raise EchoError(f"{str(path)[:200]!r} is no usable path: {error}") from None
    if size is None:
        raise EchoError(f"{path} does not exist; wanted a recording ({READABLE})")
    if size == 0:
        raise EchoError(f"{path} is empty; wanted a recording ({READABLE})")
    try:
        with sf.SoundFile(path) as file:
            rate, length, info = file.samplerate, file.frames, file.extra_info
            wanted = length if max_seconds is None else min(length, int(max_seconds * rate))
            audio = file.read(wanted, dtype="float32", always_2d=True)
    except (sf.LibsndfileError, OSError, RuntimeError, TypeError) as error:
        reason = str(error).rstrip(".").replace(f"Error opening {str(path)!r}: ", "")
        raise EchoError(f"{path} cannot be decoded ({reason}); wanted {READABLE}") from None
    if len(audio) < wanted or _is_cut_off(path, info):
        raise EchoError(f"{path} is truncated; wanted a whole recording")
    if len(audio) == 0:
        raise EchoError(f"{path} has a header but no samples; wanted a recording")
    if not np.isfinite(audio).all():
        raise EchoError(f"{path} has samples that are not finite")
    return audio, rate


def _mono(audio: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    audio = np.mean(audio, axis=1)
    audio = audio / max(1.0, float(np.abs(audio).max()))
    return soxr.resample(audio, rate, sample_rate).astype(np.float32)


def _is_cut_off(path: Path, info: str) -> bool:
    """Whether the file ends before its own header or stream says; the reader does not tell."""
    if match := re.search(r"^data : (\d+) \(should be (\d+)\)", info, re.MULTILINE):
        # A length of 0 or 2^32 - 1 is what a program writes that cannot seek back.
        return int(match[1]) > int(match[2]) and int(match[1]) < 2**32 - 1
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return False
        file.seek(max(0, path.stat().st_size - 65_536 - 282))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    is_last = len(page) > 27 and page[5] & 4
    return not is_last or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])


def check_reference(audio: np.ndarray, sample_rate: int, name: str) -> None:
    """Refuse a recording, (samples,) or (samples, channels), that cannot show a voice.

    **Raises**: `EchoError` naming it if it is too short, silent or clipped.
    """
    seconds = len(audio) / sample_rate
    if seconds < MIN_SECONDS:
        raise EchoError(f"{name} has {seconds:.2f} s; wanted at least {MIN_SECONDS} s of speech")
    peak = float(np.abs(audio).max())
    if peak < SILENT_PEAK:
        raise EchoError(f"{name} is silent (peak {peak:.1e} of full scale); wanted speech")
    # A lossy decoder rings around the level at which sound was cut: not only the peak counts.
    clipped = float(np.mean(np.abs(audio) >= 0.98 * min(max(peak, 0.9), 1.0)))
    if clipped > CLIPPED_SHARE:
        raise EchoError(
            f"{name} is clipped ({clipped:.0%} of its samples at full scale); wanted clean speech"
        )


def set_loudness(audio: np.ndarray, sample_rate: int, lufs: float) -> np.ndarray:
    """`audio` at an integrated loudness (ITU-R BS.1770), less if its peak would pass full scale."""
    import pyloudnorm  # takes a second to import, and few commands need it

    loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(audio)
    if not np.isfinite(loudness):
        return audio
    gain = 10 ** ((lufs - loudness) / 20)
    return (audio * min(gain, 1 / float(np.abs(audio).max()))).astype(np.float32)


def save_audio(path: str | Path, audio: np.ndarray, sample_rate: int) -> None:
    """Write 16-bit wav or flac, by suffix. Audio above full scale is brought down to it.

    **Raises**: `EchoError` if the place cannot be written.
    """
    path = Path(path)
    audio = audio / max(1.0, float(np.abs(audio).max(initial=0.0)))
    if not np.isfinite(audio).all():
        raise EchoError(f"the audio for {path} has values that are not finite")
    encoded = io.BytesIO()
    sf.write(encoded, audio, sample_rate, format=audio_kind(path), subtype="PCM_16")
    try:
        write_whole(path, lambda temporary: temporary.write_bytes(encoded.getbuffer()))
    except OSError as error:
        raise EchoError(f"{path} cannot be written: {error}") from None


def audio_kind(path: Path) -> str:
    """WAV or FLAC, from the suffix."""
    kind = {".wav": "WAV", ".flac": "FLAC"}.get(path.suffix.lower())
    if kind is None:
        raise EchoError(f"output {path} ends in {path.suffix!r}; wanted .wav or .flac")
    return kind
