"""MP3 (MPEG layer III, and II): its length from its frames, which few headers tell."""

import io
from dataclasses import dataclass, field

from echo_eqx.data.splice import Part, after_id3, cut_off, read_at
from echo_eqx.errors import EchoError

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
"""libsndfile does not recognise every first frame, but always this."""
_WINDOW = 2**20


@dataclass(frozen=True)
class _Header:
    version: int
    """3 is MPEG 1, 2 is MPEG 2 and 0 is MPEG 2.5, as in the header."""
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
    """Frames of one format in a row."""

    start: int
    kind: tuple[int, int, int, bool]
    first: bytes
    """Header of its first frame."""
    claimed: int | None = None
    """Frames by its Xing header."""
    frames: int = 0
    stretches: list[tuple[int, int]] = field(default_factory=list)
    """Where its frames are, without the one that holds the Xing header."""


def mp3_parts(file: io.BufferedIOBase, name: str, start: int, end: int) -> list[Part] | None:
    """The recordings from `start` to `end`, several where files were joined; None if
    libsndfile should not read it.

    One whose length its header does not tell gets a header that does.

    **Raises**: `EchoError` with `name` if one is cut off or damaged.
    """
    window = _Window(file, end)
    at = after_id3(file, end, _skip_zeros(window, start, end))
    first = _header(window.read(at, 4))
    if first is None or not _follows(window, at, end):
        return None
    streams: list[_Stream] = []
    is_new = True
    while at < end:
        head = window.read(at, 4)
        header = _header(head)
        is_other = header is not None and streams and header.kind != streams[-1].kind
        if header is None or (is_other and not _follows(window, at, end)):
            after = _after_tag(window, file, at, end)
            is_new |= after != at
            if after == at:
                after = _skip_zeros(window, at, end)
            if after == at:
                after = _after_junk(window, name, at, end)
            at = after
            continue
        if at + header.length > end:
            if not streams or streams[-1].claimed != streams[-1].frames:
                raise cut_off(name, "its last frame is incomplete")
            break
        claimed = _claimed_frames(window.read(at, min(header.length, 200)), header)
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
        return None  # it has no header that could count its frames
    return [_part(name, stream) for stream in streams] or None


def _part(name: str, stream: _Stream) -> Part:
    if stream.claimed and stream.claimed > stream.frames + 1:
        counts = f"its header counts {stream.claimed} frames and {stream.frames} are there"
        raise cut_off(name, counts)
    if stream.claimed == stream.frames and len(stream.stretches) == 1:
        return Part((_EMPTY_TAG, (stream.start, stream.stretches[-1][1])))
    return Part((_EMPTY_TAG, _xing_frame(stream), *stream.stretches))


class _Window:
    """Small reads from a file, through a buffer."""

    def __init__(self, file: io.BufferedIOBase, end: int):
        self._file, self._end, self._start, self._data = file, end, 0, b""

    def read(self, at: int, count: int) -> bytes:
        offset = at - self._start
        if offset < 0 or offset + count > len(self._data):
            self._start, offset = at, 0
            self._data = read_at(self._file, at, max(0, min(_WINDOW, self._end - at)))
        return self._data[offset : offset + count]


def _follows(window: _Window, at: int, end: int) -> bool:
    """Whether the frame at `at` is followed by two of its kind, or by the end."""
    kind = None
    for _ in range(3):
        header = _header(window.read(at, 4))
        if header is None or (kind is not None and header.kind != kind):
            return False
        kind = header.kind
        at += header.length
        if at >= end or window.read(at, 3) in (b"TAG", b"ID3", b"APE"):
            return True
    return True


def _skip_zeros(window: _Window, at: int, end: int) -> int:
    while at < end and (data := window.read(at, min(4096, end - at))):
        rest = data.lstrip(b"\0")
        at += len(data) - len(rest)
        if rest:
            break
    return at


def _after_tag(window: _Window, file: io.BufferedIOBase, at: int, end: int) -> int:
    """Where a tag at `at` ends that another file ended or began with."""
    head = window.read(at, 32)
    if head[:3] == b"ID3":
        return after_id3(file, end, at)
    if head[:3] == b"TAG":
        return min(end, at + 128)
    if head[:8] == b"APETAGEX" and len(head) == 32:
        length = int.from_bytes(head[12:16], "little")
        return min(end, at + length + (32 if head[23] & 32 else 0))
    return at


def _after_junk(window: _Window, name: str, at: int, end: int) -> int:
    """The end, if only a few bytes of something else are left.

    **Raises**: `EchoError` with `name` if not: frames may be missing there.
    """
    if end - at < 128 and not window.read(at, end - at).startswith(b"\xff"):
        return end
    raise EchoError(
        f"{name} is damaged: at byte {at} there is no frame of MP3; expected a whole recording; "
        "decode it with another program and listen to what is left"
    )


def _side_info(version: int, is_mono: bool) -> int:
    return (17 if is_mono else 32) if version == 3 else (9 if is_mono else 17)


def _claimed_frames(frame: bytes, header: _Header) -> int | None:
    """Frames by a Xing, Info or VBRI header, 0 if it does not say; None if there is none."""
    at = 4 + _side_info(header.version, header.is_mono)
    if frame[at : at + 4] in (b"Xing", b"Info"):
        has_count = int.from_bytes(frame[at + 4 : at + 8]) & 1
        return int.from_bytes(frame[at + 8 : at + 12]) if has_count else 0
    return int.from_bytes(frame[50:54]) if frame[36:40] == b"VBRI" else None


def _xing_frame(stream: _Stream) -> bytes:
    """A frame without audio that says how many follow."""
    version, rate = stream.first[1] | 1, stream.first[2] & 12
    heads = (bytes((0xFF, version, i << 4 | rate, stream.first[3])) for i in range(1, 15))
    lengths = ((head, header.length) for head in heads if (header := _header(head)))
    head, length = next(item for item in lengths if item[1] >= 64)
    side = bytes(_side_info(stream.kind[0], stream.kind[3]))
    xing = b"Xing" + (1).to_bytes(4) + stream.frames.to_bytes(4)
    return (head + side + xing).ljust(length, b"\0")
