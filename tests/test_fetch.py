"""Fetching shards from a server that misbehaves, into a cache of limited size."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
from shards import DataServer, sha256

from echo_eqx import hub
from echo_eqx.data import fetch
from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.shards import Shard
from echo_eqx.errors import EchoError, UsageError

SIZE = 200_000


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    server = DataServer(tmp_path / "hub")
    yield server
    server.stop()


def put(server: DataServer, name: str = "a.tar", size: int = SIZE, known: bool = True) -> Shard:
    path = server.root / "owner/voices" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(np.random.default_rng(len(name)).bytes(size))
    url = f"{server.url}/datasets/owner/voices/resolve/{server.commit}/{name}"
    return Shard(name, size, url=url, sha256=sha256(path) if known else None)


def contents(cache: ShardCache, shard: Shard) -> bytes:
    held = cache.open(shard)
    try:
        return os.pread(held, shard.size + 1, 0)
    finally:
        os.close(held)


def original(server: DataServer, shard: Shard) -> bytes:
    return (server.root / "owner/voices" / shard.name).read_bytes()


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([], [0]),
        (["503", "500", "429:0"], [0, 0, 0, 0]),
        (["ends:70000"], [0, 70000]),
        (["short:70000", "ends:30000"], [0, 70000, 100000]),
        (["short:70000", "503"], [0, 70000, 70000]),
        (["short:70000", "norange"], [0, 70000]),
        (["short:70000", "wrongrange"], [0, 70000]),
        (["short:70000", "short:0", "norange"], [0, 70000, 70000]),
        (["stall:70000"], [0, 70000]),
        (["corrupt"], [0, 0]),
        (["longer"], [0, 0]),
        (["short:70000", "corrupt", "ends:5"], [0, 70000, 0, 5]),
        # Each attempt makes progress, so there may be more than the limit.
        ([f"ends:{10_000}"] * 12, [10_000 * n for n in range(13)]),
    ],
)
def test_an_interrupted_download_is_resumed(server, tmp_path, monkeypatch, faults, ranges):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.3)
    shard = put(server)
    server.faults = list(faults)
    cache = ShardCache(tmp_path / "cache", SIZE)
    assert contents(cache, shard) == original(server, shard)
    asked = [int(wanted[6:-1] or 0) for _, wanted in server.requests]
    assert asked == ranges and not server.faults
    assert contents(cache, shard) == original(server, shard)
    assert len(server.requests) == len(ranges)


def test_a_reset_connection_loses_no_received_bytes(server, tmp_path):
    shard = put(server)
    server.faults = ["reset:70000"]
    cache = ShardCache(tmp_path / "cache", SIZE)
    assert contents(cache, shard) == original(server, shard)
    assert server.requests == [("a.tar", ""), ("a.tar", "bytes=70000-")]


def test_retry_after_is_respected_up_to_a_limit(server, tmp_path, monkeypatch):
    shard = put(server)
    server.faults = ["429:1"]
    began = time.monotonic()
    contents(ShardCache(tmp_path / "a", SIZE), shard)
    assert 1.0 <= time.monotonic() - began < 5.0
    monkeypatch.setattr(hub, "MAX_RETRY_AFTER", 0.1)
    server.faults = ["429:86400"]
    contents(ShardCache(tmp_path / "b", SIZE), shard)


@pytest.mark.parametrize(
    ("faults", "requests", "message"),
    [
        (["404"], 1, "the Hub answered 404"),
        (["401"], 1, "answered 401; check the name, and log in"),
        (["403"], 1, "answered 403; use a token that has access"),
        (
            ["503"] * 9,
            8,
            "0 of 200000 bytes after 8 attempts without progress: cannot download shard a.tar",
        ),
        (["short:9"] + ["short:0"] * 9, 8, "stopped at 9 of 200000 bytes after 8 attempts"),
        # Starting over is no progress, however many bytes are sent.
        (["norange:70000"] * 20, 8, "stopped at 70000 of 200000 bytes after 8 attempts"),
        (["corrupt"] * 3, 3, "a.tar: expected SHA-256"),
        (["longer"] * 3, 3, "expected 200000 bytes, got more in 3 downloads"),
    ],
)
def test_permanent_errors_are_one_line(server, tmp_path, faults, requests, message):
    shard = put(server)
    server.faults = list(faults)
    for ahead in (False, True):
        server.faults, server.requests = list(faults), []
        cache = ShardCache(tmp_path / str(ahead), SIZE)
        if ahead:
            cache.request(shard)
        with pytest.raises(EchoError) as caught:
            cache.open(shard)
        assert message in str(caught.value) and "a.tar" in str(caught.value)
        assert "\n" not in str(caught.value) and len(server.requests) == requests
        cache.close()


def test_a_size_that_differs_from_the_listing_is_rejected(server, tmp_path):
    shard = put(server, known=False)
    other = Shard(shard.name, SIZE + 1, url=shard.url)
    with pytest.raises(EchoError, match="expected 200001 bytes, got 200000"):
        ShardCache(tmp_path / "cache", 2 * SIZE).open(other)
    assert len(server.requests) == 3


def test_cached_shards_work_offline(server, tmp_path, monkeypatch):
    here, elsewhere = put(server, "a.tar"), put(server, "bb.tar")
    contents(ShardCache(tmp_path / "cache", SIZE), here)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    cache = ShardCache(tmp_path / "cache", 2 * SIZE)
    assert contents(cache, here) == original(server, here)
    with pytest.raises(EchoError, match=r"bb.tar to .*/cache: HF_HUB_OFFLINE is set"):
        cache.open(elsewhere)


def test_the_size_limit_holds_and_nothing_in_use_is_dropped(server, tmp_path):
    shards = [put(server, "x" * n + ".tar", SIZE + 1000 * n) for n in range(1, 9)]
    folder, bound = tmp_path / "cache", 3 * (SIZE + 8000)
    largest, done = 0, threading.Event()

    def watch():
        nonlocal largest
        while not done.is_set():
            used = 0
            for path in folder.glob("*.*"):
                try:
                    used += path.stat().st_size
                except FileNotFoundError:
                    continue
            largest = max(largest, used)

    watcher = threading.Thread(target=watch)
    watcher.start()
    cache = ShardCache(folder, bound)
    faults = ["short:50000", "", "ends:70000", ""]
    held = cache.open(shards[0])
    try:
        for position in [*range(1, 8), *range(1, 8)]:
            server.faults += faults
            cache.request(shards[1 + position % 7])
            assert contents(cache, shards[position]) == original(server, shards[position])
        assert os.fstat(held).st_nlink == 1
    finally:
        os.close(held)
        cache.close()
        done.set()
        watcher.join()
    assert SIZE < largest <= bound
    with pytest.raises(UsageError, match=r"--cache_gb: expected at least 3, .* 3000000000 bytes"):
        cache.check_fits(3 * 10**9)
    ShardCache(folder, SIZE)  # a smaller limit is enforced from the start
    assert not list(folder.glob("*.*"))


def test_space_held_by_others_is_waited_for_until_a_timeout(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "ROOM_WAIT", 1.0)
    one, two = put(server, "a.tar"), put(server, "bb.tar")
    first, second = (ShardCache(tmp_path / "cache", SIZE) for _ in range(2))
    held = first.open(one)
    threading.Timer(0.4, os.close, [held]).start()
    assert contents(second, two) == original(server, two)
    held = first.open(one)
    with pytest.raises(UsageError, match=r"bb.tar: no space .* --cache_gb"):
        second.open(two)
    os.close(held)


def test_closing_stops_a_download_and_keeps_received_bytes(server, tmp_path):
    shard = put(server)
    server.slow = 0.1
    cache = ShardCache(tmp_path / "cache", SIZE)
    cache.request(shard)
    threading.Timer(0.5, cache.close).start()
    with pytest.raises(EchoError, match="closed"):
        cache.open(shard)
    server.slow = 0.0
    assert contents(ShardCache(tmp_path / "cache", SIZE), shard) == original(server, shard)
    assert server.requests[1][1] > "bytes=1"


CHILD = """
import sys, time
from pathlib import Path
from echo_eqx.data.fetch import ShardCache
from echo_eqx.data.shards import Shard
url, size, sha256, folder = sys.argv[1:]
held = ShardCache(Path(folder), int(size)).open(Shard("a.tar", int(size), url=url, sha256=sha256))
print("held", flush=True)
time.sleep(60)
"""


def start_child(shard: Shard, folder: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", CHILD, str(shard.url), str(SIZE), str(shard.sha256)]
    return subprocess.Popen([*command, str(folder)], env=environment, stdout=subprocess.PIPE)


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_share_downloads_and_resume_those_of_killed_ones(server, tmp_path):
    shard, folder = put(server), tmp_path / "cache"
    server.slow = 0.2

    def downloaded() -> int:
        return sum(path.stat().st_size for path in folder.glob("*.part"))

    child = start_child(shard, folder)
    try:
        wait_for(lambda: downloaded() > 50_000)
        threading.Timer(0.3, child.send_signal, [signal.SIGKILL]).start()
        # It waits while the other one fetches, and resumes its download once it has died.
        cache = ShardCache(folder, SIZE)
        assert contents(cache, shard) == original(server, shard)
    finally:
        child.kill()
        child.wait()
    assert len(server.requests) == 2
    assert 50_000 < int(server.requests[1][1][6:-1]) < SIZE

    other, server.slow = put(server, "bb.tar"), 0.0
    child = start_child(shard, folder)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"held\n"
        assert not cache._make_room(SIZE, demanded=True), "dropped what another process holds"
    finally:
        child.kill()
        child.wait()
    assert contents(cache, other) == original(server, other)
    assert len(server.requests) == 3
