"""What a file of audio holds, found from its data: a header may lie about the length.

`find_parts` gives the recordings of a file in a form that libsndfile reads to the end. What is cut
off is refused here, because libsndfile reads the rest without a word.
"""

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from echo_eqx.data.flac import flac_parts
from echo_eqx.data.mp3 import mp3_parts
from echo_eqx.data.ogg import ogg_parts
from echo_eqx.data.splice import Part, after_id3, before_tags, cut_off, read_at
from echo_eqx.errors import EchoError

_MAX_CHUNKS = 10_000
_MAX_PADDING = 65_536
# ASF (wma), TTA, FLV, Monkey's Audio: of joined files ffmpeg reads the first.
_READ_TO_FIRST_END = (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"TTA1", b"FLV\x01", b"MAC ")
_RECORDINGS = (b"RIFF", b"RIFX", b"RF64", b"BW64", b"FORM", b"caff", b"riff")


def find_parts(file: io.BufferedIOBase, name: str) -> list[Part] | None:
    """The recordings in `file`, one after the other; None if its kind is not known here.

    **Raises**: `EchoError` with `name` if the audio is cut off or followed by other data.
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
        if _holds(file, start + 1, head[:8]):
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
    """Where the first chunk is."""
    audio: bytes
    name_size: int
    length: str
    """Format of the length for `struct`."""
    counted: int = 0
    """Bytes of the chunk's own header in its length."""
    align: int = 2
    total: tuple[int, str] | None = None
    """Where the length of the file is, and its format."""
    inset: int = 0
    """Bytes of the audio's chunk before the audio."""

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
    """First four bytes of the name, begin of the content and claimed length of each chunk."""
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
            raise cut_off(name, "its header goes on")
    else:
        return None
    field = (begin - struct.calcsize(layout.length), layout.length)
    if long_field is not None and length == 2**32 - 1:
        field = long_field
        (length,) = struct.unpack(field[1], read_at(file, field[0], 8))
    there = size - begin
    is_known = not _is_made_up(length)
    if is_known and length <= layout.inset and there and not _is_rest(file, layout, begin, size):
        is_known = False
    if is_known:
        if length > there:
            raise cut_off(name, f"its header counts {length} bytes of audio and {there} are there")
        rest = begin + length + -length % layout.align
        if rest < size and not _is_rest(file, layout, rest, size):
            raise EchoError(
                f"{name} has {size - rest} bytes after its audio that its header does not count; "
                "expected one whole recording; if it is joined from several, or its header was "
                "never completed, write it again with sox or ffmpeg"
            )
        audio_bytes = length
    else:
        audio_bytes = there
        if layout.audio == b"data" and layout.first == 12 and _holds(file, begin, b"WAVEfmt "):
            raise EchoError(
                f"{name} is joined from several files whose headers have no length; expected one "
                "recording; write each again with sox or ffmpeg before joining them"
            )
    patches: dict[int, bytes] = {}
    if not is_known:
        patches[field[0]] = struct.pack(field[1], there + layout.counted)
    if layout.total is not None:
        at, form = start + layout.total[0], layout.total[1]
        right = size - start - (0 if layout.counted else 8)
        said = read_at(file, at, struct.calcsize(form))
        if struct.unpack(form, said)[0] != right and right < 2 ** (8 * len(said) - 1):
            patches[at] = struct.pack(form, right)
    return Part.patched(start, size, patches, audio_bytes - layout.inset)


def _holds(file: io.BufferedIOBase, at: int, word: bytes) -> bool:
    """Whether `word` occurs from `at` on."""
    file.seek(at)
    tail = b""
    while block := file.read(2**22):
        if word in tail + block:
            return True
        tail = block[-len(word) :]
    return False


def _is_made_up(length: int) -> bool:
    """Whether a program that wrote to a pipe claims this length, because it cannot know it.

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
    """Refuse MP4 that ffmpeg would read only the first part of."""
    for number in range(_MAX_CHUNKS):
        head = read_at(file, at, 16).ljust(16, b"\0")
        length, kind = struct.unpack(">I4s", head[:8])
        if number and kind == b"ftyp":
            raise _joined(name)
        length = int.from_bytes(head[8:]) if length == 1 else length
        at += length
        if length < 8 or at >= size:
            return


def _joined(name: str) -> EchoError:
    return EchoError(
        f"{name} is joined from several files, of which players read the first; expected one whole "
        "recording; join them with ffmpeg instead"
    )


def _au_part(file: io.BufferedIOBase, name: str, start: int, size: int) -> Part:
    order = ">" if read_at(file, start, 1) == b"." else "<"
    offset, length = struct.unpack(order + "II", read_at(file, start + 4, 8).ljust(8, b"\0"))
    there = size - start - offset
    if length and length <= there and not _is_made_up(length):
        if there - length >= 8:
            raise EchoError(
                f"{name} has {there - length} bytes after its audio that its header does not "
                "count; expected one whole recording; write it again with sox or ffmpeg"
            )
        return Part.patched(start, size, {}, length)
    if length and not _is_made_up(length):
        raise cut_off(name, f"its header counts {length} bytes of audio and {there} are there")
    patch = struct.pack(order + "I", max(0, there))
    return Part.patched(start, size, {start + 8: patch}, max(0, there))


def _nist_part(file: io.BufferedIOBase, name: str, start: int, size: int) -> Part | None:
    lines = read_at(file, start, 1024).split(b"\n")
    fields = {line.split()[0]: line.split()[-1] for line in lines if len(line.split()) == 3}
    if b"shorten" in fields.get(b"sample_coding", b"") or not lines[1].strip().isdigit():
        return None
    there = size - start - int(lines[1])
    try:
        names = (b"sample_count", b"channel_count", b"sample_n_bytes")
        count, channels, width = (int(fields.get(key, b"1")) for key in names)
    except ValueError:
        return None
    length = count * channels * width
    if b"sample_count" not in fields or count <= 0 or _is_made_up(length):
        return Part.patched(start, size, {}, None)
    if length > there:
        raise cut_off(name, f"its header counts {length} bytes of audio and {there} are there")
    if there - length >= 8:
        raise EchoError(
            f"{name} has {there - length} bytes after its audio that its header does not count; "
            "expected one whole recording; write it again with sox or ffmpeg"
        )
    return Part.patched(start, size, {}, length)
