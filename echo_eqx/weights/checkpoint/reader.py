"""Reading training checkpoints: a manifest, and the pieces that each process wrote.

`manifest.json` is written last, so a folder without it is not a checkpoint. It lists the shape and
pieces of each tensor. A piece is a box of the tensor in one of the files, with its CRC-32.
"""

import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from echo_eqx.config import CONFIGS, CodecConfig, DiTConfig
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig, generation_from_json
from echo_eqx.json_data import from_json, parse_json
from echo_eqx.weights.native import FORMAT
from echo_eqx.weights.safetensors_reader import SafetensorsFile

KIND, VERSION = "training", 1
MANIFEST = "manifest.json"
FOLDER = "checkpoints"
_PARALLEL = ("model.", "ema.", "adam.mu.", "adam.nu.")
"""Parts of a state with the same tensors in each, the weights first."""
_STEP = re.compile(r"step_(\d{9,12})")

Box = tuple[tuple[int, int], ...]
"""Start and stop along each axis."""


def piece_name(tensor: str, box: Box) -> str:
    """Name of a piece in its file, such as `model.in_proj.weight@0:128,0:192`."""
    return f"{tensor}@{','.join(f'{start}:{stop}' for start, stop in box)}"


def step_folder(step: int) -> str:
    return f"step_{step:09d}"


def step_of(name: str) -> int | None:
    """The step in the name of a checkpoint's folder, None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_folder(int(match[1])) == name else None


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints in `folder` as (step, path), newest first, without opening any.

    **Raises**: `EchoError` if `folder` cannot be read.
    """
    try:
        names = os.listdir(folder) if folder.is_dir() else []
        steps = [(step, folder / name) for name in names if (step := step_of(name)) is not None]
        return sorted((s for s in steps if (s[1] / MANIFEST).is_file()), reverse=True)
    except OSError as error:
        raise EchoError(f"{folder} cannot be read: {error.strerror}") from None


def manifest_checksum(manifest: dict[str, Any]) -> int:
    """CRC-32 of a manifest, independent of the formatting of its JSON."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


class TrainingCheckpoint:
    """A complete checkpoint. Any slice of any tensor can be read, and is verified on reading.

    **Raises**: `EchoError` naming the folder if the manifest cannot be used.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            manifest = _read_manifest(path / MANIFEST)
            self.model_kind: str = manifest.get("model_kind", "dit")
            self.config: DiTConfig | CodecConfig = from_json(
                CONFIGS[self.model_kind], manifest["model"]
            )
            self.step = _size(manifest["step"], "step")
            self.samples_seen = _size(manifest["samples_seen"], "samples_seen")
            _check_cursor(manifest["cursor"])
            for name in ("settings", "data"):
                if not isinstance(manifest.get(name, {}), dict):
                    raise ValueError(f"{name}: expected an object")
            self.tensors = {
                name: _checked(name, from_json(_Tensor, entry, where=f"tensor {name[:100]}"))
                for name, entry in manifest["tensors"].items()
            }
            self._check_complete()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EchoError) as error:
            raise EchoError(f"{path / MANIFEST} cannot be used: {_reason(error)}") from None
        self.manifest: dict[str, Any] = manifest
        self._pieces: dict[str, list[tuple[str, _Piece]]] = {}  # by file
        for name, tensor in self.tensors.items():
            for piece in tensor.pieces:
                self._pieces.setdefault(piece.file, []).append((name, piece))
        self._files: dict[str, SafetensorsFile] = {}

    def _check_complete(self) -> None:
        """Check that the moments and the EMA have the same tensors as the weights."""
        groups = {
            prefix: {name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix)}
            for prefix in _PARALLEL
        }
        model = groups[_PARALLEL[0]]
        if not model:
            raise ValueError("it lists no weights")
        for prefix, names in groups.items():
            if names and names != model:
                odd = min(names ^ model)
                raise ValueError(f"it lists only one of {_PARALLEL[0]}{odd} and {prefix}{odd}")

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read share `part` of `parts` of the files, and compare every tensor with its checksum.

        **Raises**: `EchoError` naming the first problem found.
        """
        for file in sorted(self._pieces)[part::parts]:
            for name, piece in self._pieces[file]:
                self._file(file).verify(piece_name(name, piece.box))

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The slice `index` of a tensor, by default all of it, from the pieces that overlap it.

        **Raises**: `EchoError` if one of those pieces is missing or damaged.
        """
        tensor = self.tensors[name]
        index = index or (slice(None),) * len(tensor.shape)
        box = tuple(s.indices(size)[:2] for s, size in zip(index, tensor.shape, strict=True))
        out = np.empty([stop - start for start, stop in box], tensor.dtype)
        for piece in tensor.pieces:
            common = tuple(
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece.box, strict=True)
            )
            if any(start >= stop for start, stop in common):
                continue
            there = piece_name(name, piece.box), _slices(common, piece.box)
            out[_slices(common, box)] = self._file(piece.file).read(*there)
        return out

    def model_arrays(self) -> "ModelArrays":
        """The weights to generate with: the EMA if there is one."""
        averaged = any(name.startswith("ema.") for name in self.tensors)
        return ModelArrays(self, "ema." if averaged else "model.")

    def generation(self) -> GenerationConfig:
        """The recommended generation settings that the run recorded."""
        try:
            return generation_from_json(self.manifest.get("generation") or {})
        except EchoError as error:
            raise EchoError(f"{self.path / MANIFEST} cannot be used: {error}") from None

    def _file(self, file: str) -> SafetensorsFile:
        if file not in self._files:
            pieces = [(name, piece_name(name, p.box), p) for name, p in self._pieces[file]]
            checksums = {inside: piece.crc32 for _, inside, piece in pieces}
            opened = SafetensorsFile(self.path / file, checksums=checksums)
            for name, inside, piece in pieces:
                shape = tuple(stop - start for start, stop in piece.box)
                if not opened.holds(inside, np.dtype(self.tensors[name].dtype), shape):
                    raise EchoError(
                        f"{opened.path}: {inside} is missing, or has another type or shape"
                    )
            self._files[file] = opened
        return self._files[file]


