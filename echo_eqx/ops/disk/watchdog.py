"""Keeping a host's disk free beside a run: what goes when space is short, and what never does.

In this order, and only until there is enough: shards that were read, downloads that stopped, stale
revisions and repositories of the Hub cache, leftovers of killed runs, checkpoints outside the
retention rule. Folders are walked by descriptor from those given, and neither links nor mounts are
followed. A file on which another process holds a lock is in use.
"""

import contextlib
import os
from collections.abc import Callable, Generator
from pathlib import Path

from echo_eqx.ops.disk.cached import read_shards, stopped_downloads
from echo_eqx.ops.disk.checkpoints import dropped_checkpoints
from echo_eqx.ops.disk.hub import stale_revisions
from echo_eqx.ops.disk.log import Journal, JsonLines
from echo_eqx.ops.disk.safe import Removable, Spared, free_bytes
from echo_eqx.train.checkpoint import Retention


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
        self._wanted, self._journal, self._dry_run = free, Journal(log), dry_run
        self._runs, self._cache, self._hub_cache = runs, cache, hub_cache
        self._retention, self._hub_days = retention, hub_days
        self._short: set[int] = set()

    def check(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Remove what is needed, until `stopped`. Whether all file systems then have enough."""
        devices: dict[int, list[Path]] = {}
        enough = True
        for folder in (*self._runs, self._cache, self._hub_cache):
            if folder is not None:
                try:
                    devices.setdefault(os.lstat(folder).st_dev, []).append(folder)
                except OSError as error:
                    self._journal.report(folder, error)
                    enough = False
        for device, folders in devices.items():
            try:
                enough &= self._check_device(device, folders, stopped)
            except OSError as error:
                self._journal.report(folders[0], error)
                enough = False
        self._journal.next_check()
        return enough

    def _check_device(self, device: int, folders: list[Path], stopped: Callable[[], bool]) -> bool:
        before = free = free_bytes(folders[0])
        removed = size = news = 0
        if free < self._wanted:
            with contextlib.closing(self._removables(folders)) as removables:
                for item in removables:
                    was = free
                    if not self._dry_run and not self._remove(item):
                        continue
                    free = free + item.size if self._dry_run else free_bytes(folders[0])
                    removed, size = removed + 1, size + item.size
                    news += self._say(item, was, free)
                    if free >= self._wanted or stopped():
                        break
        short = free < self._wanted
        if news or short != (device in self._short):
            self._journal.log.write(
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
        except (Spared, FileNotFoundError):
            return False  # someone else was quicker
        except OSError as error:
            self._journal.report(item.path, error)
            return False
        return True

    def _say(self, item: Removable, before: int, after: int) -> bool:
        """Log a removal; one that is only thought of is told once, not at every check."""
        if self._dry_run and not self._journal.is_new(("would_remove", item.path)):
            return False
        self._journal.log.write(
            event="would_remove" if self._dry_run else "removed",
            kind=item.kind,
            path=str(item.path),
            bytes=item.size,
            why=item.why,
            free_before=before,
            free_after=after,
        )
        return True

    def _removables(self, folders: list[Path]) -> Generator[Removable, None, None]:
        """What may go, first things first."""
        cache = self._cache if self._cache in folders else None
        hub_cache = self._hub_cache if self._hub_cache in folders else None
        runs = [folder for folder in folders if folder in self._runs]
        if cache is not None:
            yield from read_shards(cache, self._journal)
            yield from stopped_downloads(cache, self._journal)
        if hub_cache is not None:
            yield from stale_revisions(hub_cache, self._hub_days, self._journal)
        yield from dropped_checkpoints(runs, self._retention, self._journal)
