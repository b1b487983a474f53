"""What the processes print, line by line, with the worker's number before each."""

import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Iterable
from typing import IO, Any

from echo_eqx.command import reader_left
from echo_eqx.errors import EchoError
from echo_eqx.ops.pods.shell import Done, Shell, start, stop
from echo_eqx.ops.pods.worker import HEADER
from echo_eqx.ops.pods.workers import PROGRAM, PYTHON, Workers

_MOST_FAILURES = 10
"""Connections in a row that brought nothing, after which a worker counts as lost."""


class _Follower:
    """One worker's log over as many connections as it takes: each line is printed once.

    Over a new connection, one of gcloud's own making too, a header says where in the log it begins.
    """

    def __init__(self, shell: Shell, workers: Workers, worker: str, lines: int):
        self._shell, self._workers, self.worker, self._lines = shell, workers, worker, lines
        self._seen = -1
        self._position = 0
        self._pending = b""
        self._failures = 0
        self._errors: IO[bytes] | None = None
        self.process: subprocess.Popen | None = None
        self.again_at = 0.0
        self.ended: dict[str, Any] | None = None

    def command(self) -> list[str]:
        run = self._workers.run_name(self.worker)
        remote = [PYTHON, "-P", PROGRAM, "follow", run, str(self._seen), str(self._lines)]
        return self._workers.command(self.worker, remote)

    def connect(self) -> subprocess.Popen:
        command = self.command()
        self._shell.say(command)
        self._pending = b""
        self._errors = tempfile.TemporaryFile()
        self.process = start(command, subprocess.PIPE, self._errors)
        return self.process

    def take(self, data: bytes) -> None:
        self._pending += data
        while (end := self._pending.find(b"\n")) >= 0:
            line, self._pending = self._pending[: end + 1], self._pending[end + 1 :]
            before, mark, header = line.partition(HEADER)
            if not mark:
                self._line(line)
                continue
            fields = json.loads(header)
            if "offset" in fields:  # what stands before it was cut off, and comes again
                self._position = fields["offset"]
                if self._seen < 0 or fields["anew"]:
                    self._seen = self._position
            elif before:
                self._line(before)
            if "ended" in fields or "missing" in fields:
                self.ended = fields
            self._failures = 0

    def _line(self, line: bytes) -> None:
        if self._position >= self._seen:
            text = line.decode(errors="replace").rstrip("\r\n")
            print(f"{self.worker}| {text}", flush=True)
            self._seen = self._position + len(line)
        self._position += len(line)

    def dropped(self, pause: float) -> None:
        """The connection is gone. **Raises**: `EchoError` if there is none any more."""
        assert self.process is not None and self.process.stdout and self._errors is not None
        self.process.stdout.close()
        code = self.process.wait()
        self.process = None
        self._errors.seek(0)
        done = Done(code, "", self._errors.read().decode(errors="replace"))
        self._errors.close()
        if self.ended is not None:
            return
        self._failures += 1
        if self._failures > _MOST_FAILURES or code == 127:
            raise EchoError(
                f"the log of worker {self.worker} of {self._workers} cannot be had: "
                f"{done.reason(0)}"
            )
        self.again_at = time.monotonic() + pause


def follow(
    shell: Shell, workers: Workers, ids: Iterable[str], lines: int, pause: float
) -> dict[str, int | None]:
    """Print the last `lines` of each log and what comes, until the run has ended; then its codes.

    **Raises**: `EchoError` for a worker without a run, or one that is lost.
    """
    followers = [_Follower(shell, workers, worker, lines) for worker in ids]
    if shell.dry_run:
        for follower in followers:
            shell.say(follower.command())
        return {}
    with selectors.DefaultSelector() as selector:

        def connect(follower: _Follower) -> None:
            process = follower.connect()
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ, follower)

        try:
            for follower in followers:
                connect(follower)
            while any(follower.ended is None for follower in followers):
                if reader_left():  # such as | head, and the log may grow for days
                    return {}
                for key, _ in selector.select(0.1):
                    if data := os.read(key.fd, 1 << 16):
                        key.data.take(data)
                    else:
                        selector.unregister(key.fileobj)
                        key.data.dropped(pause)
                for follower in followers:
                    if follower.process is None and follower.ended is None:
                        if time.monotonic() >= follower.again_at:
                            connect(follower)
        finally:
            for follower in followers:
                if follower.process is not None:
                    stop(follower.process)
    for follower in followers:
        if follower.ended is not None and "missing" in follower.ended:
            raise EchoError(f"worker {follower.worker} of {workers} has had no run")
    return {f.worker: (f.ended or {}).get("code") for f in followers}
