"""Audio kinds that libsndfile does not read, decoded by the programs ffmpeg and ffprobe."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from echo_eqx.errors import EchoError

READABLE = "wav, flac, ogg, opus or mp3"
NEEDED = f"{READABLE}, or ffmpeg installed for other kinds (apt install ffmpeg)"
HEADERLESS = {".g722": "g722", ".gsm": "gsm", ".g729": "g729"}
"""Demuxers of kinds that only the suffix identifies."""
# No playlists: they could name any other file on the machine.
_DEMUXERS = (
    *("mov", "matroska", "aac", "loas", "asf", "amr", "ac3", "eac3", "dts"),
    *("avi", "flv", "mpeg", "mpegts", "nut", "ogg", "mp3", "flac", "wav", "w64", "aiff", "au"),
    *("caf", "nistsphere", "voc", "ape", "wv", "tta", "tak", "mpc", "mpc8", "rm", "qcp", "oma"),
    *("dsf", "iff", "xwma", "sox", *HEADERLESS.values()),
)
_LENGTH_IS_A_GUESS = ("aac", "loas", "asf", "amr", "ac3", "eac3", "dts", "mp3", "flac")
"""Kinds whose header has no length or includes a delay, so that ffprobe guesses."""
_LIMIT_SECONDS = 900
_MAX_ALLOCATION = 2**28
_BLOCK_BYTES = 2**22

AudioSource = Path | bytes | io.BufferedReader
"""A path, the bytes of a file, or an open seekable file."""


def has_ffmpeg() -> bool:
    """Whether both programs are installed."""
    return bool(shutil.which("ffmpeg") and shutil.which("ffprobe"))


@contextlib.contextmanager
def ffmpeg_decoding(
    source: AudioSource, name: str
) -> Iterator[tuple[int, int, Iterator[np.ndarray]]]:
    """Rate, channels, and blocks (samples, channels) float32 of the first audio stream of `source`.

    **Raises**: `EchoError` naming `name` if decoding fails, or ends before the length that the
    header gives; at the latest with the last block.
    """
    with contextlib.ExitStack() as stack:
        place, handles = f"file:{source}", ()
        if not isinstance(source, Path):  # through an unnamed file, because m4a must seek
            file = stack.enter_context(tempfile.TemporaryFile())
            given = io.BytesIO(source) if isinstance(source, bytes) else source
            given.seek(0)
            shutil.copyfileobj(given, file)
            file.flush()
            place, handles = f"file:/dev/fd/{file.fileno()}", (file.fileno(),)
        kind = HEADERLESS.get(Path(name).suffix.lower())
        given_as = [
            *("-v", "error", "-max_alloc", str(_MAX_ALLOCATION), "-err_detect", "crccheck"),
            *("-protocol_whitelist", "file,pipe", "-format_whitelist", ",".join(_DEMUXERS)),
            *(("-f", kind) if kind else ()),
            *("-i", place),
        ]
        rate, channels, seconds = _probe(given_as, handles, name, place)
        out = ["-map", "0:a:0", "-vn", "-af", "asetpts=N/SR/TB", "-ar", str(rate)]
        out += ["-ac", str(channels), "-c:a", "pcm_f32le", "-f", "f32le", "pipe:1"]
        command = ["ffmpeg", "-nostdin", "-xerror", *given_as, *out]
        errors = stack.enter_context(tempfile.TemporaryFile())
        _rewind(handles)
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                pass_fds=handles,
            )
        except (OSError, ValueError) as error:
            raise EchoError(f"{name} cannot be decoded (ffmpeg: {error})") from None
        stack.enter_context(process)
        stack.callback(process.kill)
        timer = threading.Timer(_LIMIT_SECONDS, process.kill)
        timer.daemon = True
        timer.start()
        stack.callback(timer.cancel)
        yield rate, channels, _blocks(process, errors, (rate, channels, seconds), name, place)


def _blocks(
    process: subprocess.Popen[bytes],
    errors: io.BufferedRandom,
    stream: tuple[int, int, float | None],
    name: str,
    place: str,
) -> Iterator[np.ndarray]:
    rate, channels, seconds = stream
    width, count = 4 * channels, 0
    assert process.stdout is not None
    while data := process.stdout.read(_BLOCK_BYTES // width * width):
        block = np.frombuffer(data[: len(data) // width * width], "<f4").reshape(-1, channels)
        count += len(block)
        yield block.astype(np.float32)
    code = process.wait()
    errors.seek(0)
    # After some kinds of damage ffmpeg continues and only prints a message.
    if (said := errors.read(4096).decode(errors="replace").strip()) or code:
        raise _decoding_error(name, place, said or f"exit {code}")
    if seconds is not None and count / rate < 0.99 * seconds - 0.1:
        raise EchoError(
            f"{name} is truncated: its header says {seconds:.2f} s, got {count / rate:.2f} s; "
            "expected a whole recording"
        )


def _probe(
    given_as: list[str], handles: tuple[int, ...], name: str, place: str
) -> tuple[int, int, float | None]:
    """Rate, channels, and the length in seconds if the header gives it."""
    entries = "stream=codec_type,sample_rate,channels,duration:format=duration,format_name"
    command = ["ffprobe", *given_as, "-show_entries", entries, "-of", "json"]
    _rewind(handles)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=handles,
            timeout=_LIMIT_SECONDS,
        )
        found = json.loads(done.stdout or b"{}")
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise EchoError(f"{name} cannot be decoded (ffprobe: {error})") from None
    streams = found.get("streams", [])
    try:
        audio = next(stream for stream in streams if stream.get("codec_type") == "audio")
        rate, channels = int(audio["sample_rate"]), int(audio["channels"])
    except (StopIteration, KeyError, ValueError):
        said = done.stderr.decode(errors="replace").strip() or "it has no audio"
        raise _decoding_error(name, place, said) from None
    if rate < 1 or channels < 1:
        raise _decoding_error(name, place, f"{channels} channels at {rate} Hz")
    format_ = found.get("format", {})
    is_guess = format_.get("format_name") in (*_LENGTH_IS_A_GUESS, *HEADERLESS.values())
    said = audio.get("duration") or (format_.get("duration") if len(streams) == 1 else None)
    return rate, channels, None if is_guess or said is None else float(said)


def _rewind(handles: tuple[int, ...]) -> None:
    """Both programs read the same open file, and each leaves it where it stopped."""
    for handle in handles:
        os.lseek(handle, 0, os.SEEK_SET)


def _decoding_error(name: str, place: str, said: str) -> EchoError:
    reason = re.sub(r" @ 0x[0-9a-f]+", "", said.splitlines()[0].replace(place, name))
    if "whitelist" in reason:  # followed by the whole list
        reason = "this kind is not decoded"
    return EchoError(
        f"{name} cannot be decoded by ffmpeg ({reason[:200]}); expected a whole recording "
        f"({READABLE}, or another kind that ffmpeg reads)"
    )
