"""Recordings in an audio file, located from the data, because a header may give the wrong length.

`find_parts` gives the recordings of a file in a form that libsndfile reads to the end. A truncated
file is rejected here, because libsndfile reads the remaining samples without an error.
"""

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from echo_eqx.data.flac import flac_parts
from echo_eqx.data.mp3 import mp3_parts
from echo_eqx.data.ogg import ogg_parts
from echo_eqx.data.splice import Part, after_id3, before_tags, find_bytes, read_at, truncated
from echo_eqx.errors import EchoError

_MAX_CHUNKS = 10_000
_MAX_PADDING = 65_536
# ASF (wma), TTA, FLV, Monkey's Audio: if files are concatenated, ffmpeg reads only the first.
_READ_TO_FIRST_END = (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"TTA1", b"FLV\x01", b"MAC ")
_RECORDINGS = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff", b"riff")


def find_parts(file: io.BufferedIOBase, name: str) -> list[Part] | None:
    """The recordings in `file`, in order; None if its kind is not known here.

    **Raises**: `EchoError` naming `name` if the audio is truncated or followed by other data.
    """
    size = file.seek(0, io.SEEK_END)
    start = after_id3(file, size)
    head = read_at(file, start, 40)
    if head[:4] == b"OggS":
        return ogg_parts(file, name, start, size)
    if head[:4] == b"fLaC":
        return flac_parts(file, name, start, before_tags(file, size))
    if head[4:8] == b"ftyp":
        _check_boxes(file, name, start, size)
        return None
    if head.startswith(_READ_TO_FIRST_END):
        if any(find_bytes(file, start + 1, size, head[:8])):
            raise _joined(name)
        return None
    if layout := _chunk_layout(head):
        part = _chunked_part(file, name, layout, start, size)
    elif head[:4] in (b".snd", b"dns."):
        part = _au_part(file, name, start, size)
    elif head[:7] == b"NIST_1A":
        part = _nist_part(file, name, start, size)
    else:
        return mp3_parts(file, name, start, before_tags(file, size))
    return None if part is None else [part]


@dataclass(frozen=True)
class _Layout:
    """How a file is made of chunks, each with a name and a length."""

    first: int
    """Offset of the first chunk."""
    audio: bytes
    name_size: int
    length: str
    """`struct` format of the length."""
    counted: int = 0
    """Bytes of the chunk's own header that its length includes."""
    align: int = 2
    total: tuple[int, str] | None = None
    """Offset and format of the file's length."""
    inset: int = 0
    """Bytes of the audio chunk before the audio."""

    @property
    def header(self) -> int:
        return self.name_size + struct.calcsize(self.length)


def _chunk_layout(head: bytes) -> _Layout | None:
    kind, form = head[:4], head[8:12]
    if kind in (b"RIFF", b"RF64", b"BW64") and form == b"WAVE":
        return _Layout(12, b"data", 4, "<I", total=(4, "<I"))
    if kind == b"RIFX" and form == b"WAVE":
        return _Layout(12, b"data", 4, ">I", total=(4, ">I"))
    if kind == b"FORM" and form in (b"AIFF", b"AIFC"):
        return _Layout(12, b"SSND", 4, ">I", total=(4, ">I"), inset=8)
    if kind == b"caff":
        return _Layout(8, b"data", 4, ">q", align=1, inset=4)
    if kind == b"riff" and head[24:28] == b"wave":  # Sony Wave64: names are GUIDs
        return _Layout(40, b"data", 16, "<q", counted=24, align=8, total=(16, "<q"))
    return None


def _chunks(
    file: io.BufferedIOBase, layout: _Layout, at: int, size: int
) -> Iterator[tuple[bytes, int, int]]:
    """First four bytes of the name, start of the content and stated length of each chunk."""
    for _ in range(_MAX_CHUNKS):
        if at + layout.header > size:
            return
        header = read_at(file, at, layout.header)
        length = struct.unpack_from(layout.length, header, layout.name_size)[0] - layout.counted
        at += layout.header
        yield header[:4], at, length
        if length < 0 or not re.fullmatch(rb"[ -~]{4}", header[:4]):
            return
        at += length + -length % layout.align


