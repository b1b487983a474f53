"""Files of a run folder that anyone may have written: links, pipes and endless files included."""

import os
import stat
from pathlib import Path
from typing import BinaryIO


class Trouble(Exception):
    """What is wrong with one file of a run, as a sentence that names it."""


class Missing(Trouble):
    """There is no such file, which need not be wrong."""


def find_inside(root: Path, *parts: str) -> Path:
    """The real path of a file or folder below `root`, which is a real path itself.

    **Raises**: `Missing`, or `Trouble` if it leads out of `root` or cannot be looked at.
    """
    name, path = "/".join(parts), root.joinpath(*parts)
    try:
        found = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise Trouble(f"{name} is a link to nothing") from None
        raise Missing(f"{name} is missing") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise Trouble(f"{name} cannot be found: {_reason(error)}") from None
    if not found.is_relative_to(root):
        raise Trouble(f"{name} is a link that leads out of the run, so it is not read")
    return found


def open_inside(root: Path, *parts: str) -> BinaryIO:
    """A regular file below `root`, open for reading.

    **Raises**: `Missing`, or `Trouble` for anything but a regular file that can be opened.
    """
    name, path = "/".join(parts), find_inside(root, *parts)
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            # What has taken its place since then is neither followed nor waited for.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            mode = os.fstat(handle).st_mode
            if stat.S_ISREG(mode):
                return os.fdopen(handle, "rb")
            os.close(handle)
    except FileNotFoundError:
        raise Missing(f"{name} is missing") from None
    except OSError as error:
        raise Trouble(f"{name} cannot be read: {_reason(error)}") from None
    raise Trouble(f"{name}: expected a regular file, got {_kind(mode)}")


def read_inside(root: Path, name: str, limit: int) -> bytes:
    """The content of a regular file of `root`.

    **Raises**: `Missing`, or `Trouble` if it is larger than `limit` bytes or cannot be read.
    """
    with open_inside(root, name) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise Trouble(f"{name} cannot be read: {_reason(error)}") from None
    if len(data) > limit:
        raise Trouble(f"{name}: expected at most {limit >> 20} MiB, got more")
    return data


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a named pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "links lead in a circle" if isinstance(error, RuntimeError) else str(error)
