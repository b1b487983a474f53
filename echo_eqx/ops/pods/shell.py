"""Running other programs: printed first, many in parallel, and none outlives this process."""

import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from echo_eqx.errors import EchoError

_HINTS = {"gcloud": "the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"}
_TIMED_OUT = 124  # as timeout(1) exits

Completed = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Shell:
    """Runs commands, each printed first; a dry run only prints them."""

    dry_run: bool = False
    _printed: set[str] = field(default_factory=set)

    def run_all(
        self, commands: Sequence[Sequence[str]], timeout: float, *, is_query: bool = False
    ) -> list[Completed]:
        """Run all in parallel, for at most `timeout` s; [] in a dry run.

        A query changes nothing and is often repeated, so it is printed only the first time.

        **Raises**: `EchoError` for a program that is not installed.
        """
        for line in map(shlex.join, commands):
            if not is_query or line not in self._printed:
                print(line, flush=True)
            self._printed.add(line)
        if self.dry_run:
            return []
        deadline = time.monotonic() + timeout
        with contextlib.ExitStack() as stack:
            started = []
            for command in commands:
                # Not pipes: a child of `command` that outlives it would keep them open.
                out, err = (
                    stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
                    for _ in range(2)
                )
                try:  # in a session of its own, without a terminal, it cannot prompt
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
                except FileNotFoundError:
                    hint = _HINTS.get(command[0], command[0])
                    raise EchoError(f"{command[0]} is not on PATH; install {hint}") from None
                stack.callback(_kill, process)
                started.append((process, out, err))
            return [_finish(p, out, err, deadline, timeout) for p, out, err in started]


def failure_reason(completed: Completed) -> str:
    """Why a command failed: its own last error line, if it printed any."""
    lines = [line.strip() for line in completed.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return (errors or lines or [f"exit code {completed.returncode}"])[-1][:300]


def _finish(
    process: subprocess.Popen, out: IO[str], err: IO[str], deadline: float, timeout: float
) -> Completed:
    try:
        code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        reason = f"no answer within {timeout:g} s"
        return subprocess.CompletedProcess(process.args, _TIMED_OUT, "", reason)
    for file in (out, err):
        file.seek(0)
    return subprocess.CompletedProcess(process.args, code, out.read(), err.read())


def _kill(process: subprocess.Popen) -> None:
    """With its children, which are in its session."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
