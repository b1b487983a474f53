"""Reading a training checkpoint: a manifest, and the pieces that each process wrote.

`manifest.json` is written last: a folder without it holds no checkpoint. It lists, for each tensor,
its shape and pieces; a piece is a box of the tensor, in a file, with a CRC-32.
"""

import json
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
"""Parts of a state that have the same tensors, the weights first."""
_STEP = re.compile(r"step_(\d{9,12})")

Box = tuple[tuple[int, int], ...]
"""First and behind-last index along each axis."""


def piece_name(tensor: str, box: Box) -> str:
    """Name of a piece in its file, such as `model.in_proj.weight@0:128,0:192`."""
    return f"{tensor}@{','.join(f'{start}:{stop}' for start, stop in box)}"


def step_folder(step: int) -> str:
    return f"step_{step:09d}"


def step_of(name: str) -> int | None:
    """The step in the exact name of a checkpoint's folder, or None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and step_folder(int(match[1])) == name else None


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints in `folder`, (step, path), the newest first. None is looked into.

    **Raises**: `EchoError` if `folder` cannot be read.
    """
    try:
        names = os.listdir(folder) if folder.is_dir() else []
        steps = [(step, folder / name) for name in names if (step := step_of(name)) is not None]
        return sorted((s for s in steps if (s[1] / MANIFEST).is_file()), reverse=True)
    except OSError as error:
        raise EchoError(f"{folder} cannot be read: {error.strerror}") from None


