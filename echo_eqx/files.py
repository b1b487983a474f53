"""Files that appear whole or not at all, paths as a user writes them, and JSON that may be
damaged or hostile."""

import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from echo_eqx.errors import EchoError

MAX_JSON_BYTES = 2**26
_MAX_CONTAINERS = 2_000_000

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


def parse_json(data: bytes) -> Any:
    """The value in a file of JSON, whatever the file holds.

    Not accepted: NaN and infinities, an object with the same name twice, and what takes far more
    memory than its bytes.

    **Raises**: `ValueError` with the reason, and nothing else.
    """
    if len(data) > MAX_JSON_BYTES or data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS:
        raise ValueError("its JSON is larger than any that is expected here")
    try:
        return json.loads(
            data,
            object_pairs_hook=_unique,
            parse_float=_finite,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its JSON has the same name twice in an object")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"its JSON has the number {text[:20]}, which is too large")
    return value


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"its JSON has the value {text}, which is not a number")
