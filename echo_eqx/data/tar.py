"""Members of a tar file, from its headers: ustar, GNU and pax.

Time and memory are proportional to the file size, whatever its headers say, and errors give the
offset of the damage. Python's `tarfile` guarantees neither: its pax reader is quadratic
(CVE-2024-6232), and it stops silently at an unreadable header.

Formats: https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html and
https://www.gnu.org/software/tar/manual/html_node/Standard.html
"""

import errno
import os
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
MAX_EXTENDED = 1 << 20
"""Longest extended header in bytes; paths end at 4 KiB on Linux."""
FILE, FOLDER, HARD_LINK, SPARSE = "file", "folder", "hard link", "sparse file"
_KINDS = {
    b"0": FILE,
    b"\0": FILE,
    b"7": FILE,
    b"1": HARD_LINK,
    b"2": "symbolic link",
    b"3": "character device",
    b"4": "block device",
    b"5": FOLDER,
    b"6": "FIFO",
    b"S": SPARSE,
}
_WITH_DATA = (FILE, SPARSE)
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}


class TarError(Exception):
    """The rest of a tar cannot be read; the members before it are intact."""


class Member(NamedTuple):
    name: str
    """Bytes that are not UTF-8 become surrogates, as in paths."""
    kind: str
    """Such as "file", "folder", "hard link", "symbolic link" or "sparse file"."""
    offset: int
    """Offset of its data in bytes."""
    size: int
    """Bytes of data in the tar."""
    target: str
    """Target of a link."""


def read_members(descriptor: int) -> Iterator[Member]:
    """Members of an open tar in file order. The closing blocks of zeros may be missing.

    **Raises**: `TarError` at the first unreadable byte; `OSError` of the disk.
    """
    end = os.fstat(descriptor).st_size
    if not end:
        raise TarError("the file is empty")
    offset = 0
    extended: dict[str, bytes] = {}
    """Fields of extended headers for the next member."""
    while header := os.pread(descriptor, BLOCK, offset):
        if header.count(0) == len(header):
            _check_rest(descriptor, offset)
            break
        kind, size = _check(header, offset)
        data = offset + BLOCK
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            content = _read_extended(descriptor, data, size, end)
            for name, value in _extended_fields(kind, content, offset):
                extended.setdefault(name, value)
        else:
            member = _member(descriptor, header, kind, data, size, extended)
            size = member.size
            if member.offset + size > end:
                raise TarError(f"{member.name[:100]!r} is cut off at the end of the file")
            yield member
            data, extended = member.offset, {}
        offset = data + -(-size // BLOCK) * BLOCK
    if extended:
        raise TarError("it ends between an extended header and the member it belongs to")


def _check(header: bytes, offset: int) -> tuple[bytes, int]:
    """Kind and size of a header, after its checksum."""
    if offset == 0:
        for magic, name in _COMPRESSED.items():
            if header.startswith(magic):
                raise TarError(f"expected an uncompressed tar, got {name}")
    if len(header) < BLOCK:
        raise TarError(f"the header at byte {offset} is cut off")
    field = header[148:156]
    match = _OCTAL.fullmatch(field)
    given = -1 if match is None else int(match[1] or b"0", 8)
    # Adler-32's low half is one more than the sum of the bytes, modulo 65521, which 256 bytes never
    # reach: much faster than a sum in Python.
    halves = zlib.adler32(header[:256]), zlib.adler32(header[256:])
    total = sum((half & 0xFFFF) - 1 for half in halves) - sum(field) + 8 * ord(" ")
    # Some old writers summed signed bytes.
    if given != total and given != total - 256 * sum(byte > 127 for byte in header):
        raise TarError(f"unreadable header at byte {offset}")
    return header[156:157], _number(header[124:136], offset)


def _number(field: bytes, offset: int) -> int:
    """A number in octal digits, or big-endian after a byte of 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise TarError(f"header at byte {offset}: expected an octal number, got {field!r}")
    return int(match[1] or b"0", 8)


def _member(
    descriptor: int, header: bytes, flag: bytes, data: int, size: int, extended: dict[str, bytes]
) -> Member:
    kind = _KINDS.get(flag, f"member of type {flag!r}")
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
        name = f"{prefix}/{name}"
    name = _decode(extended["path"]) if "path" in extended else name
    target = _decode(extended["linkpath"]) if "linkpath" in extended else _text(header[157:257])
    if flag == b"\0" and name.endswith("/"):
        kind = FOLDER
    if flag == b"S":
        more = header[482]
        while more:  # further blocks of the map of a sparse file
            block = os.pread(descriptor, BLOCK, data)
            if len(block) < BLOCK:
                raise TarError(f"{name[:100]!r} is cut off at the end of the file")
            more, data = block[504], data + BLOCK
    if "sparse" in extended and kind == FILE:
        kind = SPARSE
    if "size" in extended:
        digits = extended["size"]
        if not digits.isdigit() or len(digits) > 20:
            raise TarError(f"{name[:100]!r}: expected a number as size, got {digits[:30]!r}")
        size = int(digits)
    has_data = kind in _WITH_DATA or flag not in _KINDS
    return Member(name, kind, data, size if has_data else 0, target)


def _read_extended(descriptor: int, data: int, size: int, end: int) -> bytes:
    if size > MAX_EXTENDED:
        raise TarError(
            f"extended header at byte {data - BLOCK}: expected at most {MAX_EXTENDED} bytes, got "
            f"{size}"
        )
    if data + size > end:
        raise TarError(f"the extended header at byte {data - BLOCK} is cut off")
    return os.pread(descriptor, size, data)


def _extended_fields(kind: bytes, content: bytes, offset: int) -> Iterator[tuple[str, bytes]]:
    """The fields used here, by their pax names; "sparse" stands for all those of sparse files."""
    if kind in (b"L", b"K"):
        yield "path" if kind == b"L" else "linkpath", content.split(b"\0", 1)[0]
        return
    for name, value in _pax_records(content, offset):
        sparse = name.startswith("GNU.sparse.")
        if kind == b"g" and (sparse or name in ("path", "linkpath", "size")):
            raise TarError(f"the header at byte {offset} gives all members the same {name[:50]}")
        if sparse:
            yield "sparse", b""
        if name == "GNU.sparse.name":
            yield "path", value
        elif name in ("path", "linkpath", "size") and value:
            yield name, value


def _pax_records(content: bytes, offset: int) -> Iterator[tuple[str, bytes]]:
    """Name and value of each "LENGTH NAME=VALUE\\n", whose length counts the whole record."""
    start = 0
    while start < len(content) and content[start] != 0:
        space = content.find(b" ", start, start + 20)
        length = content[start : max(space, start)]
        stop = start + int(length) if length.isdigit() else start
        name, equals, value = content[space + 1 : stop].partition(b"=")
        if not equals or stop > len(content) or not value.endswith(b"\n"):
            raise TarError(f"the extended header at byte {offset} cannot be read")
        yield _decode(name), value[:-1]
        start = stop


def _check_rest(descriptor: int, offset: int) -> None:
    """A tar has nothing but zeros after its closing blocks."""
    while True:
        try:  # skip holes in the file
            offset = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
        chunk = os.pread(descriptor, 1 << 20, offset)
        if not chunk:
            return
        if chunk.count(0) != len(chunk):
            first = offset + len(chunk) - len(chunk.lstrip(b"\0"))
            raise TarError(f"expected zeros after the closing blocks, got data at byte {first}")
        offset += len(chunk)


def _text(field: bytes) -> str:
    return _decode(field.split(b"\0", 1)[0])


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
