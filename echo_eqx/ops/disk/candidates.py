"""What the watchdog may delete: read shards, stale Hub files, leftovers and old checkpoints."""

import contextlib
import errno
import fcntl
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.utils import logging as hub_logging

from echo_eqx.ops.disk.log import EventLog, InUse
from echo_eqx.weights.checkpoint.reader import FOLDER, MANIFEST, find_checkpoints, step_of
from echo_eqx.weights.checkpoint.retention import (
    Retention,
    is_leftover,
    open_checkpoints,
    remove_file,
    remove_step,
    set_aside_step,
    temporary_export_step,
)

STALLED_SECONDS = 3600.0
"""A download that received nothing for this long and is held by no process may be deleted."""

_SHARD = re.compile(r"[0-9a-f]{24}\.\d+\.tar")
_PARTIAL = re.compile(r"[0-9a-f]{24}\.\d+\.part")


@dataclass(frozen=True)
class Candidate:
    """Something that may be deleted now; `size` estimates the bytes that this frees."""

    kind: str
    path: Path
    size: int
    reason: str
    delete: Callable[[], object]


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file and not a link to one."""
    return path.is_file() and not path.is_symlink()


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder and not a link to one."""
    return path.is_dir() and not path.is_symlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[os.stat_result]:
    """Hold an exclusive lock on a file. **Raises**: `InUse` if another process holds one."""
    # NFS grants an exclusive lock only on a file that is open for writing.
    with path.open("rb+" if os.access(path, os.W_OK) else "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse from None
        status = os.fstat(file.fileno())
        if not os.path.samestat(status, path.lstat()):
            raise InUse  # it was replaced meanwhile
        yield status


def unused_bytes(path: Path) -> int:
    """Disk space of a file, or of all files in a folder. **Raises**: `InUse` if one is locked."""
    size = 0
    for file in filter(is_file, (path, *path.rglob("*"))):
        with locked(file) as status:
            size += allocated_bytes(status)
    return size


def allocated_bytes(status: os.stat_result) -> int:
    """Bytes that deleting the file frees: none while it has other hard links."""
    return status.st_blocks * 512 if status.st_nlink == 1 else 0


def cached_shards(folder: Path, log: EventLog) -> Iterator[Candidate]:
    """Shards that the trainer marked as read (modification time 0), then stalled downloads."""
    for names, kind, reason in (
        (_SHARD, "shard", "already read"),
        (_PARTIAL, "download", "stalled"),
    ):
        paths = []
        with log.skipping(folder):
            paths = [path for path in sorted(folder.iterdir()) if names.fullmatch(path.name)]
        for path in filter(is_file, paths):
            with log.skipping(path):
                with locked(path) as status:
                    modified = status.st_mtime
                stalled = time.time() - modified > STALLED_SECONDS
                if modified == 0 if kind == "shard" else stalled:
                    delete = functools.partial(_delete_cached, path, modified)
                    yield Candidate(kind, path, allocated_bytes(status), reason, delete)


def _delete_cached(path: Path, modified: float) -> None:
    with locked(path) as status:
        if status.st_mtime != modified:
            raise InUse  # it was requested again
        path.unlink()


def stale_revisions(folder: Path, days: float, log: EventLog) -> Iterator[Candidate]:
    """Superseded revisions in the Hub's cache, then repositories unused for `days`."""
    found = []
    with log.skipping(folder):
        for repo in scan_cache_dir(folder).repos:
            revisions = sorted(repo.revisions, key=lambda r: (r.last_modified, "main" in r.refs))
            hashes = [revision.commit_hash for revision in revisions]
            last_use = max(repo.last_accessed, repo.last_modified)
            if revisions and time.time() - last_use > days * 86400:
                found.append((True, last_use, repo.repo_path, repo.repo_path, hashes))
                continue
            for revision in revisions[:-1]:
                path, commit = revision.snapshot_path, revision.commit_hash
                found.append((False, revision.last_modified, path, repo.repo_path, [commit]))
    for unused, _, path, repo_path, hashes in sorted(found):
        with log.skipping(path):
            # Scanned again: a file that two revisions share is deleted with the second.
            strategy = scan_cache_dir(folder).delete_revisions(*hashes)
            paths = (*strategy.repos, *strategy.snapshots, *strategy.refs, *strategy.blobs)
            for part in paths:
                if not part.resolve().is_relative_to(folder):
                    raise InUse
                unused_bytes(part)
            unused_bytes(folder / ".locks" / repo_path.name)  # a download holds one of these
            reason = f"unused for {days:g} days" if unused else "a newer revision is cached"
            delete = functools.partial(_delete_from_hub_cache, strategy.execute, paths)
            yield Candidate("hub", path, strategy.expected_freed_size, reason, delete)


def _delete_from_hub_cache(execute: Callable[[], None], paths: tuple[Path, ...]) -> None:
    hub_logging.set_verbosity_error()  # it only warns if it cannot delete something
    execute()
    for path in paths:
        if os.path.lexists(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def old_checkpoints(
    folders: list[Path], retention: Retention, log: EventLog
) -> Iterator[Candidate]:
    """Leftovers of killed runs, then checkpoints outside the retention rule, oldest first."""
    found = []
    for folder in folders:
        for run in _run_folders(folder, log):
            with log.skipping(run):
                found += [(*item, run) for item in _due(run, retention)]
    for complete, _, _, path, run in sorted(found):
        with contextlib.ExitStack() as stack:
            stack.enter_context(log.skipping(path))
            if path not in [due[-1] for due in _due(run, retention)]:
                continue  # the run went back to an older checkpoint meanwhile
            if not complete and is_file(run / ".lock"):
                stack.enter_context(locked(run / ".lock"))
            size = unused_bytes(path)
            if complete and is_file(export := path.with_suffix(".safetensors")):
                size += unused_bytes(export)
            kind = "checkpoint" if complete else "leftover"
            reason = "outside the retention rule" if complete else "not a complete checkpoint"
            yield Candidate(kind, path, size, reason, functools.partial(_delete_checkpoint, path))


def _run_folders(folder: Path, log: EventLog) -> list[Path]:
    """`folder` if it is a run folder, else the run folders in it."""
    if is_folder(folder / FOLDER):
        return [folder]
    runs = []
    with log.skipping(folder):
        runs = [path for path in sorted(folder.iterdir()) if is_folder(path)]
    return [path for path in runs if is_folder(path / FOLDER)]


def _due(run: Path, retention: Retention) -> Iterator[tuple[bool, float, int, Path]]:
    """Checkpoints and leftovers to delete: whether complete, time written, step and path of each.

    None if the run has no complete checkpoint, and none that is newer than its newest one.
    """
    with open_checkpoints(run) as handle:
        listed = {path: step for step, path in find_checkpoints(run / FOLDER)}
        complete = {p: s for p, s in listed.items() if is_folder(p) and is_file(p / MANIFEST)}
        if handle is None or not complete:
            return
        dropped = retention.drops(list(complete.values()))
        for path, step in complete.items():
            if step in dropped:
                yield True, (path / MANIFEST).stat().st_mtime, step, path
        for path in (run / FOLDER).iterdir():
            step = None
            if path in listed:
                continue
            if is_folder(path) and is_leftover(path.name, handle):
                step = step_of(path.name)
                step = set_aside_step(path.name) if step is None else step
            elif is_file(path):
                step = temporary_export_step(path.name)
            if step is not None and step <= max(complete.values()):
                yield False, 0.0, step, path


def _delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint and its export, or a leftover. Files that no trainer wrote stay."""
    with open_checkpoints(path.parents[1]) as handle:
        if handle is not None:
            (remove_step if is_folder(path) else remove_file)(path.name, handle)
