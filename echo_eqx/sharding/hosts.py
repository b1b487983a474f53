"""Runs of several processes: connecting, agreement, and the heartbeat between them.

If a process dies, the others would hang in a collective. So each process exchanges heartbeats with
process 0; if a connection closes or goes silent, all processes exit with one message and
`EXIT_PEER_LOST`.
"""

import contextlib
import hashlib
import hmac
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from echo_eqx.errors import EchoError, UsageError

EXIT_PEER_LOST = 75
"""Exit code: another process died; the same command can be run again (EX_TEMPFAIL)."""
EXIT_PREEMPTED = 76
"""Exit code: stopped by SIGTERM, and saved."""

_INTERVAL, _TIMEOUT = 1.0, 100.0
"""Seconds between heartbeats, and without one before a process counts as dead (JAX's default)."""
_CONNECT_TIMEOUT = 300.0
"""Seconds for all processes to connect."""


def start_processes(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
    """Connect the processes of a run. Call it before any other use of JAX.

    `coordinator` (HOST:PORT) needs `num_processes` and `process_id`. Without it, the processes of a
    TPU pod or SLURM job find each other; anywhere else this is a single-process run.

    **Raises**: `UsageError` for inconsistent flags; `EchoError` if not all processes connect within
    `timeout` seconds.
    """
    explicit = (coordinator, num_processes, process_id)
    options: dict[str, Any] = {}
    if coordinator is not None:
        if num_processes is None or process_id is None:
            raise UsageError("--coordinator needs --num_processes and --process_id")
        if not 0 <= process_id < num_processes:
            raise UsageError(f"process_id: expected 0 to {num_processes - 1}, got {process_id}")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"coordinator: expected HOST:PORT, got {coordinator!r}")
        # By default the coordinator would listen on every interface.
        options = {
            "cluster_detection_method": "deactivate",
            "coordinator_bind_address": coordinator,
        }
    elif any(value is not None for value in explicit):
        raise UsageError("--num_processes and --process_id need --coordinator HOST:PORT")
    elif not _in_a_cluster():
        return
    try:
        jax.distributed.initialize(*explicit, initialization_timeout=timeout, **options)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and coordinator is None:
            return  # a TPU that is not part of a cluster
        raise EchoError(
            f"the processes of this run could not connect: {str(error).splitlines()[0][:200]}"
        ) from None


def _in_a_cluster() -> bool:
    """Whether this is a worker of a TPU pod, or of a SLURM job with several tasks."""
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(workers) > 1 or int(os.environ.get("SLURM_NTASKS") or 1) > 1:
        return True
    has_tpu = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    return has_tpu and "cpu" not in os.environ.get("JAX_PLATFORMS", "")


def check_agreement(fingerprint: Mapping[str, str]) -> str:
    """Check that all processes have the same `fingerprint`, such as the code's digest as "code".

    Returns a launch id: the same in all processes, new with each launch.

    **Raises**: `EchoError` naming the host that differs, and in what.
    """
    launch_id = os.urandom(8)
    names = sorted(fingerprint)
    digests = [hashlib.sha256(fingerprint[name].encode()).digest() for name in names]
    host = socket.gethostname().encode()[:64].ljust(64, b"\0")
    row = np.frombuffer(launch_id + host + b"".join(digests), np.uint8)
    rows = np.atleast_2d(multihost_utils.process_allgather(row))
    for i, name in enumerate(names):
        seen = [bytes(r[72 + 32 * i :][:32]) for r in rows]
        usual = Counter(seen).most_common(1)[0][0]
        for process, digest in enumerate(seen):
            if digest != usual:
                other = bytes(rows[process][8:72]).rstrip(b"\0").decode(errors="replace")
                raise EchoError(
                    f"host {other} (process {process}): expected the same {name} on all hosts, got "
                    "a difference; run the same command and version on all of them"
                )
    return bytes(rows[0][:8]).hex()


