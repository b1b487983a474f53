"""Keep a host's disk free next to a training run.

    echo-eqx watchdog --free_gb 20 --runs runs/ --cache_dir ~/.cache/echo_eqx/shards
    echo-eqx watchdog --free_gb 50 --runs runs/mine --keep_last 2 --once --dry_run

While a file system of the given folders has less than --free_gb free, these are deleted, in this
order and only until enough is free: shards already read, stale revisions in the Hub's cache,
checkpoints outside the retention rule. Never a run's newest complete checkpoint, a file that
another process has locked, or anything reached through a link. It logs JSON lines. SIGTERM or
Ctrl-C end it with exit code 0; with --once, code 1 means that there is still too little space.
"""

from echo_eqx.cli import parse
from echo_eqx.ops.disk.watchdog import WatchdogArgs, watch


def main() -> None:
    raise SystemExit(watch(parse(WatchdogArgs, __doc__)))
