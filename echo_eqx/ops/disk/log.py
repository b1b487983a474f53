"""The watchdog's log: JSON lines. A problem is logged once for as long as it lasts."""

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError


class InUse(Exception):
    """Not to be deleted: a process has it open or locked, or it is a link out of its folder."""


class EventLog:
    """JSON objects, one per line, appended to `path` or printed; on stderr if that fails.

    **Raises**: `EchoError` if the file cannot be created, unless the disk is full.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._known: set[tuple[Any, ...]] = set()
        self._current: set[tuple[Any, ...]] = set()
        try:
            self._append(b"")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise EchoError(f"cannot write the log {path}: {error.strerror}") from None

    def write(self, **fields: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": now, **fields}) + "\n"
        try:
            self._append(line.encode())
        except OSError:
            print(line, end="", file=sys.stderr, flush=True)

    def _append(self, data: bytes) -> None:
        if self._path is None:
            os.write(1, data)  # sys.stdout would keep the data in its buffer if the disk is full
            return
        with self._path.open("ab", buffering=0) as file:
            size = file.tell()
            if file.write(data) < len(data):
                file.truncate(size)  # half a line would spoil the next one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def error(self, path: Path, error: Exception) -> None:
        """Log what is wrong with `path`, unless the previous check already did."""
        reason = (error.strerror if isinstance(error, OSError) else str(error)) or repr(error)
        if self.is_new("error", path, reason):
            self.write(event="error", path=str(path), reason=reason)

    def is_new(self, *key: Any) -> bool:
        """Whether `key` came up neither in this check nor in the previous one."""
        new = key not in self._known and key not in self._current
        self._current.add(key)
        return new

    def end_check(self) -> None:
        """End a check: from now on, keys that did not come up in it are new again."""
        self._known, self._current = self._current, set()

    @contextlib.contextmanager
    def skipping(self, path: Path) -> Iterator[None]:
        """Skip `path` if it is in use or gone; log any other error."""
        try:
            yield
        except (InUse, FileNotFoundError):
            pass
        except (OSError, EchoError) as error:
            self.error(path, error)
