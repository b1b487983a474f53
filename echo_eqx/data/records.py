"""Reading and checking the records of a tar shard, and latents of silence.

A record `key` has latents `key.npy` (frames, c), `key.json` with "text", and optionally reference
latents `key.ref.npy` (frames, c).
"""

import io
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from echo_eqx.data.tar_index import RecordEntry
from echo_eqx.errors import EchoError

MAX_LATENTS = 1 << 30
"""Largest latents file, in bytes: 46 hours of 128 channels in float16."""
MAX_JSON = 1 << 22
"""Largest JSON file, in bytes: parsing takes up to thirty times as much memory."""
_DTYPES = (np.dtype("<f2"), np.dtype("<f4"))


class BrokenRecord(Exception):
    """A record that cannot be used. `kind` is one of tar, missing, size, dtype, shape, nan, json,
    text, utf8, and `detail` says what was found.
    """

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


@dataclass(frozen=True)
class Sample:
    """One record: `latents` and `reference` (frames, c), float16 or float32 as stored."""

    key: str
    text: str
    latents: np.ndarray
    reference: np.ndarray | None

    @property
    def dtype(self) -> np.dtype:
        """The dtype that holds both exactly."""
        arrays = (self.latents,) if self.reference is None else (self.latents, self.reference)
        return np.result_type(*arrays)


def read_sample(descriptor: int, entry: RecordEntry, latent_dim: int) -> Sample:
    """Read the record at `entry` of an open shard; thread-safe.

    **Raises**: `BrokenRecord` if it cannot be trained on.
    """
    if entry.damage is not None:
        raise BrokenRecord("tar", entry.damage)
    if entry.latents is None or entry.json is None:
        raise BrokenRecord("missing", f"no .{'npy' if entry.latents is None else 'json'}")
    latents = _read_npy(_read(descriptor, entry.latents, MAX_LATENTS), latent_dim, ".npy")
    if not len(latents):
        raise BrokenRecord("shape", ".npy has no frames")
    reference = None
    if entry.reference is not None:
        data = _read(descriptor, entry.reference, MAX_LATENTS)
        reference = _read_npy(data, latent_dim, ".ref.npy")
    text = _read_text(_read(descriptor, entry.json, MAX_JSON))
    return Sample(entry.key, text, latents, reference)


def record_lengths(descriptor: int, entry: RecordEntry) -> tuple[int, int]:
    """Latent frames of a record, from their header, and bytes of its text in UTF-8.

    **Raises**: `BrokenRecord` if either cannot be told.
    """
    shape = _latent_shape(descriptor, entry)
    if shape is None or entry.json is None:
        raise BrokenRecord("shape", "no readable .npy and .json")
    return shape[0], len(_read_text(_read(descriptor, entry.json, MAX_JSON)).encode())


def latent_width(descriptor: int, entry: RecordEntry) -> int | None:
    """Channels of a record, from the header of its latents; None if the header is invalid."""
    shape = _latent_shape(descriptor, entry)
    return None if shape is None else shape[1]


def _latent_shape(descriptor: int, entry: RecordEntry) -> tuple[int, int] | None:
    if entry.latents is None:
        return None
    offset, size = entry.latents
    try:
        shape, _, dtype, begin = _npy_header(os.pread(descriptor, min(size, 16_384), offset))
    except Exception:
        return None
    is_whole = len(shape) == 2 and shape[0] and shape[0] * shape[1] * dtype.itemsize == size - begin
    return (shape[0], shape[1]) if is_whole else None


def _read(descriptor: int, part: tuple[int, int], most: int) -> bytes:
    offset, size = part
    if size > most:
        raise BrokenRecord("size", f"expected a file of at most {most} bytes, got {size}")
    data = os.pread(descriptor, size, offset)
    while len(data) < size:  # one call may read less than asked
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            raise BrokenRecord("tar", f"expected {size} bytes, got {len(data)}")
        data += more
    return data


def _npy_header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype, and offset of the values. Nothing is unpickled."""
    # Later versions are for headers above 64 KiB, which an array of floats never has.
    if data[:8] != np.lib.format.magic(1, 0):
        raise ValueError("not a version-1.0 .npy file")
    length = 10 + int.from_bytes(data[8:10], "little")
    return *_parse_header(data[8:length]), length


@lru_cache(1024)  # one per recording length; parsing costs as much as reading
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header))
    if not all(0 <= size < 2**48 for size in shape):  # a longer number could not be printed
        raise ValueError("its shape is negative or far too large")
    return shape, fortran, dtype


def _read_npy(data: bytes, latent_dim: int, name: str) -> np.ndarray:
    """(frames, latent_dim), float16 or float32 as stored."""
    try:
        shape, fortran, dtype, begin = _npy_header(data)
    except Exception as error:  # the header is a Python literal and can fail in many ways
        raise BrokenRecord(
            "shape", f"{name} has an unreadable header: {str(error)[:100]}"
        ) from None
    if dtype not in _DTYPES:
        raise BrokenRecord("dtype", f"{name}: expected float16 or float32, got {str(dtype)[:50]}")
    if len(shape) != 2 or shape[1] != latent_dim:
        raise BrokenRecord(
            "shape", f"{name}: expected (frames, {latent_dim}), got {str(shape)[:50]}"
        )
    if shape[0] * shape[1] * dtype.itemsize != len(data) - begin:
        raise BrokenRecord(
            "shape", f"{name} has shape {str(shape)[:50]} but {len(data) - begin} bytes of values"
        )
    values = np.frombuffer(data, dtype, offset=begin).reshape(shape, order="F" if fortran else "C")
    if dtype.itemsize == 2:
        is_finite = not values.size or (values.view(np.uint16) & 0x7C00).max() < 0x7C00
    else:
        is_finite = np.isfinite(values).all()
    if not is_finite:
        raise BrokenRecord("nan", f"{name} has values that are not finite")
    return np.ascontiguousarray(values)


def _read_text(data: bytes) -> str:
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BrokenRecord("utf8", f".json is not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise BrokenRecord("json", f".json cannot be parsed: {str(error)[:100]}") from None
    if not isinstance(fields, dict):
        raise BrokenRecord("json", f".json: expected an object, got a {type(fields).__name__}")
    text = fields.get("text")
    if not isinstance(text, str):
        got = "no text" if text is None else f"a {type(text).__name__}"
        raise BrokenRecord("text", f'.json: expected a string as "text", got {got}')
    if not text.strip():
        raise BrokenRecord("text", "the text is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BrokenRecord("utf8", f"the text is not UTF-8 at character {error.start}") from None
    return text


def load_silence(path: str | Path, latent_dim: int) -> np.ndarray:
    """(n, latent_dim) float32: latents of silence from a .npy, or from the tensor "silence" of a
    .safetensors.

    **Raises**: `EchoError` naming the file if it is missing, unreadable, of another width, empty or
    not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise EchoError(
            f"{path} does not exist; expected latents of silence (.npy or .safetensors)"
        )
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                values = np.asarray(file.get_tensor("silence"), np.float32)
        else:
            values = _read_npy(path.read_bytes(), latent_dim, "the file").astype(np.float32)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise EchoError(f"cannot read latents of silence from {path}: {error}") from None
    except BrokenRecord as error:
        raise EchoError(f"cannot read latents of silence from {path}: {error.detail}") from None
    if values.ndim != 2 or values.shape[1] != latent_dim or not len(values):
        raise EchoError(f"{path}: expected shape (frames, {latent_dim}), got {values.shape}")
    if not np.isfinite(values).all():
        raise EchoError(f"{path} has values that are not finite")
    return values
