"""A streaming safetensors writer.

The library's writer needs all tensors in memory at once. This one can write a model larger than
memory, adds checksums, and gives the same bytes for the same content.

The format: 8 bytes with the length of a JSON header, the header with dtype, shape and offsets of
every tensor, then the numbers (https://github.com/huggingface/safetensors).

The metadata gets one more entry, `CHECKSUMS`: CRC-32s in hexadecimal, of the header (with its own
eight digits zeroed) and of each tensor in file order.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from echo_eqx.errors import EchoError

CHECKSUMS = "echo_eqx.crc32"
_BLANK = "0" * 8
NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int32): "I32",
    np.dtype(np.int8): "I8",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write; `parts()` yields its numbers in order, in arrays of any size."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_safetensors(
    path: Path, tensors: Iterable[Tensor], metadata: Mapping[str, str]
) -> dict[str, int]:
    """Write `tensors` to `path` and return the CRC-32 of each, by name."""
    tensors = list(tensors)
    blank = " ".join([_BLANK] * (len(tensors) + 1))
    header: dict[str, object] = {"__metadata__": {CHECKSUMS: blank, **metadata}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        crcs = {tensor.name: _write(file, tensor) for tensor in tensors}
        found = " ".join([_BLANK, *(f"{crc:08x}" for crc in crcs.values())])
        text = text.replace(blank.encode(), found.encode(), 1)
        sealed = found.replace(_BLANK, f"{header_checksum(text, found):08x}", 1)
        file.seek(8)
        file.write(text.replace(found.encode(), sealed.encode(), 1))
    return crcs


def header_checksum(text: bytes, checksums: str) -> int:
    """CRC-32 of a header whose own checksum in `checksums`, the value of `CHECKSUMS`, is zeroed."""
    blank = _BLANK + checksums[len(_BLANK) :]
    return zlib.crc32(text.replace(checksums.encode(), blank.encode(), 1))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write whole arrays, sorted by name: the same content is the same bytes every time.

    The library's own writer puts the metadata in a random order.
    """
    tensors = [converted(name, array, array.dtype) for name, array in sorted(arrays.items())]
    write_safetensors(path, tensors, dict(sorted(metadata.items())))


def converted(name: str, array: Any, dtype: np.dtype) -> Tensor:
    """`array`, of NumPy or JAX, to be written in `dtype`.

    It is converted when it is written, so that only one array at a time is in memory twice.
    `parts` raises an `EchoError` naming the array if a number does not fit `dtype`.
    """
    return Tensor(name, dtype, tuple(array.shape), lambda: [to_dtype(name, array, dtype)])


def to_dtype(name: str, array: Any, dtype: np.dtype) -> np.ndarray:
    """`array` in `dtype`, contiguous.

    **Raises**: `EchoError` naming the array if a number does not fit `dtype`.
    """
    with np.errstate(over="ignore"):
        out = np.asarray(array).astype(dtype, order="C", copy=False)
    if dtype != array.dtype and not np.isfinite(out.astype(np.float32, copy=False)).all():
        raise EchoError(f"{name} has values that {dtype} cannot hold")
    return out


def _write(file: BinaryIO, tensor: Tensor) -> int:
    crc = written = 0
    for part in tensor.parts():
        data: Any = np.asarray(part, tensor.dtype, order="C").reshape(-1).view(np.uint8)
        file.write(data)
        crc = zlib.crc32(data, crc)
        written += data.nbytes
    assert written == tensor.num_bytes, tensor.name
    return crc
