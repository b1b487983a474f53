"""The trainer's shards from the Hub: those that were read, and downloads that stopped."""

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from echo_eqx.ops.disk.log import Journal
from echo_eqx.ops.disk.safe import (
    Removable,
    Spared,
    allocated,
    crosses_mount,
    is_file,
    locked,
    opened,
)

STALE_PARTIAL = 3600.0
"""Seconds without a byte after which a download that no one holds may go."""

_SHARD = re.compile(r"[0-9a-f]{24}\.\d+\.tar")
_PARTIAL = re.compile(r"[0-9a-f]{24}\.\d+\.part")


def read_shards(folder: Path, journal: Journal) -> Iterator[Removable]:
    """Shards that the trainer has marked as read, by a time of 0."""
    why = "the shard was read"
    return _cached(folder, journal, _SHARD, "shard", why, lambda modified: modified == 0)


def stopped_downloads(folder: Path, journal: Journal) -> Iterator[Removable]:
    """Parts of shards to which nothing was added for long."""

    def stale(modified: float) -> bool:
        return time.time() - modified > STALE_PARTIAL

    return _cached(folder, journal, _PARTIAL, "download", "the download stopped long ago", stale)


def _cached(
    folder: Path,
    journal: Journal,
    names: re.Pattern,
    kind: str,
    why: str,
    goes: Callable[[float], bool],
) -> Iterator[Removable]:
    with journal.sparing(folder), opened(folder, folder) as handle:
        for name in sorted(os.listdir(handle)):
            path = folder / name
            if not names.fullmatch(name) or not is_file(name, handle):
                continue
            with journal.sparing(path):
                if crosses_mount(path, folder):
                    continue
                with locked(name, handle) as status:
                    size, going = allocated(status), goes(status.st_mtime)
                if going:
                    remove = functools.partial(_remove_cached, name, handle, goes)
                    yield Removable(kind, path, size, why, remove)


def _remove_cached(name: str, handle: int, goes: Callable[[float], bool]) -> None:
    # A file gives its room back when the last descriptor is closed, so it is not held for longer.
    with locked(name, handle) as status:
        if not goes(status.st_mtime):
            raise Spared  # it was asked for again
        os.unlink(name, dir_fd=handle)
