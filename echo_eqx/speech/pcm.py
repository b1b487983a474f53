"""Audio as raw samples, written to a file or a pipe while it is made."""

import os
import select
from pathlib import Path

import numpy as np
from jaxtyping import Float

from echo_eqx.errors import EchoError, UsageError

STDOUT = Path("-")
READER_LEFT = 141
"""Exit code of a program that writes to a pipe without a reader: 128 + SIGPIPE."""


def to_pcm(audio: Float[np.ndarray, " samples"]) -> bytes:
    """Signed 16-bit little-endian samples; what is above full scale is clipped."""
    return np.round(np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes()


class PCMWriter:
    """Writes audio to `path`, or to stdout if that is `-`, as it comes. A context manager.

    If nobody reads a pipe any more, the program ends with the exit code 141 and without a word, as
    others do.

    **Raises**: `EchoError` if the file cannot be written; `UsageError` if stdout is a terminal.
    """

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> "PCMWriter":
        if self._path == STDOUT:
            self._number = 1
            if os.isatty(self._number):
                raise UsageError(
                    "--stream -: expected stdout to be a pipe or a file, got a terminal"
                )
            return self
        try:
            self._number = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        except OSError as error:
            raise EchoError(f"cannot write {self._path}: {error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._path != STDOUT:
            os.close(self._number)

    def write(self, audio: Float[np.ndarray, " samples"]) -> None:
        data = memoryview(to_pcm(audio))
        while data:
            try:
                data = data[os.write(self._number, data) :]
            except BlockingIOError:  # wait for a slow reader
                select.select([], [self._number], [])
            except BrokenPipeError:
                raise SystemExit(READER_LEFT) from None
            except OSError as error:
                raise EchoError(f"cannot write {self._path}: {error}") from None
