"""Other programs, as they are run: printed first, many at once, and ended with this one."""

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from echo_eqx.errors import EchoError

_ABOUT = {
    "gcloud": "the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)",
    "ssh": "OpenSSH",
    "scp": "OpenSSH",
    "sbatch": "a machine of the cluster, where jobs are submitted",
}


@dataclass(frozen=True)
class Done:
    """How a command ended; `code` is None if it took too long and was stopped."""

    code: int | None
    out: str
    err: str

    def reason(self, seconds: float) -> str:
        """Why it failed, in the words of the program as far as it said any."""
        if self.code is None:
            return f"no answer within {seconds:g} s"
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith("error")]
        return (errors or lines or [f"it ended with code {self.code}"])[-1][:300]


class Shell:
    """Runs commands, each printed before; a dry run prints them and does nothing."""

    def __init__(self, dry_run: bool = False):
        self.dry_run = dry_run
        self._said: set[str] = set()

    def run(self, command: Sequence[str], timeout: float, *, asks: bool = False) -> Done:
        """As `run_all`, of one command. Not for a dry run."""
        return self.run_all([command], timeout, asks=asks)[0]

    def run_all(
        self, commands: Sequence[Sequence[str]], timeout: float, *, asks: bool = False
    ) -> list[Done]:
        """Run all at once, for `timeout` s at most; nothing in a dry run.

        What only `asks` how things are is asked again and again, and printed once.

        **Raises**: `EchoError` for a program that is not there.
        """
        for command in commands:
            self.say(command, asks=asks)
        if self.dry_run:
            return []
        with contextlib.ExitStack() as stack:
            files = [
                tuple(stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
                for _ in commands
            ]
            processes = []
            stack.callback(lambda: [stop(process) for process in processes])
            for command, (out, err) in zip(commands, files, strict=True):
                processes.append(start(command, out, err))
            until = time.monotonic() + timeout
            done = []
            for process, outputs in zip(processes, files, strict=True):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
                code = process.poll()
                for file in outputs:
                    file.seek(0)
                out, err = (file.read().decode(errors="replace") for file in outputs)
                done.append(Done(code, out, err))
        return done

    def say(self, command: Sequence[str], *, asks: bool = False) -> None:
        line = shlex.join(command)
        if not asks or line not in self._said:
            print(line, flush=True)
        if asks:
            self._said.add(line)


def start(command: Sequence[str], out: Any, err: Any) -> subprocess.Popen:
    """Begin a program in a session of its own: `stop` ends all that it began, and none asks here.

    **Raises**: `EchoError` if it is not there.
    """
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    except FileNotFoundError:
        wanted = _ABOUT.get(command[0], "it installed")
        raise EchoError(f"{command[0]} is not on PATH; wanted {wanted}") from None
    except OSError as error:
        raise EchoError(f"{command[0]} cannot be run: {error.strerror}") from None


def stop(process: subprocess.Popen) -> None:
    """End a program of `start` and what it began. Nothing if it has ended."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1.0)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
