"""What the watchdog may delete: read shards, stale Hub files, leftovers and old checkpoints."""

import contextlib
import errno
import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from huggingface_hub.utils import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo
from huggingface_hub.utils import logging as hub_logging

from echo_eqx.ops.disk.files import (
    InUse,
    allocated_bytes,
    crosses_mount,
    is_file,
    is_folder,
    locked,
    unused_bytes,
)
from echo_eqx.ops.disk.log import EventLog
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
"""A download that got no byte for this long and that no process holds may go."""

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


def cached_shards(folder: Path, log: EventLog) -> Iterator[Candidate]:
    """Shards that the trainer marked as read (modification time 0), then stalled downloads."""

    def is_read(modified: float) -> bool:
        return modified == 0

    def is_stalled(modified: float) -> bool:
        return time.time() - modified > STALLED_SECONDS

    for names, kind, reason, is_due in (
        (_SHARD, "shard", "already read", is_read),
        (_PARTIAL, "download", "stalled", is_stalled),
    ):
        with log.skipping(folder):
            for path in sorted(folder.iterdir()):
                if names.fullmatch(path.name) and is_file(path):
                    with log.skipping(path):
                        with locked(path) as status:
                            size, due = allocated_bytes(status), is_due(status.st_mtime)
                        if due and not crosses_mount(path, folder):
                            delete = functools.partial(_delete_cached, path, is_due)
                            yield Candidate(kind, path, size, reason, delete)


def _delete_cached(path: Path, is_due: Callable[[float], bool]) -> None:
    with locked(path) as status:
        if not is_due(status.st_mtime):
            raise InUse  # it was requested again
        path.unlink()


def stale_revisions(folder: Path, days: float, log: EventLog) -> Iterator[Candidate]:
    """Revisions in the Hub's cache with a newer one, then repositories unused for `days`."""
    tried: set[Path] = set()
    while True:
        # Scanned after each deletion: a file that two revisions share is deleted with the second.
        try:
            cache = scan_cache_dir(folder)
        except (OSError, ValueError, CacheNotFound) as error:
            return log.error(folder, error)
        stale = next((item for item in _stale(cache, days) if item[0] not in tried), None)
        if stale is None:
            return
        path, repo, revisions, reason = stale
        tried.add(path)
        strategy = cache.delete_revisions(*(revision.commit_hash for revision in revisions))
        paths = (*strategy.repos, *strategy.snapshots, *strategy.refs, *strategy.blobs)
        with log.skipping(path):
            for part in paths:
                if not part.resolve().is_relative_to(folder) or crosses_mount(part, folder):
                    raise InUse
                unused_bytes(part)
            unused_bytes(folder / ".locks" / repo.repo_path.name)  # a download holds one of these
            delete = functools.partial(_delete_from_hub_cache, strategy.execute, paths)
            yield Candidate("hub", path, strategy.expected_freed_size, reason, delete)


def _stale(
    cache: HFCacheInfo, days: float
) -> Iterator[tuple[Path, CachedRepoInfo, list[CachedRevisionInfo], str]]:
    """Path, repository, revisions and reason, in the order of deletion."""
    old, unused = [], []
    for repo in cache.repos:
        revisions = sorted(repo.revisions, key=lambda r: (r.last_modified, "main" in r.refs))
        last_use = max(repo.last_accessed, repo.last_modified)
        if revisions and time.time() - last_use > days * 86400:
            reason = f"unused for {days:g} days"
            unused.append((last_use, (repo.repo_path, repo, revisions, reason)))
            continue
        for revision in revisions[:-1]:
            item = revision.snapshot_path, repo, [revision], "a newer revision is cached"
            old.append((revision.last_modified, item))
    for _, item in (*sorted(old, key=itemgetter(0)), *sorted(unused, key=itemgetter(0))):
        yield item


def _delete_from_hub_cache(execute: Callable[[], None], paths: tuple[Path, ...]) -> None:
    hub_logging.set_verbosity_error()  # it only warns of what it could not delete
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
                found += [(folder, run, *item) for item in _due(run, retention)]
    for folder, run, complete, _, _, path in sorted(found, key=itemgetter(2, 3, 4)):
        with contextlib.ExitStack() as stack:
            stack.enter_context(log.skipping(path))
            if path not in [due[-1] for due in _due(run, retention)] or crosses_mount(path, folder):
                continue  # the run went back to an older checkpoint meanwhile
            if not complete and is_file(run / ".lock"):
                stack.enter_context(locked(run / ".lock"))
            size = unused_bytes(path)
            export = path.with_suffix(".safetensors")
            if complete and is_file(export):
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
    """Whether it is complete, when it was written, its step and path, for all that may go.

    Nothing of a run without a complete checkpoint, and nothing newer than its newest.
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
