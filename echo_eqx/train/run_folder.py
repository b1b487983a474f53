"""The run folder: its lock, its description, and its metrics file."""

import contextlib
import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import jax
from jax.experimental import multihost_utils

from echo_eqx.errors import EchoError
from echo_eqx.files import write_json, write_whole
from echo_eqx.json_data import to_json
from echo_eqx.train.settings import RunConfig

_README = """\
# A training run of echo_eqx

- `config.json`: all settings; pass this file or this folder as `--config`
- `environment.json`: command, versions, git revision, devices and end of each launch
- `metrics.jsonl`: a line per step; some lines also have speed and evaluation
- `checkpoints/step_N/`: weights, moments and data cursor, to resume from
- `checkpoints/step_N.safetensors`: weights in bfloat16, for `echo-eqx infer`
- `samples/step_N/`: generated audio, with the original recordings and the references
- `broken-P.jsonl`: records that process P could not read
- `nonfinite-P.jsonl`: samples of process P in batches whose update was skipped

`echo_eqx.load_dit` (for a codec, `echo_eqx.load_codec`) loads this folder, a checkpoint or an
export.
"""


_REWRITTEN = {
    ".lock": b"process ",
    "metrics.jsonl": b'{"step": ',
    "config.json": b'{\n  "model": "',
    "environment.json": b'[\n  {\n    "time": ',
}
"""Files that a launch overwrites or truncates, and how they begin if they are not empty."""


def _check_own(path: Path) -> None:
    """**Raises**: `EchoError` if a launch would overwrite a file that no run wrote."""
    for name, start in _REWRITTEN.items():
        file = path / name
        if not os.path.lexists(file):
            continue
        try:
            own = not file.is_symlink() and file.is_file()
            if own:
                with file.open("rb") as opened:
                    own = opened.read(len(start)) in (start, b"")
        except OSError as error:
            raise EchoError(f"cannot read {file}: {error.strerror}") from None
        if not own:
            raise EchoError(
                f"{file}: expected a file of a training run, got something else; move it away, or "
                "choose another --run_dir"
            )


class RunFolder:
    """The folder `path`, created if missing. Process 0 locks it until it exits.

    **Raises**: `EchoError` if it is not writable, another process is training in it, or it has
    files with the names of a run's files that no run wrote.
    """

    def __init__(self, path: Path, writes: bool):
        self.path = path
        self._lock = None
        if not writes:
            return
        _check_own(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / ".lock").open("a+")
        except OSError as error:
            raise EchoError(f"cannot write to {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise EchoError(f"{path} is in use by {self._lock.read().strip()}") from None
        except OSError:
            pass  # a file system without locks
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def check_shared(self, launch_id: str) -> None:
        """Check that all processes share this folder.

        **Raises**: `EchoError` on a process that sees a different folder at this path.
        """
        file = self.path / ".start"
        if self._lock is not None:
            write_whole(file, lambda temporary: temporary.write_text(launch_id))
        multihost_utils.sync_global_devices("started")
        if not file.is_file() or file.read_text() != launch_id:
            raise EchoError(
                f"{self.path.absolute()} on {socket.gethostname()}: expected the folder that "
                "process 0 writes to, got another; use a --run_dir on a disk that all hosts share"
            )

    def describe(self, config: RunConfig) -> None:
        """Write settings, environment and README."""
        write_json(self.path / "config.json", to_json(config))
        starts = self.path / "environment.json"
        write_json(starts, [*_read_list(starts), _environment()])
        readme = self.path / "README.md"
        if not os.path.lexists(readme):  # an existing one may contain notes
            write_whole(readme, lambda file: file.write_text(_README))


def note_end(run_dir: Path, step: int) -> None:
    """Record in `environment.json` that the last launch ended, saved at `step`.

    This tells the monitor that the run was stopped and did not crash.
    """
    file = run_dir / "environment.json"
    history = _read_list(file)
    if history and isinstance(history[-1], dict):
        history[-1]["end"] = {"time": _now(), "step": step}
        with contextlib.suppress(OSError):  # the run is saved all the same
            write_json(file, history)


def open_metrics(path: Path, step: int) -> TextIO:
    """Open `metrics.jsonl` (a JSON object per step) to append; lines after `step` are cut off."""
    end = 0
    with path.open("a+b") as file:
        file.seek(0)
        for line in file:
            try:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        file.truncate(end)
    return path.open("a")


def _environment() -> dict[str, Any]:
    packages = ("jax", "jaxlib", "equinox", "optax", "numpy", "safetensors", "huggingface_hub")
    return {
        "time": _now(),
        "command": sys.argv,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "git": _git_revision(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _read_list(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []
