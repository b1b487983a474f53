"""What runs on a worker, by the standard library alone: a process that stays, and how it fares.

    python worker.py start RUN MARK COMMAND...   begin COMMAND, unless this run is alive
    python worker.py status RUN LINES            how it fares, as a line of JSON
    python worker.py end RUN TERM|KILL [stopped] it saves and ends, or ends; by someone's wish
    python worker.py follow RUN OFFSET LINES     what it prints, until it has ended
    python worker.py versions                    what must be the same everywhere

RUN is a folder in ~/echo_eqx_runs. Its file `lock` is held for as long as the process or its keeper
lives, which outlasts neither a reboot nor a reused process number. MARK tells one launch from
another. Any of this may be asked twice, since gcloud repeats a command whose connection broke.
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

HEADER = b"\x1e"
"""Begins a line of JSON between the lines of a log that is followed."""
BEAT = 10.0
"""Seconds between two headers, by which a follower whose connection broke notices it."""
_START_SECONDS = 20.0
_LONGEST = 64 << 10


def main(arguments: list[str]) -> None:
    action, *rest = arguments
    if action == "versions":
        return _answer(_versions())
    folder, *rest = rest
    path = Path.home() / "echo_eqx_runs" / folder
    if action == "start":
        _start(path, rest[0], rest[1:])
    elif action == "keep":
        _keep(path, rest[0], rest[1:])
    elif action == "status":
        _answer(_status(path, int(rest[0])))
    elif action == "end":
        _end(path, rest[0], rest[1:] == ["stopped"])
    elif action == "follow":
        _follow(path, int(rest[0]), int(rest[1]))


def _answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _start(path: Path, mark: str, command: list[str]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    if not _is_held(path) and _state(path).get("mark") != mark:
        (path / "stopped").unlink(missing_ok=True)
        keeper = [sys.executable, str(Path(__file__).resolve()), "keep", path.name, mark, *command]
        with (path / "log").open("ab") as log:
            # Of a session of its own, so that it outlives the connection that began it.
            process = subprocess.Popen(
                keeper,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and process.poll() is None:
            if _state(path).get("mark") == mark:
                break
            time.sleep(0.02)
    _answer(_status(path, 0))


def _keep(path: Path, mark: str, command: list[str]) -> NoReturn:
    """Stay beside the process for its exit code, in a session that no signal for it reaches."""
    lock = _locked(path, fcntl.LOCK_EX)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(command)}", flush=True)
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            cwd=Path.home(),
            pass_fds=(lock,),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    except OSError as error:
        print(f"error: {command[0]} cannot be started: {error.strerror}", flush=True)
        _write_state(path, mark=mark, pid=None, code=127)
        raise SystemExit(0) from None
    _write_state(path, mark=mark, pid=process.pid, code=None)
    code = process.wait()
    _write_state(path, mark=mark, pid=process.pid, code=code if code >= 0 else 128 - code)
    raise SystemExit(0)


def _status(path: Path, lines: int) -> dict[str, Any]:
    """`code` is that of the process that ended; None if it was lost with its machine."""
    alive = _is_held(path)
    state = _state(path)
    return {
        "alive": alive,
        "mark": state.get("mark"),
        "code": None if alive else state.get("code"),
        "stopped": (path / "stopped").exists(),
        "lines": [line.decode(errors="replace") for line in _last_lines(path / "log", lines)],
    }


def _end(path: Path, name: str, stopped: bool) -> None:
    if _is_held(path):
        if stopped:
            (path / "stopped").touch()
        pid = _state(path).get("pid")
        with suppress(ProcessLookupError, PermissionError):
            if pid and name == "KILL":
                os.killpg(pid, signal.SIGKILL)
            elif pid:
                os.kill(pid, signal.SIGTERM)
    _answer(_status(path, 0))


def _follow(path: Path, offset: int, lines: int) -> None:
    """Lines from byte `offset` on, or, if it is negative, the last `lines` and what follows.

    A header says at which byte the next line begins; the last one says that the process has ended.
    """
    log = path / "log"
    if not log.exists():
        return _header(missing=True)
    size = log.stat().st_size
    if offset < 0:
        offset = size - sum(len(line) + 1 for line in _last_lines(log, lines))
    anew = offset > size  # the log that was followed is gone
    offset = 0 if anew else offset
    _header(offset=offset, anew=anew)
    beat = time.monotonic()
    with log.open("rb") as file:
        while True:
            held = _is_held(path)  # asked before reading: what is written meanwhile is still read
            chunk = os.pread(file.fileno(), _LONGEST, offset)
            end = chunk.rfind(b"\n") + 1
            if not end and (len(chunk) == _LONGEST or not held):
                end = len(chunk)  # a line without an end
            if end:
                offset += end
                sys.stdout.buffer.write(chunk[:end])
                sys.stdout.buffer.flush()
            elif not held:
                return _header(ended=True, code=_state(path).get("code"))
            else:
                if time.monotonic() - beat > BEAT:
                    beat = time.monotonic()
                    _header()
                time.sleep(0.2)


def _header(**fields: Any) -> None:
    sys.stdout.buffer.write(HEADER + json.dumps(fields).encode() + b"\n")
    sys.stdout.buffer.flush()


def _locked(path: Path, kind: int) -> int:
    handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    until = time.monotonic() + 5.0  # someone who only looks holds it for a moment
    while True:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > until:
                raise SystemExit(0) from None
            time.sleep(0.01)


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
        found = json.loads((path / "state.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_state(path: Path, **fields: Any) -> None:
    temporary = path / ".state.json"
    temporary.write_text(json.dumps(fields))
    temporary.replace(path / "state.json")


def _last_lines(log: Path, count: int) -> list[bytes]:
    """The last whole lines, of a log that may have any size."""
    if count <= 0 or not log.exists():
        return []
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LONGEST))
        lines = file.read(_LONGEST).split(b"\n")
    return lines[1 if size > _LONGEST else 0 : -1][-count:]


def _versions() -> dict[str, Any]:
    # Here, since all else should answer quickly and needs no package.
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
