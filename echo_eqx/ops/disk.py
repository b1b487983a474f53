"""Keeping a host's disk free beside a run: what goes when space is short, and what never does.

In this order, and only until there is enough: shards that were read, downloads that stopped, stale
revisions and repositories of the Hub cache, leftovers of killed runs, checkpoints outside the
retention rule. Folders are walked by descriptor from those given, and neither links nor mounts are
followed. A file on which another process holds a lock is in use.
"""

import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from huggingface_hub.utils import DeleteCacheStrategy, HFCacheInfo
from huggingface_hub.utils import logging as hub_logging

from echo_eqx.errors import EchoError
from echo_eqx.train.checkpoint import Retention
from echo_eqx.weights.checkpoint import FOLDER, MANIFEST, find_checkpoints

STALE_PARTIAL = 3600.0
"""Seconds without a byte after which a download that no one holds may go."""

_SHARD = re.compile(r"[0-9a-f]{24}\.\d+\.tar")
_PARTIAL = re.compile(r"[0-9a-f]{24}\.\d+\.part")
_LEFT_FOLDER = re.compile(r"step_(\d{1,12})|damaged_step_(\d{1,12})_[0-9a-f]{6}")
_LEFT_FILE = re.compile(r"step_(\d{1,12})\.safetensors|\.step_(\d{1,12})\.safetensors\.\w+")
_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OPEN_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class _Spared(Exception):
    """Something that must not go: it is in use, or leads out of its folder."""


@dataclass(frozen=True)
class Removable:
    """Something that may go now; `size` is an estimate of the bytes it gives back."""

    kind: str
    path: Path
    size: int
    why: str
    remove: Callable[[], object]


class JsonLines:
    """A log of JSON objects, appended to `path` or printed; on stderr if that fails.

    **Raises**: `EchoError` if the file cannot be made, unless for want of room.
    """

    def __init__(self, path: Path | None):
        self._path = path
        try:
            self._append(b"")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise EchoError(f"log {path} cannot be written: {error.strerror}") from None

    def write(self, **fields: Any) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        line = json.dumps({"time": now, **fields}) + "\n"
        try:
            self._append(line.encode())
        except OSError:
            with contextlib.suppress(OSError):
                print(line, end="", file=sys.stderr, flush=True)

    def _append(self, data: bytes) -> None:
        if self._path is None:
            while data:  # past the buffer of sys.stdout, which would keep what a full disk refused
                data = data[os.write(1, data) :]
            return
        handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(handle).st_size
            if os.write(handle, data) < len(data):
                os.ftruncate(handle, before)  # half a line would spoil the next one
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


