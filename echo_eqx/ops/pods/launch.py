"""A run on all workers or on none: start it, watch it settle, follow its logs, stop it."""

import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from echo_eqx.cli import reader_left
from echo_eqx.errors import EchoError
from echo_eqx.ops.pods.install import RetryArgs
from echo_eqx.ops.pods.workers import PYTHON, Answer, NotSetUp, WorkerArgs, Workers
from echo_eqx.sharding.hosts import EXIT_PEER_LOST, EXIT_PREEMPTED

logger = logging.getLogger(__name__)

_LAST_LINES = 10  # of a log, to say why a process ended
_MAX_FAILURES = 10  # queries in a row without an answer, after which following a log fails


@dataclass(frozen=True, kw_only=True)
class PollArgs:
    poll: float = 2.0
    """Seconds between two queries of the workers."""


@dataclass(frozen=True, kw_only=True)
class LaunchArgs(PollArgs, RetryArgs, WorkerArgs):
    """Start train on all workers at once; if one fails to start, stop the others and try again."""

    settle: float = 15.0
    """Seconds for which all processes must stay alive for the launch to succeed."""


def launch(workers: Workers, flags: Sequence[str], args: LaunchArgs) -> None:
    """Start `train` with `flags` on all workers.

    If a worker does not start, the others would wait for it, so they are stopped and all try again.

    **Raises**: `EchoError` if a run is already alive, a worker fails at every attempt, or a process
    ends with an error.
    """
    token, reason = secrets.token_hex(4), ""
    for attempt in range(args.tries):
        if attempt:
            logger.info(f"{reason}; the others were stopped; trying again in {args.pause:g} s")
            time.sleep(args.pause)
        answers = workers.status()
        for answer in answers:
            if answer.value and answer.alive and not str(answer.value["launch"]).startswith(token):
                raise EchoError(
                    f"a run is alive on worker {answer.worker} of {workers}; stop it first"
                )
        launch_id = f"{token}-{attempt}"
        silent = next((answer for answer in answers if answer.value is None), None)
        failed = silent or _start(workers, launch_id, flags, args)
        if workers.shell.dry_run:
            return
        if failed is None:
            logger.info(f"the run is alive on {len(workers.ids)} workers of {workers}")
            return
        if silent is None:  # a silent worker may have another run
            workers.call(lambda worker: ["end", workers.run_name(worker), "KILL"])
        if _severity(failed, launch_id) == 2:
            for answer in workers.status({failed.worker: -_LAST_LINES}, among=[failed.worker]):
                for line in answer.value["lines"] if answer.value else []:
                    logger.info(f"{failed.worker}| {line}")
            raise EchoError(
                f"the run on worker {failed.worker} of {workers} {failed} right after its start; "
                "its last lines are above"
            )
        reason = f"worker {failed.worker} of {workers} did not start: {failed.problem or failed}"
    raise EchoError(f"{reason} ({args.tries} tries); the run was stopped on the others")


def _start(
    workers: Workers, launch_id: str, flags: Sequence[str], args: LaunchArgs
) -> Answer | None:
    """Start all processes; returns one that failed before they settled, if any did."""

    def arguments(worker: str) -> list[str]:
        train = [PYTHON, "-m", "echo_eqx", "train", *flags, *workers.train_flags(worker)]
        return ["start", workers.run_name(worker), launch_id, *train]

    answers, deadline = workers.call(arguments), time.monotonic() + args.settle
    while not workers.shell.dry_run:
        # When one process crashes, the others fail too, and its answer explains more than theirs.
        worst = max(answers, key=lambda answer: _severity(answer, launch_id))
        if _severity(worst, launch_id):
            return worst
        if time.monotonic() > deadline:
            break
        time.sleep(args.poll)
        answers = workers.status()
    return None


def _severity(answer: Answer, launch_id: str) -> int:
    """0: alive, finished or stopped on request; 1: not started or lost; 2: failed with an error."""
    value = answer.value
    if value is None or value["launch"] != launch_id:
        return 1
    code = value["code"]
    if value["alive"] or code in (0, EXIT_PREEMPTED):
        return 0
    return 1 if code is None or code == EXIT_PEER_LOST or code >= 128 else 2


def stop(workers: Workers, *, now: bool, wait: float, poll: float) -> None:
    """Stop the run on all workers: it saves and exits, or with `now` exits immediately.

    **Raises**: `EchoError` naming a worker that is still alive or silent after `wait` seconds.
    """
    unreached, deadline = list(workers.ids), time.monotonic() + wait
    while True:
        answers = workers.call(
            lambda worker: ["end", workers.run_name(worker), "KILL" if now else "TERM"],
            among=unreached,
        )
        unreached = [answer.worker for answer in answers if answer.value is None]
        if workers.shell.dry_run:
            return
        answers = workers.status()
        left = next((a for a in answers if a.value is None or a.alive), None)
        if left is None:
            break
        if time.monotonic() > deadline:
            raise EchoError(
                f"worker {left.worker} of {workers} did not end within {wait:g} s: {left}"
            )
        time.sleep(poll)
    for answer in answers:
        logger.info(f"worker {answer.worker}: {answer}")


def check_no_run(workers: Workers, advice: str) -> None:
    """**Raises**: `EchoError` with `advice` if a run is alive on a worker."""
    try:
        alive = [answer.worker for answer in workers.status() if answer.alive]
    except NotSetUp:
        return
    if alive:
        raise EchoError(f"a run is alive on worker {alive[0]} of {workers}; {advice}")


def follow(workers: Workers, ids: Sequence[str], lines: int, poll: float) -> dict[str, int | None]:
    """Print the last `lines` of each log, then new ones until the run ends; returns exit codes.

    **Raises**: `EchoError` for a worker that has had no run, or no longer answers.
    """
    positions, failures = dict.fromkeys(ids, -lines), Counter[str]()
    codes: dict[str, int | None] = {}
    while len(codes) < len(ids) and not reader_left():  # such as | head; a run may take days
        quiet = True
        answers = workers.status(positions, among=[i for i in ids if i not in codes])
        for answer in answers:
            worker, value = answer.worker, answer.value
            if value is None:
                failures[worker] += 1
                if failures[worker] > _MAX_FAILURES:
                    raise EchoError(
                        f"cannot read the log of worker {worker} of {workers}: {answer.problem}"
                    )
                continue
            if value["launch"] is None:
                raise EchoError(f"worker {worker} of {workers} has had no run")
            failures[worker] = 0
            for line in value["lines"]:
                print(f"{worker}| {line}", flush=True)
                quiet = False
            positions[worker] = value["position"]
            if not value["alive"] and not value["lines"]:
                codes[worker] = value["code"]
        if workers.shell.dry_run:
            break
        if quiet:
            time.sleep(poll)
    return codes
