"""Files that are what they seem: reached without following links or mounts, and held by no one."""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Spared(Exception):
    """Something that must not go: it is in use, or leads out of its folder."""


@dataclass(frozen=True)
class Removable:
    """Something that may go now; `size` is an estimate of the bytes it gives back."""

    kind: str
    path: Path
    size: int
    why: str
    remove: Callable[[], object]


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def opened(base: Path, folder: Path) -> Iterator[int]:
    """Descriptor of `folder`, reached from `base` without following a link."""
    try:
        handle = os.open(base, _OPEN_FOLDER)
    except OSError as error:
        _spare_link(error)
    try:
        for part in folder.relative_to(base).parts:
            try:
                below = os.open(part, _OPEN_FOLDER, dir_fd=handle)
            except OSError as error:
                _spare_link(error)
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def _spare_link(error: OSError) -> NoReturn:
    """Which of the two is said of a link depends on the system."""
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        raise Spared from None
    raise error


@contextlib.contextmanager
def locked(name: str, handle: int) -> Iterator[os.stat_result]:
    """Hold the file `name` in the folder `handle`.

    **Raises**: `Spared` if another process does, or it is no plain file.
    """
    try:
        # Over a network an exclusive lock takes a file that is open for writing.
        file = os.open(name, os.O_RDWR | _OPEN_FILE, dir_fd=handle)
    except PermissionError:
        file = os.open(name, os.O_RDONLY | _OPEN_FILE, dir_fd=handle)
    except OSError as error:
        _spare_link(error)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Spared from None
        status = os.fstat(file)
        there = os.stat(name, dir_fd=handle, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or not os.path.samestat(status, there):
            raise Spared
        yield status
    finally:
        os.close(file)


def bytes_unlocked(name: str, handle: int) -> int:
    """Bytes of a file, or of a folder with all that is in it.

    **Raises**: `Spared` if a file is in use, or a folder in it is a link or another file system.
    """
    if not is_folder(name, handle):
        with locked(name, handle) as status:
            return allocated(status)
    total = 0
    device = os.stat(name, dir_fd=handle, follow_symlinks=False).st_dev
    for _, folders, files, inner in os.fwalk(name, dir_fd=handle, onerror=_raise):
        for other in folders:
            status = os.stat(other, dir_fd=inner, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode) or status.st_dev != device:
                raise Spared
        for file in files:
            if is_file(file, inner):
                with locked(file, inner) as status:
                    total += allocated(status)
    return total


def allocated(status: os.stat_result) -> int:
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def is_file(name: str, handle: int) -> bool:
    return _has_kind(stat.S_ISREG, name, handle)


def is_folder(name: str, handle: int) -> bool:
    return _has_kind(stat.S_ISDIR, name, handle)


def _has_kind(kind: Callable[[int], bool], name: str, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return kind(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode)
    return False


def crosses_mount(path: Path, folder: Path) -> bool:
    """Whether something is mounted at `path`, in it, or on the way to it from `folder`."""
    try:
        text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return False  # another system: only other devices are noticed
    fields = (line.split(" ")[4] for line in text.splitlines())
    mounts = (Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), field)) for field in fields)
    return any(
        mount != folder
        and mount.is_relative_to(folder)
        and (path.is_relative_to(mount) or mount.is_relative_to(path))
        for mount in mounts
    )


def _raise(error: OSError) -> NoReturn:
    raise error
