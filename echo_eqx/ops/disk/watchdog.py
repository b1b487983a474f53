"""Keep disk space free on a host during a run.

When space is short, files are deleted in this order until enough is free: shards already read,
stalled downloads, stale revisions and repositories in the Hub's cache, leftovers of killed runs,
checkpoints outside the retention rule. Links are not followed, and a file that another process has
locked is in use.
"""

import queue
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.disk.candidates import (
    Candidate,
    cached_shards,
    old_checkpoints,
    stale_revisions,
)
from echo_eqx.ops.disk.log import EventLog
from echo_eqx.weights.checkpoint.retention import Retention


@dataclass(frozen=True)
class WatchdogArgs:
    free_gb: float = 20.0
    """Keep this much free, in 10^9 bytes."""
    runs: tuple[Path, ...] = ()
    """Run folders, or folders that hold run folders."""
    cache_dir: Path | None = None
    """The trainer's --cache_dir: shards from the Hub."""
    hub_cache: Path | None = None
    """The Hub's own cache, such as ~/.cache/huggingface/hub."""
    hub_days: float = 14.0
    """Delete repositories in --hub_cache that have not been used for this many days."""
    keep_last: int = 3
    """Keep this many of the newest checkpoints of each run, regardless of the trainer's setting."""
    keep_every: int = 0
    """Also keep checkpoints at multiples of this many steps; 0 keeps only the newest."""
    every: float = 30.0
    """Seconds between checks."""
    once: bool = False
    """Check once and exit."""
    dry_run: bool = False
    """Log what would be deleted, and delete nothing."""
    log: Path | None = None
    """Append the JSON lines to this file; by default they are printed."""


class DiskWatchdog:
    """Deletes from the given folders while their file systems have too little free space.

    **Raises**: `EchoError` for a folder that cannot be used, `UsageError` for a bad setting.
    """

    def __init__(self, args: WatchdogArgs):
        _check_numbers(args)
        self._required, self._dry_run = round(args.free_gb * 1e9), args.dry_run
        self._runs = list(dict.fromkeys(self._folder("runs", path) for path in args.runs))
        self._cache_dir = args.cache_dir and self._folder("cache_dir", args.cache_dir)
        self._hub_cache = args.hub_cache and self._folder("hub_cache", args.hub_cache)
        self._hub_days, self._retention = args.hub_days, Retention(args.keep_last, args.keep_every)
        self._log = EventLog(args.log)

    def _folder(self, flag: str, path: Path) -> Path:
        if path.is_symlink() or not path.is_dir():
            got = "a link" if path.is_symlink() else "a file" if path.exists() else "nothing"
            raise EchoError(f"--{flag} {path}: expected a folder, got {got}")
        total = shutil.disk_usage(path).total
        if self._required >= total:
            raise UsageError(
                f"--free_gb: expected less than {total / 1e9:g}, the size of the disk that holds "
                f"{path}, got {self._required / 1e9:g}"
            )
        return path.resolve()

    def check(self, stopped: Callable[[], bool] = lambda: False) -> bool:
        """Delete what is necessary, until `stopped`; returns whether every disk has enough free."""
        folders = [*self._runs, *filter(None, (self._cache_dir, self._hub_cache))]
        devices: dict[int, list[Path]] = {}
        for folder in folders:
            with self._log.skipping(folder):
                devices.setdefault(folder.lstat().st_dev, []).append(folder)
        checked = 0
        for group in devices.values():
            with self._log.skipping(group[0]):
                if self._check_device(group, stopped):
                    checked += len(group)
        self._log.end_check()
        return checked == len(folders)

    def _check_device(self, folders: list[Path], stopped: Callable[[], bool]) -> bool:
        before = free = shutil.disk_usage(folders[0]).free
        count = size = logged = 0
        candidates = self._candidates(folders)
        while free < self._required and not stopped():
            candidate = next(candidates, None)
            if candidate is None:
                break
            if self._dry_run:
                after = free + candidate.size
            elif self._delete(candidate):
                after = shutil.disk_usage(folders[0]).free
            else:
                continue
            count, size = count + 1, size + candidate.size
            # A dry run finds the same candidates at every check.
            if not self._dry_run or self._log.is_new("would_delete", candidate.path):
                logged += 1
                self._log.write(
                    event="would_delete" if self._dry_run else "deleted",
                    kind=candidate.kind,
                    path=str(candidate.path),
                    bytes=candidate.size,
                    reason=candidate.reason,
                    free_before=free,
                    free_after=after,
                )
            free = after
        enough = free >= self._required
        if (not enough and self._log.is_new("short", *folders)) or logged:
            self._log.write(
                event="check",
                folders=[str(folder) for folder in folders],
                required=self._required,
                free_before=before,
                free_after=free,
                deleted=count,
                bytes=size,
                enough=enough,
            )
        return enough

    def _delete(self, candidate: Candidate) -> bool:
        with self._log.skipping(candidate.path):
            candidate.delete()
            return True
        return False

    def _candidates(self, folders: list[Path]) -> Iterator[Candidate]:
        if self._cache_dir in folders:
            yield from cached_shards(self._cache_dir, self._log)
        if self._hub_cache in folders:
            yield from stale_revisions(self._hub_cache, self._hub_days, self._log)
        runs = [folder for folder in folders if folder in self._runs]
        yield from old_checkpoints(runs, self._retention, self._log)


def watch(args: WatchdogArgs) -> int:
    """Check regularly until SIGTERM or SIGINT, or only once; returns the exit code."""
    watchdog = DiskWatchdog(args)
    stop: queue.SimpleQueue[int] = queue.SimpleQueue()  # a signal handler may safely fill it
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.put(number))
    while True:
        enough = watchdog.check(lambda: not stop.empty())
        if args.once and stop.empty():
            return 0 if enough else 1
        try:
            stop.get(timeout=args.every)
            return 0
        except queue.Empty:
            continue


def _check_numbers(args: WatchdogArgs) -> None:
    if not (args.runs or args.cache_dir or args.hub_cache):
        raise UsageError("expected --runs, --cache_dir or --hub_cache, got none of them")
    least = {"keep_last": 1, "keep_every": 0, "hub_days": 0, "free_gb": None, "every": None}
    for name, bound in least.items():
        value = getattr(args, name)
        if bound is None and not 0 < value < float("inf"):
            raise UsageError(f"--{name}: expected a positive number, got {value}")
        if bound is not None and not bound <= value < float("inf"):
            raise UsageError(f"--{name}: expected at least {bound}, got {value}")
