"""Writing PyTorch's zip files (`torch.save`) without PyTorch, and without pickling any object.

The file is a zip of stored entries below one folder: `data.pkl`, a pickle of protocol 2 in which a
tensor is a reference to a storage, and `data/0`, `data/1`, ... with the numbers of each storage, on
multiples of 64 bytes (https://github.com/pytorch/pytorch/blob/main/torch/serialization.py). The
opcodes are written here; `torch.load(weights_only=True)` reads them. The same content is the same
bytes every time.
"""

import math
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

_ALIGNMENT = 64
_LARGE = 2**30
"""Bytes from which on an entry has 64-bit sizes."""
_STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
}


def write_torch_file(path: Path, value: Any) -> None:
    """Write dicts, lists, strings, integers and arrays as `torch.save` does; arrays are tensors.

    **Raises**: `TypeError` for other values.
    """
    code, arrays = bytearray(b"\x80\x02"), []
    _write_value(code, arrays, value)
    code += b"."
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:

        def add(name: str, data: Any) -> None:
            entry = zipfile.ZipInfo(f"weights/{name}")  # the date is that of the format: 1980
            data = memoryview(data)
            is_large = data.nbytes > _LARGE
            start = file.tell() + 30 + len(entry.filename) + (20 if is_large else 0) + 4
            padding = b"Z" * (-start % _ALIGNMENT)
            entry.extra = struct.pack("<2sH", b"FB", len(padding)) + padding
            with archive.open(entry, "w", force_zip64=is_large) as writer:
                writer.write(data)

        add("data.pkl", code)
        add(".format_version", b"1")
        add(".storage_alignment", b"%d" % _ALIGNMENT)
        add("byteorder", b"little")
        for key, array in enumerate(arrays):
            add(f"data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        add("version", b"3\n")


def _write_value(code: bytearray, arrays: list[np.ndarray], value: Any) -> None:
    """Append the opcodes that push `value`, and to `arrays` the storages that they name."""
    match value:
        case bool():
            code += b"\x88" if value else b"\x89"
        case int():
            code += b"J" + struct.pack("<i", value)
        case str():
            text = value.encode()
            code += b"X" + struct.pack("<I", len(text)) + text
        case list():
            code += b"]("
            for item in value:
                _write_value(code, arrays, item)
            code += b"e"
        case Mapping():
            code += b"ccollections\nOrderedDict\n)R" if isinstance(value, OrderedDict) else b"}"
            for key, item in value.items():
                _write_value(code, arrays, key)
                _write_value(code, arrays, item)
                code += b"s"
        case np.ndarray():
            # The persistent id of a storage, then offset, size, stride, requires_grad and hooks.
            key = str(len(arrays)).encode()
            code += b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage"
            code += f"ctorch\n{_STORAGES[value.dtype]}\n".encode()
            code += b"X" + struct.pack("<I", len(key)) + key + b"X\x03\0\0\0cpu"
            code += b"J" + struct.pack("<i", value.size) + b"tQJ\0\0\0\0"
            strides = [math.prod(value.shape[axis + 1 :]) for axis in range(value.ndim)]
            for sizes in (value.shape, strides):
                code += b"(" + b"".join(b"J" + struct.pack("<i", size) for size in sizes) + b"t"
            code += b"\x89ccollections\nOrderedDict\n)RtR"
            arrays.append(value)
        case _:
            raise TypeError(f"expected a container, string, integer or array, got {type(value)}")
