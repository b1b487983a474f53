"""Checkpoints outside the retention rule, and what killed runs left beside them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from echo_eqx.ops.disk.log import Journal
from echo_eqx.ops.disk.safe import (
    Removable,
    Spared,
    bytes_unlocked,
    crosses_mount,
    is_file,
    is_folder,
    locked,
    opened,
)
from echo_eqx.train.checkpoint import Retention
from echo_eqx.train.own_files import (
    is_leftover,
    remove_file,
    remove_step,
    set_aside_step,
    temporary_export_step,
)
from echo_eqx.weights.checkpoint import FOLDER, MANIFEST, find_checkpoints, step_of


@dataclass(frozen=True)
class _Found:
    """What may go of a run: a complete checkpoint, or what a killed run left."""

    folder: Path
    run: Path
    name: str
    step: int
    complete: bool
    written: float


def dropped_checkpoints(
    folders: list[Path], retention: Retention, journal: Journal
) -> Iterator[Removable]:
    """What may go of the runs in `folders`: leftovers first, then what was written first."""
    tried: set[Path] = set()
    while True:
        # Anew each time: a run that goes back behind a damaged one has another newest.
        heads: list[_Found] = []
        for folder in folders:
            for run in _run_folders(folder, journal):
                with journal.sparing(run):
                    found = _outside(folder, run, retention)
                    heads += [f for f in found if run / FOLDER / f.name not in tried][:1]
        if not heads:
            return
        head = min(heads, key=lambda found: (found.complete, found.written))
        tried.add(head.run / FOLDER / head.name)
        yield from _checkpoint(head, journal)


def _run_folders(folder: Path, journal: Journal) -> list[Path]:
    """`folder` if it is a run's, else those in it that are."""
    runs = []
    with journal.sparing(folder), opened(folder, folder) as handle:
        if is_folder(FOLDER, handle):
            return [folder]
        for name in sorted(os.listdir(handle)):
            if is_folder(name, handle) and os.path.lexists(folder / name / FOLDER):
                runs.append(folder / name)
    return runs


def _checkpoint(found: _Found, journal: Journal) -> Iterator[Removable]:
    folder, run, name = found.folder, found.run, found.name
    path = run / FOLDER / name
    with contextlib.ExitStack() as stack:
        stack.enter_context(journal.sparing(path))
        if not found.complete:
            run_handle = stack.enter_context(opened(folder, run))
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(locked(".lock", run_handle))
        handle = stack.enter_context(opened(folder, run / FOLDER))
        if crosses_mount(path, folder):
            raise Spared
        size = bytes_unlocked(name, handle)
        export = f"{name}.safetensors"
        if found.complete and is_file(export, handle):
            size += bytes_unlocked(export, handle)
        why = "outside the retention rule" if found.complete else "no whole checkpoint"
        kind = "checkpoint" if found.complete else "leftover"
        yield Removable(kind, path, size, why, lambda: _remove_checkpoint(name, handle))


def _outside(folder: Path, run: Path, retention: Retention) -> list[_Found]:
    """Leftovers, then checkpoints that the rule drops, each from the lowest step on.

    Nothing of a run without a complete checkpoint, and nothing that is newer than its newest.
    """
    with opened(folder, run / FOLDER) as handle:
        listed = {path.name: step for step, path in find_checkpoints(run / FOLDER)}
        complete = {
            name: step
            for name, step in listed.items()
            if is_folder(name, handle) and is_file(f"{name}/{MANIFEST}", handle)
        }
        if not complete:
            return []
        newest = max(complete.values())
        drops = retention.drops(list(complete.values()))
        # Exports go with their checkpoints, and what is one by way of a link is left alone.
        stay = listed.keys() - complete.keys()
        found = []
        for name in os.listdir(handle):
            if is_folder(name, handle):
                step = step_of(name)
                step = set_aside_step(name) if step is None else step
            else:
                step = temporary_export_step(name) if is_file(name, handle) else None
            if step is None or name in stay:
                continue
            if name not in complete and is_folder(name, handle) and not is_leftover(name, handle):
                continue
            if (step in drops) if name in complete else (step <= newest):
                with contextlib.suppress(FileNotFoundError):
                    inner = f"{name}/{MANIFEST}" if name in complete else name
                    written = os.stat(inner, dir_fd=handle, follow_symlinks=False).st_mtime
                    found.append(_Found(folder, run, name, step, name in complete, written))
    return sorted(found, key=lambda found: (found.complete, found.step))


def _remove_checkpoint(name: str, handle: int) -> None:
    """Delete a checkpoint and its export, or a leftover. What the trainer did not write stays."""
    if is_folder(name, handle):
        remove_step(name, handle)
    else:
        remove_file(name, handle)
