"""FLAC (RFC 9639): the length is read from the last frame, since streams lack it in the header."""

import io
from dataclasses import dataclass

from echo_eqx.data.splice import Part, find_bytes, read_at, truncated
from echo_eqx.errors import EchoError

_STARTS = (b"fLaC\x00\x00\x00\x22", b"fLaC\x80\x00\x00\x22")
_MAX_FRAME = 2**21


def _crc_table(polynomial: int, bits: int) -> list[int]:
    table = []
    for value in range(256):
        crc = value << (bits - 8)
        for _ in range(8):
            crc = (crc << 1) ^ (polynomial if crc & 1 << (bits - 1) else 0)
        table.append(crc & ((1 << bits) - 1))
    return table


_CRC8, _CRC16 = _crc_table(0x07, 8), _crc_table(0x8005, 16)


def flac_parts(file: io.BufferedIOBase, name: str, start: int, end: int) -> list[Part]:
    """The recordings from `start` to `end`, several if files were joined.

    **Raises**: `EchoError` naming `name` if one is truncated.
    """
    starts = [start, *find_bytes(file, start + 4, end, *_STARTS)]
    return [_part(file, name, *span) for span in zip(starts, [*starts[1:], end], strict=True)]


def _part(file: io.BufferedIOBase, name: str, start: int, end: int) -> Part:
    info = read_at(file, start + 8, 18)
    if len(info) < 18:
        raise truncated(name, "its header is incomplete")
    block_size = int.from_bytes(info[:2])
    packed = int.from_bytes(info[10:18])  # sample rate, channels, bits per sample, total samples
    claimed = packed & (2**36 - 1)
    longest = int.from_bytes(info[7:10])
    window = min(end - start, max(longest + 16, 2**14) if longest else _MAX_FRAME)
    tail = read_at(file, end - window, window)
    frames = _frame_headers(tail, block_size)
    if claimed and any(frame.end == claimed for frame in frames):
        return Part(((start, end),), frames=claimed)
    whole = next((frame for frame in frames if _crc16(tail[frame.at :]) == 0), None)
    if whole is None or (whole.end < claimed < 2**36 - 2**16):
        reason = "its last frame is incomplete" if whole is None else "frames are missing"
        raise truncated(name, reason)
    if whole.end >= 2**36:
        raise EchoError(f"{name} is damaged: its last frame has the number {whole.end}")
    right = (packed >> 36 << 36 | whole.end).to_bytes(8)
    return Part.patched(start, end, {start + 18: right}, frames=whole.end)


@dataclass(frozen=True)
class _Frame:
    at: int
    end: int
    """Samples from the start of the recording to the end of the frame."""


def _frame_headers(data: bytes, block_size: int) -> list[_Frame]:
    """Possible frame headers, the last first."""
    found = []
    at = len(data)
    while (at := data.rfind(b"\xff", 0, at)) >= 0:
        if data[at + 1 : at + 2] in (b"\xf8", b"\xf9"):
            frame = _frame_header(data, at, block_size)
            if frame is not None:
                found.append(frame)
    return found


def _frame_header(data: bytes, at: int, block_size: int) -> _Frame | None:
    head = io.BytesIO(data[at : at + 16])
    sync = head.read(4)
    if len(sync) < 4 or sync[3] & 1:
        return None
    size_code, rate_code = sync[2] >> 4, sync[2] & 15
    # A number coded like UTF-8: of the frame, or of its first sample.
    first = head.read(1)[:1] or b"\xff"
    ones = 8 - (first[0] ^ 255).bit_length()
    if ones in (1, 8):
        return None
    number = first[0] & (127 >> ones)
    for _ in range(max(0, ones - 1)):
        byte = head.read(1)
        if not byte or byte[0] >> 6 != 2:
            return None
        number = number << 6 | byte[0] & 63
    if size_code in (6, 7):
        size = int.from_bytes(head.read(size_code - 5)) + 1
    elif size_code >= 8:
        size = 256 << (size_code - 8)
    else:
        size = (0, 192, 576, 1152, 2304, 4608)[size_code]
    head.read({12: 1, 13: 2, 14: 2}.get(rate_code, 0))
    length = head.tell()
    crc = head.read(1)
    if not crc or not size or rate_code == 15:
        return None
    check = 0
    for byte in data[at : at + length]:
        check = _CRC8[check ^ byte]
    if check != crc[0]:
        return None
    is_numbered_by_sample = sync[1] & 1
    return _Frame(at, (number if is_numbered_by_sample else number * block_size) + size)


def _crc16(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc = (crc << 8 & 0xFFFF) ^ _CRC16[crc >> 8 ^ byte]
    return crc
