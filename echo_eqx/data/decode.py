"""Decoding audio files of any kind, in blocks, to the end of their data."""

import contextlib
import io
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import soundfile as sf
import soxr

from echo_eqx.data.containers import find_parts
from echo_eqx.data.ffmpeg import (
    HEADERLESS,
    NEEDED,
    READABLE,
    AudioSource,
    ffmpeg_decoding,
    has_ffmpeg,
)
from echo_eqx.data.splice import Part, read_at, truncated
from echo_eqx.errors import EchoError

MIN_RATE, MAX_RATE = 1000, 768_000
MAX_CHANNELS = 64
MAX_SAMPLES = 2**29
"""Most samples decoded in one go, over all channels: 2 GiB."""
_BLOCK = 2**20
_PREROLL = 0.5
"""Seconds decoded and dropped before the start: an mp3 or Vorbis frame needs earlier ones."""
_SAMPLE_BYTES = {
    **{"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4},
    **{"FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1},
}


class _Misread(Exception):
    """libsndfile opens a recording, but would not read all of it."""


_UNKNOWN = "its kind is not recognized"
_NOT_READ = (sf.LibsndfileError, OSError, RuntimeError, TypeError, ValueError, _Misread)


def decode(
    source: AudioSource, name: str, sample_rate: int, start: float, stop: float | None
) -> tuple[np.ndarray, int]:
    """(samples, channels) float32 of the seconds [start, stop), and the file's sample rate.

    **Raises**: `EchoError` naming `name` if it is missing, of no known kind, damaged, truncated,
    without samples in that range, not finite, or longer than `MAX_SAMPLES`, also after resampling
    to `sample_rate`.
    """
    _check_given(source, name)
    span = _Range(name, sample_rate, start, stop)
    with _opened(source, name) as (file, parts):
        try:
            if parts is None:
                raise _Misread(_UNKNOWN)
            audio, rate = _from_parts(file, parts, name, span)
        except _NOT_READ as error:
            _check_for_ffmpeg(file, name, error, parts)
            with ffmpeg_decoding(source, name) as (rate, channels, blocks):
                audio = _from_ffmpeg(_checked_rate(rate, channels, name), channels, blocks, span)
    if len(audio) == 0 and start > 0:
        raise EchoError(f"{name} has no samples after {start:g} s")
    if len(audio) == 0:
        raise _without_samples(name)
    if not np.isfinite(audio).all():
        raise EchoError(f"{name} has samples that are not finite")
    return audio, rate


def audio_seconds(source: AudioSource, name: str) -> float:
    """Length in seconds of what `decode` returns, whatever the header says.

    **Raises**: `EchoError` naming `name` if it is missing, of no known kind, truncated or without
    samples.
    """
    _check_given(source, name)
    if isinstance(source, Path):
        stat = source.stat()
        seconds = _seconds_of_file(source, name, stat.st_mtime_ns, stat.st_size)
    else:
        seconds = _seconds(source, name)
    if not seconds > 0:
        raise _without_samples(name)
    return seconds


@lru_cache(1024)
def _seconds_of_file(path: Path, name: str, changed: int, size: int) -> float:
    """Cached, because many clips may be cut from one file."""
    return _seconds(path, name)


def _seconds(source: AudioSource, name: str) -> float:
    with _opened(source, name) as (file, parts):
        try:
            if parts is None:
                raise _Misread(_UNKNOWN)
            rate = total = 0
            for part in parts:
                with _sound(file, part, name) as sound:
                    rate = rate or sound.samplerate
                    total += round(sound.frames * rate / sound.samplerate)
            return total / max(1, rate)
        except _NOT_READ as error:
            _check_for_ffmpeg(file, name, error, parts)
    with ffmpeg_decoding(source, name) as (rate, channels, blocks):
        rate = _checked_rate(rate, channels, name)
        return sum(map(len, blocks)) / rate


class _Range:
    """The seconds to decode, and a limit on them."""

    def __init__(self, name: str, sample_rate: int, start: float, stop: float | None):
        self.name, self.sample_rate, self.start, self.stop = name, sample_rate, start, stop

    def begin(self, rate: int) -> int:
        return round(self.start * rate)

    def end(self, rate: int, frames: int) -> int:
        return frames if self.stop is None else min(frames, round(self.stop * rate))

    def check(self, frames: int, rate: int, channels: int) -> None:
        samples = max(frames * channels, frames * self.sample_rate // rate)
        if samples > MAX_SAMPLES:
            raise EchoError(
                f"{self.name}: expected at most {MAX_SAMPLES} samples to decode at once, got "
                f"{frames / rate:.0f} s in {channels} channels; split it with start and end, or "
                "convert it to one channel"
            )


def _from_parts(
    file: io.BufferedIOBase | Path, parts: list[Part], name: str, span: _Range
) -> tuple[np.ndarray, int]:
    rate = channels = position = 0
    found: list[np.ndarray] = []
    for part in parts:
        with _sound(file, part, name) as sound:
            rate, channels = rate or sound.samplerate, channels or sound.channels
            ratio = rate / sound.samplerate
            length = round(sound.frames * ratio)
            begin = max(0, span.begin(rate) - position)
            end = span.end(rate, position + length) - position
            position += length
            if begin >= end:
                continue
            span.check(end - begin + sum(map(len, found)), rate, channels)
            if ratio == 1:
                samples = _samples(sound, begin, end, name)
            else:  # joined from files of different rates
                whole = _samples(sound, 0, sound.frames, name)
                samples = soxr.resample(whole, sound.samplerate, rate)[begin:end]
            found.append(_with_channels(samples, channels))
    return (np.concatenate(found) if found else np.zeros((0, 1), np.float32)), rate


def _samples(sound: sf.SoundFile, begin: int, end: int, name: str) -> np.ndarray:
    """(end - begin, channels) float32; seeks if the file can."""
    preroll = min(begin, round(_PREROLL * sound.samplerate)) if sound.seekable() else begin
    if begin > preroll:
        sound.seek(begin - preroll)
    audio = np.empty((end - begin, sound.channels), np.float32)
    at = -preroll
    while at < len(audio):
        block = sound.read(min(_BLOCK, len(audio) - at), dtype="float32", always_2d=True)
        if len(block) == 0:
            raise truncated(name, f"expected {sound.frames} samples, decoded {begin + at}")
        audio[max(0, at) : at + len(block)] = block[max(0, -at) :]
        at += len(block)
    return audio


def _with_channels(audio: np.ndarray, channels: int) -> np.ndarray:
    if audio.shape[1] == channels:
        return audio
    return np.repeat(audio.mean(axis=1, keepdims=True), channels, axis=1)


def _from_ffmpeg(
    rate: int, channels: int, blocks: Iterator[np.ndarray], span: _Range
) -> np.ndarray:
    begin, at = span.begin(rate), 0
    found: list[np.ndarray] = []
    for block in blocks:
        end = span.end(rate, at + len(block))
        found.append(block[max(0, begin - at) : max(0, end - at)])
        at += len(block)
        span.check(at - begin, rate, channels)
        if end < at:
            break
    return np.concatenate([*found, np.zeros((0, channels), np.float32)])


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
        raise EchoError(f"{name[:200]!r} is not a usable path: {error}") from None
    if size is None:
        exists = isinstance(source, Path) and source.exists()
        what = "is not a file" if exists else "does not exist"
        raise EchoError(f"{name} {what}; expected a recording ({READABLE})")
    if size == 0:
        raise EchoError(f"{name} is empty; expected a recording ({READABLE})")


def _is_text(file: io.BufferedIOBase) -> bool:
    """Whether the file starts like text, so that it cannot be a recording."""
    head = read_at(file, 0, 512)
    text = head.decode("utf-8", "replace").removesuffix("\ufffd")
    return bool(text.strip()) and all(char.isprintable() or char.isspace() for char in text)


def _is_ogg(file: io.BufferedIOBase | Path) -> bool:
    with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as opened:
        opened.seek(0)
        return opened.read(4) == b"OggS"


@contextlib.contextmanager
def _opened(
    source: AudioSource, name: str
) -> Iterator[tuple[io.BufferedIOBase | Path, list[Part] | None]]:
    """The file, and its recordings if libsndfile can read them."""
    with contextlib.ExitStack() as stack:
        try:
            if isinstance(source, Path):
                file = stack.enter_context(source.open("rb"))
            else:
                file = io.BytesIO(source) if isinstance(source, bytes) else source
            has_header = Path(name).suffix.lower() not in HEADERLESS
            parts = find_parts(file, name) if has_header else None
            size = file.seek(0, io.SEEK_END)
        except OSError as error:
            raise EchoError(f"{name} cannot be read: {error.strerror or error}") from None
        if parts is None and has_header and _is_text(file):
            raise EchoError(
                f"{name}: expected a recording ({READABLE}, or a kind that ffmpeg reads), got text"
            )
        is_plain = parts is not None and [part.pieces for part in parts] == [((0, size),)]
        # libsndfile reads faster from a path.
        yield (source if isinstance(source, Path) and is_plain else file), parts


@contextlib.contextmanager
def _sound(file: io.BufferedIOBase | Path, part: Part, name: str) -> Iterator[sf.SoundFile]:
    """A recording opened by libsndfile, if it would read all of it."""
    given = os.fsencode(file) if isinstance(file, Path) else part.open(file)
    with _open(given) as sound:
        _checked_rate(sound.samplerate, sound.channels, name)
        if sound.format.startswith("WAV") and sound.subtype.startswith("MPEG"):
            raise _Misread("MP3 inside WAV, whose header does not give the exact number of samples")
        frames, width = part.frames, _SAMPLE_BYTES.get(sound.subtype)
        if part.audio_bytes is not None and width is not None:
            frames = part.audio_bytes // (width * sound.channels)
        if frames is not None and frames != sound.frames:
            raise _Misread(f"its header says {sound.frames} samples, got {frames}")
        yield sound


class _Unseekable(sf.SoundFile):
    """For kinds that libsndfile wrongly reports as seekable."""

    def seekable(self) -> bool:
        return False


def _open(given: Any) -> sf.SoundFile:
    """Open a path (as bytes) or a file."""
    sound = sf.SoundFile(given)
    if not sound.subtype.startswith("DWVW"):
        return sound
    sound.close()
    if not isinstance(given, bytes):
        given.seek(0)
    return _Unseekable(cast(Any, given))


def _checked_rate(rate: int, channels: int, name: str) -> int:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise EchoError(f"{name}: expected a rate of {MIN_RATE} to {MAX_RATE} Hz, got {rate}")
    if channels > MAX_CHANNELS:
        raise EchoError(f"{name}: expected at most {MAX_CHANNELS} channels, got {channels}")
    return rate


def _without_samples(name: str) -> EchoError:
    return EchoError(f"{name} has a header but no samples; expected a recording")


def _check_for_ffmpeg(
    file: io.BufferedIOBase | Path, name: str, error: Exception, parts: list[Part] | None
) -> None:
    """Check that a recording that libsndfile cannot read can be passed on to ffmpeg.

    A damaged one cannot, and ffmpeg has to be installed.

    **Raises**: `EchoError` naming `name`, the reason and what to install.
    """
    reason = str(error)
    if isinstance(error, sf.LibsndfileError):
        reason = error.error_string
    reason = reason.rstrip(". ") or "its header is damaged"
    is_counted = bool(parts) and all(part.frames is not None for part in parts or ())
    if is_counted and isinstance(error, sf.LibsndfileError) and not _is_ogg(file):
        # libsndfile reads this kind, so it is damaged, and ffmpeg would skip damaged frames
        # silently. Ogg is different: all page checksums are right by now, and libsndfile does not
        # read every FLAC in Ogg.
        raise EchoError(f"{name} is damaged ({reason}); expected a whole recording") from None
    if has_ffmpeg():
        return
    raise EchoError(f"{name} cannot be decoded ({reason}); expected {NEEDED}") from None
