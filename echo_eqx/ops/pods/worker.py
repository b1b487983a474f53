"""Runs on a worker, with the standard library alone: supervises a process and reports its state.

    python worker.py start RUN LAUNCH COMMAND...  start COMMAND, unless this run is alive
    python worker.py status RUN START             its state, and its log from byte START on;
                                                  the last -START lines if it is negative
    python worker.py end RUN TERM|KILL            it saves and exits, or is killed
    python worker.py versions                     what must be the same on all workers

Each prints a line of JSON. RUN is a folder in ~/echo_eqx_runs. Its file `lock` is held for as long
as the process or its supervisor lives; unlike a process id, a lock does not survive a reboot.
LAUNCH identifies a launch: gcloud repeats a command if its connection breaks, so each of these may
run twice.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

_START_SECONDS = 20.0
_MAX_BYTES = 64 << 10


def main(arguments: list[str]) -> None:
    action, *rest = arguments
    path = Path.home() / "echo_eqx_runs" / rest.pop(0) if rest else Path()
    if action == "keep":
        _keep(path, rest[0], rest[1:])
    if action == "start":
        _start(path, rest[0], rest[1:])
    elif action == "end":
        _end(path, rest[0])
    first = int(rest[0]) if action == "status" else -1
    answer = _versions() if action == "versions" else _status(path, first)
    print("\n" + json.dumps(answer), flush=True)  # after half an answer, if the connection broke


def _start(path: Path, launch: str, command: list[str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if _is_held(path) or _state(path).get("launch") == launch:
        return
    keeper = [sys.executable, str(Path(__file__).resolve()), "keep", path.name, launch, *command]
    with (path / "log").open("ab") as log:
        # In a session of its own, it outlives the connection that started it.
        process = subprocess.Popen(
            keeper, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if _state(path).get("launch") == launch:
            break
        time.sleep(0.02)


def _keep(path: Path, launch: str, command: list[str]) -> NoReturn:
    """Wait for the process, to record its exit code. Its signals do not reach this session."""
    lock = _lock(path)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}", flush=True)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        cwd=Path.home(),
        pass_fds=(lock,),
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    _write_state(path, launch=launch, pid=process.pid, code=None)
    code = process.wait()
    _write_state(path, launch=launch, pid=process.pid, code=code if code >= 0 else 128 - code)
    raise SystemExit(0)


def _status(path: Path, start: int) -> dict[str, Any]:
    """`code` is the exit code; None if the process is alive or was lost with its machine."""
    alive = _is_held(path)  # before the log is read, so no line after the end is missed
    state = _state(path)
    lines, position = _read_log(path / "log", start, alive)
    return {
        "alive": alive,
        "launch": state.get("launch"),
        "code": None if alive else state.get("code"),
        "lines": [line.decode(errors="replace").rstrip("\r\n") for line in lines],
        "position": position,
    }


def _end(path: Path, name: str) -> None:
    pid = _state(path).get("pid")
    if pid and _is_held(path):
        with suppress(ProcessLookupError, PermissionError):
            if name == "KILL":
                os.killpg(pid, signal.SIGKILL)
            else:
                os.kill(pid, signal.SIGTERM)


def _read_log(log: Path, start: int, alive: bool) -> tuple[list[bytes], int]:
    """Complete lines from byte `start`, or the last `-start`, and where the next line begins."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            first = max(0, size - _MAX_BYTES) if start < 0 else start if start <= size else 0
            file.seek(first)
            data = file.read(_MAX_BYTES)
    except FileNotFoundError:
        return [], 0
    end = data.rfind(b"\n") + 1
    if not end and (len(data) == _MAX_BYTES or not alive):
        end = len(data)  # a line that never ended
    lines = data[:end].splitlines(keepends=True)
    if start < 0:
        lines = lines[1 if first else 0 :][start:]
    return lines, first + end


def _lock(path: Path) -> int:
    handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    for _ in range(500):  # a status query holds it for a moment
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        time.sleep(0.01)
    raise SystemExit(0)


def _is_held(path: Path) -> bool:
    try:
        with (path / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _state(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "state.json").read_bytes())
    except FileNotFoundError:
        return {}


def _write_state(path: Path, **fields: Any) -> None:
    temporary = path / ".state.json"
    temporary.write_text(json.dumps(fields))
    temporary.replace(path / "state.json")


def _versions() -> dict[str, Any]:
    # Imported here: the other actions must answer quickly and need no package.
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from echo_eqx.sharding.hosts import code_digest

    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "libtpu", "equinox", "optax", "numpy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "code of echo_eqx": code_digest()}


if __name__ == "__main__":
    main(sys.argv[1:])