class ModelArrays:
    """Weights in a checkpoint, by their names in the model."""

    def __init__(self, checkpoint: TrainingCheckpoint, prefix: str):
        self._checkpoint, self._prefix = checkpoint, prefix
        self.shapes = {
            name.removeprefix(prefix): tensor.shape
            for name, tensor in checkpoint.tensors.items()
            if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self.part(name)

    def part(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return self._checkpoint.read(self._prefix + name, index)


@dataclass(frozen=True)
class _Piece:
    box: tuple[tuple[int, int], ...]
    file: str
    crc32: int


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: Literal["float32", "int32"]
    pieces: tuple[_Piece, ...]


def _checked(name: str, tensor: _Tensor) -> _Tensor:
    """`tensor`, if its pieces tile it exactly once and lie in files of the checkpoint's folder."""
    for piece in tensor.pieces:
        inside = len(piece.box) == len(tensor.shape) and all(
            len(interval) == 2 and 0 <= interval[0] < interval[1] <= size
            for interval, size in zip(piece.box, tensor.shape, strict=True)
        )
        if not inside or not re.fullmatch(r"[\w.-]+\.safetensors", piece.file):
            raise ValueError(f"a piece of {name[:100]} lies outside the tensor or the folder")
    boxes = {piece.box for piece in tensor.pieces}
    count = 1
    for axis, size in enumerate(tensor.shape):
        intervals = sorted({box[axis] for box in boxes})
        starts = [start for start, _ in intervals]
        if [0, *(stop for _, stop in intervals)] != [*starts, size]:
            count = -1
        count *= len(intervals)
    if not len(boxes) == len(tensor.pieces) == count:
        raise ValueError(f"the pieces of {name[:100]} overlap, or some are missing")
    return tensor


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = parse_json(path.read_bytes())
    if manifest["format"] != FORMAT or manifest["kind"] != KIND:
        raise ValueError(f"expected a {FORMAT} {KIND} checkpoint")
    if manifest["version"] != VERSION:
        raise ValueError(f"expected version {VERSION}, got {str(manifest['version'])[:20]}")
    if manifest.pop("crc32") != manifest_checksum(manifest):
        raise ValueError("it is damaged: it does not match its checksum")
    return manifest


def _check_cursor(cursor: Any) -> None:
    if not isinstance(cursor, dict):
        raise ValueError("cursor: expected an object")
    for position in cursor.values():
        if not isinstance(position, list):
            raise ValueError("cursor: expected lists")
        for number in position:
            _size(number, "cursor")


def _size(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"{name}: expected a count")
    return value


def _slices(box: Box, within: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - base, stop - base)
        for (start, stop), (base, _) in zip(box, within, strict=True)
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return str(error) or type(error).__name__


def open_verified(step: int, path: Path, part: int = 0, parts: int = 1) -> TrainingCheckpoint:
    """The checkpoint at `path`, whose name says `step`, with share `part` of `parts` verified.

    **Raises**: `EchoError` naming the first problem found.
    """
    checkpoint = TrainingCheckpoint(path)
    if checkpoint.step != step:
        raise EchoError(f"expected step {step}, as its name says, got step {checkpoint.step}")
    checkpoint.verify(part, parts)
    return checkpoint
