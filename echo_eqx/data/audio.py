"""Audio files: read to mono at a given rate, and written whole or not at all."""

import contextlib
import io
import re
import shutil
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr

from echo_eqx.data.ffmpeg import READABLE, AudioSource, ffmpeg_samples, ffmpeg_seconds
from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole

SOUNDFILE_SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".w64")
FFMPEG_SUFFIXES = (".m4a", ".mp4", ".aac", ".webm", ".mka", ".mkv", ".wma", ".amr", ".ac3", ".3gp")
AUDIO_SUFFIXES = SOUNDFILE_SUFFIXES + FFMPEG_SUFFIXES
MIN_RATE, MAX_RATE = 1000, 768_000
SILENT_PEAK = 1e-3
CLIPPED_SHARE = 0.01
MIN_SECONDS = 0.5
_RUN_UP = 0.5
"""Seconds decoded and dropped before a start: a frame of mp3 or Vorbis needs those before it."""


def load_audio(path: str | Path, sample_rate: int, max_seconds: float | None = None) -> np.ndarray:
    """(samples,) float32, mono, at `sample_rate`; at most the first `max_seconds`.

    Channels are averaged; louder than full scale is brought down to it.

    **Raises**: `EchoError` naming the file if it is missing, of no known kind, damaged, truncated,
    without samples or with values that are not finite.
    """
    return decode_audio(Path(path), str(path), sample_rate, stop=max_seconds)


def decode_audio(
    source: AudioSource,
    name: str,
    sample_rate: int,
    start: float = 0.0,
    stop: float | None = None,
) -> np.ndarray:
    """`load_audio` of the seconds [start, stop); only they are decoded and held in memory.

    Kinds that libsndfile does not know go through `ffmpeg`, where that is installed.

    **Raises**: `EchoError` with `name` as `load_audio` does, and if nothing is there from `start`.
    """
    return _mono(*_decode(source, name, sample_rate, start, stop), sample_rate)


def audio_seconds(source: AudioSource, name: str) -> float:
    """Length in seconds as the header tells; only where it does not is the audio decoded.

    **Raises**: `EchoError` with `name` if it is missing, of no known kind or without samples.
    """
    _check_given(source, name)
    try:
        with _open(source) as file:
            seconds = file.frames / _checked_rate(file.samplerate, name)
    except (sf.LibsndfileError, OSError, RuntimeError, TypeError) as error:
        _check_for_ffmpeg(source, name, error)
        seconds = ffmpeg_seconds(source, name)
    if not seconds > 0:
        raise EchoError(f"{name} has a header but no samples; wanted a recording")
    return seconds


def load_reference(path: str | Path, sample_rate: int, max_seconds: float) -> np.ndarray:
    """`load_audio` for a recording of a voice.

    **Raises**: `EchoError` also if it is too short, silent or clipped.
    """
    audio, rate = _decode(Path(path), str(path), sample_rate, 0.0, max_seconds)
    # As decoded: resampling smooths the edges of what is clipped.
    check_reference(audio, rate, str(path))
    return _mono(audio, rate, sample_rate)


def _decode(
    source: AudioSource, name: str, sample_rate: int, start: float, stop: float | None
) -> tuple[np.ndarray, int]:
    """Samples (n, channels) as decoded, and their rate; ffmpeg is asked for `sample_rate`."""
    _check_given(source, name)
    try:
        with _open(source) as file:
            rate, info = _checked_rate(file.samplerate, name), file.extra_info
            end = file.frames if stop is None else min(file.frames, round(stop * rate))
            begin = min(round(start * rate), end)
            run_up = min(begin, round(_RUN_UP * rate))
            file.seek(begin - run_up)
            audio = file.read(end - begin + run_up, dtype="float32", always_2d=True)[run_up:]
        is_whole = len(audio) == end - begin and not _is_cut_off(source, info)
    except (sf.LibsndfileError, OSError, RuntimeError, TypeError) as error:
        _check_for_ffmpeg(source, name, error)
        audio, rate = ffmpeg_samples(source, name, sample_rate, start, stop), sample_rate
        is_whole = True
    if not is_whole:
        raise EchoError(f"{name} is truncated; wanted a whole recording")
    if len(audio) == 0 and start > 0:
        raise EchoError(f"{name} has no samples from {start:g} s on")
    if len(audio) == 0:
        raise EchoError(f"{name} has a header but no samples; wanted a recording")
    if not np.isfinite(audio).all():
        raise EchoError(f"{name} has samples that are not finite")
    return audio, rate


def _check_given(source: AudioSource, name: str) -> None:
    size = None
    try:
        if isinstance(source, bytes):
            size = len(source)
        elif isinstance(source, io.BufferedReader):
            size = source.seek(0, io.SEEK_END)
        elif source.is_file():
            size = source.stat().st_size
    except (OSError, ValueError) as error:
        raise EchoError(f"{name[:200]!r} is no usable path: {error}") from None
    if size is None:
        what = "is no file" if isinstance(source, Path) and source.exists() else "does not exist"
        raise EchoError(f"{name} {what}; wanted a recording ({READABLE})")
    if size == 0:
        raise EchoError(f"{name} is empty; wanted a recording ({READABLE})")


def _open(source: AudioSource) -> sf.SoundFile:
    if isinstance(source, io.BufferedReader):
        source.seek(0)
    return sf.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)


def _checked_rate(rate: int, name: str) -> int:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise EchoError(f"{name} has a rate of {rate} Hz; wanted {MIN_RATE} to {MAX_RATE}")
    return rate


def _check_for_ffmpeg(source: AudioSource, name: str, error: Exception) -> None:
    """Refuse what libsndfile could not read and ffmpeg is not asked for either."""
    reason = str(error).partition(": ")[2] or str(error)
    if isinstance(source, Path):
        reason = str(error).replace(f"Error opening {str(source)!r}: ", "")
    reason = reason.rstrip(". ") or "its header is damaged"
    # Not recognised, or a known container with an unknown encoding; anything else is damage.
    is_unknown = isinstance(error, TypeError) or getattr(error, "code", None) in (1, 4)
    if is_unknown and shutil.which("ffmpeg") and shutil.which("ffprobe"):
        return
    wanted = f"{READABLE}, or ffmpeg installed for other kinds" if is_unknown else READABLE
    raise EchoError(f"{name} cannot be decoded ({reason}); wanted {wanted}") from None


def _mono(audio: np.ndarray, rate: int, sample_rate: int) -> np.ndarray:
    audio = np.mean(audio, axis=1)
    audio = audio / max(1.0, float(np.abs(audio).max()))
    return soxr.resample(audio, rate, sample_rate).astype(np.float32)


def _is_cut_off(source: AudioSource, info: str) -> bool:
    """Whether the file ends before its own header or stream says; the reader does not tell."""
    if match := re.search(r"^data : (\d+) \(should be (\d+)\)", info, re.MULTILINE):
        # A length of 0 or 2^32 - 1 is what a program writes that cannot seek back.
        return int(match[1]) > int(match[2]) and int(match[1]) < 2**32 - 1
    with contextlib.ExitStack() as stack:
        if isinstance(source, Path):
            file = stack.enter_context(source.open("rb"))
        else:
            file = io.BytesIO(source) if isinstance(source, bytes) else source
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        if file.read(4) != b"OggS":
            return False
        file.seek(max(0, size - 65_536 - 282))
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
