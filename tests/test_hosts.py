"""Heartbeat connections between the processes of a run."""

import socket
import threading

import pytest

from echo_eqx.errors import EchoError
from echo_eqx.sharding.hosts import accept_peers

SECRET = "0123456789abcdef" * 2


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def connect(server: socket.socket, data: bytes = b"") -> socket.socket:
    peer = socket.create_connection(server.getsockname())
    peer.sendall(data)
    return peer


def test_foreign_connections_neither_join_nor_delay_a_run(server):
    hello = [SECRET.encode() + index.to_bytes(4, "little") for index in (1, 2)]
    silent = connect(server)
    wrong = connect(server, b"x" * 32 + hello[0][32:])
    gone = connect(server, b"GET / HTTP/1.1\r\n")
    gone.close()
    slow = connect(server, hello[1][:20])
    late = threading.Timer(0.2, lambda: slow.sendall(hello[1][20:]))
    late.start()
    first = connect(server, hello[0])
    peers = accept_peers(server, SECRET, 2, seconds=30.0)
    assert peers.keys() == {1, 2}
    assert peers[1].getpeername() == first.getsockname()
    assert peers[2].getpeername() == slow.getsockname()
    assert silent.recv(1) == b"" and wrong.recv(1) == b""  # both were disconnected
    for peer in (silent, wrong, slow, first, *peers.values()):
        peer.close()


def test_a_process_that_never_connects_is_reported(server):
    with connect(server), pytest.raises(EchoError, match=r"expected 1, got 0 in 0.1 s"):
        accept_peers(server, SECRET, 1, seconds=0.1)
