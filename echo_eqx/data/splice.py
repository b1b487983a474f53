"""Parts of a file, each read as if it were a file of its own with a correct header."""

import bisect
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from echo_eqx.errors import EchoError


@dataclass(frozen=True)
class Part:
    """One recording: pieces that together make a file with a correct header."""

    pieces: tuple[bytes | tuple[int, int], ...]
    """Bytes, and ranges [start, stop) of the file."""
    audio_bytes: int | None = None
    """Bytes of audio, for kinds that count them."""
    frames: int | None = None
    """Samples per channel, for kinds that count them."""

    @classmethod
    def patched(
        cls, start: int, stop: int, patches: dict[int, bytes], **counts: int | None
    ) -> "Part":
        """[start, stop) of a file, with some bytes replaced."""
        pieces: list[bytes | tuple[int, int]] = []
        for at, new in sorted(patches.items()):
            pieces += [(start, at), new]
            start = at + len(new)
        return cls((*pieces, (start, stop)), **counts)

    def open(self, file: io.BufferedIOBase) -> io.BufferedReader:
        """The pieces as a seekable file. `file` must stay open."""
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
        number = bisect.bisect_right(self._ends, self._at)
        if number == len(self._pieces):
            return 0
        piece = self._pieces[number]
        begin = self._at - (self._ends[number - 1] if number else 0)
        count = min(len(buffer), self._ends[number] - self._at)
        if isinstance(piece, bytes):
            data = piece[begin : begin + count]
        else:
            data = read_at(self._file, piece[0] + begin, count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def read_at(file: io.BufferedIOBase, at: int, count: int) -> bytes:
    """Up to `count` bytes from `at`."""
    file.seek(at)
    return file.read(count)


def find_bytes(file: io.BufferedIOBase, at: int, end: int, *words: bytes) -> Iterator[int]:
    """Where any of `words`, all of one length, occurs in [at, end), in order."""
    overlap = len(words[0]) - 1
    while at < end and (block := read_at(file, at, min(2**22 + overlap, end - at))):
        found = []
        for word in words:
            place = block.find(word)
            while place >= 0:
                found.append(at + place)
                place = block.find(word, place + 1)
        yield from sorted(found)
        at += 2**22


def truncated(name: str, detail: str) -> EchoError:
    """The error for a recording that ends before it should."""
    return EchoError(f"{name} is truncated: {detail}; expected a whole recording")


def damaged(name: str, at: int, detail: str) -> EchoError:
    """The error for a recording with unreadable bytes."""
    return EchoError(f"{name} is damaged: at byte {at} {detail}; expected a whole recording")


def after_id3(file: io.BufferedIOBase, size: int, at: int = 0) -> int:
    """End of the ID3v2 tags that begin at `at`."""
    while True:
        head = read_at(file, at, 10)
        if len(head) < 10 or head[:3] != b"ID3" or max(head[6:]) > 127:
            return at
        length = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
        at = min(size, at + 10 + length + (10 if head[5] & 16 else 0))


def before_tags(file: io.BufferedIOBase, size: int) -> int:
    """Start of the tags at the end of a file (ID3v1, APEv2, Lyrics3v2)."""
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
