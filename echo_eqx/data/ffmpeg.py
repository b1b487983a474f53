"""Kinds of audio that libsndfile does not know, through the programs ffmpeg and ffprobe."""

import io
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from echo_eqx.errors import EchoError

READABLE = "wav, flac, ogg, opus or mp3"
# Playlists are not among them: they could name any other file of the machine.
_FFMPEG_KINDS = "mov,matroska,aac,asf,amr,ac3,eac3,avi,caf,wav,mpegts,ape,wv,tta"
_FFMPEG_SECONDS = 900
_COARSE_RATE = 1000

AudioSource = Path | bytes | io.BufferedReader
"""A file, its bytes, or an open file that can seek."""


def ffmpeg_seconds(source: AudioSource, name: str) -> float:
    """Length in seconds by the header, or decoded where that does not say.

    **Raises**: `EchoError` with `name` if it cannot be read.
    """
    entry = ["-show_entries", "format=duration", "-of", "default=nw=1:nk=1"]
    said = _run("ffprobe", source, name, [], entry).decode(errors="replace").strip()
    try:
        return float(said)
    except ValueError:  # a recorder that wrote to a pipe could not say
        return len(ffmpeg_samples(source, name, _COARSE_RATE, 0.0, None)) / _COARSE_RATE


def ffmpeg_samples(
    source: AudioSource, name: str, sample_rate: int, start: float, stop: float | None
) -> np.ndarray:
    """(samples, 1) float32 at `sample_rate`, channels averaged, of the seconds [start, stop).

    **Raises**: `EchoError` with `name` if it cannot be decoded without an error.
    """
    cut = ["-ss", f"{start:.6f}"] if start else []
    cut += [] if stop is None else ["-t", f"{stop - start:.6f}"]
    out = ["-map", "0:a:0", "-f", "f32le", "-ac", "1", "-ar", str(sample_rate), "pipe:1"]
    data = _run("ffmpeg", source, name, ["-nostdin", *cut], out)
    return np.frombuffer(data[: len(data) // 4 * 4], "<f4").reshape(-1, 1).astype(np.float32)


def _run(
    program: str, source: AudioSource, name: str, before: list[str], after: list[str]
) -> bytes:
    """What `ffmpeg` or `ffprobe` writes about `source`."""
    limits = ["-protocol_whitelist", "file,pipe", "-format_whitelist", _FFMPEG_KINDS]
    # m4a can only be read where one can seek, so bytes go through a file without a name.
    with tempfile.TemporaryFile() as file:
        place, handles = f"file:{source}", ()
        if not isinstance(source, Path):
            given = io.BytesIO(source) if isinstance(source, bytes) else source
            given.seek(0)
            shutil.copyfileobj(given, file)
            file.flush()
            file.seek(0)
            place, handles = f"file:/dev/fd/{file.fileno()}", (file.fileno(),)
        command = [program, *before, "-v", "error", *limits, "-i", place, *after]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=handles,
                timeout=_FFMPEG_SECONDS,
            )
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise EchoError(f"{name} cannot be decoded ({program}: {error})") from None
    # It goes on after damage and only writes about it.
    said = done.stderr.decode(errors="replace").replace(place, name).strip().splitlines()
    if done.returncode or said:
        reason = re.sub(r" @ 0x[0-9a-f]+", "", said[0]) if said else f"exit {done.returncode}"
        raise EchoError(f"{name} cannot be decoded by ffmpeg ({reason[:200]}); wanted {READABLE}")
    return done.stdout
