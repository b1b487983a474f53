"""A web page that shows training runs from what is in their folders. It changes nothing."""

import functools
import gzip
import hashlib
import hmac
import importlib
import ipaddress
import json
import math
import re
import shutil
import socket
import sys
import threading
import time
import traceback
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.curves import FIELDS
from echo_eqx.ops.run_files import FileProblem
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
    "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TEXT = "text/plain; charset=utf-8"
_COOKIE = "echo_monitor"
_READ_SECONDS = 1.0
"""Time to read new lines for one answer; the page asks again at once if there are more."""


class MonitorServer(ThreadingHTTPServer):
    """Serves the runs in `root` at `host` and `port`; port 0 takes a free one.

    **Raises**: `EchoError` for a missing folder or package, or a port that is in use; `UsageError`
    for an address that other machines can reach, without a token.
    """

    daemon_threads = True
    request_queue_size = 1024  # connections that wait to be accepted; the default is 5

    def __init__(self, root: Path, host: str, port: int, token: str | None):
        if not root.is_dir():
            raise EchoError(f"expected --runs to be a folder of runs, or a run, got {root}")
        if not 0 <= port < 65536:
            raise UsageError(f"expected --port from 0 to 65535, got {port}")
        if token == "":
            raise UsageError("expected a --token of at least one character, got none")
        if token is None and not _is_loopback(host):
            raise UsageError(f"--host {host} lets other machines in; add --token TEXT")
        self.runs = Runs(root)
        self._overview: dict[str, Any] = {}
        self._overview_time, self._lock = -math.inf, threading.Lock()
        self.plotly = _read_plotly()
        self.token = token
        self.cookie = hashlib.sha256((token or "").encode()).hexdigest()
        self.host_names = {"localhost", "127.0.0.1", "::1", host}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            reason = error.strerror or error
            raise EchoError(f"cannot bind {host}:{port} ({reason}); try --port") from None

    def overview(self) -> dict[str, Any]:
        """The state of all runs, computed once for all requests that wait for it."""
        requested = time.monotonic()
        with self._lock:
            if self._overview_time < requested:
                self._overview_time = time.monotonic()
                self._overview = _overview(self.runs)
            return self._overview

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error, unless the browser closed the connection."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_plotly() -> bytes:
    try:
        importlib.import_module("pyarrow.json")  # reads the metrics
        plotly = importlib.import_module("plotly")
        return _compress(Path(str(plotly.__file__)).parent / "package_data" / "plotly.min.js")
    except (ImportError, OSError):
        raise EchoError(
            "the monitor needs plotly and pyarrow: pip install 'echo_eqx[monitor]'"
        ) from None


