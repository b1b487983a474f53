"""Ogg (RFC 3533): recordings joined in one file, and whether the last page is complete."""

import io
import zlib
from dataclasses import dataclass, field

from echo_eqx.data.splice import Part, before_tags, damaged, read_at, truncated

_READ_BY_LIBSNDFILE = (b"OpusHead", b"\x01vorbis", b"\x7fFLAC")
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_LAST, _FIRST = 4, 2
"""Page flags."""


@dataclass
class _Link:
    """Pages of one recording; several streams if there is video too."""

    start: int
    heads: list[bytes] = field(default_factory=list)
    pages: dict[bytes, int] = field(default_factory=dict)
    """Number of the last page of each stream, by serial number."""
    has_data: bool = False
    granule: int = 0
    last: tuple[int, bytes] = (0, b"")
    """Offset and content of the last page."""

    def is_read_by_libsndfile(self) -> bool:
        return len(self.pages) == 1 and self.heads[0].startswith(_READ_BY_LIBSNDFILE)

    def part(self, stop: int) -> Part:
        at, page = self.last
        patches = {}
        if not page[5] & _LAST:  # libsndfile needs the flag to find the end
            page = page[:5] + bytes((page[5] | _LAST,)) + page[6:]
            patches[at] = page[:22] + _checksum(page) + page[26:]
        is_flac = self.heads[0].startswith(b"\x7fFLAC")
        return Part.patched(self.start, stop, patches, frames=self.granule if is_flac else None)


def ogg_parts(file: io.BufferedIOBase, name: str, start: int, size: int) -> list[Part] | None:
    """The recordings from `start` on; None if libsndfile does not read what is in them.

    A stream without an end flag is complete if its last page is and no packet continues after it,
    because a recorded live stream has no end flag.

    **Raises**: `EchoError` naming `name` if one is truncated, or a page is missing or damaged.
    """
    links: list[_Link] = []
    at, end = start, before_tags(file, size)
    while at < end:
        head = read_at(file, at, 27 + 255)
        if head[:4] != b"OggS"[: len(head)]:
            if not links or any(read_at(file, at, min(end - at, 65_536))):
                raise damaged(name, at, "expected an Ogg page, got other data")
            break
        lacing = head[27 : 27 + head[26]] if len(head) > 26 else b""
        length = 27 + len(lacing) + sum(lacing)
        if len(head) < 27 or len(lacing) < head[26] or at + length > end:
            raise truncated(name, "its last page is incomplete")
        page = read_at(file, at, length)
        if _checksum(page) != page[22:26]:
            raise damaged(name, at, "the checksum of an Ogg page is wrong")
        flags, serial = page[5], page[14:18]
        number = int.from_bytes(page[18:22], "little")
        if flags & _FIRST and (not links or links[-1].has_data):
            links.append(_Link(at))
        if not links or (not flags & _FIRST and serial not in links[-1].pages):
            raise damaged(name, at, "an Ogg page has no header")
        link = links[-1]
        if flags & _FIRST:
            link.heads.append(page[27 + len(lacing) :][:8])
        elif number != (link.pages[serial] + 1) % 2**32 and link.granule > 0:
            # A live stream starts with its headers and continues at any page.
            raise damaged(name, at, "pages are missing")
        link.has_data |= not flags & _FIRST
        link.pages[serial] = number
        link.granule = max(link.granule, int.from_bytes(page[6:14], "little", signed=True))
        link.last = (at, page)
        at += length
    if any(page[26 + page[26]] == 255 for page in (link.last[1] for link in links) if page[26]):
        raise truncated(name, "its last page ends inside a packet")
    if not all(link.is_read_by_libsndfile() for link in links):
        return None
    stops = [*(link.start for link in links[1:]), at]
    return [link.part(stop) for link, stop in zip(links, stops, strict=True)]


def _checksum(page: bytes) -> bytes:
    """CRC of a page: zlib's with the bit order reversed, and not inverted."""
    blank = page[:22] + bytes(4) + page[26:]
    crc = zlib.crc32(blank.translate(_REVERSED), 2**32 - 1) ^ (2**32 - 1)
    return int(f"{crc:032b}"[::-1], 2).to_bytes(4, "little")
