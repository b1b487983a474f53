"""Files of a run folder, which may hold anything: links out of it, pipes, devices."""

import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


class FileProblem(Exception):
    """What is wrong with one file of a run, as a sentence that names it."""


class FileMissing(FileProblem):
    """There is no such file, which may be all right."""


def find_inside(root: Path, *parts: str) -> Path:
    """The path of a file or folder below `root`, which has no links in it.

    **Raises**: `FileMissing`, or `FileProblem` for one that is a link out of `root`.
    """
    name, path = "/".join(parts), root.joinpath(*parts)
    try:
        found = path.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        raise FileMissing(f"{name} is missing") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: before Python 3.13
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise FileProblem(f"cannot find {name}: {reason}") from None
    if not found.is_relative_to(root):
        raise FileProblem(f"{name} is a link out of the run folder, so it is not read")
    return found


def open_inside(root: Path, *parts: str) -> BinaryIO:
    """A regular file below `root`, open for reading.

    **Raises**: `FileMissing`, or `FileProblem` for anything else that cannot be read.
    """
    name, path = "/".join(parts), find_inside(root, *parts)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would block
            kind = _KINDS.get(stat.S_IFMT(mode), "a device")
            raise FileProblem(f"{name}: expected a regular file, got {kind}")
        return path.open("rb")
    except OSError as error:
        raise FileProblem(f"cannot read {name}: {error.strerror}") from None
