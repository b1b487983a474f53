"""`echo-eqx benchmark serve`: many clients of a speech server at the same time."""

import http.client
import json
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from echo_eqx.errors import EchoError

TEXT = "Turn off the kitchen lights at seven, please. The weather is fine today."


@dataclass(frozen=True)
class Serve:
    """Clients of a server with the small voice, each asking again as soon as it has its answer."""

    clients: int = 100
    seconds: float = 120.0
    """How long the clients ask; one client alone asks for a quarter of it before."""
    steps: int | None = None
    """Sampling steps; by default what the model recommends."""
    batch_size: int | None = None
    pace: bool = False
    """Instead: how many words per second are spoken at several values of speed."""


@dataclass
class _Results:
    first_bytes: list[float] = field(default_factory=list)
    wholes: list[float] = field(default_factory=list)
    audio_bytes: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    connections: set[http.client.HTTPConnection] = field(default_factory=set)
    is_over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


def serve(args: Serve) -> None:
    command = [sys.executable, "-m", "echo_eqx", "serve", "--port", "0"]
    if args.steps is not None:
        command += ["--steps", str(args.steps)]
    if args.batch_size is not None:
        command += ["--batch_size", str(args.batch_size)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if match := re.search(r"ready at http://\S+:(\d+) ", line):
                break
        else:
            raise EchoError("the server did not start")
        port = int(match[1])
        _speak(port, 0, _Results())
        if args.pace:
            _measure_pace(port)
        else:
            alone = _measure(port, 1, args.seconds / 4)
            together = _measure(port, args.clients, args.seconds)
            ratio = together / alone
            print(f"throughput of {args.clients} clients against one: {ratio:.2f}")
        server.send_signal(signal.SIGTERM)
        print(f"SIGTERM: exit code {server.wait(60)}")
    finally:
        server.kill()
        server.wait()


def _measure(port: int, clients: int, seconds: float) -> float:
    """Print what `clients` got in `seconds`, and return seconds of audio per second."""
    results, started = _Results(), time.monotonic()

    def ask(number: int) -> None:
        seed = number * 10_000
        while not results.is_over:
            wait = _speak(port, seed, results)
            time.sleep(max(0.0, min(wait, started + seconds - time.monotonic())))
            seed += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    early = min(30.0, seconds / 2)
    time.sleep(early)
    memory = [_memory(port)]
    time.sleep(max(0.0, started + seconds - time.monotonic()))
    memory.append(_memory(port))
    speed = results.audio_bytes / 48_000 / (time.monotonic() - started)
    with results.lock:  # answers that are not complete do not count
        results.is_over = True
        for connection in results.connections:
            if connection.sock is not None:
                connection.sock.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join()
    errors = ", ".join(f"{kind}: {count}" for kind, count in sorted(results.errors.items()))
    print(
        f"{clients} clients, {seconds:.0f} s: {len(results.wholes)} answers, {speed:.2f} s of "
        f"audio per second; first byte {_percentiles(results.first_bytes)}, whole answer "
        f"{_percentiles(results.wholes)}; errors: {errors or 'none'}; memory of "
        f"the server {memory[0]:.0f} MiB after {early:.0f} s, {memory[1]:.0f} MiB at the end"
    )
    return speed


def _measure_pace(port: int) -> None:
    """Print words per second of the same 16 answers at each speed."""
    for speed in (0.5, 0.7, 1.0, 1.3, 2.0):
        results = _Results()
        for seed in range(16):
            _speak(port, seed, results, speed)
        seconds, words = results.audio_bytes / 48_000, len(results.wholes) * len(TEXT.split())
        print(f"speed {speed}: {words / seconds:.2f} words per second of audio")


def _percentiles(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return "unknown"
    cuts = statistics.quantiles(seconds, n=20, method="inclusive")
    return f"p50 {cuts[9]:.2f} s, p95 {cuts[18]:.2f} s"


def _speak(port: int, seed: int, results: _Results, speed: float = 1.0) -> float:
    """Ask once, and return how long to wait before the next time."""
    body = {"input": TEXT, "voice": "ben", "response_format": "pcm", "seed": seed}
    body |= {"speed": speed}
    started, first, wait, error, size = time.monotonic(), 0.0, 0.0, None, 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    with results.lock:
        results.connections.add(connection)
    try:
        connection.request("POST", "/v1/audio/speech", json.dumps(body))
        response = connection.getresponse()
        if response.status == 200:
            size = len(response.read(1))
            first = time.monotonic() - started
            size += len(response.read())
        else:
            response.read()
            error = str(response.status)
            wait = float(response.getheader("Retry-After") or 0)
    except (OSError, http.client.HTTPException) as problem:
        error = type(problem).__name__
    finally:
        connection.close()
    with results.lock:
        results.connections.discard(connection)
        if results.is_over:
            return 0.0
        if error is not None:
            results.errors[error] += 1
        else:
            results.first_bytes.append(first)
            results.wholes.append(time.monotonic() - started)
            results.audio_bytes += size
    return wait


def _memory(port: int) -> float:
    """Resident memory of the server in MiB."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    match = re.search(r"^echo_memory_bytes (\S+)$", text, re.M)
    assert match is not None
    return float(match[1]) / 2**20
