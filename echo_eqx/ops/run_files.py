"""Opening files of a run folder, which may contain anything: links out of it, pipes, devices."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def find_inside(root: Path, *parts: str) -> Path:
    """The real path of something below `root`. **Raises**: `OSError` for a link out of `root`."""
    path = Path(os.path.realpath(root.joinpath(*parts)))
    if not path.is_relative_to(root):
        raise OSError(errno.EXDEV, "it is a link out of the run folder")
    return path


def open_inside(root: Path, *parts: str) -> BinaryIO:
    """A regular file below `root`, open for reading. **Raises**: `OSError` for anything else."""
    path = find_inside(root, *parts)
    if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
        raise OSError(errno.EINVAL, "it is not a regular file")
    return path.open("rb")
