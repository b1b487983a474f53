"""Files that are replaced atomically, and paths as a user writes them."""

import errno
import json
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError


def expand(path: Path) -> Path:
    """Replace `~` by the home folder; `~name` of an unknown user is left as it is.

    For a user without a home folder, `~/.cache` becomes a folder in the system's temporary folder.

    **Raises**: `EchoError` for any other `~` of such a user.
    """
    found = Path(os.path.expanduser(path))
    if path.parts[:1] != ("~",) or found != path:
        return found
    if path.parts[1:2] == (".cache",):
        return Path(tempfile.gettempdir(), f"cache-{os.getuid()}", *path.parts[2:])
    raise EchoError(
        f"{path}: cannot expand ~, because this user has no home folder; set HOME, or write the "
        "path without ~"
    )


def write_whole(path: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`.

    If anything fails, `path` is unchanged and the temporary file is removed.

    **Raises**: `FileExistsError` if `path` exists and `replace` is false.
    """
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if replace or not _link(temporary, path):
            temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _link(temporary: Path, path: Path) -> bool:
    """Give `temporary` the name `path` unless another process has just made that file."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        return False  # some file systems have no links
    temporary.unlink()
    return True


def write_json(path: Path, data: Any, indent: int = 2) -> None:
    """`write_whole` of a JSON value."""
    text = json.dumps(data, indent=indent) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))


def remove_temporary_files(folder: Path, names: Collection[str]) -> None:
    """Remove temporary files that a killed `write_whole` of one of `names` left in `folder`.

    Only regular files with exactly such a name are removed.

    **Raises**: `OSError`.
    """
    for path in folder.iterdir():
        match = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", path.name, re.DOTALL)
        if match and match[1] in names and stat.S_ISREG(path.lstat().st_mode):
            path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: it survives a power loss once the folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network file systems cannot
    finally:
        os.close(handle)
