"""Audio formats of answers: encoders that take samples as they come and return bytes.

libsndfile writes wav, flac, mp3 and opus; aac needs the program ffmpeg.
"""

import abc
import io
import shutil
import struct
import subprocess
import threading
from typing import Any

import numpy as np
import soundfile as sf
import soxr
from jaxtyping import Float

from echo_eqx.serve.errors import ApiError

PCM_RATE = 24_000
"""Sample rate of `pcm`, which has no header to say another one."""
CONTENT_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
WHOLE = ("wav", "flac")
"""Formats whose header has the length: sent as a whole unless the client asks for a stream."""
_OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)


class Encoder(abc.ABC):
    """Samples to the bytes of a format."""

    @abc.abstractmethod
    def encode(self, samples: Float[np.ndarray, " samples"]) -> bytes:
        """Bytes that are ready after `samples`, float32 at the rate of `make_encoder`."""

    @abc.abstractmethod
    def finish(self) -> bytes:
        """The rest."""

    def close(self) -> None:
        """Free what the encoder holds; also without `finish`."""
        return


def make_encoder(kind: str, rate: int, streamed: bool) -> Encoder:
    """An encoder of mono audio at `rate`. With `streamed`, nothing that was returned is changed
    later, so a wav header has the placeholder 0xFFFFFFFF instead of its sizes; otherwise all bytes
    come from `finish`.

    **Raises**: `ApiError` for aac without ffmpeg.
    """
    if kind == "pcm":
        return _PCM(rate)
    if kind == "wav" and streamed:
        return _StreamedWAV(rate)
    if kind == "aac":
        return _AAC(rate)
    return _SoundFile(kind, rate, streamed)


def to_int16(samples: Float[np.ndarray, " samples"]) -> np.ndarray:
    """Signed 16-bit little-endian samples; audio above full scale is clipped."""
    return np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2")


class _Resampler:
    """A rate converter that keeps its state between calls."""

    def __init__(self, rate: int, target: int):
        self._stream = None if rate == target else soxr.ResampleStream(rate, target, 1, "float32")

    def __call__(self, samples: np.ndarray, last: bool = False) -> np.ndarray:
        if self._stream is None:
            return samples
        return self._stream.resample_chunk(samples, last=last)


class _PCM(Encoder):
    def __init__(self, rate: int):
        self._resample = _Resampler(rate, PCM_RATE)

    def encode(self, samples: np.ndarray) -> bytes:
        return to_int16(self._resample(samples)).tobytes()

    def finish(self) -> bytes:
        return to_int16(self._resample(np.zeros(0, np.float32), last=True)).tobytes()


class _StreamedWAV(Encoder):
    def __init__(self, rate: int):
        unknown = 0xFFFFFFFF
        header = struct.pack(
            "<4sI8sIHHIIHH", b"RIFF", unknown, b"WAVEfmt ", 16, 1, 1, rate, 2 * rate, 2, 16
        )
        self._header = header + struct.pack("<4sI", b"data", unknown)

    def encode(self, samples: np.ndarray) -> bytes:
        header, self._header = self._header, b""
        return header + to_int16(samples).tobytes()

    def finish(self) -> bytes:
        return self.encode(np.zeros(0, np.float32))


class _Output(io.BytesIO):
    """A file for libsndfile. Of a stream, what was taken cannot be rewritten."""

    def __init__(self, streamed: bool):
        super().__init__()
        self._data, self._taken, self._position, self._streamed = bytearray(), 0, 0, streamed

    def take(self) -> bytes:
        data, self._taken = bytes(self._data), self._taken + len(self._data)
        self._data.clear()
        return data

    def write(self, data: Any, /) -> int:
        start, end = self._position - self._taken, self._position - self._taken + len(data)
        if start >= 0 and (start == len(self._data) or not self._streamed):
            self._data[start:end] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        base = (0, self._position, self._taken + len(self._data))[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        return b""


class _SoundFile(Encoder):
    def __init__(self, kind: str, rate: int, streamed: bool):
        target = min((r for r in _OPUS_RATES if r >= rate), default=48_000)
        target = target if kind == "opus" else rate
        self._resample = _Resampler(rate, target)
        self._output, self._streamed = _Output(streamed), streamed
        self._is_exact = kind in ("wav", "flac")
        self._is_mp3_stream = streamed and kind == "mp3"
        options = {
            "wav": {"format": "WAV", "subtype": "PCM_16"},
            "flac": {"format": "FLAC", "subtype": "PCM_16"},
            "opus": {"format": "OGG", "subtype": "OPUS"},
            # A constant bit rate, from which players tell the length of a stream.
            "mp3": {
                "format": "MP3",
                "subtype": "MPEG_LAYER_III",
                "bitrate_mode": "CONSTANT",
                "compression_level": 0.5,
            },
        }[kind]
        self._file = sf.SoundFile(self._output, "w", target, 1, **options)

    def encode(self, samples: np.ndarray) -> bytes:
        self._write(self._resample(samples))
        return self._take() if self._streamed else b""

    def finish(self) -> bytes:
        self._write(self._resample(np.zeros(0, np.float32), last=True))
        self._file.close()
        return self._take()

    def _write(self, samples: np.ndarray) -> None:
        self._file.write(to_int16(samples) if self._is_exact else np.clip(samples, -1, 1))

    def _take(self) -> bytes:
        data = self._output.take()
        if self._is_mp3_stream and data:
            # The first frame is the header of a file, to be filled in at its end. Players would
            # read its zeros as the length.
            self._is_mp3_stream = False
            return data[max(0, data.find(data[:2], 4)) :]
        return data

    def close(self) -> None:
        self._file.close()


class _AAC(Encoder):
    """ADTS frames from ffmpeg. A thread reads them, so that neither pipe fills up."""

    def __init__(self, rate: int):
        if shutil.which("ffmpeg") is None:
            raise ApiError(
                400,
                "response_format: aac needs ffmpeg on the server; ask for mp3, opus, flac, wav or "
                "pcm",
                param="response_format",
                code="unsupported_format",
            )
        command = ["ffmpeg", "-nostdin", "-v", "error", "-f", "s16le", "-ar", str(rate)]
        command += ["-ac", "1", "-i", "pipe:0", "-c:a", "aac", "-b:a", "96k", "-flush_packets", "1"]
        command += ["-f", "adts", "pipe:1"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._lock, self._ready = threading.Lock(), bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while data := self._process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
            with self._lock:
                self._ready += data

    def _take(self) -> bytes:
        with self._lock:
            data = bytes(self._ready)
            self._ready.clear()
        return data

    def encode(self, samples: np.ndarray) -> bytes:
        assert self._process.stdin is not None
        self._process.stdin.write(to_int16(samples).tobytes())
        self._process.stdin.flush()
        return self._take()

    def finish(self) -> bytes:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._reader.join(60)
        if self._process.wait(60):
            raise RuntimeError("ffmpeg could not encode aac")
        return self._take()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass
