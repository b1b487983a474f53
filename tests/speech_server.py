"""`echo-eqx serve` in a process, and a plain HTTP client for it."""

import contextlib
import fcntl
import http.client
import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import SCRIPTS, Process

KEY = "secret"
SHARED_FLAGS = (
    *("--steps", 2, "--batch_size", 2, "--max_requests", 6, "--max_characters", 400),
    *("--max_body_mb", 1, "--allow_uploads"),
    *("--length", "full", "--first_seconds", 2),  # few programs to compile
)


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


class Client:
    """Requests have the key unless they bring their own headers."""

    def __init__(self, port: int):
        self.port = port

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> Answer:
        connection = self.send(method, path, body, headers, timeout)
        response = connection.getresponse()
        headers = {name.lower(): value for name, value in response.getheaders()}
        answer = Answer(response.status, headers, response.read())
        connection.close()
        return answer

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> http.client.HTTPConnection:
        """A connection on which the request was sent; `getresponse` reads the answer."""
        headers = {"Authorization": f"Bearer {KEY}"} if headers is None else headers
        if isinstance(body, dict):
            body, headers = json.dumps(body), {"Content-Type": "application/json", **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        connection.request(method, path, body, headers)
        return connection

    def speech(self, text: str, **fields: Any) -> Answer:
        return self.request("POST", "/v1/audio/speech", {"input": text, **fields})

    def metric(self, name: str) -> float:
        text = self.request("GET", "/metrics").body.decode()
        found = re.findall(rf"^echo_{name}(?:\{{.*\}})? (\S+)$", text, re.M)
        assert found, f"no metric {name}"
        return sum(map(float, found))


class SpeechServer(Client):
    """Ready when made."""

    def __init__(self, *flags: object, port: int = 0):
        options = ("--port", port, "--api_key", KEY, *flags)
        self.process = Process(SCRIPTS / "serve.py", *options)
        deadline = time.monotonic() + 240
        while not (match := re.search(r"ready at http://\S+:(\d+) ", self.errors)):
            assert self.process.returncode is None and time.monotonic() < deadline, self.errors
            time.sleep(0.05)
        super().__init__(int(match[1]))

    @property
    def errors(self) -> str:
        return self.process.errors_so_far

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(120)


@contextlib.contextmanager
def shared_server(folder: Path) -> Iterator[int]:
    """The port of one server for all workers of a test run, which share `folder`.

    It is quick, batches two rows, and has few places. The worker that started it ends it once all
    others have done with it. It must end well: SIGTERM finishes what is being spoken, the exit code
    is 0, nothing was compiled, and no error was logged.
    """
    path, server = folder / "speech_server", None
    with open(path.with_suffix(".users"), "w") as users:
        with locked(path.with_suffix(".start")):
            fcntl.flock(users, fcntl.LOCK_SH)
            if not path.exists():
                voices = folder / "speech_server_voices"
                voices.mkdir(exist_ok=True)
                server = SpeechServer(*SHARED_FLAGS, "--voices", voices)
                path.write_text(str(server.port))
            port = int(path.read_text())
        yield port
        if server is not None:
            fcntl.flock(users, fcntl.LOCK_EX)
            path.unlink()  # whoever comes now starts another
            end_well(server)


def end_well(server: SpeechServer) -> None:
    assert server.metric("compilations_since_ready") == 0
    body = {"input": "Good morning. " * 20, "voice": "ben", "response_format": "pcm"}
    connection = server.send("POST", "/v1/audio/speech", body)
    response = connection.getresponse()
    begun = response.read(100)
    server.process.terminate()
    assert len(begun + response.read()) > 24_000  # to the end, or `read` raises IncompleteRead
    server.process.communicate(60)
    assert server.process.returncode == 0
    assert "Traceback" not in server.errors and "error" not in server.errors, server.errors


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
