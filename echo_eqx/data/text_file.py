"""Reading text files in the usual Unicode encodings, and the suffixes of JSON lines files."""

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl", ".json")
"""Suffixes, in lower case, of files with one JSON object per line."""
MAX_LINE = 2**24
"""Longest line in characters. A longer one means a damaged file, and could exhaust memory."""

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_HEAD = 4096


def encoding_of(data: bytes) -> str:
    """UTF-8, UTF-16 or UTF-32, by the byte order mark, or else by the positions of NULs.

    UTF-16 without a mark has NULs in every second byte of line ends, digits and Latin letters, and
    only a few in the other bytes, from characters such as U+4E00.
    """
    head = data[:_HEAD]
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    even, odd = head[::2].count(0), head[1::2].count(0)
    if max(even, odd) >= max(4, len(head) / 40) and min(even, odd) * 3 <= max(even, odd):
        return "utf-16-le" if odd > even else "utf-16-be"
    return "utf-8"


def decode(data: bytes, errors: str = "surrogateescape") -> str:
    """`data` as text. Bytes that are not UTF-8 become surrogates, which `check_text` finds.

    **Raises**: `UnicodeDecodeError` if `errors` is "strict" and the bytes are not text.
    """
    encoding = encoding_of(data)
    if encoding.startswith("utf-8"):
        return data.decode(encoding, errors)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        if errors == "strict":
            raise
        return data.decode("utf-8", errors)


def open_text(path: Path) -> TextIO:
    """Open `path` for reading as `decode` does; line ends are kept.

    **Raises**: `OSError`. Reading raises `UnicodeDecodeError` for damaged UTF-16 or UTF-32.
    """
    with path.open("rb") as file:
        encoding = encoding_of(file.read(_HEAD))
    errors = "surrogateescape" if encoding.startswith("utf-8") else "strict"
    return path.open(encoding=encoding, errors=errors, newline="")


def lines_of(path: Path) -> Iterator[str | None]:
    """The lines of a text file without line ends; None for a line longer than `MAX_LINE`.

    **Raises**: as `open_text`.
    """
    with open_text(path) as file:
        while line := file.readline(MAX_LINE + 1):
            is_whole = len(line) <= MAX_LINE
            while len(line) > MAX_LINE:  # the rest of a line that is too long
                line = file.readline(MAX_LINE + 1)
            yield line.rstrip("\r\n") if is_whole else None
