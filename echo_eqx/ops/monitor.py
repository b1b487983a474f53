"""A web page that shows training runs from the files in their folders. It is read-only."""

import functools
import gzip
import hashlib
import hmac
import importlib
import json
import re
import shutil
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.runs import Run, Runs

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    # Plotly sets styles on its elements; scripts come from this server only.
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_COOKIE = "echo_monitor"
_READ_SECONDS = 1.0
"""Time to read new lines for one response; if there are more, the page asks again immediately."""


class MonitorServer(ThreadingHTTPServer):
    """Serves the runs in `root` at `host` and `port`; port 0 picks a free one.

    **Raises**: `EchoError` for a missing folder or package, or a port that is in use; `UsageError`
    for an address that other machines can reach but no token.
    """

    daemon_threads = True
    request_queue_size = 1024  # connections that wait to be accepted; the default is 5

    def __init__(self, root: Path, host: str, port: int, token: str | None):
        if not root.is_dir():
            raise EchoError(f"--runs: expected a folder of runs, or a run, got {root}")
        self.host_names = {"localhost", "127.0.0.1", "::1"}
        if not token and host not in self.host_names:
            raise UsageError(f"--host {host} can be reached from other machines; add --token TEXT")
        self.runs = Runs(root)
        self.plotly = _read_plotly()
        self.token = token
        self.cookie = f"{_COOKIE}={hashlib.sha256((token or '').encode()).hexdigest()}"
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EchoError(f"cannot bind {host}:{port} ({reason}); try --port") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error, unless the browser closed the connection."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


@functools.cache
def _read_plotly() -> bytes:
    try:
        importlib.import_module("pyarrow.json")  # reads the metrics
        plotly = importlib.import_module("plotly")
        path = Path(str(plotly.__file__)).parent / "package_data" / "plotly.min.js"
        return gzip.compress(path.read_bytes(), 6)
    except (ImportError, OSError):
        raise EchoError(
            "the monitor needs plotly and pyarrow: pip install 'echo_eqx[monitor]'"
        ) from None


class _HTTPError(Exception):
    """Ends a request with this status and text."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: MonitorServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "echo_eqx", ""
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        try:
            url = urlsplit(self.path)
            query = dict(parse_qsl(url.query))
            cookie = self._check_access(query)
            body, kind, headers = self._answer(unquote(url.path), query)
        except ValueError:
            self.send_error(400, "invalid address")
        except _HTTPError as error:
            self.send_error(error.status, str(error))
        else:
            self.send_response(206 if "Content-Range" in headers else 200)
            content = {"Content-Type": kind, "Content-Length": str(len(body))}
            for name, value in (_HEADERS | content | cookie | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged, because one of them contains the token."""

    def _check_access(self, query: dict[str, str]) -> dict[str, str]:
        """The cookie to set for a token in the query.

        Without a token, requests must address this machine by a local name. This prevents DNS
        rebinding, in which another site makes its own name point here.

        **Raises**: `_HTTPError` if access is denied.
        """
        server = self.server
        if not server.token:
            name = re.sub(r":[0-9]+$", "", self.headers.get("Host", "")).strip("[]").lower()
            if name not in server.host_names:
                raise _HTTPError(
                    400, "expected localhost as Host; to use another name, start with --token"
                )
            return {}
        if hmac.compare_digest(query.get("token", "").encode(), server.token.encode()):
            return {"Set-Cookie": f"{server.cookie}; Path=/; HttpOnly; SameSite=Strict"}
        cookies = self.headers.get("Cookie", "").encode().split(b"; ")
        if not any(hmac.compare_digest(cookie, server.cookie.encode()) for cookie in cookies):
            raise _HTTPError(403, "add ?token=TEXT to the address, as given with --token")
        return {}

    def _answer(self, path: str, query: dict[str, str]) -> tuple[bytes, str, dict[str, str]]:
        """Body, content type and further headers."""
        if path in _PAGE_FILES:
            name, kind = _PAGE_FILES[path]
            return (_PAGE / name).read_bytes(), kind, {}
        if path == "/plotly.js":
            headers = {"Content-Encoding": "gzip", "Cache-Control": "private, max-age=86400"}
            return self.server.plotly, "text/javascript; charset=utf-8", headers
        runs = self.server.runs.all()
        if match := re.fullmatch(r"/samples/([^/]+)/([0-9]{1,15})/([^/]+)", path):
            return self._sample(_find(runs, match[1]), int(match[2]), match[3])
        if path == "/runs.json":
            free = shutil.disk_usage(self.server.runs.root).free
            statuses = [{"name": name, **run.status()} for name, run in runs.items()]
            value = {"runs": statuses, "disk_free_bytes": free}
        elif path == "/data.json":
            value = _data(_find(runs, query.get("run")), query)
        elif path == "/about.json":
            run = _find(runs, query.get("run"))
            names = ("config", "environment")
            value = {name: run.text(f"{name}.json") for name in names}
        elif path == "/samples.json":
            value = _samples(_find(runs, query.get("run")), query.get("step"))
        else:
            raise _HTTPError(404, "not found")
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        return text.encode(), "application/json", {}

    def _sample(self, run: Run, step: int, name: str) -> tuple[bytes, str, dict[str, str]]:
        try:
            with run.open_sample(step, name) as file:
                body = file.read()
        except OSError:
            raise _HTTPError(404, "no such sample") from None
        headers, size = {"Accept-Ranges": "bytes"}, len(body)
        if (part := _range(self.headers.get("Range"), size)) is not None:
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
            body = body[part]
        kind = "audio/wav" if name.endswith(".wav") else "text/plain; charset=utf-8"
        return body, kind, headers


def _range(header: str | None, size: int) -> slice | None:
    """The bytes a Range header asks for, None for all of them.

    **Raises**: `_HTTPError` for a range outside the file.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header or "")
    if match is None or match[0] == "bytes=-":
        return None
    if match[1]:
        first, stop = int(match[1]), min(int(match[2] or size) + 1, size)
    else:
        first, stop = max(0, size - int(match[2])), size
    if first >= stop:
        raise _HTTPError(416, "the range is outside the file")
    return slice(first, stop)


def _find(runs: dict[str, Run], name: str | None) -> Run:
    """**Raises**: `_HTTPError` if there is no run with this name."""
    if name not in runs:
        raise _HTTPError(404, "no such run")
    return runs[name]


def _data(run: Run, query: dict[str, str]) -> dict[str, Any]:
    """New data for a page, whose query has `key:stride:full` for each curve that it has."""
    items = re.findall(r"(\w+):([0-9]{1,9}):([0-9]{1,9})", query.get("have", ""))
    known = {name: (int(stride), int(full)) for name, stride, full in items}
    return run.metrics.update(int(query.get("version", 0)), known, _READ_SECONDS)


def _samples(run: Run, chosen: str | None) -> dict[str, Any]:
    """The samples of the chosen step, or else of the newest one."""
    steps = run.sample_steps()
    step = next((step for step in steps if str(step) == chosen), steps[0] if steps else None)
    samples, count = run.samples(step) if step is not None else ([], 0)
    return {"steps": steps, "step": step, "samples": samples, "count": count}
