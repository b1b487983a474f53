"""Which checkpoints to keep, and how to delete the others safely.

A `checkpoints` folder may hold other things: copies, notes, links. Only regular files and folders
with exactly the names that the trainer writes are deleted. Everything is opened relative to the run
folder's descriptor, so nothing is deleted through a link.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from echo_eqx.weights.checkpoint.reader import FOLDER, MANIFEST, step_of

_PIECES = re.compile(r"[0-9a-f]{16}-[0-9]{5,}\.(safetensors|json)")
"""Files of a process in the folder of a checkpoint: launch id and process index."""
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
"""Temporary names of `write_whole`."""
_DAMAGED = re.compile(r"damaged_(step_\d+)_[0-9a-f]{6}")
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def export_name(folder_name: str) -> str:
    """Name of the exported weights next to a checkpoint's folder."""
    return f"{folder_name}.safetensors"


def set_aside_name(name: str) -> str:
    """A new name for something that is in a checkpoint's place."""
    return f"damaged_{name}_{os.urandom(3).hex()}"


def set_aside_step(name: str) -> int | None:
    """The step of a folder that was set aside, None for any other name."""
    match = _DAMAGED.fullmatch(name)
    return step_of(match[1]) if match else None


def temporary_export_step(name: str) -> int | None:
    """The step of an unfinished export, None for any other name."""
    match = _TEMPORARY.fullmatch(name)
    if match is None or not match[1].endswith(".safetensors"):
        return None
    return step_of(match[1].removesuffix(".safetensors"))


@dataclass(frozen=True)
class Retention:
    """Which checkpoints to keep: the newest `last`, and those at multiples of `every` steps."""

    last: int = 3
    every: int = 0

    def drops(self, steps: list[int]) -> list[int]:
        """The steps whose checkpoints are to be deleted."""
        newest = sorted(steps)[-max(self.last, 1) :]
        return [s for s in steps if s not in newest and not (self.every and s % self.every == 0)]


@contextlib.contextmanager
def open_checkpoints(run_dir: Path) -> Iterator[int | None]:
    """A descriptor of a run's `checkpoints` folder, None if it is missing or a link."""
    with contextlib.ExitStack() as stack:
        handle = None
        with contextlib.suppress(OSError):
            handle = stack.enter_context(_folder(run_dir / FOLDER))
        yield handle


@contextlib.contextmanager
def _folder(path: str | Path, inside: int | None = None) -> Iterator[int]:
    """A descriptor of a folder, if it is not a link."""
    handle = os.open(path, _OPEN_FOLDER, dir_fd=inside)
    try:
        yield handle
    finally:
        os.close(handle)


def is_leftover(name: str, handle: int) -> bool:
    """Whether the folder `name` in `handle` is empty or contains files that the trainer wrote."""
    try:
        with _folder(name, handle) as inner:
            files = os.listdir(inner)
            return not files or any(_is_own_file(file, name, inner) for file in files)
    except OSError:
        return False


def remove_step(name: str, handle: int) -> None:
    """Delete the checkpoint or leftover `name` in the folder `handle`, and its export.

    The manifest is removed first, so a partial delete is never taken for a checkpoint. The folder
    stays if it has files that the trainer did not write.

    **Raises**: `OSError`, a `FileNotFoundError` if there is no `name`.
    """
    if _kind(name, handle) not in (stat.S_IFDIR, None):
        return
    with _folder(name, handle) as inner:
        ours = [file for file in os.listdir(inner) if _is_own_file(file, name, inner)]
        if MANIFEST in ours:
            os.unlink(MANIFEST, dir_fd=inner)
        # Pieces are removed last, so an export without pieces was kept on purpose.
        if ours and _kind(export_name(name), handle) == stat.S_IFREG:
            os.unlink(export_name(name), dir_fd=handle)
        for file in ours:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file, dir_fd=inner)
        empty = not os.listdir(inner)
    if empty:
        os.rmdir(name, dir_fd=handle)


def remove_file(name: str, handle: int) -> None:
    """Delete a regular file; anything else stays.

    **Raises**: `OSError`, a `FileNotFoundError` if there is no `name`.
    """
    if _kind(name, handle) in (stat.S_IFREG, None):
        os.unlink(name, dir_fd=handle)


def _is_own_file(file: str, folder: str, inner: int) -> bool:
    temporary = _TEMPORARY.fullmatch(file)
    name = temporary[1] if temporary else file
    damaged = _DAMAGED.fullmatch(folder)  # its export was moved into it
    ours = name == MANIFEST or _PIECES.fullmatch(name) is not None
    ours = ours or (damaged is not None and name == export_name(damaged[1]))
    return ours and _kind(file, inner) == stat.S_IFREG


def _kind(name: str, handle: int) -> int | None:
    try:
        return stat.S_IFMT(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return None
