"""Files that appear whole or not at all, and paths as a user writes them."""

import os
import re
import stat
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from echo_eqx.errors import EchoError

# It can only be read by being set, which other threads would notice later on.
_UMASK = os.umask(0)
os.umask(_UMASK)


def expand(path: Path) -> Path:
    """`path` with `~` as the home folder; `~name` of an unknown user stays as it is.

    A cache below `~/.cache` of a user without a home folder is among the temporary files.

    **Raises**: `EchoError` for any other `~` of such a user.
    """
    found = Path(os.path.expanduser(path))
    if path.parts[:1] != ("~",) or found != path:
        return found
    if path.parts[1:2] == (".cache",):
        return Path(tempfile.gettempdir(), f"cache-{os.getuid()}", *path.parts[2:])
    raise EchoError(
        f"{path}: expected a home folder in place of ~, but this user has none; set HOME, or write "
        "the path without ~"
    )


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there.

    If anything fails, what stood at `path` still does and the temporary file is gone.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, names: Collection[str]) -> None:
    """Remove what `write_whole` left in `folder` when it was killed while writing one of `names`.

    Nothing else goes: a temporary file is known by the whole of its name, and links stay.

    **Raises**: `OSError`.
    """
    for path in folder.iterdir():
        match = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", path.name, re.DOTALL)
        if match and match[1] in names and stat.S_ISREG(path.lstat().st_mode):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A rename outlives a loss of power once the folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot; they keep their own order
    finally:
        os.close(handle)
