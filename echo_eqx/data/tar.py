"""Members of a tar file, from its headers: ustar, GNU and pax.

Time and memory stay in proportion to the file, whatever its headers say, and a tar that is damaged
says where. Python's `tarfile` promises neither: its pax reader is quadratic (CVE-2024-6232), and it
stops without a word at a header it cannot read.

Formats: https://pubs.opengroup.org/onlinepubs/9799919799/utilities/pax.html and
https://www.gnu.org/software/tar/manual/html_node/Standard.html
"""

import errno
import os
import re
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
    """A tar that cannot be read on; what came before is good."""


class Member(NamedTuple):
    name: str
    """Bytes that are not UTF-8 are surrogates, as in paths."""
    kind: str
    """A few words: "file", "folder", "hard link", "symbolic link", "sparse file" or another."""
    offset: int
    """Where its data begin, in bytes."""
    size: int
    """Bytes of data in the tar."""
    target: str
    """What a link names."""


def read_members(descriptor: int) -> Iterator[Member]:
    """Members of an open tar in file order. A tar may end after any member, with or without the
    blocks of zeros that close it.

    **Raises**: `TarError` at the first byte that is not part of a whole tar; `OSError` of the disk.
    """
    end = os.fstat(descriptor).st_size
    if not end:
        raise TarError("the file is empty")
    offset = 0
    extended: dict[str, bytes] = {}
    """What extended headers say of the member after them."""
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
        raise TarError("it ends after an extended header, before the member that this belongs to")


def _check(header: bytes, offset: int) -> tuple[bytes, int]:
    """Kind and size of a header whose checksum is right."""
    if offset == 0:
        for magic, name in _COMPRESSED.items():
            if header.startswith(magic):
                raise TarError(f"it is compressed with {name}; expected a plain tar")
    if len(header) < BLOCK:
        raise TarError(f"the header at byte {offset} is cut off")
    field = header[148:156]
    match = _OCTAL.fullmatch(field)
    given = -1 if match is None else int(match[1] or b"0", 8)
    total = sum(header) - sum(field) + 8 * ord(" ")
    # Some old writers summed signed bytes.
    if given != total and given != total - 256 * sum(byte > 127 for byte in header):
        raise TarError(f"no header can be read at byte {offset}")
    return header[156:157], _number(header[124:136], offset)


def _number(field: bytes, offset: int) -> int:
    """A number in octal digits, or big-endian behind a byte of 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise TarError(f"the header at byte {offset} has the number {field!r}; expected octal")
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
            raise TarError(f"{name[:100]!r} has a size of {digits[:30]!r}; expected a number")
        size = int(digits)
    has_data = kind in _WITH_DATA or flag not in _KINDS
    return Member(name, kind, data, size if has_data else 0, target)


def _read_extended(descriptor: int, data: int, size: int, end: int) -> bytes:
    if size > MAX_EXTENDED:
        raise TarError(
            f"the extended header at byte {data - BLOCK} has {size} bytes; "
            f"expected at most {MAX_EXTENDED}"
        )
    if data + size > end:
        raise TarError(f"the extended header at byte {data - BLOCK} is cut off")
    return os.pread(descriptor, size, data)


def _extended_fields(kind: bytes, content: bytes, offset: int) -> Iterator[tuple[str, bytes]]:
    """The fields that matter here, under the names of pax; "sparse" stands for all of sparse
    files."""
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
    """Name and value of each "LENGTH NAME=VALUE\\n"; its length counts all of the record."""
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
    """After its closing blocks a tar has nothing but zeros."""
    while True:
        try:  # holes of the file are not read
            offset = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
        chunk = os.pread(descriptor, 1 << 20, offset)
        if not chunk:
            return
        if chunk.count(0) != len(chunk):
            first = offset + len(chunk) - len(chunk.lstrip(b"\0"))
            raise TarError(f"there is more after the closing blocks, at byte {first}")
        offset += len(chunk)


def _text(field: bytes) -> str:
    return _decode(field.split(b"\0", 1)[0])


def _decode(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
