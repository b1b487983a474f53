"""A bounded folder of shards from the Hub, fetched ahead and shared by the processes of a machine.

What makes sharing work: an open, locked file descriptor is what holds a shard or a download, so
that whoever dies lets go. A download is `NAME.SIZE.part` until it is whole, and counts with its
full size from the start. A shard's modification time is when it was fetched or asked for, and 0
once it was opened for reading, which makes it the first to go.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import queue
import random
import re
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from echo_eqx.data.shards import Shard
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.hub import HubOffline, HubUnavailable, hub_errors

NUM_THREADS = 4
MAX_ATTEMPTS = 8
"""Attempts in a row without a byte more than before, after which a download is given up."""
MAX_DOWNLOADS = 3
"""How often a file is fetched whose content turns out wrong."""
BACKOFF = 1.0
"""Seconds before the second attempt; doubles from there, with jitter."""
MAX_BACKOFF = 60.0
TIMEOUT = 30.0
ROOM_WAIT = 600.0
"""Seconds to wait for room that other readers of the folder hold."""
CLOSE_WAIT = 5.0
"""Seconds that closing waits for threads; one that waits for a server ends with the process."""
UNUSED = 3600.0
"""Seconds after which a shard or download that no one asked for makes room for one fetched ahead.
"""
_CACHED = re.compile(r"[0-9a-f]{24}\.[0-9]+\.(tar|part)")
"""What this cache writes. A folder may hold other tars, which are never dropped."""
_POLL = 0.1


class CorruptDownload(EchoError):
    """The downloaded bytes are not the file that is listed."""


class ShardCache:
    """Shards as open files; those on the Hub by way of `folder`, never above `max_bytes`.

    One object for each `Stream`; several, also of other processes, may share the folder.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = folder, max_bytes
        self._closed = threading.Event()
        self._waiting: queue.SimpleQueue[tuple[Future[bool], Shard] | None] = queue.SimpleQueue()
        self._ahead: dict[str, Future[bool]] = {}
        self._threads: list[threading.Thread] = []
        if folder.is_dir():
            with self._room_lock():
                self._make_room(0, demanded=True)

    def check_fits(self, num_bytes: int) -> None:
        """Refuse shards of `num_bytes` that must be held at once.

        **Raises**: `UsageError` if they exceed the bound.
        """
        if num_bytes > self.max_bytes:
            raise UsageError(
                f"the shards read at once take {num_bytes} bytes and the cache may hold "
                f"{self.max_bytes}; wanted --cache_gb of at least {-(-num_bytes // 10**9)}, or "
                "fewer --num_streams"
            )

    def request(self, shard: Shard) -> None:
        """Fetch a shard in the background, unless that leaves no room for what is wanted first.

        Cheap enough to be repeated; what fails is raised by `open`.
        """
        if shard.path is not None or self._closed.is_set():
            return
        with contextlib.suppress(OSError):
            os.utime(self._whole(shard))
            return
        running = self._ahead.get(shard.name)
        if running is not None and (not running.done() or running.exception()):
            return
        if not self._threads:
            for _ in range(NUM_THREADS):
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
        future = self._ahead[shard.name] = Future()
        self._waiting.put((future, shard))

    def open(self, shard: Shard) -> int:
        """Descriptor of a whole shard. It is held in the cache until `os.close`.

        **Raises**: `EchoError` if it cannot be had.
        """
        if shard.path is not None:
            try:
                return os.open(shard.path, os.O_RDONLY)
            except OSError as error:
                raise EchoError(f"{shard.path} cannot be opened: {error.strerror}") from None
        ahead = self._ahead.pop(shard.name, None)
        if ahead is not None and not ahead.cancel():
            ahead.result()
        pulse = None
        deadline = time.monotonic() + ROOM_WAIT
        while True:
            held = _lock(self._whole(shard), os.O_RDONLY, fcntl.LOCK_SH)
            if held is not None:
                with contextlib.suppress(OSError):
                    os.utime(held, (0, 0))
                return held
            if self._fetch(shard, demanded=True):
                continue
            # What this object fetches ahead ends by itself, and can make room then; so does what
            # another process fetches of this shard, while it grows.
            before, pulse = pulse, self._pulse(shard)
            if pulse != before or any(not future.done() for future in self._ahead.values()):
                deadline = time.monotonic() + ROOM_WAIT
            if time.monotonic() > deadline:
                raise UsageError(
                    f"shard {shard.name} could not be had in {ROOM_WAIT:.0f} s: other readers of "
                    f"{self.folder} hold it, or the room for its {shard.size} bytes; wanted a "
                    "larger --cache_gb or fewer --num_streams"
                )
            self._closed.wait(_POLL)

    def close(self) -> None:
        """Stop what is fetched; it goes on from there another time."""
        self._closed.set()
        for _ in self._threads:
            self._waiting.put(None)
        deadline = time.monotonic() + CLOSE_WAIT
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            future, shard = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._fetch(shard, demanded=False))
            except BaseException as error:  # raised where the shard is opened
                future.set_exception(error)

    def _whole(self, shard: Shard) -> Path:
        name = hashlib.sha256(str(shard.url).encode()).hexdigest()[:24]
        return self.folder / f"{name}.{shard.size}.tar"

    def _pulse(self, shard: Shard) -> float | None:
        with contextlib.suppress(FileNotFoundError):
            return self._whole(shard).with_suffix(".part").stat().st_mtime
        return None

    def _check_open(self, shard: Shard) -> None:
        if self._closed.is_set():
            raise EchoError(f"shard {shard.name} was not fetched: the stream was closed")

    def _fetch(self, shard: Shard, demanded: bool) -> bool:
        """Whether the shard is now here. It is not if there is no room, or another fetches it."""
        self._check_open(shard)
        whole = self._whole(shard)
        try:
            held = self._reserve(shard, demanded)
            if held is None:
                return whole.exists()
            try:
                self._download(shard, held)
                whole.with_suffix(".part").replace(whole)
            finally:
                os.close(held)
        except OSError as error:
            raise self._cannot_write(shard, error) from None
        return True

    def _reserve(self, shard: Shard, demanded: bool) -> int | None:
        """Locked descriptor of the shard's download, with room for all of it."""
        self.check_fits(shard.size)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._whole(shard).with_suffix(".part")
        with self._room_lock():
            # In this order: a download turns into a whole shard outside of this lock.
            if part.exists():
                return _lock(part, os.O_RDWR, fcntl.LOCK_EX)
            if self._whole(shard).exists() or not self._make_room(shard.size, demanded):
                return None
            return _lock(part, os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX)

    @contextlib.contextmanager
    def _room_lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int, demanded: bool) -> bool:
        """Drop shards until `size` bytes more fit: none that is held, and for one that is only
        fetched ahead, none that is still to be read."""
        files = []
        total = 0
        for path in self.folder.iterdir():
            if _CACHED.fullmatch(path.name) and not path.is_symlink():  # not other files' room
                with contextlib.suppress(FileNotFoundError):  # a download has turned whole
                    files.append((path.stat().st_mtime, path))
                total += _size_of(path)
        missing = total + size - self.max_bytes
        dropped: list[tuple[Path, int]] = []
        for modified, path in sorted(files):
            if missing <= 0 or (not demanded and time.time() - modified < UNUSED):
                break
            held = _lock(path, os.O_RDONLY, fcntl.LOCK_EX)
            if held is not None:
                dropped.append((path, held))
                missing -= _size_of(path)
        for path, held in dropped:
            if missing <= 0:
                path.unlink()
            os.close(held)
        return missing <= 0

    def _download(self, shard: Shard, held: int) -> None:
        best = attempts = wrong = 0
        while True:
            try:
                self._attempt(shard, held)
                _check_content(shard, held)
                return
            except CorruptDownload as error:
                os.ftruncate(held, 0)
                wrong += 1
                if wrong == MAX_DOWNLOADS:
                    raise EchoError(
                        f"shard {shard.name} was fetched {wrong} times and {error}"
                    ) from None
            except HubOffline:
                raise
            except HubUnavailable as error:
                have = os.fstat(held).st_size
                attempts = 1 if have > best else attempts + 1
                best = max(best, have)
                if attempts == MAX_ATTEMPTS:
                    raise EchoError(
                        f"shard {shard.name} stays at {have} of {shard.size} bytes after "
                        f"{attempts} attempts: {error}"
                    ) from None
                wait = error.retry_after
                if wait is None:
                    wait = min(BACKOFF * 2.0 ** (attempts - 1), MAX_BACKOFF)
                    wait *= random.uniform(0.5, 1.0)
                self._closed.wait(wait)

    def _attempt(self, shard: Shard, held: int) -> None:
        """One request for what is still missing, appended to the download."""
        self._check_open(shard)
        have = os.fstat(held).st_size
        if have >= shard.size:
            return
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with hub_errors(f"cannot download shard {shard.name} to {self.folder}"):
            with get_session().stream(
                "GET", str(shard.url), headers=headers, timeout=TIMEOUT
            ) as response:
                hf_raise_for_status(response)
                start, total = _range_of(response.status_code, response.headers)
                if total is not None and total != shard.size:
                    raise CorruptDownload(f"has {total} bytes; wanted {shard.size}")
                if start != have:
                    os.ftruncate(held, 0)
                    have = 0
                    if start != 0:
                        raise HubUnavailable(f"the answer starts at byte {start}")
                for chunk in response.iter_bytes():
                    self._check_open(shard)
                    if have + len(chunk) > shard.size:
                        raise CorruptDownload(f"has more than {shard.size} bytes")
                    self._append(shard, held, chunk, have)
                    have += len(chunk)
        if have < shard.size:
            raise HubUnavailable("the answer ended early")

    def _append(self, shard: Shard, held: int, chunk: bytes, position: int) -> None:
        try:
            if os.pwrite(held, chunk, position) < len(chunk):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._cannot_write(shard, error) from None

    def _cannot_write(self, shard: Shard, error: OSError) -> EchoError:
        return EchoError(f"shard {shard.name} cannot be written to {self.folder}: {error.strerror}")


def _lock(path: Path, flags: int, kind: int) -> int | None:
    """Descriptor of `path` with a lock on it, None if another holds one or the file is gone."""
    try:
        held = os.open(path, flags, 0o666)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(held, kind | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(held), os.stat(path)):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(held)
    return None


def _size_of(path: Path) -> int:
    """Bytes that a shard has when it is whole: `NAME.SIZE.tar`."""
    return int(path.name.split(".")[-2])


def _check_content(shard: Shard, held: int) -> None:
    if shard.sha256 is None:
        return
    with open(held, "rb", closefd=False) as file:
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise CorruptDownload(f"has SHA-256 {digest}; wanted {shard.sha256}")


def _range_of(status: int, headers: Mapping[str, str]) -> tuple[int, int | None]:
    """First byte of an answer, and of how many in all; a server may ignore what was asked for."""
    if status == 200:
        length = headers.get("content-length", "")
        return 0, int(length) if length.isdigit() else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("content-range", ""))
    if match is None:
        return -1, None
    return int(match[1]), None if match[2] == "*" else int(match[2])
