"""Writes training checkpoints in the background, prunes old ones, and restores states.

Every process writes the pieces it owns, then a list of them. Process 0 waits for all lists and
writes the manifest, which completes the checkpoint. File names contain the launch id, so pieces
that a killed launch left are never taken for pieces of this one.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from echo_eqx.errors import EchoError
from echo_eqx.files import write_json, write_whole
from echo_eqx.trees import leaf_names, named_leaves
from echo_eqx.weights.checkpoint.reader import (
    FOLDER,
    KIND,
    MANIFEST,
    VERSION,
    Box,
    TrainingCheckpoint,
    find_checkpoints,
    manifest_checksum,
    piece_name,
    step_folder,
    step_of,
)
from echo_eqx.weights.checkpoint.retention import (
    Retention,
    export_name,
    open_checkpoints,
    remove_file,
    remove_step,
    set_aside_name,
    temporary_export_step,
)
from echo_eqx.weights.native import FORMAT, generation_metadata
from echo_eqx.weights.safetensors_writer import Tensor, write_safetensors

logger = logging.getLogger(__name__)

_PIECES_TIMEOUT = 1800.0
"""Seconds that process 0 waits for the others' pieces."""


State = TypeVar("State", bound=Any)
"""A training state: a pytree with a step counter `step` and a model `model`."""


class CheckpointWriter:
    """Saves the states of one run from one process.

    `launch_id` is the same in all processes and different in each launch.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        launch_id: str,
        process: int,
        num_processes: int,
        retention: Retention,
        export: bool,
    ):
        self._folder = run_dir / FOLDER
        self._launch_id = launch_id
        self._process, self._num_processes = process, num_processes
        self._retention, self._export = retention, export
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: Any, manifest: dict[str, Any], cursor: dict[str, Any]) -> None:
        """Copy `state` to the host and write it in the background, after the previous write.

        `manifest` describes the checkpoint, apart from its tensors, and is the same in all
        processes; `cursor` is this process's position in the data.

        **Raises**: `EchoError` if the disk is full, or the previous write has failed.
        """
        self.wait()
        self._check_room(state)
        shapes = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
            for name, leaf in named_leaves(state).items()
        }
        pieces = _copy_to_host(state)
        folder = self._folder / step_folder(manifest["step"])
        self._thread = threading.Thread(
            target=self._write, args=(folder, pieces, shapes, manifest, cursor), daemon=True
        )
        self._thread.start()

    def poll(self) -> None:
        """Raise the error of the background write, if there was one."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until the last save is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def _check_room(self, state: Any) -> None:
        if self._process != 0:
            return  # the folder is shared, and others may be writing already
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if self._export:
            needed += sum(2 * leaf.size for leaf in jax.tree.leaves(state.model))
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if needed + 2**20 > free:
            raise EchoError(
                f"expected {needed / 2**30:.2f} GiB free in {self._folder} for a checkpoint, got "
                f"{free / 2**30:.2f} GiB; free some space (earlier checkpoints are untouched)"
            )

    def _write(self, folder: Path, pieces, shapes, manifest, cursor) -> None:
        try:
            if folder.is_symlink():
                raise EchoError(f"{folder}: expected a folder, got a link; move it away")
            folder.mkdir(parents=True, exist_ok=True)
            listed = self._write_pieces(folder, pieces)
            del pieces
            write_json(
                self._list(folder, self._process), {"pieces": listed, "cursor": cursor}, indent=1
            )
            if self._process == 0:
                self._complete(folder, shapes, manifest)
                if self._export:
                    export_weights(TrainingCheckpoint(folder), folder.with_suffix(".safetensors"))
                prune_checkpoints(folder.parent.parent, manifest["step"], self._retention)
        except OSError as error:
            what = error.strerror or type(error).__name__
            self._error = EchoError(
                f"cannot write checkpoint {folder}: {what}; earlier checkpoints are untouched"
            )
        except BaseException as error:  # raised in the main thread by `poll`
            self._error = error

    def _write_pieces(self, folder: Path, pieces: list[tuple[str, Box, np.ndarray]]) -> list[dict]:
        file = folder / f"{self._launch_id}-{self._process:05d}.safetensors"
        tensors = [
            Tensor(piece_name(name, box), array.dtype, array.shape, lambda array=array: [array])
            for name, box, array in pieces
        ]
        crcs: dict[str, int] = {}
        metadata = {"format": FORMAT, "kind": "pieces"}
        write_whole(file, lambda path: crcs.update(write_safetensors(path, tensors, metadata)))
        return [
            {"tensor": name, "box": box, "file": file.name, "crc32": crcs[piece_name(name, box)]}
            for name, box, _ in pieces
        ]

    def _list(self, folder: Path, process: int) -> Path:
        return folder / f"{self._launch_id}-{process:05d}.json"

    def _complete(self, folder: Path, shapes: dict, manifest: dict) -> None:
        """Wait for the lists of all processes, then write the manifest."""
        tensors = {name: {**entry, "pieces": []} for name, entry in shapes.items()}
        cursors: dict[str, Any] = {}
        deadline = time.monotonic() + _PIECES_TIMEOUT
        for process in range(self._num_processes):
            path = self._list(folder, process)
            while not path.is_file():
                if time.monotonic() > deadline:
                    raise EchoError(
                        f"timed out waiting for {path}; check that all hosts share {self._folder}"
                    )
                time.sleep(0.02)
            listed = json.loads(path.read_bytes())
            cursors |= listed["cursor"]
            for piece in listed["pieces"]:
                tensors[piece.pop("tensor")]["pieces"].append(piece)
        whole = {"format": FORMAT, "kind": KIND, "version": VERSION, **manifest}
        whole |= {"cursor": cursors, "tensors": tensors}
        write_json(folder / MANIFEST, {**whole, "crc32": manifest_checksum(whole)}, indent=1)


