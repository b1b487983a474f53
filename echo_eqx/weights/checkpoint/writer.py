"""Writing training checkpoints in the background, keeping some, and going on from one.

Every process writes the pieces it owns, then a list of them; process 0 waits for all the lists and
writes the manifest, by which the checkpoint comes into being. What a process that was killed left
behind has another run's launch_id in its name and is never taken for a piece of this one.
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
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding

from echo_eqx.errors import EchoError
from echo_eqx.files import write_whole
from echo_eqx.trees import leaf_names, named_leaves
from echo_eqx.weights.checkpoint.reader import (
    FOLDER,
    KIND,
    MANIFEST,
    VERSION,
    Box,
    TrainingCheckpoint,
    checkpoint_generation,
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

_PATIENCE = 1800.0
"""Seconds that process 0 waits for the others' pieces."""


@runtime_checkable
class State(Protocol):
    """What a run changes, a pytree with the model in it."""

    @property
    def model(self) -> Any: ...


StateLike = TypeVar("StateLike", bound=State)


class CheckpointWriter:
    """Saves states of one run from one process.

    `launch_id` is the same in all processes and differs from that of any earlier start of the run.
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

    def save(self, state: State, manifest: dict[str, Any], cursor: dict[str, Any]) -> None:
        """Copy `state` to the host and write it in the background.

        Waits for the write before, if it still goes on. `manifest` is what the checkpoint says of
        itself beside its tensors, the same in all processes; `cursor` is this process's.

        **Raises**: `EchoError` if the disk has no room, or the write before has failed.
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
        """Raise what went wrong in the background, if anything has."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Until the last save is on disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def _check_room(self, state: State) -> None:
        if self._process != 0:
            return  # the folder is shared, and others may be writing already
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if self._export:
            needed += sum(2 * leaf.size for leaf in jax.tree.leaves(state.model))
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if needed + 2**20 > free:
            raise EchoError(
                f"a checkpoint takes {needed / 2**30:.2f} GiB and {self._folder} has "
                f"{free / 2**30:.2f} GiB free; the checkpoints before are untouched"
            )

    def _write(self, folder: Path, pieces, shapes, manifest, cursor) -> None:
        try:
            if folder.is_symlink():
                raise EchoError(f"{folder}: expected a folder, got a link; move it away")
            folder.mkdir(parents=True, exist_ok=True)
            listed = self._write_pieces(folder, pieces)
            del pieces
            _write_json(self._list(folder, self._process), {"pieces": listed, "cursor": cursor})
            if self._process == 0:
                self._complete(folder, shapes, manifest)
                if self._export:
                    export_weights(TrainingCheckpoint(folder), folder.with_suffix(".safetensors"))
                self._prune(manifest["step"])
        except OSError as error:
            what = error.strerror or type(error).__name__
            self._error = EchoError(
                f"checkpoint {folder} cannot be written: {what}; the ones before are untouched"
            )
        except BaseException as error:  # it is raised where the loop runs
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
        """Wait for all lists, then write the manifest."""
        tensors = {name: {**entry, "pieces": []} for name, entry in shapes.items()}
        cursors: dict[str, Any] = {}
        deadline = time.monotonic() + _PATIENCE
        for process in range(self._num_processes):
            path = self._list(folder, process)
            while not path.is_file():
                if time.monotonic() > deadline:
                    raise EchoError(f"{path} did not appear; do all hosts share {self._folder}?")
                time.sleep(0.02)
            listed = json.loads(path.read_bytes())
            cursors |= listed["cursor"]
            for piece in listed["pieces"]:
                tensors[piece.pop("tensor")]["pieces"].append(piece)
        whole = {"format": FORMAT, "kind": KIND, "version": VERSION, **manifest}
        whole |= {"cursor": cursors, "tensors": tensors}
        _write_json(folder / MANIFEST, {**whole, "crc32": manifest_checksum(whole)})

    def _prune(self, newest: int) -> None:
        with open_checkpoints(self._folder.parent) as handle:
            if handle is None:
                return
            # Later ones can only be left from before a damaged one was gone back behind.
            found = [step for step in _own_steps(self._folder) if step <= newest]
            for step in self._retention.drops(found):
                name = step_folder(step)
                _try_to_remove(self._folder / name, partial(remove_step, name, handle))


def _try_to_remove(path: Path, remove: Callable[[], object]) -> None:
    """A run does not end because something old stays."""
    try:
        remove()
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.info(f"{path} cannot be deleted: {error.strerror}")


def _own_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints that are folders, not links to some."""
    return [step for step, path in find_checkpoints(folder) if not path.is_symlink()]