def code_digest() -> str:
    """SHA-256 over the package's source files."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


class Heartbeat:
    """Ends this process when another process of the run dies. Does nothing in a single process."""

    def __init__(self, coordinator: str | None) -> None:
        self._closing = threading.Event()
        self._peers: dict[int, socket.socket] = {}
        if jax.process_count() == 1:
            return
        if jax.process_index() == 0:
            host = coordinator.rpartition(":")[0] if coordinator else _own_address()
            with socket.create_server((host, 0)) as server:
                secret = os.urandom(16).hex()
                _broadcast(json.dumps([secret, *server.getsockname()[:2]]))
                self._peers = accept_peers(server, secret, jax.process_count() - 1)
        else:
            secret, *address = json.loads(_broadcast(""))
            try:
                peer = socket.create_connection(tuple(address), timeout=60)
                peer.sendall(secret.encode() + jax.process_index().to_bytes(4, "little"))
            except OSError as error:
                raise EchoError(
                    f"cannot reach process 0 at {address[0]}:{address[1]} ({error}); check that "
                    "no firewall blocks ports between the hosts"
                ) from None
            self._peers[0] = peer
        for process, peer in self._peers.items():
            peer.settimeout(_TIMEOUT)
            threading.Thread(target=self._listen, args=(process, peer), daemon=True).start()
        threading.Thread(target=self._beat, daemon=True).start()

    def fail(self, reason: str, code: int) -> NoReturn:
        """End this process and all others, with one message and exit code."""
        print(f"error: {reason}", file=sys.stderr, flush=True)
        for peer in self._peers.values():
            _send(peer, json.dumps([reason, code]).encode() + b"\n")
        # A plain exit would wait for the other processes, which wait for this one.
        os._exit(code)

    def close(self) -> None:
        """Stop watching: the run is over. Call it after a barrier."""
        self._closing.set()
        for peer in self._peers.values():
            _send(peer, b"bye\n")

    def wait_for_peer_error(self) -> None:
        """Call it when a collective has failed: if another process died, this does not return."""
        if self._peers:
            time.sleep(5)

    def _beat(self) -> None:
        while not self._closing.wait(_INTERVAL):
            for peer in self._peers.values():
                _send(peer, b"\n")

    def _listen(self, process: int, peer: socket.socket) -> None:
        lines = peer.makefile("rb")
        reason = f"process {process} died"
        code = EXIT_PEER_LOST
        while True:
            try:
                line = lines.readline()
            except TimeoutError:
                reason = f"no heartbeat from process {process} for {_TIMEOUT:.0f} s"
                break
            except OSError:
                break
            if line == b"bye\n":
                return
            if not line:
                break
            if line != b"\n":
                reason, code = json.loads(line)
                break
        if not self._closing.is_set():
            if code == EXIT_PEER_LOST and "start" not in reason:
                reason += "; start all processes again to resume from the last checkpoint"
            self.fail(reason, code)  # the main thread may be stuck in a collective


def accept_peers(
    server: socket.socket, secret: str, count: int, seconds: float = _CONNECT_TIMEOUT
) -> dict[int, socket.socket]:
    """The connections of `count` processes, by process index.

    Each process sends `secret` and its index in 4 bytes. Other connections are closed, and silent
    ones delay nobody.

    **Raises**: `EchoError` if not all processes connect within `seconds`.
    """
    peers: dict[int, socket.socket] = {}
    connected: list[socket.socket] = []

    def greet(peer: socket.socket) -> None:
        with contextlib.suppress(OSError):
            hello = peer.recv(36, socket.MSG_WAITALL)
            if len(hello) == 36 and hmac.compare_digest(hello[:32], secret.encode()):
                peers[int.from_bytes(hello[32:], "little")] = peer

    until = time.monotonic() + seconds
    server.settimeout(0.1)
    while len(peers) < count:
        if time.monotonic() > until:
            raise EchoError(
                f"timed out waiting for all processes to connect: expected {count}, got "
                f"{len(peers)} in {seconds:g} s"
            )
        with contextlib.suppress(TimeoutError):
            connected.append(server.accept()[0])
            threading.Thread(target=greet, args=(connected[-1],), daemon=True).start()
    for peer in connected:
        if peer not in peers.values():
            with contextlib.suppress(OSError):  # already disconnected
                peer.shutdown(socket.SHUT_RDWR)
            peer.close()
    return peers


def _send(peer: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the thread that listens to this peer notices
        peer.sendall(data)


def _own_address() -> str:
    """The address at which other hosts reach this one: the source of its default route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def _broadcast(text: str) -> str:
    """The `text` of process 0, on every process."""
    data = np.zeros(256, np.uint8)
    encoded = text.encode()
    data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))).rstrip(b"\0").decode()
