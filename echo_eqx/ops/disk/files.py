"""Files that may be deleted: no links or mounts, and not locked by another process."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import psutil


class InUse(Exception):
    """Something that must stay: another process holds it, or it leads out of its folder."""


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file and not a link to one."""
    return path.is_file() and not path.is_symlink()


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[os.stat_result]:
    """Hold an exclusive lock on a regular file.

    **Raises**: `InUse` if another process holds a lock, or it is not a regular file.
    """
    if not is_file(path):
        raise InUse
    # NFS grants an exclusive lock only on a file that is open for writing.
    with path.open("rb+" if os.access(path, os.W_OK) else "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse from None
        status = os.fstat(file.fileno())
        if not os.path.samestat(status, path.lstat()):
            raise InUse  # it was replaced meanwhile
        yield status


def unused_bytes(path: Path) -> int:
    """Disk space of a file, or of everything in a folder.

    **Raises**: `InUse` if any file is locked.
    """
    if is_file(path):
        with locked(path) as status:
            return allocated_bytes(status)
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(unused_bytes(file) for file in files if is_file(file))


def allocated_bytes(status: os.stat_result) -> int:
    """What deleting the file frees: nothing while it has other names."""
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def crosses_mount(path: Path, folder: Path) -> bool:
    """Whether something is mounted at `path`, in it, or on the way to it from `folder`."""
    mounts = (Path(partition.mountpoint) for partition in psutil.disk_partitions(all=True))
    return any(
        mount != folder
        and mount.is_relative_to(folder)
        and (path.is_relative_to(mount) or mount.is_relative_to(path))
        for mount in mounts
    )