def manifest_checksum(manifest: dict[str, Any]) -> int:
    """CRC-32 of a manifest, however its JSON is laid out."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


class TrainingCheckpoint:
    """A complete checkpoint, of which any part of any tensor can be read.

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
                    raise ValueError(f"its {name} is not an object")
            self.tensors = {name: _Tensor(entry) for name, entry in manifest["tensors"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EchoError) as error:
            raise EchoError(f"{path / MANIFEST} cannot be used: {_reason(error)}") from None
        self.manifest: dict[str, Any] = manifest
        self._files: dict[str, SafetensorsFile] = {}

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """The first thing wrong with the pieces of share `part` of `parts`, or None.

        What the headers say is compared with the manifest, and every byte of the tensors with its
        checksum there, each read once.
        """
        expected: dict[str, list[tuple[str, Box, int]]] = {}
        for name, tensor in self.tensors.items():
            if not tensor.is_whole():
                return f"pieces of {name} are not in the manifest, or overlap"
            for box, file, crc in tensor.pieces:
                expected.setdefault(file, []).append((name, box, crc))
        if problem := self._missing_tensors():
            return problem
        for file in sorted(expected)[part::parts]:
            try:
                opened = self._file(file)
                for name, box, crc in expected[file]:
                    piece = piece_name(name, box)
                    shape = tuple(stop - start for start, stop in box)
                    if not opened.holds(piece, self.tensors[name].dtype, shape):
                        return f"{piece} in {file} is missing, or of another type or shape"
                    if opened.checksum(piece) != crc:
                        return f"{piece} in {file} is damaged"
            except EchoError as error:
                return str(error)
        return None

    def _missing_tensors(self) -> str | None:
        """Whether moments or average belong to other weights than those that are here."""
        groups: dict[str, set[str]] = {}
        for name in self.tensors:
            for prefix in _PARALLEL:
                if name.startswith(prefix):
                    groups.setdefault(prefix, set()).add(name.removeprefix(prefix))
        model = groups.get(_PARALLEL[0], set())
        if not model:
            return "its manifest lists no weights"
        for prefix, names in groups.items():
            if names != model:
                odd = min(names ^ model)
                return f"its manifest lists only one of {_PARALLEL[0]}{odd} and {prefix}{odd}"
        return None

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """The part `index` (by default all) of a tensor, from the pieces it touches."""
        tensor = self.tensors[name]
        index = index or (slice(None),) * len(tensor.shape)
        box = tuple(s.indices(size)[:2] for s, size in zip(index, tensor.shape, strict=True))
        out = np.empty([stop - start for start, stop in box], tensor.dtype)
        for piece, file, _ in tensor.pieces:
            common = tuple(
                (max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, piece, strict=True)
            )
            if any(start >= stop for start, stop in common):
                continue
            there = _slices(common, piece)
            out[_slices(common, box)] = self._file(file).read(piece_name(name, piece), there)
        return out

    def model_arrays(self) -> "ModelArrays":
        """The weights to speak with: the moving average where one was kept."""
        averaged = any(name.startswith("ema.") for name in self.tensors)
        return ModelArrays(self, "ema." if averaged else "model.")

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            # The manifest has its own checksums, so that a part of a tensor can be read.
            self._files[name] = SafetensorsFile(self.path / name, verify=False)
        return self._files[name]


class ModelArrays:
    """Parameters of a checkpoint by their names in the model."""

    def __init__(self, checkpoint: TrainingCheckpoint, prefix: str):
        self._checkpoint, self._prefix = checkpoint, prefix
        names = (name for name in checkpoint.tensors if name.startswith(prefix))
        self.names = [name.removeprefix(prefix) for name in names]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._checkpoint.read(self._prefix + name)

    def part(self, name: str, index: tuple[slice, ...] | None) -> np.ndarray:
        return self._checkpoint.read(self._prefix + name, index)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.tensors[self._prefix + name].shape


class _Tensor:
    def __init__(self, entry: Any):
        if not isinstance(entry, dict):
            raise ValueError("it lists a tensor that is not an object")
        self.shape = tuple(_size(size, "shape") for size in _list(entry["shape"], 16))
        self.dtype = {"float32": np.dtype(np.float32), "int32": np.dtype(np.int32)}[entry["dtype"]]
        self.pieces: list[tuple[Box, str, int]] = []
        for piece in _list(entry["pieces"]):
            box = tuple(map(_interval, _list(piece["box"], 16)))
            inside = len(box) == len(self.shape) and all(
                start < stop <= size for (start, stop), size in zip(box, self.shape, strict=True)
            )
            if not inside or not re.fullmatch(r"[\w.-]+\.safetensors", piece["file"]):
                raise ValueError("a piece lies outside its tensor or folder")
            self.pieces.append((box, piece["file"], _size(piece["crc32"], "crc32")))

    def is_whole(self) -> bool:
        """Whether the pieces are a grid over the tensor, each there once."""
        boxes = {box for box, _, _ in self.pieces}
        count = 1
        for axis, size in enumerate(self.shape):
            intervals = sorted({box[axis] for box in boxes})
            starts = [start for start, _ in intervals]
            if [0, *(stop for _, stop in intervals)] != [*starts, size]:
                return False
            count *= len(intervals)
        return len(boxes) == len(self.pieces) == count


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = parse_json(path.read_bytes())
    if manifest["format"] != FORMAT or manifest["kind"] != KIND:
        raise ValueError("it is of another kind")
    if manifest["version"] != VERSION:
        raise ValueError(f"expected version {VERSION}, got {str(manifest['version'])[:20]}")
    if manifest.pop("crc32") != manifest_checksum(manifest):
        raise ValueError("its content is not what was written")
    return manifest


def _check_cursor(cursor: Any) -> None:
    if not isinstance(cursor, dict):
        raise ValueError("its cursor is not an object")
    for position in cursor.values():
        for number in _list(position, 16):
            _size(number, "cursor")


def _size(value: Any, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**48:
        raise ValueError(f"its {name} is not a count")
    return value


def _interval(value: Any) -> tuple[int, int]:
    start, stop = _list(value, 2)
    return _size(start, "box"), _size(stop, "box")


def _list(value: Any, longest: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (longest is not None and len(value) > longest):
        raise ValueError("it holds something else where a list belongs")
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


def checkpoint_generation(checkpoint: TrainingCheckpoint) -> GenerationConfig:
    """How to speak with the model of a run, as far as its settings and data say."""
    try:
        return generation_from_json(checkpoint.manifest.get("generation") or {})
    except EchoError as error:
        raise EchoError(f"{checkpoint.path / MANIFEST} cannot be used: {error}") from None


def open_intact(
    step: int, path: Path, part: int = 0, parts: int = 1
) -> tuple[TrainingCheckpoint | None, str | None]:
    """The checkpoint at `path`, whose name says `step`, and the first thing wrong with it if any.

    Of the pieces only share `part` of `parts` is looked at.
    """
    try:
        checkpoint = TrainingCheckpoint(path)
        if checkpoint.step != step:
            return checkpoint, f"it is of step {checkpoint.step}"
        return checkpoint, checkpoint.damage(part, parts)
    except EchoError as error:
        return None, str(error)


def newest_intact(folder: Path, say: Callable[[str], object]) -> TrainingCheckpoint | None:
    """The newest checkpoint in `folder` without damage; `say` is told of each that has some.

    **Raises**: `EchoError` if there are some and none is intact.
    """
    found = find_checkpoints(folder)
    for step, path in found:
        checkpoint, problem = open_intact(step, path)
        if problem is None:
            return checkpoint
        say(f"checkpoint {path} is damaged ({problem})")
    if found:
        raise EchoError(f"no checkpoint in {folder} is intact, of {len(found)}")
    return None
