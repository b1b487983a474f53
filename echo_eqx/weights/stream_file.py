"""Writing safetensors piece by piece: no tensor has to be whole in memory.

The format: 8 bytes with the length of a JSON header, the header with type, shape and place of every
tensor, then the numbers (https://github.com/huggingface/safetensors). The library's own writer
copies all tensors first.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int32): "I32",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: what it is, and its numbers in order, in parts of any size."""

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
    header: dict[str, object] = {"__metadata__": dict(metadata)}
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
        return {tensor.name: _write(file, tensor) for tensor in tensors}


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write whole arrays, sorted by name: the same content is the same bytes every time.

    The library's own writer puts the metadata in a random order.
    """
    tensors = [
        Tensor(name, array.dtype, array.shape, lambda array=array: [array])
        for name, array in sorted(arrays.items())
    ]
    write_safetensors(path, tensors, dict(sorted(metadata.items())))


def _write(file: BinaryIO, tensor: Tensor) -> int:
    crc = written = 0
    for part in tensor.parts():
        data: Any = np.asarray(part, tensor.dtype, order="C").reshape(-1).view(np.uint8)
        file.write(data)
        crc = zlib.crc32(data, crc)
        written += data.nbytes
    assert written == tensor.num_bytes, tensor.name
    return crc


def checksums(path: Path) -> Iterator[tuple[str, int]]:
    """CRC-32 of each tensor in a safetensors file, read in small parts.

    **Raises**: `ValueError` or `OSError` if the file is damaged.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it is cut off in its header")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            crc, left = 0, end - start
            while left:
                data = file.read(min(left, 2**24))
                if not data:
                    raise ValueError(f"it is cut off in {name}")
                crc = zlib.crc32(data, crc)
                left -= len(data)
            yield name, crc
