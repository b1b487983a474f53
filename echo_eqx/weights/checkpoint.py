"""Reading a training checkpoint: a manifest, and the pieces that each process wrote.

`manifest.json` is written last: a folder without it holds no checkpoint. It lists, for each tensor,
its shape and pieces; a piece is a box of the tensor, in a file, with a CRC-32.
"""

import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.config import (
    CodecConfig,
    DiTConfig,
    codec_config_from_json,
    dit_config_from_json,
)
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig, generation_from_json
from echo_eqx.weights.own_format import FORMAT, SafetensorsFile
from echo_eqx.weights.stream_file import checksums

KIND, VERSION = "training", 1
MANIFEST = "manifest.json"
FOLDER = "checkpoints"
_STEP = re.compile(r"step_(\d{1,12})")

Box = tuple[tuple[int, int], ...]
"""First and behind-last index along each axis."""


def piece_name(tensor: str, box: Box) -> str:
    """Name of a piece in its file, such as `model.in_proj.weight@0:128,0:192`."""
    return f"{tensor}@{','.join(f'{start}:{stop}' for start, stop in box)}"


def step_folder(step: int) -> str:
    return f"step_{step:09d}"


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints in `folder`, (step, path), the newest first. None is looked into."""
    if not folder.is_dir():
        return []
    matches = ((_STEP.fullmatch(path.name), path) for path in folder.iterdir())
    found = [(int(m[1]), path) for m, path in matches if m and (path / MANIFEST).is_file()]
    return sorted(found, reverse=True)


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
            manifest = json.loads((path / MANIFEST).read_bytes())
            if manifest["format"] != FORMAT or manifest["kind"] != KIND:
                raise ValueError("it is of another kind")
            if manifest["version"] != VERSION:
                raise ValueError(f"its version is {manifest['version']}; wanted {VERSION}")
            if manifest.pop("crc32") != manifest_checksum(manifest):
                raise ValueError("its content is not what was written")
            self.model_kind: str = manifest.get("model_kind", "dit")
            parse = {"dit": dit_config_from_json, "codec": codec_config_from_json}[self.model_kind]
            self.config: DiTConfig | CodecConfig = parse(manifest["model"])
            self.step, self.samples_seen = int(manifest["step"]), int(manifest["samples_seen"])
            self.tensors = {name: _Tensor(entry) for name, entry in manifest["tensors"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EchoError) as error:
            raise EchoError(f"{path / MANIFEST} cannot be used: {_reason(error)}") from None
        except RecursionError:
            raise EchoError(f"{path / MANIFEST} cannot be used: it is nested too deeply") from None
        self.manifest: dict[str, Any] = manifest
        self._files: dict[str, SafetensorsFile] = {}

    def damage(self, part: int = 0, parts: int = 1) -> str | None:
        """The first thing wrong with the pieces of share `part` of `parts`, or None.

        Every byte of them is read once.
        """
        wanted: dict[str, dict[str, int]] = {}
        for name, tensor in self.tensors.items():
            if sum(_volume(box) for box, _, _ in tensor.pieces) != np.prod(tensor.shape, dtype=int):
                return f"pieces of {name} are not in the manifest"
            for box, file, crc in tensor.pieces:
                wanted.setdefault(file, {})[piece_name(name, box)] = crc
        for file in sorted(wanted)[part::parts]:
            try:
                found = dict(checksums(self.path / file))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                return f"{file} cannot be read: {_reason(error)}"
            for name, crc in wanted[file].items():
                if found.get(name) != crc:
                    return f"{name} in {file} is {'damaged' if name in found else 'missing'}"
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
            self._files[name] = SafetensorsFile(self.path / name)
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
    def __init__(self, entry: dict):
        self.shape: tuple[int, ...] = tuple(map(int, entry["shape"]))
        self.dtype = {"float32": np.dtype(np.float32), "int32": np.dtype(np.int32)}[entry["dtype"]]
        self.pieces: list[tuple[Box, str, int]] = []
        for piece in entry["pieces"]:
            box = tuple((int(start), int(stop)) for start, stop in piece["box"])
            inside = len(box) == len(self.shape) and all(
                0 <= start < stop <= size
                for (start, stop), size in zip(box, self.shape, strict=True)
            )
            if not inside or not re.fullmatch(r"[\w.-]+\.safetensors", piece["file"]):
                raise ValueError("a piece lies outside its tensor or folder")
            self.pieces.append((box, piece["file"], int(piece["crc32"])))


def _slices(box: Box, within: Box) -> tuple[slice, ...]:
    return tuple(
        slice(start - base, stop - base)
        for (start, stop), (base, _) in zip(box, within, strict=True)
    )


def _volume(box: Box) -> int:
    return int(np.prod([stop - start for start, stop in box], dtype=int))


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


def newest_intact(folder: Path, say: Callable[[str], object]) -> TrainingCheckpoint | None:
    """The newest checkpoint in `folder` without damage; `say` is told of each that has some.

    **Raises**: `EchoError` if there are some and none is intact.
    """
    found = find_checkpoints(folder)
    for _, path in found:
        try:
            checkpoint = TrainingCheckpoint(path)
            problem = checkpoint.damage()
        except EchoError as error:
            problem = str(error)
        else:
            if problem is None:
                return checkpoint
        say(f"checkpoint {path} is damaged ({problem})")
    if found:
        raise EchoError(f"no checkpoint in {folder} is intact, of {len(found)}")
    return None
