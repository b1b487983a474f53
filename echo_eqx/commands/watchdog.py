"""Keep a host's disk free during a training run.

    echo-eqx watchdog --free_gb 20 --runs runs/ --cache_dir ~/.cache/echo_eqx/shards
    echo-eqx watchdog --free_gb 50 --runs runs/mine --keep_last 2 --once --dry_run

While the file system of a given folder has less than --free_gb free, these are deleted, in this
order and only until enough is free: shards already read, stale revisions in the Hub's cache,
checkpoints outside the retention rule. A run's newest complete checkpoint, files that another
process has locked, and anything reached through a link are never deleted. The log is JSON lines.
SIGTERM or Ctrl-C ends it with exit code 0; with --once, code 1 means that there is still too little
space.
"""

from echo_eqx.cli import parse
from echo_eqx.ops.disk.watchdog import WatchdogArgs, watch


def main() -> None:
    raise SystemExit(watch(parse(WatchdogArgs, __doc__)))
