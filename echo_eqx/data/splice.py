"""A recording within a file, read as if it were a file with a right header."""

import bisect
import io
from dataclasses import dataclass
from typing import Any

from echo_eqx.errors import EchoError


@dataclass(frozen=True)
class Part:
    """One recording: pieces that make a file whose header is right."""

    pieces: tuple[bytes | tuple[int, int], ...]
    """Bytes, and stretches [start, stop) of the file."""
    audio_bytes: int | None = None
    """Bytes of audio, where the kind counts them."""
    frames: int | None = None
    """Samples in each channel, where the kind counts them."""

    @classmethod
    def patched(
        cls, start: int, stop: int, patches: dict[int, bytes], audio_bytes: int | None
    ) -> "Part":
        """[start, stop) of a file, with other bytes at some places."""
        pieces: list[bytes | tuple[int, int]] = []
        for at, new in sorted(patches.items()):
            pieces += [(start, at), new]
            start = at + len(new)
        return cls((*pieces, (start, stop)), audio_bytes)

    def open(self, file: io.BufferedIOBase) -> io.BufferedReader:
        """The pieces as a file that can seek. `file` must stay open."""
        return io.BufferedReader(_Spliced(file, self.pieces))


class _Spliced(io.RawIOBase):
    def __init__(self, file: io.BufferedIOBase, pieces: tuple[bytes | tuple[int, int], ...]):
        self._file, self._pieces, self._at = file, pieces, 0
        self._ends: list[int] = []
        for piece in pieces:
            length = len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]
            self._ends.append((self._ends[-1] if self._ends else 0) + length)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._ends[-1]}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        number = bisect.bisect_right(self._ends, self._at)
        if number == len(self._pieces):
            return 0
        piece = self._pieces[number]
        before = self._ends[number - 1] if number else 0
        view = view[: self._ends[number] - self._at]
        skipped = self._at - before
        if isinstance(piece, bytes):
            view[:] = piece[skipped : skipped + len(view)]
            count = len(view)
        else:
            self._file.seek(piece[0] + skipped)
            data = self._file.read(len(view))
            count = len(data)
            view[:count] = data
        self._at += count
        return count


def read_at(file: io.BufferedIOBase, at: int, count: int) -> bytes:
    """Up to `count` bytes from `at`."""
    file.seek(at)
    return file.read(count)


def cut_off(name: str, detail: str) -> EchoError:
    """The error for a recording that ends before it should."""
    return EchoError(f"{name} is truncated: {detail}; expected a whole recording")


def after_id3(file: io.BufferedIOBase, size: int, at: int = 0) -> int:
    """Where the ID3v2 tags that begin at `at` end."""
    while True:
        head = read_at(file, at, 10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:]) > 127:
            return at
        length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        at = min(size, at + 10 + length + (10 if head[5] & 16 else 0))


def before_tags(file: io.BufferedIOBase, size: int) -> int:
    """Where the tags at the end of a file begin (ID3v1, APEv2, Lyrics3v2)."""
    while size >= 32:
        if size >= 128 and read_at(file, size - 128, 3) == b"TAG":
            size -= 128
            continue
        foot = read_at(file, size - 32, 32)
        if foot[:8] == b"APETAGEX":
            length = int.from_bytes(foot[12:16], "little") + (32 if foot[23] & 128 else 0)
        elif foot[-9:] == b"LYRICS200" and foot[-15:-9].isdigit():
            length = int(foot[-15:-9]) + 15
        else:
            break
        if not 32 <= length <= size:
            break
        size -= length
    return size