class DiskWatchdog:
    """Removes from the given folders while their file systems have less than `free` bytes free.

    `runs` are run folders or hold some. The folders must be absolute, without links on the way.
    """

    def __init__(
        self,
        free: int,
        log: JsonLines,
        *,
        retention: Retention,
        runs: tuple[Path, ...] = (),
        cache: Path | None = None,
        hub_cache: Path | None = None,
        hub_days: float = 14.0,
        dry_run: bool = False,
    ):
        self._wanted, self._log, self._dry_run = free, log, dry_run
        self._runs, self._cache, self._hub_cache = runs, cache, hub_cache
        self._retention, self._hub_days = retention, hub_days
        self._short: set[int] = set()
        self._said: set[tuple] = set()
        self._saying: set[tuple] = set()

    def check(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Remove what is needed, until `stopped`. Whether all file systems then have enough."""
        devices: dict[int, list[Path]] = {}
        enough = True
        for folder in (*self._runs, self._cache, self._hub_cache):
            if folder is not None:
                try:
                    devices.setdefault(os.lstat(folder).st_dev, []).append(folder)
                except OSError as error:
                    self._report(folder, error)
                    enough = False
        for device, folders in devices.items():
            try:
                enough &= self._check_device(device, folders, stopped)
            except OSError as error:
                self._report(folders[0], error)
                enough = False
        self._said, self._saying = self._saying, set()
        return enough

    def _check_device(self, device: int, folders: list[Path], stopped: Callable[[], bool]) -> bool:
        before = free = _free(folders[0])
        removed = size = news = 0
        if free < self._wanted:
            with contextlib.closing(self._removables(folders)) as removables:
                for item in removables:
                    was = free
                    if not self._dry_run and not self._remove(item):
                        continue
                    free = free + item.size if self._dry_run else _free(folders[0])
                    removed, size = removed + 1, size + item.size
                    news += self._say(item, was, free)
                    if free >= self._wanted or stopped():
                        break
        short = free < self._wanted
        if news or short != (device in self._short):
            self._log.write(
                event="check",
                folders=[str(folder) for folder in folders],
                wanted=self._wanted,
                free_before=before,
                free_after=free,
                removed=removed,
                bytes=size,
                enough=not short,
            )
        (self._short.add if short else self._short.discard)(device)
        return not short

    def _remove(self, item: Removable) -> bool:
        try:
            item.remove()
        except (_Spared, FileNotFoundError):
            return False  # someone else was quicker
        except OSError as error:
            self._report(item.path, error)
            return False
        return True

    def _say(self, item: Removable, before: int, after: int) -> bool:
        """Log a removal; one that is only thought of is told once, not at every check."""
        if self._dry_run and not self._is_new(("would_remove", item.path)):
            return False
        self._log.write(
            event="would_remove" if self._dry_run else "removed",
            kind=item.kind,
            path=str(item.path),
            bytes=item.size,
            why=item.why,
            free_before=before,
            free_after=after,
        )
        return True

    def _report(self, path: Path, error: Exception) -> None:
        why = error.strerror if isinstance(error, OSError) else str(error)
        if self._is_new(("error", path, why)):
            self._log.write(event="error", path=str(path), why=why or type(error).__name__)

    def _is_new(self, what: tuple) -> bool:
        """Whether `what` was not already so at the check before."""
        known = what in self._said or what in self._saying
        self._saying.add(what)
        return not known

    @contextlib.contextmanager
    def _sparing(self, path: Path) -> Iterator[None]:
        """What is in use or gone is passed over; what cannot be looked at is reported."""
        try:
            yield
        except (_Spared, FileNotFoundError):
            pass
        except OSError as error:
            self._report(path, error)

    def _removables(self, folders: list[Path]) -> Generator[Removable, None, None]:
        """What may go, first things first."""
        cache = self._cache if self._cache in folders else None
        hub_cache = self._hub_cache if self._hub_cache in folders else None
        runs = [folder for folder in folders if folder in self._runs]
        if cache is not None:
            yield from self._shards(cache)
            yield from self._partials(cache)
        if hub_cache is not None:
            yield from self._stale_hub(hub_cache)
        yield from self._checkpoints(runs)

    # --- The trainer's shards -------------------------------------------------------------------

    def _shards(self, folder: Path) -> Iterator[Removable]:
        why = "the shard was read"
        return self._cached(folder, _SHARD, "shard", why, lambda modified: modified == 0)

    def _partials(self, folder: Path) -> Iterator[Removable]:
        def stale(modified: float) -> bool:
            return time.time() - modified > STALE_PARTIAL

        return self._cached(folder, _PARTIAL, "download", "the download stopped long ago", stale)

    def _cached(
        self, folder: Path, names: re.Pattern, kind: str, why: str, goes: Callable[[float], bool]
    ) -> Iterator[Removable]:
        with self._sparing(folder), _opened(folder, folder) as handle:
            for name in sorted(os.listdir(handle)):
                path = folder / name
                if not names.fullmatch(name) or not _is_file(name, handle):
                    continue
                with self._sparing(path):
                    if _crosses_mount(path, folder):
                        continue
                    with _locked(name, handle) as status:
                        size, going = _bytes(status), goes(status.st_mtime)
                    if going:
                        remove = functools.partial(_remove_cached, name, handle, goes)
                        yield Removable(kind, path, size, why, remove)

    # --- The Hub's cache ------------------------------------------------------------------------

    def _stale_hub(self, folder: Path) -> Iterator[Removable]:
        tried: set[Path] = set()
        while True:
            # Anew each time: files that two revisions share go with the second one.
            try:
                info = scan_cache_dir(folder)
            except (OSError, ValueError, CacheNotFound) as error:
                return self._report(folder, error)
            stale = _stale_revisions(info, self._hub_days)
            item = next((item for item in stale if item[0] not in tried), None)
            if item is None:
                return
            path, repo, revisions, why = item
            tried.add(path)
            strategy = info.delete_revisions(*revisions)
            with self._sparing(path):
                _check_strategy(strategy, folder, repo)
                remove = functools.partial(_execute, strategy)
                yield Removable("hub", path, strategy.expected_freed_size, why, remove)

    # --- Checkpoints ----------------------------------------------------------------------------

    def _checkpoints(self, folders: list[Path]) -> Iterator[Removable]:
        tried: set[Path] = set()
        while True:
            # Anew each time: a run that goes back behind a damaged one has another newest.
            heads: list[_Found] = []
            for folder in folders:
                for run in self._run_folders(folder):
                    with self._sparing(run):
                        found = _outside(folder, run, self._retention)
                        heads += [f for f in found if run / FOLDER / f.name not in tried][:1]
            if not heads:
                return
            head = min(heads, key=lambda found: (found.complete, found.written))
            tried.add(head.run / FOLDER / head.name)
            yield from self._checkpoint(head)

    def _run_folders(self, folder: Path) -> list[Path]:
        """`folder` if it is a run's, else those in it that are."""
        runs = []
        with self._sparing(folder), _opened(folder, folder) as handle:
            if _is_folder(FOLDER, handle):
                return [folder]
            for name in sorted(os.listdir(handle)):
                if _is_folder(name, handle) and os.path.lexists(folder / name / FOLDER):
                    runs.append(folder / name)
        return runs

    def _checkpoint(self, found: "_Found") -> Iterator[Removable]:
        folder, run, name = found.folder, found.run, found.name
        path = run / FOLDER / name
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._sparing(path))
            if not found.complete:
                run_handle = stack.enter_context(_opened(folder, run))
                with contextlib.suppress(FileNotFoundError):
                    stack.enter_context(_locked(".lock", run_handle))
            handle = stack.enter_context(_opened(folder, run / FOLDER))
            if _crosses_mount(path, folder):
                raise _Spared
            size = _bytes_unlocked(name, handle)
            export = f"{name}.safetensors"
            if found.complete and _is_file(export, handle):
                size += _bytes_unlocked(export, handle)
            why = "outside the retention rule" if found.complete else "no whole checkpoint"
            kind = "checkpoint" if found.complete else "leftover"
            yield Removable(kind, path, size, why, lambda: _remove_checkpoint(name, handle))


