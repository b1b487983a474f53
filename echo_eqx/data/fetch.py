"""A size-bounded cache folder for shards from the Hub, prefetched and shared between processes.

A shard or download in use is held by a locked file descriptor, so a process that dies releases it.
A download is `NAME.SIZE.part` until it is complete, and counts with its full size from the start.
A shard's modification time is when it was fetched or last requested, and 0 once it was opened, so
shards already read are dropped first.

`hf_hub_download` is not used, because it starts over after a process was killed, does not check
where a resumed response starts, and has no size limit.
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
"""Consecutive attempts without progress before a download fails."""
MAX_DOWNLOADS = 3
"""Complete downloads with the wrong content before that is an error."""
BACKOFF = 1.0
"""Seconds before the second attempt; doubles from there, with jitter."""
MAX_BACKOFF = 60.0
TIMEOUT = 30.0
ROOM_WAIT = 600.0
"""Seconds to wait for space that other readers of the folder occupy."""
CLOSE_WAIT = 5.0
"""Seconds that `close` waits for the threads; any still running end with the process."""
UNUSED = 3600.0
"""Seconds since its last request after which a shard may be dropped for a prefetched one."""
_CACHED = re.compile(r"[0-9a-f]{24}\.[0-9]+\.(tar|part)")
"""File names of this cache. Other files in the folder are never dropped."""
_POLL = 0.1


class CorruptDownload(EchoError):
    """The downloaded bytes differ from the listed file."""


class ShardCache:
    """Shards as open files; those on the Hub are kept in `folder`, within `max_bytes`.

    Each `DataLoader` has its own; several may share the folder, also in different processes.
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
        """**Raises**: `UsageError` if `num_bytes` of shards do not fit in the cache together."""
        if num_bytes > self.max_bytes:
            raise UsageError(
                f"--cache_gb: expected at least {-(-num_bytes // 10**9)}, because the shards read "
                f"at once take {num_bytes} bytes, got {self.max_bytes / 1e9:g}; raise it or set a "
                "lower --num_streams"
            )

    def request(self, shard: Shard) -> None:
        """Fetch a shard in the background, if there is space that is not needed sooner.

        Cheap to repeat; errors are raised by `open`.
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
        """Descriptor of a complete shard, which the cache keeps until the descriptor is closed.

        **Raises**: `EchoError` if it cannot be fetched or opened.
        """
        if shard.path is not None:
            try:
                return os.open(shard.path, os.O_RDONLY)
            except OSError as error:
                raise EchoError(f"cannot open {shard.path}: {error.strerror}") from None
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
            # Wait on while our own prefetches run, which make room when done, or while another
            # process's download of this shard grows.
            before, pulse = pulse, self._pulse(shard)
            if pulse != before or any(not future.done() for future in self._ahead.values()):
                deadline = time.monotonic() + ROOM_WAIT
            if time.monotonic() > deadline:
                raise UsageError(
                    f"shard {shard.name}: no space for its {shard.size} bytes within "
                    f"{ROOM_WAIT:.0f} s, because other readers of {self.folder} hold the shard or "
                    "the space; raise --cache_gb or set a lower --num_streams"
                )
            self._closed.wait(_POLL)

    def close(self) -> None:
        """Stop all downloads; a later one continues where they stopped."""
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
            raise EchoError(f"shard {shard.name} was not fetched because the loader was closed")

    def _fetch(self, shard: Shard, demanded: bool) -> bool:
        """Whether the shard is complete now; false if there is no space for it, or another process
        is fetching it."""
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
        """Locked descriptor of the shard's download, with space reserved for its full size."""
        self.check_fits(shard.size)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._whole(shard).with_suffix(".part")
        with self._room_lock():
            # In this order: a download becomes a complete shard outside this lock.
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
        """Drop shards until `size` more bytes fit; never one that is held, and for a prefetch (not
        `demanded`) none that is still to be read."""
        files = []
        total = 0
        for path in self.folder.iterdir():
            if _CACHED.fullmatch(path.name) and not path.is_symlink():  # other files do not count
                with contextlib.suppress(FileNotFoundError):  # a download has completed
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
                return _check_content(shard, held)
            except CorruptDownload as error:
                os.ftruncate(held, 0)
                wrong += 1
                if wrong == MAX_DOWNLOADS:
                    raise EchoError(f"shard {shard.name}: {error} in {wrong} downloads") from None
            except HubOffline:
                raise
            except HubUnavailable as error:
                have = os.fstat(held).st_size
                attempts = 1 if have > best else attempts + 1
                best = max(best, have)
                if attempts == MAX_ATTEMPTS:
                    raise EchoError(
                        f"shard {shard.name}: stopped at {have} of {shard.size} bytes after "
                        f"{attempts} attempts without progress: {error}"
                    ) from None
                wait = error.retry_after
                if wait is None:
                    wait = min(BACKOFF * 2.0 ** (attempts - 1), MAX_BACKOFF)
                    wait *= random.uniform(0.5, 1.0)
                self._closed.wait(wait)

    def _attempt(self, shard: Shard, held: int) -> None:
        """One request for the missing bytes, appended to the download."""
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
                start, total = _content_range(response.status_code, response.headers)
                if total is not None and total != shard.size:
                    raise CorruptDownload(f"expected {shard.size} bytes, got {total}")
                if start != have:
                    os.ftruncate(held, 0)
                    have = 0
                    if start != 0:
                        raise HubUnavailable(f"the response starts at byte {start}")
                for chunk in response.iter_bytes():
                    self._check_open(shard)
                    if have + len(chunk) > shard.size:
                        raise CorruptDownload(f"expected {shard.size} bytes, got more")
                    self._append(shard, held, chunk, have)
                    have += len(chunk)
        if have < shard.size:
            raise HubUnavailable("the response ended early")

    def _append(self, shard: Shard, held: int, chunk: bytes, position: int) -> None:
        try:
            if os.pwrite(held, chunk, position) < len(chunk):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._cannot_write(shard, error) from None

    def _cannot_write(self, shard: Shard, error: OSError) -> EchoError:
        return EchoError(f"cannot write shard {shard.name} to {self.folder}: {error.strerror}")


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
    """Size of the complete shard: `NAME.SIZE.tar`."""
    return int(path.name.split(".")[-2])


def _check_content(shard: Shard, held: int) -> None:
    if shard.sha256 is None:
        return
    with open(held, "rb", closefd=False) as file:
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.sha256:
        raise CorruptDownload(f"expected SHA-256 {shard.sha256}, got {digest}")


def _content_range(status: int, headers: Mapping[str, str]) -> tuple[int, int | None]:
    """First byte of a response, and the file size; a server may ignore the range requested."""
    if status == 200:
        length = headers.get("content-length", "")
        return 0, int(length) if length.isdigit() else None
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("content-range", ""))
    if match is None:
        return -1, None
    return int(match[1]), None if match[2] == "*" else int(match[2])