def _chunked_part(
    file: io.BufferedIOBase, name: str, layout: _Layout, start: int, size: int
) -> Part | None:
    """WAV, RF64, AIFF, CAF or W64."""
    long_field = None
    for kind, begin, length in _chunks(file, layout, start + layout.first, size):
        if kind == b"ds64":  # the lengths of RF64
            long_field = (begin + 8, "<Q")
        if kind == layout.audio:
            break
        if begin + length > size:
            raise truncated(name, "its header is incomplete")
    else:
        return None
    field = (begin - struct.calcsize(layout.length), layout.length)
    if long_field is not None and length == 2**32 - 1:
        field = long_field
        (length,) = struct.unpack(field[1], read_at(file, field[0], 8))
    found = size - begin
    is_known = not _is_placeholder(length)
    if is_known and length <= layout.inset and found and not _is_rest(file, layout, begin, size):
        is_known = False
    patches: dict[int, bytes] = {}
    if is_known:
        _check_length(name, length, found)
        rest = begin + length + -length % layout.align
        if rest < size and not _is_rest(file, layout, rest, size):
            raise _followed(name, size - rest)
    else:
        length = found
        patches[field[0]] = struct.pack(field[1], found + layout.counted)
        is_wav = layout.audio == b"data" and layout.first == 12
        if is_wav and any(find_bytes(file, begin, size, b"WAVEfmt ")):
            raise EchoError(
                f"{name}: expected one recording, got several files joined together whose headers "
                "have no length; convert each with sox or ffmpeg before joining them"
            )
    if layout.total is not None:
        at, form = start + layout.total[0], layout.total[1]
        right = size - start - (0 if layout.counted else 8)
        stated = read_at(file, at, struct.calcsize(form))
        if struct.unpack(form, stated)[0] != right and right < 2 ** (8 * len(stated) - 1):
            patches[at] = struct.pack(form, right)
    return Part.patched(start, size, patches, audio_bytes=length - layout.inset)


def _is_placeholder(length: int) -> bool:
    """Whether this is a length that programs write to a pipe because they cannot know the real one.

    SoX writes about 0x7F000000 or 0x7FFFF000, arecord 2^31, ffmpeg 2^32 - 1 or -1.
    """
    is_near = any(abs(length - edge) <= 65_536 for edge in (0x7F000000, 2**31, 2**32))
    return length < 0 or is_near or length >= 2**62


def _is_rest(file: io.BufferedIOBase, layout: _Layout, at: int, size: int) -> bool:
    """Whether only chunks, tags or padding follow."""
    if size - at < layout.header or before_tags(file, size) <= at:
        return True
    if read_at(file, at, 3) == b"ID3":
        return after_id3(file, size, at) >= size
    if size - at <= _MAX_PADDING and not any(read_at(file, at, size - at)):
        return True
    end = at
    for kind, begin, length in _chunks(file, layout, at, size):
        is_chunk = re.fullmatch(rb"[ -~]{4}", kind) and kind not in _RECORDINGS
        if not is_chunk or length < 0 or begin + length > size:
            return end > at and before_tags(file, size) <= end
        end = begin + length + -length % layout.align
    return size - end < layout.header


def _check_boxes(file: io.BufferedIOBase, name: str, at: int, size: int) -> None:
    """Reject joined MP4 files: ffmpeg would read only the first."""
    for number in range(_MAX_CHUNKS):
        head = read_at(file, at, 16).ljust(16, b"\0")
        length, kind = struct.unpack(">I4s", head[:8])
        if number and kind == b"ftyp":
            raise _joined(name)
        length = int.from_bytes(head[8:]) if length == 1 else length
        at += length
        if length < 8 or at >= size:
            return


def _check_length(name: str, length: int, found: int) -> None:
    if length > found:
        raise truncated(name, f"its header says {length} bytes of audio, got {found}")


def _followed(name: str, rest: int) -> EchoError:
    return EchoError(
        f"{name}: expected one whole recording, got {rest} bytes after the audio that the header "
        "does not count; if several files were joined, or the header was never completed, convert "
        "it with sox or ffmpeg"
    )


def _joined(name: str) -> EchoError:
    return EchoError(
        f"{name}: expected one whole recording, got several files joined together, and players "
        "read only the first; join them with ffmpeg instead"
    )


def _au_part(file: io.BufferedIOBase, name: str, start: int, size: int) -> Part:
    order = ">" if read_at(file, start, 1) == b"." else "<"
    offset, length = struct.unpack(order + "II", read_at(file, start + 4, 8).ljust(8, b"\0"))
    found = max(0, size - start - offset)
    if length and not _is_placeholder(length):
        _check_whole(name, length, found)
        return Part.patched(start, size, {}, audio_bytes=length)
    patch = struct.pack(order + "I", found)
    return Part.patched(start, size, {start + 8: patch}, audio_bytes=found)


def _nist_part(file: io.BufferedIOBase, name: str, start: int, size: int) -> Part | None:
    lines = read_at(file, start, 1024).split(b"\n")
    fields = {line.split()[0]: line.split()[-1] for line in lines if len(line.split()) == 3}
    if b"shorten" in fields.get(b"sample_coding", b"") or not lines[1].strip().isdigit():
        return None
    try:
        names = (b"sample_count", b"channel_count", b"sample_n_bytes")
        count, channels, width = (int(fields.get(key, b"1")) for key in names)
    except ValueError:
        return None
    length = count * channels * width
    if b"sample_count" not in fields or count <= 0 or _is_placeholder(length):
        return Part.patched(start, size, {})
    _check_whole(name, length, size - start - int(lines[1]))
    return Part.patched(start, size, {}, audio_bytes=length)


def _check_whole(name: str, length: int, found: int) -> None:
    """Reject audio that is shorter than its header says, or followed by other data."""
    _check_length(name, length, found)
    if found - length >= 8:
        raise _followed(name, found - length)
