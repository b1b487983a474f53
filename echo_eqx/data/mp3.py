"""MP3 (MPEG layers II and III): frames are counted, because few headers give the length."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field

from echo_eqx.data.splice import Part, after_id3, damaged, read_at, truncated

_LAYER_3, _LAYER_2 = 1, 2
_LOW = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_BITRATES = {  # kbit/s by index, of a layer in MPEG 1 or in MPEG 2 and 2.5
    (_LAYER_3, True): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (_LAYER_2, True): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (_LAYER_3, False): _LOW,
    (_LAYER_2, False): _LOW,
}
_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_EMPTY_TAG = b"ID3\x04" + bytes(5) + b"\x40" + bytes(64)
"""libsndfile does not recognize every first frame, but always recognizes this tag."""
_Read = Callable[[int, int], bytes]
"""`(offset, count)`: reads up to `count` bytes."""


@dataclass(frozen=True)
class _Header:
    version: int
    """3 for MPEG 1, 2 for MPEG 2 and 0 for MPEG 2.5, as in the header."""
    layer: int
    rate: int
    is_mono: bool
    length: int

    @property
    def kind(self) -> tuple[int, int, int, bool]:
        return self.version, self.layer, self.rate, self.is_mono


def _header(data: bytes) -> _Header | None:
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return None
    version, bitrate, rate = data[1] >> 3 & 3, data[2] >> 4, data[2] >> 2 & 3
    layer = data[1] >> 1 & 3
    if version == 1 or layer not in (_LAYER_3, _LAYER_2) or bitrate in (0, 15) or rate == 3:
        return None
    hertz = _RATES[version][rate]
    kbits = _BITRATES[layer, version == 3][bitrate]
    slots = 72 if layer == _LAYER_3 and version != 3 else 144
    length = slots * kbits * 1000 // hertz + (data[2] >> 1 & 1)
    return _Header(version, layer, hertz, data[3] >> 6 == 3, length)


@dataclass
class _Stream:
    """Consecutive frames of one format."""

    start: int
    kind: tuple[int, int, int, bool]
    first: bytes
    """Header of its first frame."""
    claimed: int | None = None
    """Number of frames given by its Xing header."""
    frames: int = 0
    stretches: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of its frames, without the one that holds the Xing header."""


def mp3_parts(file: io.BufferedIOBase, name: str, start: int, end: int) -> list[Part] | None:
    """The recordings from `start` to `end`, several if files were joined; None if libsndfile should
    not read it.

    A recording whose header does not give its length gets one that does.

    **Raises**: `EchoError` naming `name` if one is truncated or damaged.
    """

    def read(at: int, count: int) -> bytes:
        return read_at(file, at, max(0, min(count, end - at)))

    at = after_id3(file, end, _skip_zeros(read, start, end))
    if _header(read(at, 4)) is None or not _follows(read, at, end):
        return None
    streams: list[_Stream] = []
    is_new = True
    while at < end:
        head = read(at, 4)
        header = _header(head)
        is_other = header is not None and streams and header.kind != streams[-1].kind
        if header is None or (is_other and not _follows(read, at, end)):
            after = _after_tag(read, file, at, end)
            is_new |= after != at
            if after == at:
                after = _skip_zeros(read, at, end)
            if after == at:
                after = _after_junk(read, name, at, end)
            at = after
            continue
        if at + header.length > end:
            if not streams or streams[-1].claimed != streams[-1].frames:
                raise truncated(name, "its last frame is incomplete")
            break
        claimed = _claimed_frames(read(at, min(header.length, 200)), header)
        if is_new or claimed is not None or header.kind != streams[-1].kind:
            streams.append(_Stream(at, header.kind, head, claimed))
            is_new = False
        stream = streams[-1]
        if claimed is None:
            stream.frames += 1
            if stream.stretches and stream.stretches[-1][1] == at:
                stream.stretches[-1] = (stream.stretches[-1][0], at + header.length)
            else:
                stream.stretches.append((at, at + header.length))
        at += header.length
    streams = [stream for stream in streams if stream.frames]
    if any(stream.kind[1] == _LAYER_2 for stream in streams):
        return None  # no header can give their number of frames
    return [_part(name, stream) for stream in streams] or None


def _part(name: str, stream: _Stream) -> Part:
    if stream.claimed and stream.claimed > stream.frames + 1:
        counts = f"its header says {stream.claimed} frames, got {stream.frames}"
        raise truncated(name, counts)
    if stream.claimed == stream.frames and len(stream.stretches) == 1:
        return Part((_EMPTY_TAG, (stream.start, stream.stretches[-1][1])))
    return Part((_EMPTY_TAG, _xing_frame(stream), *stream.stretches))


def _follows(read: _Read, at: int, end: int) -> bool:
    """Whether the frame at `at` is followed by two of the same kind, or by the end."""
    kind = None
    for _ in range(3):
        header = _header(read(at, 4))
        if header is None or (kind is not None and header.kind != kind):
            return False
        kind = header.kind
        at += header.length
        if at >= end or read(at, 3) in (b"TAG", b"ID3", b"APE"):
            return True
    return True


def _skip_zeros(read: _Read, at: int, end: int) -> int:
    while at < end and (data := read(at, min(4096, end - at))):
        rest = data.lstrip(b"\0")
        at += len(data) - len(rest)
        if rest:
            break
    return at


def _after_tag(read: _Read, file: io.BufferedIOBase, at: int, end: int) -> int:
    """End of the tag at `at`, left from a joined file; `at` if there is none."""
    head = read(at, 32)
    if head[:3] == b"ID3":
        return after_id3(file, end, at)
    if head[:3] == b"TAG":
        return min(end, at + 128)
    if head[:8] == b"APETAGEX" and len(head) == 32:
        length = int.from_bytes(head[12:16], "little")
        return min(end, at + length + (32 if head[23] & 32 else 0))
    return at


def _after_junk(read: _Read, name: str, at: int, end: int) -> int:
    """The end, if only a few other bytes are left.

    **Raises**: `EchoError` naming `name` otherwise, because frames may be missing.
    """
    if end - at < 128 and not read(at, end - at).startswith(b"\xff"):
        return end
    raise damaged(name, at, "expected an MP3 frame, got other data")


def _side_info(version: int, is_mono: bool) -> int:
    return (17 if is_mono else 32) if version == 3 else (9 if is_mono else 17)


def _claimed_frames(frame: bytes, header: _Header) -> int | None:
    """Number of frames according to a Xing, Info or VBRI header: 0 if it gives none, None if there
    is no such header."""
    at = 4 + _side_info(header.version, header.is_mono)
    if frame[at : at + 4] in (b"Xing", b"Info"):
        has_count = int.from_bytes(frame[at + 4 : at + 8]) & 1
        return int.from_bytes(frame[at + 8 : at + 12]) if has_count else 0
    return int.from_bytes(frame[50:54]) if frame[36:40] == b"VBRI" else None


def _xing_frame(stream: _Stream) -> bytes:
    """A frame without audio that gives the number of frames after it."""
    version, rate = stream.first[1] | 1, stream.first[2] & 12
    heads = (bytes((0xFF, version, i << 4 | rate, stream.first[3])) for i in range(1, 15))
    lengths = ((head, header.length) for head in heads if (header := _header(head)))
    head, length = next(item for item in lengths if item[1] >= 64)
    side = bytes(_side_info(stream.kind[0], stream.kind[3]))
    xing = b"Xing" + (1).to_bytes(4) + stream.frames.to_bytes(4)
    return (head + side + xing).ljust(length, b"\0")
