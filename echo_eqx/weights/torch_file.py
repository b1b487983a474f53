"""PyTorch's zip files (`torch.save`), read without PyTorch."""

import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from echo_eqx.errors import EchoError
from echo_eqx.weights.safe_pickle import (
    PARSE_ERRORS,
    Builder,
    Global,
    Record,
    is_shape,
    load,
    only_global,
    ordered_dict,
)
from echo_eqx.weights.sharded import shared_prefix

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError)
_MAX_DIRECTORY = 2**24
"""Largest central directory of a zip in bytes. An entry takes some 60, and 1 kB in memory."""


KNOWN: dict[str, Builder] = {
    "collections.OrderedDict": ordered_dict,
    "torch._utils._rebuild_tensor_v2": lambda args: Record("tensor", args),
    "torch._utils._rebuild_parameter": lambda args: args[0],
    **{f"torch.{name}": only_global(f"torch.{name}") for name in _STORAGES},
}


def read_torch_file(path: Path) -> dict[str, Any]:
    """The pickled dict of a `torch.save` file, its tensors as NumPy arrays.

    **Raises**: `EchoError` naming the file and what is wrong in it.
    """
    try:
        with _Opening(path) as file, zipfile.ZipFile(file) as archive:
            file.is_open = True
            return _read(archive, path)
    except (*_ZIP_ERRORS, *PARSE_ERRORS) as error:
        raise EchoError(
            f"{path}: expected a zip file written by torch.save, got one that is damaged, "
            f"truncated or of another kind ({error})"
        ) from None


class _Opening(io.FileIO):
    """A file with a bound on what is read while it is opened as a zip: the central directory."""

    is_open = False

    def read(self, size: int | None = -1, /) -> bytes:
        if not self.is_open and size is not None and size > _MAX_DIRECTORY:
            raise EchoError(
                f"{self.name}: expected a zip directory of at most {_MAX_DIRECTORY} bytes, got "
                f"{size}"
            )
        return super().read(size) or b""


def _read(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if sum(entry.file_size for entry in entries.values()) > path.stat().st_size:
        raise EchoError(f"{path}: its entries are larger than the file; they overlap")
    for entry in entries.values():
        # torch.save never compresses: a compressed entry could unpack to any size.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise EchoError(f"{path}: entry {entry.filename!r} is compressed, which is refused")
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise EchoError(f"{path}: expected one entry data.pkl, got {len(pickles)}")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(folder + "byteorder")
    if order is not None and archive.read(order).strip() != b"little":
        raise EchoError(f"{path}: expected little-endian numbers, got big-endian")

    storages: dict[str, np.ndarray] = {}

    def storage(persistent_id: Any) -> np.ndarray:
        match persistent_id:
            case ("storage", Global(name), str(key), _, int(count)):
                dtype = _STORAGES[name.rsplit(".", 1)[1]]
            case _:
                raise EchoError("expected a storage, got another persistent id")
        if key not in storages:
            entry = entries.get(f"{folder}data/{key}")
            if entry is None:
                raise EchoError(f"storage {key[:50]!r} is missing")
            if entry.file_size != count * dtype.itemsize:
                raise EchoError(
                    f"storage {key} has {entry.file_size} bytes; "
                    f"its header says {count} x {dtype.itemsize}"
                )
            storages[key] = np.frombuffer(archive.read(entry), dtype)
        if storages[key].dtype != dtype:
            raise EchoError(f"storage {key} is used as {storages[key].dtype} and as {dtype}")
        return storages[key]

    value = load(archive.read(pickles[0]), str(path), KNOWN, storage)
    if not isinstance(value, dict):
        raise EchoError(f"{path}: expected a dict of tensors, got a {type(value).__name__}")
    return value


def tensors(state_dict: Any, path: Path) -> dict[str, np.ndarray]:
    """Arrays of a state dict by name."""
    if not isinstance(state_dict, dict):
        raise EchoError(f"{path}: expected a state_dict, got a {type(state_dict).__name__}")
    out = {}
    prefix = shared_prefix(state_dict)
    for name, value in state_dict.items():
        if not (isinstance(value, Record) and value.name == "tensor"):
            raise EchoError(f"{path}: {name}: expected a tensor, got a {type(value).__name__}")
        try:
            out[name.removeprefix(prefix)] = _tensor(value.args, f"{path}: {name}")
        except PARSE_ERRORS as error:
            raise EchoError(f"{path}: {name} is damaged ({type(error).__name__})") from None
    return out


def _tensor(args: tuple, where: str) -> np.ndarray:
    storage, offset, size, stride = args[:4]
    if not (is_shape(size) and is_shape(stride) and is_shape((offset,))):
        raise EchoError(f"{where}: expected offset, size and stride to be short tuples of sizes")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= len(storage) or count > len(storage)):
        raise EchoError(
            f"{where} of size {size} reaches beyond its storage of {len(storage)} numbers"
        )
    strides = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], size, strides, writeable=False)