@dataclass(frozen=True)
class _Found:
    """What may go of a run: a complete checkpoint, or what a killed run left."""

    folder: Path
    run: Path
    name: str
    step: int
    complete: bool
    written: float


def _outside(folder: Path, run: Path, retention: Retention) -> list[_Found]:
    """Leftovers, then checkpoints that the rule drops, each from the lowest step on.

    Nothing of a run without a complete checkpoint, and nothing that is newer than its newest.
    """
    with _opened(folder, run / FOLDER) as handle:
        listed = {path.name: step for step, path in find_checkpoints(run / FOLDER)}
        complete = {
            name: step
            for name, step in listed.items()
            if _is_folder(name, handle) and _is_file(f"{name}/{MANIFEST}", handle)
        }
        if not complete:
            return []
        newest = max(complete.values())
        drops = retention.drops(list(complete.values()))
        # Exports go with their checkpoints, and what is one by way of a link is left alone.
        stay = {f"{name}.safetensors" for name in listed} | (listed.keys() - complete.keys())
        found = []
        for name in os.listdir(handle):
            is_folder = _is_folder(name, handle)
            match = (_LEFT_FOLDER if is_folder else _LEFT_FILE).fullmatch(name)
            if match is None or name in stay or not (is_folder or _is_file(name, handle)):
                continue
            step = int(match[1] or match[2])
            if (step in drops) if name in complete else (step <= newest):
                with contextlib.suppress(FileNotFoundError):
                    inner = f"{name}/{MANIFEST}" if name in complete else name
                    written = os.stat(inner, dir_fd=handle, follow_symlinks=False).st_mtime
                    found.append(_Found(folder, run, name, step, name in complete, written))
    return sorted(found, key=lambda found: (found.complete, found.step))


def _remove_cached(name: str, handle: int, goes: Callable[[float], bool]) -> None:
    # A file gives its room back when the last descriptor is closed, so it is not held for longer.
    with _locked(name, handle) as status:
        if not goes(status.st_mtime):
            raise _Spared  # it was asked for again
        os.unlink(name, dir_fd=handle)


def _remove_checkpoint(name: str, handle: int) -> None:
    """Delete a checkpoint and its export, or a leftover; from the first moment on it is none."""
    if not _is_folder(name, handle):
        return os.unlink(name, dir_fd=handle)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{name}/{MANIFEST}", dir_fd=handle)
    shutil.rmtree(name, dir_fd=handle)
    if _is_file(f"{name}.safetensors", handle):
        os.unlink(f"{name}.safetensors", dir_fd=handle)


def _stale_revisions(info: HFCacheInfo, days: float) -> list[tuple[Path, Path, list[str], str]]:
    """Where, in which repository, which revisions and why, in the order in which they go."""
    old, unused = [], []
    for repo in info.repos:
        ordered = sorted(repo.revisions, key=lambda r: (r.last_modified, "main" in r.refs))
        used = max(repo.last_accessed, repo.last_modified)
        if ordered and time.time() - used > days * 86400:
            hashes = [revision.commit_hash for revision in ordered]
            item = (repo.repo_path, repo.repo_path, hashes, f"not used for {days:g} days")
            unused.append((used, item))
            continue
        for revision in ordered[:-1]:
            why = "a newer revision is there"
            item = (revision.snapshot_path, repo.repo_path, [revision.commit_hash], why)
            old.append((revision.last_modified, item))
    return [item for _, item in (*sorted(old), *sorted(unused))]