def remove_leftovers(run_dir: Path, restored: TrainingCheckpoint | None) -> None:
    """Make the folder of checkpoints ready to go on after `restored`. Only before anyone writes.

    Deletes what a killed run left half-written. Sets aside, under another name, later checkpoints,
    which are damaged, and whatever else is where a checkpoint would be written. Nothing is deleted
    below or through a link, nor under any name that the trainer does not give.

    **Raises**: `EchoError` if there can be no folder of checkpoints.
    """
    folder = run_dir / FOLDER
    if os.path.lexists(folder) and not folder.is_dir():
        raise EchoError(f"{folder}: expected a folder, got something else; move it away")
    if folder.is_symlink():
        logger.info(f"{folder} is a link: nothing is deleted there, and old checkpoints stay")
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
                    f"{folder / name}: expected a folder, got something else; it is {aside} now"
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
    """Rename a checkpoint; its export goes into it."""
    export = path.with_name(export_name(path.name))
    try:
        if _is_folder(path) and export.is_file():
            export.rename(path / export.name)
        path.rename(aside)
    except OSError as error:
        raise EchoError(f"{path} cannot be set aside: {error.strerror}; move it away") from None


def make_missing_export(checkpoint: TrainingCheckpoint) -> None:
    """Write the export of `checkpoint` if a kill came before it.

    **Raises**: `EchoError` if it cannot be written.
    """
    file = checkpoint.path.with_name(export_name(checkpoint.path.name))
    if not os.path.lexists(file):
        try:
            export_weights(checkpoint, file)
        except OSError as error:
            raise EchoError(f"{file} cannot be written: {error.strerror}") from None


def export_weights(checkpoint: TrainingCheckpoint, file: Path) -> None:
    """Write the weights to speak with in bfloat16, as a file that `load_dit` or `load_codec` reads.

    One layer at a time is in memory.
    """
    arrays = checkpoint.model_arrays()
    bfloat16 = np.dtype(ml_dtypes.bfloat16)

    def parts(name: str, shape: tuple[int, ...]) -> Callable[[], Any]:
        rest = (slice(None),) * (len(shape) - 1)
        return lambda: (arrays.part(name, (slice(i, i + 1), *rest)) for i in range(shape[0]))

    shapes = {name: arrays.shape(name) for name in arrays.names}
    tensors = [Tensor(name, bfloat16, shape, parts(name, shape)) for name, shape in shapes.items()]
    config = json.dumps(checkpoint.manifest["model"])
    metadata = {
        "format": FORMAT,
        "kind": checkpoint.model_kind,
        "config": config,
        "step": str(checkpoint.step),
    } | generation_metadata(checkpoint_generation(checkpoint))
    write_whole(file, lambda path: write_safetensors(path, tensors, metadata))


def restore_state(checkpoint: TrainingCheckpoint, abstract: StateLike) -> StateLike:
    """The state in `checkpoint`, each device reading only its slices.

    `abstract` has shapes and shardings; the mesh may differ from the one that was saved. A moving
    average that the run before did not keep begins at the weights.
    """

    def source(name: str) -> str:
        if name.startswith("ema.") and name not in checkpoint.tensors:
            return "model." + name.removeprefix("ema.")
        return name

    def restore(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        tensor = checkpoint.tensors.get(source(name))
        if tensor is None or tensor.shape != leaf.shape or tensor.dtype != leaf.dtype:
            found = "is missing" if tensor is None else f"has the shape {tensor.shape}"
            raise EchoError(f"{checkpoint.path}: {name} {found}; wanted {leaf.shape}")
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: checkpoint.read(source(name), index)
        )

    leaves, treedef = jax.tree.flatten(abstract)
    restored = map(restore, leaf_names(abstract), leaves)
    return treedef.unflatten(restored)


def put_on_mesh(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host's array as a global one, of which each device takes its slice."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _copy_to_host(state: State) -> list[tuple[str, Box, np.ndarray]]:
    """The pieces of `state` that this process owns: of equal copies one process has the first."""
    owned = []
    for name, leaf in named_leaves(state).items():
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                shard.data.copy_to_host_async()
                index = zip(shard.index, leaf.shape, strict=True)
                owned.append((name, tuple(s.indices(size)[:2] for s, size in index), shard.data))
    # A copy: the device's memory is given to the next step.
    return [(name, box, np.array(data)) for name, box, data in owned]


def _write_json(path: Path, data: dict[str, Any]) -> None:
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(data, indent=1) + "\n"))
