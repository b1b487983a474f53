"""Weights as other programs lay them out: in several files with an index, or under one prefix."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.errors import EchoError
from echo_eqx.json_data import MAX_JSON_BYTES, parse_json
from echo_eqx.weights.safetensors_reader import SafetensorsFile

INDEX_SUFFIX = ".safetensors.index.json"
_MAX_PARTS = 1000


class ShardedSafetensors:
    """The files that an index `*.safetensors.index.json` lists, as one.

    The index has the Hugging Face format: `weight_map` gives the file of each tensor, in the folder
    of the index (https://huggingface.co/docs/transformers/big_models).

    **Raises**: `EchoError` naming the index or a file that cannot be used.
    """

    def __init__(self, path: Path):
        self.path = path
        self._where = weight_map(path)
        self._files = {
            name: SafetensorsFile(path.parent / name) for name in shard_files(self._where)
        }
        for name, file in self._where.items():
            if name not in self._files[file].names:
                raise EchoError(f"{path}: expected tensor {name[:100]} in {file}, got none")
        for file, opened in self._files.items():
            if extra := next((n for n in opened.names if self._where.get(n) != file), None):
                raise EchoError(f"{path}: tensor {extra[:100]} of {file} is not in the index")
        self.metadata = next(iter(self._files.values())).metadata
        self.names = list(self._where)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        by_file = {name: file.shapes() for name, file in self._files.items()}
        return {name: by_file[file][name] for name, file in self._where.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[self._where[name]][name]


class WithoutPrefix:
    """Tensors with the prefix removed that all their names share. Wrappers of a model add such
    prefixes: `module.`, `_orig_mod.`, `ema_model.`, also nested."""

    def __init__(self, weights: SafetensorsFile | ShardedSafetensors, separator: str = "."):
        self._weights, self.path = weights, weights.path
        self._prefix = shared_prefix(weights.names, separator)
        self.names = [name.removeprefix(self._prefix) for name in weights.names]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._weights.shapes()
        return {name.removeprefix(self._prefix): shape for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights[self._prefix + name]


def shared_prefix(names: Iterable[str], separator: str = ".") -> str:
    """The longest prefix of whole parts that all names share."""
    names = list(names)
    first, last = min(names, default=""), max(names, default="")  # all others lie between them
    same = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first)
    )
    return first[: first.rfind(separator, 0, same) + 1]


def weight_map(index: Path) -> dict[str, str]:
    """File name by tensor, from an index.

    **Raises**: `EchoError` naming the index and what is wrong with it.
    """
    try:
        with index.open("rb") as file:
            found: Any = parse_json(file.read(MAX_JSON_BYTES + 1))
        found = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(found, dict) or not found:
            raise ValueError("expected an object weight_map with files by tensor")
        for file in found.values():
            # Nothing outside of the folder is ever read.
            if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
                raise ValueError(f"expected *.safetensors next to it, got {str(file)[:100]!r}")
        if len(shard_files(found)) > _MAX_PARTS:
            raise ValueError(f"it lists more than {_MAX_PARTS} files")
    except OSError as error:
        raise EchoError(f"{index} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise EchoError(f"{index} is not a usable index of weights: {error}") from None
    return found


def shard_files(where: dict[str, str]) -> list[str]:
    """The files of an index, in order."""
    return sorted(set(where.values()))
