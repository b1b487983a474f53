"""The HTTP server itself: its socket, its time limits, its signals."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.serve.app import make_app
from echo_eqx.serve.memory import collect_often, keep_trimming
from echo_eqx.serve.service import Service

REQUEST_SECONDS = 30.0
"""A connection whose first request has not begun by then is closed."""
MAX_CONNECTIONS = 1000
_LOCAL = ("localhost", "127.0.0.1", "::1")


def bind(host: str, port: int, api_key: str | None) -> socket.socket:
    """A socket that does not listen yet.

    **Raises**: `UsageError` if other machines could use it without a key; `EchoError` if the
    address cannot be used.
    """
    if api_key is None and host not in _LOCAL:
        raise UsageError(f"--host {host} can be reached from other machines; add --api_key TEXT")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EchoError(f"cannot bind {host}:{port} ({reason}); try --port") from None
    return listener


class _Protocol(H11Protocol):
    """HTTP/1.1 that does not wait forever for a request to begin."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Signals are handled by `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(service: Service, listener: socket.socket, ready: str) -> None:
    """Answer requests until SIGTERM or SIGINT; then finish the answers that have begun.

    A second signal cuts them off. `ready` is logged when the first request can be answered.
    """
    asyncio.run(_serve(service, listener, ready))


async def _serve(service: Service, listener: socket.socket, ready: str) -> None:
    config = uvicorn.Config(
        make_app(service),
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        server_header=False,
    )
    for name in ("uvicorn", "uvicorn.error", "uvicorn.asgi"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    server = _Server(config)
    loop = asyncio.get_running_loop()

    def stop(*_: Any) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    listener.listen(1024)
    logging.getLogger("echo_eqx.serve").info(ready)
    collect_often()
    trimming = asyncio.create_task(keep_trimming())
    await server.serve(sockets=[listener])
    trimming.cancel()