def prune_checkpoints(run_dir: Path, newest: int, retention: Retention) -> None:
    """Delete the complete checkpoints of a run up to step `newest` that `retention` drops."""
    folder = run_dir / FOLDER
    with open_checkpoints(run_dir) as handle:
        if handle is None:
            return
        # Later checkpoints are damaged ones from before the run was resumed.
        complete = find_checkpoints(folder)
        found = [s for s, path in complete if s <= newest and not path.is_symlink()]
        for step in retention.drops(found):
            name = step_folder(step)
            _try_to_remove(folder / name, partial(remove_step, name, handle))


def _try_to_remove(path: Path, remove: Callable[[], object]) -> None:
    """Call `remove`. A failure is only logged: an old checkpoint must not stop the run."""
    try:
        remove()
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.info(f"cannot delete {path}: {error.strerror}")


def clean_checkpoints(run_dir: Path, restored: TrainingCheckpoint | None) -> None:
    """Clean the checkpoints folder before a launch that resumes after `restored` writes anything.

    Incomplete checkpoints of killed launches are deleted. Later checkpoints, which are damaged, are
    renamed, as is anything else in a checkpoint's place. Only names that the trainer writes are
    deleted, and never through a link.

    **Raises**: `EchoError` if the checkpoints folder is something other than a folder.
    """
    folder = run_dir / FOLDER
    if os.path.lexists(folder) and not folder.is_dir():
        raise EchoError(f"{folder}: expected a folder, got something else; move it away")
    if folder.is_symlink():
        logger.info(f"{folder} is a link: old checkpoints in it are not deleted")
    complete = dict(find_checkpoints(folder))
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    for name in names:
        step = step_of(name)
        later = step in complete and restored is not None and step > restored.step
        in_the_way = step is not None and step not in complete and not _is_folder(folder / name)
        if later or in_the_way:
            aside = folder / set_aside_name(name)
            _set_aside(folder / name, aside)
            if in_the_way:
                logger.info(
                    f"{folder / name}: expected a folder, got something else; renamed it to {aside}"
                )
    with open_checkpoints(run_dir) as handle:
        if handle is None:
            return
        for name in names:
            if (step := step_of(name)) is not None and step not in complete:
                _try_to_remove(folder / name, partial(remove_step, name, handle))
            elif temporary_export_step(name) is not None:
                _try_to_remove(folder / name, partial(remove_file, name, handle))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _set_aside(path: Path, aside: Path) -> None:
    """Rename a checkpoint, and move its export into it."""
    export = path.with_name(export_name(path.name))
    try:
        if _is_folder(path) and export.is_file():
            export.rename(path / export.name)
        path.rename(aside)
    except OSError as error:
        raise EchoError(f"cannot rename {path}: {error.strerror}; move it away") from None


