"""The Hub's own cache: revisions with a newer one beside them, repositories that no one uses."""

import contextlib
import errno
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from huggingface_hub.utils import DeleteCacheStrategy, HFCacheInfo
from huggingface_hub.utils import logging as hub_logging

from echo_eqx.ops.disk.log import Journal
from echo_eqx.ops.disk.safe import (
    Removable,
    Spared,
    bytes_unlocked,
    crosses_mount,
    is_folder,
    locked,
    opened,
)


def stale_revisions(folder: Path, days: float, journal: Journal) -> Iterator[Removable]:
    """Old revisions, then repositories without use for so many `days`."""
    tried: set[Path] = set()
    while True:
        # Anew each time: files that two revisions share go with the second one.
        try:
            info = scan_cache_dir(folder)
        except (OSError, ValueError, CacheNotFound) as error:
            return journal.report(folder, error)
        stale = _in_order(info, days)
        item = next((item for item in stale if item[0] not in tried), None)
        if item is None:
            return
        path, repo, revisions, why = item
        tried.add(path)
        strategy = info.delete_revisions(*revisions)
        with journal.sparing(path):
            _check_strategy(strategy, folder, repo)
            remove = functools.partial(_execute, strategy)
            yield Removable("hub", path, strategy.expected_freed_size, why, remove)


def _in_order(info: HFCacheInfo, days: float) -> list[tuple[Path, Path, list[str], str]]:
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
    """**Raises**: `Spared` if anything that would go is in use or not in `repo` itself."""
    if not repo.is_relative_to(folder):
        raise Spared
    locks = folder / ".locks" / repo.name
    with contextlib.suppress(FileNotFoundError):  # a download holds a lock beside the repository
        with opened(folder, locks) as handle:
            for name in os.listdir(handle):
                with locked(name, handle):
                    pass
    for path in (*strategy.repos, *strategy.snapshots, *strategy.refs, *strategy.blobs):
        if not path.is_relative_to(repo) or crosses_mount(path, folder):
            raise Spared
        with opened(folder, path.parent) as handle:
            if path in strategy.blobs and path.is_symlink():
                if not path.resolve().is_relative_to(folder):
                    raise Spared
            elif path in strategy.repos or path in strategy.snapshots:
                if not is_folder(path.name, handle):
                    raise Spared
                bytes_unlocked(path.name, handle)
            else:
                bytes_unlocked(path.name, handle)


def _execute(strategy: DeleteCacheStrategy) -> None:
    hub_logging.set_verbosity_error()  # what it only warns of is an error here
    strategy.execute()
    for path in (*strategy.repos, *strategy.snapshots, *strategy.blobs):
        if os.path.lexists(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
