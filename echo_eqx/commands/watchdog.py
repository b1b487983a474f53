"""Keep a host's disk free beside a training run.

    echo-eqx watchdog --free_gb 20 --runs runs/ --cache ~/.cache/echo_eqx/shards
    echo-eqx watchdog --free_gb 50 --runs runs/mine --keep_last 2 --once --dry_run

While a file system of the given folders has less than --free_gb free, this goes, in this order and
only until there is enough: shards that were read, stale revisions in the Hub's cache, checkpoints
outside the retention rule. Never a run's newest complete checkpoint, a file that another process
has locked, or anything behind a link. It logs JSON lines. SIGTERM or Ctrl-C end it with code 0;
with --once code 1 says that there is still too little.
"""

import queue
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from echo_eqx.command import parse
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.disk.log import JsonLines
from echo_eqx.ops.disk.watchdog import DiskWatchdog
from echo_eqx.train.checkpoint import Retention


@dataclass(frozen=True)
class Args:
    free_gb: float = 20.0
    """Keep this much free, in 10^9 bytes."""
    runs: tuple[Path, ...] = ()
    """Run folders, or folders that hold run folders."""
    cache: Path | None = None
    """The trainer's --cache_dir: shards from the Hub."""
    hub_cache: Path | None = None
    """The Hub's own cache, such as ~/.cache/huggingface/hub."""
    hub_days: float = 14.0
    """Days without use after which all of a repository in --hub_cache may go."""
    keep_last: int = 3
    """Newest checkpoints of each run that stay, whatever the trainer would keep."""
    keep_every: int = 0
    """Also those at multiples of so many steps; 0: none."""
    every: float = 30.0
    """Seconds between two checks."""
    once: bool = False
    """Check once and end."""
    dry_run: bool = False
    """Say what would go, and remove nothing."""
    log: Path | None = None
    """Append the JSON lines to this file; by default they are printed."""


def main() -> None:
    args = parse(Args, __doc__)
    check_usage(args)
    free = int(args.free_gb * 1e9)
    watchdog = DiskWatchdog(
        free,
        JsonLines(args.log),
        runs=tuple(dict.fromkeys(given_folder(path, "runs", free) for path in args.runs)),
        cache=args.cache and given_folder(args.cache, "cache", free),
        hub_cache=args.hub_cache and given_folder(args.hub_cache, "hub_cache", free),
        retention=Retention(args.keep_last, args.keep_every),
        hub_days=args.hub_days,
        dry_run=args.dry_run,
    )
    stop: queue.SimpleQueue[int] = queue.SimpleQueue()  # the one thing a signal may safely fill
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: stop.put(number))
    while True:
        enough = watchdog.check(lambda: not stop.empty())
        if args.once and stop.empty():
            raise SystemExit(0 if enough else 1)
        try:
            stop.get(timeout=args.every)
            return
        except queue.Empty:
            continue


def check_usage(args: Args) -> None:
    if not (args.runs or args.cache or args.hub_cache):
        raise UsageError("no folder is given; wanted --runs, --cache or --hub_cache")
    for name, value in {"free_gb": args.free_gb, "every": args.every}.items():
        if not 0 < value < float("inf"):
            raise UsageError(f"{name} is {value}; wanted a positive number")
    if args.keep_last < 1:
        raise UsageError(f"keep_last is {args.keep_last}; wanted at least 1")
    for name, value in {"keep_every": args.keep_every, "hub_days": args.hub_days}.items():
        if not 0 <= value < float("inf"):
            raise UsageError(f"{name} is {value}; wanted 0 or more")


def given_folder(path: Path, name: str, free: int) -> Path:
    """The folder itself, with no link on the way to it."""
    try:
        if path.is_symlink():
            raise EchoError(f"{name} {path} is a link; wanted the folder itself")
        if not path.is_dir():
            raise EchoError(f"{name} {path} is no folder; wanted one that is there")
        total = shutil.disk_usage(path).total
    except OSError as error:
        raise EchoError(f"{name} {path} cannot be looked at: {error.strerror}") from None
    if free >= total:
        raise UsageError(
            f"free_gb is {free / 1e9:g}; wanted less than the {total / 1e9:g} that the disk of "
            f"{path} holds in all"
        )
    return path.resolve()