def _check_strategy(strategy: DeleteCacheStrategy, folder: Path, repo: Path) -> None:
    """**Raises**: `_Spared` if anything that would go is in use or not in `repo` itself."""
    if not repo.is_relative_to(folder):
        raise _Spared
    locks = folder / ".locks" / repo.name
    with contextlib.suppress(FileNotFoundError):  # a download holds a lock beside the repository
        with _opened(folder, locks) as handle:
            for name in os.listdir(handle):
                with _locked(name, handle):
                    pass
    for path in (*strategy.repos, *strategy.snapshots, *strategy.refs, *strategy.blobs):
        if not path.is_relative_to(repo) or _crosses_mount(path, folder):
            raise _Spared
        with _opened(folder, path.parent) as handle:
            if path in strategy.blobs and path.is_symlink():
                if not path.resolve().is_relative_to(folder):
                    raise _Spared
            elif path in strategy.repos or path in strategy.snapshots:
                if not _is_folder(path.name, handle):
                    raise _Spared
                _bytes_unlocked(path.name, handle)
            else:
                _bytes_unlocked(path.name, handle)


def _execute(strategy: DeleteCacheStrategy) -> None:
    hub_logging.set_verbosity_error()  # what it only warns of is an error here
    strategy.execute()
    for path in (*strategy.repos, *strategy.snapshots, *strategy.blobs):
        if os.path.lexists(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


# --- Files that are what they seem --------------------------------------------------------------


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


@contextlib.contextmanager
def _opened(base: Path, folder: Path) -> Iterator[int]:
    """Descriptor of `folder`, reached from `base` without following a link."""
    try:
        handle = os.open(base, _OPEN_FOLDER)
    except OSError as error:
        _spare_link(error)
    try:
        for part in folder.relative_to(base).parts:
            try:
                below = os.open(part, _OPEN_FOLDER, dir_fd=handle)
            except OSError as error:
                _spare_link(error)
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def _spare_link(error: OSError) -> NoReturn:
    """Which of the two is said of a link depends on the system."""
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        raise _Spared from None
    raise error


@contextlib.contextmanager
def _locked(name: str, handle: int) -> Iterator[os.stat_result]:
    """Hold the file `name` in the folder `handle`.

    **Raises**: `_Spared` if another process does, or it is no plain file.
    """
    try:
        # Over a network an exclusive lock takes a file that is open for writing.
        file = os.open(name, os.O_RDWR | _OPEN_FILE, dir_fd=handle)
    except PermissionError:
        file = os.open(name, os.O_RDONLY | _OPEN_FILE, dir_fd=handle)
    except OSError as error:
        _spare_link(error)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _Spared from None
        status = os.fstat(file)
        there = os.stat(name, dir_fd=handle, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or not os.path.samestat(status, there):
            raise _Spared
        yield status
    finally:
        os.close(file)


def _bytes_unlocked(name: str, handle: int) -> int:
    """Bytes of a file, or of a folder with all that is in it.

    **Raises**: `_Spared` if a file is in use, or a folder in it is a link or another file system.
    """
    if not _is_folder(name, handle):
        with _locked(name, handle) as status:
            return _bytes(status)
    total = 0
    device = os.stat(name, dir_fd=handle, follow_symlinks=False).st_dev
    for _, folders, files, inner in os.fwalk(name, dir_fd=handle, onerror=_raise):
        for other in folders:
            status = os.stat(other, dir_fd=inner, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode) or status.st_dev != device:
                raise _Spared
        for file in files:
            if _is_file(file, inner):
                with _locked(file, inner) as status:
                    total += _bytes(status)
    return total


def _bytes(status: os.stat_result) -> int:
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def _is_file(name: str, handle: int) -> bool:
    return _has_kind(stat.S_ISREG, name, handle)


def _is_folder(name: str, handle: int) -> bool:
    return _has_kind(stat.S_ISDIR, name, handle)


def _has_kind(kind: Callable[[int], bool], name: str, handle: int) -> bool:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return kind(os.stat(name, dir_fd=handle, follow_symlinks=False).st_mode)
    return False


def _crosses_mount(path: Path, folder: Path) -> bool:
    """Whether something is mounted at `path`, in it, or on the way to it from `folder`."""
    try:
        text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return False  # another system: only other devices are noticed
    fields = (line.split(" ")[4] for line in text.splitlines())
    mounts = (Path(re.sub(r"\\(\d{3})", lambda m: chr(int(m[1], 8)), field)) for field in fields)
    return any(
        mount != folder
        and mount.is_relative_to(folder)
        and (path.is_relative_to(mount) or mount.is_relative_to(path))
        for mount in mounts
    )


def _raise(error: OSError) -> NoReturn:
    raise error
