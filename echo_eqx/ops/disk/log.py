"""What the watchdog tells: lines of JSON, and each thing once for as long as it stays so."""

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
from echo_eqx.ops.disk.safe import Spared


class JsonLines:
    """A log of JSON objects, appended to `path` or printed; on stderr if that fails.

    **Raises**: `EchoError` if the file cannot be made, unless for want of room.
    """

    def __init__(self, path: Path | None):
        self._path = path
        try:
            self._append(b"")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise EchoError(f"log {path} cannot be written: {error.strerror}") from None

    def write(self, **fields: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": now, **fields}) + "\n"
        try:
            self._append(line.encode())
        except OSError:
            with contextlib.suppress(OSError):
                print(line, end="", file=sys.stderr, flush=True)

    def _append(self, data: bytes) -> None:
        if self._path is None:
            while data:  # past the buffer of sys.stdout, which would keep what a full disk refused
                data = data[os.write(1, data) :]
            return
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(handle).st_size
            if os.write(handle, data) < len(data):
                os.ftruncate(handle, before)  # half a line would spoil the next one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


class Journal:
    """Tells what goes wrong while folders are looked through, once for as long as it stays so."""

    def __init__(self, log: JsonLines):
        self.log = log
        self._said: set[tuple] = set()
        self._saying: set[tuple] = set()

    def next_check(self) -> None:
        """A check is over: what was not told in it is news again."""
        self._said, self._saying = self._saying, set()

    def report(self, path: Path, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) else str(error)
        if self.is_new(("error", path, why)):
            self.log.write(event="error", path=str(path), why=why or type(error).__name__)

    def is_new(self, what: tuple) -> bool:
        """Whether `what` was not already so at the check before."""
        known = what in self._said or what in self._saying
        self._saying.add(what)
        return not known

    @contextlib.contextmanager
    def sparing(self, path: Path) -> Iterator[None]:
        """What is in use or gone is passed over; what cannot be looked at is reported."""
        try:
            yield
        except (Spared, FileNotFoundError):
            pass
        except (OSError, EchoError) as error:
            self.report(path, error)
