"""A web page of training runs, served from what is in their folders. It changes nothing."""

import functools
import gzip
import hashlib
import hmac
import importlib
import ipaddress
import json
import os
import re
import shutil
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.curves import FIELDS
from echo_eqx.ops.inside import Trouble
from echo_eqx.ops.runs import Run, Runs, Shared

_PAGE = Path(__file__).parent / "page"
_PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_SECURITY = {
    # Plotly sets styles on its elements; scripts come from files of this server only.
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_TEXT = "text/plain; charset=utf-8"
_BLOCK = 256 << 10
_COOKIE = "echo_monitor"
_READ_SECONDS = 1.0
"""Of new lines in one answer; the page asks on at once when there are more."""


class MonitorServer(ThreadingHTTPServer):
    """Serves the runs of `root` at `host` and `port`; port 0 takes a free one.

    **Raises**: `EchoError` for a missing folder or package, or a port that cannot be had;
    `UsageError` for an address that others can reach without a token.
    """

    daemon_threads = True
    request_queue_size = 1024  # connections that wait to be accepted; the default is 5

    def __init__(self, root: Path, host: str, port: int, token: str | None):
        if not root.is_dir():
            raise EchoError(f"{root} is not a folder; wanted one with runs, or a run")
        if not 0 <= port < 65536:
            raise UsageError(f"--port {port} is not from 0 to 65535")
        if token is not None and not token:
            raise UsageError("--token is empty")
        if token is None and not _is_loopback(host):
            raise UsageError(f"--host {host} lets others in, so it needs a --token that they give")
        self.runs = Runs(root)
        self.overview = Shared(self._overview)
        self.plotly = _plotly()
        self.token = token
        self.cookie = hashlib.sha256((token or "").encode()).hexdigest()
        self.host_names = {"localhost", "127.0.0.1", "::1", host}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            reason = error.strerror or str(error)
            raise EchoError(
                f"port {port} of {host} cannot be had ({reason}); another is chosen with --port"
            ) from None
        threading.Thread(target=self.runs.read_ahead, daemon=True).start()

    def _overview(self) -> dict[str, Any]:
        try:
            free = shutil.disk_usage(self.runs.root).free
        except OSError:
            free = None
        found = [{"name": name, **_status(run)} for name, run in self.runs.all().items()]
        return {"runs": found, "disk_free_bytes": free}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the error, unless it is a browser that went away."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _plotly() -> bytes:
    """The script that draws, packed by gzip."""
    try:
        importlib.import_module("pyarrow.json")  # reads the metrics
        package = importlib.import_module("plotly")
        return _packed(Path(str(package.__file__)).parent / "package_data" / "plotly.min.js")
    except (ImportError, OSError):
        raise EchoError(
            "the monitor needs a package that is not here: pip install 'echo_eqx[monitor]'"
        ) from None


@functools.cache
def _packed(path: Path) -> bytes:
    return gzip.compress(path.read_bytes(), 6)


class _Refused(Exception):
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
        self._started = False
        try:
            self._answer()
        except _Refused as refusal:
            self.send_error(refusal.status, str(refusal))
        except OSError:
            raise  # the browser went away
        except Exception:  # our own fault, which still gets an answer
            traceback.print_exc()
            if self._started:
                self.close_connection = True
            else:
                self.send_error(500, "the monitor failed; its terminal says how")

    do_HEAD = do_GET

    def parse_request(self) -> bool:
        valid = super().parse_request()
        if valid and self.request_version == "HTTP/0.9":
            self.send_error(400)
            return False
        return valid

    def send_error(self, code: int, message: str | None = None, explain: Any = None) -> None:
        # The base class says 501 to a method that has no do_METHOD, 414 to a line that is too long
        # and 505 to a version that is not HTTP.
        if code == 501:
            code, message = 405, "only GET and HEAD"
        elif code in (414, 505):
            code = 400
        if self.request_version in ("", "HTTP/0.9"):
            self.request_version = "HTTP/1.0"  # to 0.9 the base class sends no status
        self.close_connection = True
        allow = {"Allow": "GET, HEAD", "Connection": "close"}
        self._send((message or str(code)).encode(), _TEXT, allow, code)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: one of them holds the token."""

    def _answer(self) -> None:
        path, query = _parsed(self.path)
        new_cookie = self._check_allowed(query)
        if path in _PAGE_FILES:
            name, kind = _PAGE_FILES[path]
            self._send((_PAGE / name).read_bytes(), kind, new_cookie)
        elif path == "/plotly.js":
            self._send_plotly()
        elif path == "/runs.json":
            self._send_json(self.server.overview())
        elif path in _DATA:
            self._send_json(_DATA[path](self._run(query), query))
        elif match := re.fullmatch(r"/samples/([^/]+)/([0-9]{1,18})/([^/]+)", path):
            run = self.server.runs.all().get(match[1])
            if run is None:
                raise _Refused(404, "not found")
            try:
                file = run.open_sample(int(match[2]), match[3])
            except Trouble as trouble:
                raise _Refused(404, str(trouble)) from None
            with file:
                self._send_file(file, "audio/wav" if match[3].endswith(".wav") else _TEXT)
        else:
            raise _Refused(404, "not found")

    def _check_allowed(self, query: dict[str, list[str]]) -> dict[str, str]:
        """**Raises**: `_Refused` unless the token is known; returns the cookie for a new one.

        Without a token only this machine asks, and by its own name: a page of another site whose
        name was made to point here would ask by that name.
        """
        server = self.server
        if server.token is None:
            hosts = self.headers.get_all("Host", [""])
            name = re.sub(r":[0-9]+$", "", hosts[0]).strip("[]").lower()
            if len(hosts) > 1 or name not in server.host_names:
                raise _Refused(
                    400, "expected this machine's own name as Host; start the monitor with --token"
                )
            return {}
        given = query.get("token", [""])[0]
        if hmac.compare_digest(given.encode(), server.token.encode()):
            return {"Set-Cookie": f"{_COOKIE}={server.cookie}; Path=/; HttpOnly; SameSite=Strict"}
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(_COOKIE)
        except CookieError:
            cookie = None
        if cookie is None or not hmac.compare_digest(cookie.value.encode(), server.cookie.encode()):
            raise _Refused(403, "add ?token=TEXT to the address, as given with --token")
        return {}

    def _run(self, query: dict[str, list[str]]) -> Run:
        run = self.server.runs.all().get(query.get("run", [""])[0])
        if run is None:
            raise _Refused(404, "there is no such run")
        return run

    def _send_plotly(self) -> None:
        script = self.server.plotly
        packed = "gzip" in self.headers.get("Accept-Encoding", "")
        headers = {"Cache-Control": "private, max-age=86400", "Vary": "Accept-Encoding"}
        if packed:
            headers["Content-Encoding"] = "gzip"
        body = script if packed else gzip.decompress(script)
        self._send(body, "text/javascript; charset=utf-8", headers)

    def _send_json(self, value: Any) -> None:
        text = json.dumps(value, separators=(",", ":"), allow_nan=False)
        self._send(text.encode(), "application/json", {})

    def _send_file(self, file: BinaryIO, kind: str) -> None:
        size = os.fstat(file.fileno()).st_size
        first, last = _range(self.headers.get("Range"), size)
        headers = {"Accept-Ranges": "bytes"}
        if first is None:
            first, last, status = 0, size - 1, 200
        else:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            status = 206
        file.seek(first)
        left = last - first + 1
        self._send_head(left, kind, headers, status)
        while left and self.command != "HEAD":
            block = file.read(min(left, _BLOCK))
            if not block:  # the file was cut meanwhile
                self.close_connection = True
                break
            self.wfile.write(block)
            left -= len(block)

    def _send(self, body: bytes, kind: str, headers: dict[str, str], status: int = 200) -> None:
        self._send_head(len(body), kind, headers, status)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_head(self, size: int, kind: str, headers: dict[str, str], status: int) -> None:
        self._started = True
        self.send_response(status)
        fixed = {"Content-Type": kind, "Content-Length": str(size), "Cache-Control": "no-store"}
        for name, value in (fixed | _SECURITY | headers).items():
            self.send_header(name, value)
        self.end_headers()


def _parsed(target: str) -> tuple[str, dict[str, list[str]]]:
    """Path and query of a request.

    **Raises**: `_Refused` with 400 for an address that is not one.
    """
    try:
        if not re.fullmatch(r"/(?:[!-$&-~]|%[0-9A-Fa-f]{2})*", target):
            raise ValueError
        url = urlsplit(target)
        return unquote(url.path, errors="strict"), parse_qs(
            url.query, errors="strict", max_num_fields=20
        )
    except ValueError:
        raise _Refused(400, "this is not a valid address") from None


def _range(header: str | None, size: int) -> tuple[int | None, int]:
    """First and last byte asked for; None for all of them.

    **Raises**: `_Refused` for a range outside the file.
    """
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", header or "")
    if match is None or match[0] == "bytes=-":
        return None, size - 1
    if match[1]:
        first, last = int(match[1]), min(int(match[2] or size), size - 1)
    else:
        first, last = max(0, size - int(match[2])), size - 1
    if first > last:
        raise _Refused(416, "this range is not in the file")
    return first, last


def _status(run: Run) -> dict[str, Any]:
    """Of one run; whatever fails in it is told as its trouble, and no other run's."""
    try:
        return run.status()
    except Exception as error:
        traceback.print_exc()
        nothing = dict.fromkeys(("num_steps", "step", "age", "every", "left", "samples"))
        return {**nothing, "saved": False, "trouble": [f"cannot be shown: {error!r}"]}


def _data(run: Run, query: dict[str, list[str]]) -> dict[str, Any]:
    """Of a curve the page says `field:stride:full`."""
    have = {}
    for item in query.get("have", [""])[0].split(","):
        match = re.fullmatch(r"(\w+):([0-9]{1,9}):([0-9]{1,9})", item)
        if match and match[1] in FIELDS:
            have[match[1]] = int(match[2]), int(match[3])
    version = query.get("version", [""])[0]
    known = int(version) if re.fullmatch(r"-?[0-9]{1,18}", version) else 0
    return run.metrics.news(known, have, _READ_SECONDS)


def _about(run: Run, _: dict[str, list[str]]) -> dict[str, Any]:
    return {"config": run.json("config.json"), "environment": run.json("environment.json")}


def _samples(run: Run, query: dict[str, list[str]]) -> dict[str, Any]:
    steps = run.sample_steps()
    asked = query.get("step", [""])[0]
    step = int(asked) if re.fullmatch(r"[0-9]{1,18}", asked) else None
    if step not in steps:
        step = steps[0] if steps else None
    samples, count = run.samples(step) if step is not None else ([], 0)
    return {"steps": steps, "step": step, "samples": samples, "count": count}


_DATA: dict[str, Callable[[Run, dict[str, list[str]]], dict[str, Any]]] = {
    "/data.json": _data,
    "/about.json": _about,
    "/samples.json": _samples,
}
