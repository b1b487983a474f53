"""Reading safetensors files in which any byte may be wrong, one tensor at a time.

The format, and the checksums in our own files, are described in `safetensors_writer`. Checksums
are verified while a tensor is read, so each byte is read once. Files without them load too.
"""

import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from echo_eqx.errors import EchoError
from echo_eqx.json_data import MAX_JSON_BYTES, parse_json
from echo_eqx.weights.safetensors_writer import CHECKSUMS, header_checksum

_TYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_MAX_TENSORS = 100_000
_BLOCK = 2**24


@dataclass(frozen=True)
class _Entry:
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int


class SafetensorsFile:
    """A safetensors file: metadata, shapes, and arrays read one by one.

    A tensor is verified against its CRC-32 in `checksums` the first time it is read. By default
    these are the checksums in the file, if it has any.

    **Raises**: `EchoError` naming the file if it is empty, truncated, damaged or of another kind.
    """

    def __init__(self, path: Path, *, checksums: Mapping[str, int] | None = None):
        self.path = path
        try:
            if not path.is_file():
                raise ValueError("it is not a regular file")
            with path.open("rb") as file:
                text, size = _header_of(file.fileno())
            header = parse_json(text)
            if not isinstance(header, dict) or len(header) > _MAX_TENSORS:
                raise ValueError(f"expected a header with at most {_MAX_TENSORS} tensors")
            # Other programs change a file and keep its metadata, checksums included, but format
            # the header in their own way.
            as_written = json.dumps(header).encode() == text.rstrip(b" ")
            self.metadata = _metadata(header.pop("__metadata__", {}))
            self._entries = _entries(header, 8 + len(text), size)
            if checksums is None:
                checksums = self._read_checksums(text) if as_written else {}
        except OSError as error:
            raise EchoError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise EchoError(f"{path} is not a readable safetensors file: {error}") from None
        self.names = list(self._entries)
        self._unverified = dict(checksums)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def holds(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> bool:
        entry = self._entries.get(name)
        return entry is not None and (entry.dtype, entry.shape) == (dtype, shape)

    def verify(self, name: str) -> None:
        """Read a tensor in blocks and compare it with its checksum, unless that was already done.

        **Raises**: `EchoError` if the tensor is missing, unreadable or not what was written.
        """
        if name in self._unverified:
            for _ in self._verified_blocks(name):
                pass

    def __getitem__(self, name: str) -> np.ndarray:
        """**Raises**: `EchoError` if the tensor is missing, unreadable or not what was written."""
        entry = self._entry(name)
        data = np.empty(entry.num_bytes, np.uint8)
        position = 0
        for block in self._verified_blocks(name):
            data[position : position + len(block)] = np.frombuffer(block, np.uint8)
            position += len(block)
        return data.view(entry.dtype).reshape(entry.shape)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of a tensor. The whole tensor is verified the first time.

        **Raises**: `EchoError` if the tensor is missing, unreadable or not what was written.
        """
        entry = self._entry(name)
        boxes = zip(index, entry.shape, strict=True)
        if all(s.indices(size)[:2] == (0, size) for s, size in boxes):
            return self[name]
        self.verify(name)
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            count = math.prod(entry.shape)
            flat = np.frombuffer(mapped, entry.dtype, count, entry.start)
            return flat.reshape(entry.shape)[index].copy()
        except (OSError, ValueError) as error:
            raise EchoError(f"{self.path}: tensor {name} cannot be read: {error}") from None

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise EchoError(f"{self.path}: tensor {name} is missing")
        return self._entries[name]

    def _verified_blocks(self, name: str) -> Iterator[bytes]:
        entry = self._entry(name)
        crc = 0
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry.start)
                left = entry.num_bytes
                while left:
                    block = file.read(min(left, _BLOCK))
                    if not block:
                        raise EchoError(f"{self.path} is cut off in {name}")
                    left -= len(block)
                    if name in self._unverified:
                        crc = zlib.crc32(block, crc)
                    yield block
        except OSError as error:
            raise EchoError(
                f"{self.path}: tensor {name} cannot be read: {error.strerror}"
            ) from None
        if crc != self._unverified.get(name, crc):
            raise EchoError(
                f"{self.path}: tensor {name} is damaged: expected CRC-32 "
                f"{self._unverified[name]:08x}, got {crc:08x}; use another copy of the file"
            )
        self._unverified.pop(name, None)

    def _read_checksums(self, text: bytes) -> dict[str, int]:
        found = self.metadata.get(CHECKSUMS)
        if found is None:
            return {}
        numbers = [int(crc, 16) for crc in re.findall(r"[0-9a-f]{8}", found)]
        if len(found) != 9 * len(numbers) - 1 or len(numbers) != 1 + len(self._entries):
            raise ValueError(
                f"expected {1 + len(self._entries)} checksums in its metadata, got {len(numbers)}"
            )
        if header_checksum(text, found) != numbers[0]:
            raise ValueError("its header is damaged: it does not match its checksum")
        return dict(zip(self._entries, numbers[1:], strict=True))


def _header_of(file: int) -> tuple[bytes, int]:
    """The header's text, and the size of the file."""
    size = os.fstat(file).st_size
    head = os.read(file, 8)
    length = int.from_bytes(head, "little")
    if len(head) < 8:
        raise ValueError(f"it has {size} bytes")
    if length > size - 8:
        raise ValueError(f"its header has {length} bytes, but the file only {size}")
    if length > MAX_JSON_BYTES:
        raise ValueError(f"expected a header of at most {MAX_JSON_BYTES} bytes, got {length}")
    text = os.read(file, length)
    if len(text) < length:
        raise ValueError("it is cut off in its header")
    return text, size


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("expected metadata that maps strings to strings")
    return found


def _entries(header: dict[str, Any], base: int, size: int) -> dict[str, _Entry]:
    """Tensors in file order. Together they must cover the file from the header to its end."""
    entries = {name: _entry(name, found, base) for name, found in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)))
    position = base
    for name, entry in entries.items():
        if entry.start != position:
            raise ValueError(f"tensor {name[:100]!r} does not start where the previous one ends")
        position += entry.num_bytes
    if position != size:
        raise ValueError(f"expected its tensors to end at byte {size}, got {position}")
    return entries


def _entry(name: str, found: Any, base: int) -> _Entry:
    where = f"tensor {name[:100]!r}"
    if not isinstance(found, dict) or set(found) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _TYPES:
        shown = dtype[:20] if isinstance(dtype, str) else type(dtype).__name__
        raise ValueError(f"{where}: expected type {', '.join(_TYPES)}, got {shown!r}")
    if not _are_sizes(shape) or len(shape) > 16:
        raise ValueError(f"{where}: expected a shape of at most 16 sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: expected two data_offsets")
    num_bytes = math.prod(shape) * _TYPES[dtype].itemsize
    if offsets[1] - offsets[0] != num_bytes:
        raise ValueError(f"{where}: expected {num_bytes} bytes, got {offsets[1] - offsets[0]}")
    return _Entry(_TYPES[dtype], tuple(shape), base + offsets[0], num_bytes)


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(n) is int and 0 <= n < 2**48 for n in found)
