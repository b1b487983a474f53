"""Reading GGUF files in which any byte may be wrong, one tensor at a time.

It is our own because the reader of the package `gguf` believes what a file says: an array that
claims 2^60 entries keeps it busy until memory is full.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: magic,
version, numbers of tensors and of fields, the fields (key, type, value), the tensors (name, sizes
with the fastest first, type, offset), and the numbers, aligned.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from echo_eqx.errors import EchoError

MAGIC = b"GGUF"
Q8_0 = np.dtype([("scale", np.float16), ("values", np.int8, 32)])
"""32 numbers of a row: a scale times integers."""
_TYPES = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    8: Q8_0,
    30: np.dtype(ml_dtypes.bfloat16),
}
_BLOCK = {8: 32}
"""Numbers in one item of a type, where that is more than one."""
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 100_000
"""Fields, tensors, or strings of an array."""
_MAX_NAME = 1000


@dataclass(frozen=True)
class _Entry:
    type: int
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""

    @property
    def items(self) -> int:
        return math.prod(self.shape) // _BLOCK.get(self.type, 1)

    @property
    def num_bytes(self) -> int:
        return self.items * _TYPES[self.type].itemsize


class GGUFFile:
    """A GGUF file: fields, shapes as NumPy has them, and arrays read one by one.

    `fields` are numbers and strings by key, and None for an array. Tensors of type F32,
    F16 and BF16 are read as they are, and Q8_0 as float32.

    **Raises**: `EchoError` naming the file if it is truncated, damaged or of another kind.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self.fields, self._entries = _Parser(file, path.stat().st_size).parse()
        except OSError as error:
            raise EchoError(f"{path} cannot be read: {error.strerror}") from None
        except ValueError as error:  # also text that is not UTF-8
            raise EchoError(f"{path} is not a readable GGUF file: {error}") from None
        self.names = list(self._entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """**Raises**: `EchoError` if the tensor is missing or cannot be read."""
        if name not in self._entries:
            raise EchoError(f"{self.path}: tensor {name} is missing")
        entry = self._entries[name]
        try:
            with self.path.open("rb") as file:
                file.seek(entry.start)
                flat: Any = np.fromfile(file, _TYPES[entry.type], entry.items)
        except OSError as error:
            raise EchoError(
                f"{self.path}: tensor {name} cannot be read: {error.strerror}"
            ) from None
        if flat.size < entry.items:
            raise EchoError(f"{self.path} is cut off in {name}")
        if flat.dtype == Q8_0:
            flat = flat["scale"].astype(np.float32)[:, None] * flat["values"]
        return flat.reshape(entry.shape)


class _Parser:
    def __init__(self, file: BinaryIO, size: int):
        self.file, self.left, self.size = file, size, size

    def parse(self) -> tuple[dict[str, Any], dict[str, _Entry]]:
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("<I")) not in (2, 3):
            raise ValueError(f"expected version 2 or 3, little-endian, got {version}")
        num_tensors, num_fields = self._number("<Q"), self._number("<Q")
        if max(num_tensors, num_fields) > _MAX_ENTRIES:
            raise ValueError(f"expected at most {_MAX_ENTRIES} tensors and fields")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self._text(_MAX_NAME)
            if key in fields:
                raise ValueError(f"field {key[:100]!r} is there twice")
            fields[key] = self._value(self._number("<I"))
        infos = [self._tensor() for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**16:
            raise ValueError(f"general.alignment: expected 1 to 65536, got {str(alignment)[:20]}")
        position = self.size - self.left
        return fields, self._placed(infos, position + -position % alignment)

    def _placed(self, infos: list[tuple[str, _Entry]], base: int) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        for name, info in infos:
            if name in entries:
                raise ValueError(f"tensor {name[:100]!r} is there twice")
            entry = _Entry(info.type, info.shape, base + info.start)
            if entry.start + entry.num_bytes > self.size:
                raise ValueError(f"tensor {name[:100]!r} reaches beyond its end")
            entries[name] = entry
        if sum(entry.num_bytes for entry in entries.values()) > self.size:
            raise ValueError("its tensors are larger than the file; they overlap")
        return entries

    def _take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(f"it is cut off: expected {count} more bytes, got {self.left}")
        self.left -= count
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError("it is cut off")
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, limit: int) -> str:
        if (length := self._number("<Q")) > limit:
            raise ValueError(f"expected a text of at most {limit} bytes, got {length}")
        return self._take(length).decode()

    def _value(self, kind: int) -> Any:
        """A number or a string; None for an array, whose length is checked and which is skipped."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text(2**20)
        if kind != _ARRAY:
            raise ValueError(f"expected a field of type 0 to 12, got {kind}")
        kind, count = self._number("<I"), self._number("<Q")
        if kind in _SCALARS:
            num_bytes = count * struct.calcsize(_SCALARS[kind])
            if num_bytes > self.left:
                raise ValueError(f"an array of {count} numbers reaches beyond its end")
            self.left -= num_bytes
            self.file.seek(num_bytes, 1)
        elif kind == _STRING and count <= _MAX_ENTRIES:
            for _ in range(count):
                self._text(2**20)
        else:
            raise ValueError(f"an array of {count} values of type {kind} is refused")
        return None

    def _tensor(self) -> tuple[str, _Entry]:
        """A name and what is said of it, with `start` still within the numbers."""
        name = self._text(_MAX_NAME)
        where = f"tensor {name[:100]!r}"
        if (rank := self._number("<I")) > 4:
            raise ValueError(f"{where}: expected at most 4 dimensions, got {rank}")
        shape = tuple(self._number("<Q") for _ in range(rank))[::-1]
        if any(size >= 2**48 for size in shape):
            raise ValueError(f"{where}: expected sizes below 2^48")
        kind, start = self._number("<I"), self._number("<Q")
        if kind not in _TYPES:
            raise ValueError(f"{where}: expected type F32, F16, BF16 or Q8_0, got type {kind}")
        if (block := _BLOCK.get(kind, 1)) > 1 and (not shape or shape[-1] % block):
            raise ValueError(f"{where}: expected rows of a multiple of {block}, got {shape}")
        return name, _Entry(kind, shape, start)