def make_missing_export(checkpoint: TrainingCheckpoint) -> None:
    """Export `checkpoint` if its launch was killed before the export was written.

    **Raises**: `EchoError` if the file cannot be written.
    """
    file = checkpoint.path.with_name(export_name(checkpoint.path.name))
    if not os.path.lexists(file):
        try:
            export_weights(checkpoint, file)
        except OSError as error:
            raise EchoError(f"cannot write {file}: {error.strerror}") from None


def export_weights(checkpoint: TrainingCheckpoint, file: Path) -> None:
    """Write the inference weights in bfloat16, as a file for `load_dit` or `load_codec`.

    Only one layer at a time is held in memory.
    """
    arrays = checkpoint.model_arrays()
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def parts(name: str, shape: tuple[int, ...]) -> Callable[[], Any]:
        rest = (slice(None),) * (len(shape) - 1)
        return lambda: (arrays.part(name, (slice(i, i + 1), *rest)) for i in range(shape[0]))

    shapes = arrays.shapes.items()
    tensors = [Tensor(name, bfloat16, shape, parts(name, shape)) for name, shape in shapes]
    config = json.dumps(checkpoint.manifest["model"])
    metadata = {"format": FORMAT, "kind": checkpoint.model_kind, "config": config}
    metadata |= {"step": str(checkpoint.step), **generation_metadata(checkpoint.generation())}
    write_whole(file, lambda path: write_safetensors(path, tensors, metadata))


def restore_state(checkpoint: TrainingCheckpoint, abstract: State) -> State:
    """The state in `checkpoint`; each device reads only its shards.

    `abstract` has the shapes and shardings, on any mesh. If it has an EMA and the checkpoint has
    none, the EMA starts from the weights.
    """

    def source(name: str) -> str:
        if name.startswith("ema.") and name not in checkpoint.tensors:
            return "model." + name.removeprefix("ema.")
        return name

    def restore(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        tensor = checkpoint.tensors.get(source(name))
        if tensor is None or tensor.shape != leaf.shape or tensor.dtype != leaf.dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype} {tensor.shape}"
            raise EchoError(
                f"{checkpoint.path}: expected {name} of {leaf.dtype} {leaf.shape}, got {found}"
            )
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: checkpoint.read(source(name), index)
        )

    leaves, treedef = jax.tree.flatten(abstract)
    restored = map(restore, leaf_names(abstract), leaves)
    return treedef.unflatten(restored)


def put_on_mesh(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array as a global array with `sharding`."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _copy_to_host(state: Any) -> list[tuple[str, Box, np.ndarray]]:
    """The pieces of `state` that this process owns; every piece has exactly one owner."""
    owned = []
    for name, leaf in named_leaves(state).items():
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                shard.data.copy_to_host_async()
                index = zip(shard.index, leaf.shape, strict=True)
                owned.append((name, tuple(s.indices(size)[:2] for s, size in index), shard.data))
    # Copied, as the next step reuses the device memory.
    return [(name, box, np.array(data)) for name, box, data in owned]