@functools.cache
def _compress(path: Path) -> bytes:
    return gzip.compress(path.read_bytes(), 6)


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
        # A body is never read, so what follows it must not be taken for a request.
        if self.headers.get("Content-Length") or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
        try:
            path, query = _parse_address(self.path)
            cookie = self._check_access(query)
            body, kind, headers = self._answer(path, query)
        except _HTTPError as error:
            self.send_error(error.status, str(error))
        except Exception:  # our own bug, which still gets an answer
            traceback.print_exc()
            self.send_error(500, "the monitor failed; see its terminal")
        else:
            status = 206 if "Content-Range" in headers else 200
            self._send(status, body, kind, cookie | headers)

    do_HEAD = do_GET

    def parse_request(self) -> bool:
        valid = super().parse_request()
        if valid and self.request_version == "HTTP/0.9":
            self.send_error(400)
            return False
        return valid

    def send_error(self, code: int, message: str | None = None, explain: Any = None) -> None:
        # The base class says 501 to a method without do_METHOD, 414 to a line that is too long and
        # 505 to a bad version.
        if code == 501:
            code, message = 405, "only GET and HEAD"
        elif code in (414, 505):
            code = 400
        if self.request_version in ("", "HTTP/0.9"):
            self.request_version = "HTTP/1.0"  # to 0.9 the base class sends no status line
        self.close_connection = True
        headers = {"Allow": "GET, HEAD", "Connection": "close"}
        self._send(code, (message or str(code)).encode(), _TEXT, headers)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: one of them holds the token."""

    def _check_access(self, query: dict[str, str]) -> dict[str, str]:
        """The cookie to set for a token in the query.

        Without a token only this machine may ask, by its own name: a page of another site can make
        its own name point here.

        **Raises**: `_HTTPError` for anyone else.
        """
        server = self.server
        if server.token is None:
            hosts = self.headers.get_all("Host", [""])
            name = re.sub(r":[0-9]+$", "", hosts[0]).strip("[]").lower()
            if len(hosts) > 1 or name not in server.host_names:
                raise _HTTPError(
                    400, "expected this machine's own name as Host; start the monitor with --token"
                )
            return {}
        if hmac.compare_digest(query.get("token", "").encode(), server.token.encode()):
            return {"Set-Cookie": f"{_COOKIE}={server.cookie}; Path=/; HttpOnly; SameSite=Strict"}
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            cookie = None
        if cookie is None or not hmac.compare_digest(cookie.value.encode(), server.cookie.encode()):
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
        runs = self.server.runs
        if match := re.fullmatch(r"/samples/([^/]+)/([0-9]{1,15})/([^/]+)", path):
            return self._sample(runs.all().get(match[1]), int(match[2]), match[3])
        if path == "/runs.json":
            value = self.server.overview()
        elif path in ("/data.json", "/about.json", "/samples.json"):
            run = runs.all().get(query.get("run", ""))
            if run is None:
                raise _HTTPError(404, "there is no such run")
            answers = {"/data.json": _data, "/about.json": _about, "/samples.json": _samples}
            value = answers[path](run, query)
        else:
            raise _HTTPError(404, "not found")
        text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        return text.encode(errors="replace"), "application/json", {}

    def _sample(self, run: Run | None, step: int, name: str) -> tuple[bytes, str, dict[str, str]]:
        try:
            if run is None:
                raise FileProblem("there is no such run")
            with run.open_sample(step, name) as file:
                body = file.read()
        except FileProblem as problem:
            raise _HTTPError(404, str(problem)) from None
        headers, size = {"Accept-Ranges": "bytes"}, len(body)
        if (part := _range(self.headers.get("Range"), size)) is not None:
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
            body = body[part]
        return body, "audio/wav" if name.endswith(".wav") else _TEXT, headers

    def _send(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        content = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (_HEADERS | content | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _parse_address(target: str) -> tuple[str, dict[str, str]]:
    """Path and query of a request. **Raises**: `_HTTPError` with 400 for an invalid one."""
    try:
        if not re.fullmatch(r"/(?:[!-$&-~]|%[0-9A-Fa-f]{2})*", target):
            raise ValueError
        url = urlsplit(target)
        query = parse_qs(url.query, errors="strict", max_num_fields=20)
        return unquote(url.path, errors="strict"), {name: query[name][0] for name in query}
    except ValueError:
        raise _HTTPError(400, "this is not a valid address") from None


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
        raise _HTTPError(416, "this range is not in the file")
    return slice(first, stop)


def _overview(runs: Runs) -> dict[str, Any]:
    try:
        free = shutil.disk_usage(runs.root).free
    except OSError:
        free = None
    statuses = [{"name": name, **_status(run)} for name, run in runs.all().items()]
    return {"runs": statuses, "disk_free_bytes": free}


def _status(run: Run) -> dict[str, Any]:
    """A failure in one run is a problem of that run and hides no other."""
    try:
        return run.status()
    except Exception as error:
        traceback.print_exc()
        nothing = dict.fromkeys(("num_steps", "step", "age", "every", "left", "samples"))
        return {**nothing, "saved": False, "problems": [f"cannot be shown: {error!r}"]}


def _data(run: Run, query: dict[str, str]) -> dict[str, Any]:
    """The page says `key:stride:full` of each curve that it has."""
    known = {}
    for item in query.get("have", "").split(","):
        match = re.fullmatch(r"(\w+):([0-9]{1,9}):([0-9]{1,9})", item)
        if match and match[1] in FIELDS:
            known[match[1]] = int(match[2]), int(match[3])
    return run.metrics.update(_integer(query.get("version", "")) or 0, known, _READ_SECONDS)


def _about(run: Run, query: dict[str, str]) -> dict[str, Any]:
    return {"config": run.json("config.json"), "environment": run.json("environment.json")}


def _samples(run: Run, query: dict[str, str]) -> dict[str, Any]:
    steps = run.sample_steps()
    step = _integer(query.get("step", ""))
    if step not in steps:
        step = steps[0] if steps else None
    samples, count = run.samples(step) if step is not None else ([], 0)
    return {"steps": steps, "step": step, "samples": samples, "count": count}


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None
