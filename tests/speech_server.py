"""`echo-eqx serve` in a process, and a plain HTTP client for it."""

import http.client
import json
import re
import signal
import time
from dataclasses import dataclass
from typing import Any

from processes import SCRIPTS, Process

KEY = "secret"


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


class SpeechServer:
    """Ready when made. Requests have the key unless they bring their own headers."""

    def __init__(self, *flags: object, port: int = 0):
        options = ("--port", port, "--api_key", KEY, *flags)
        self.process = Process(SCRIPTS / "serve.py", *options)
        deadline = time.monotonic() + 240
        while not (match := re.search(r"ready at http://\S+:(\d+) ", self.errors)):
            assert self.process.returncode is None and time.monotonic() < deadline, self.errors
            time.sleep(0.05)
        self.port = int(match[1])

    @property
    def errors(self) -> str:
        return self.process.errors_so_far

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
        return sum(map(float, found))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(120)
