"""A run on all workers or on none: start it, watch it settle, follow its logs, stop it."""

import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from echo_eqx.cli import reader_left
from echo_eqx.errors import EchoError
from echo_eqx.ops.pods.gcloud import GcloudError, describe
from echo_eqx.ops.pods.install import RetryArgs
from echo_eqx.ops.pods.workers import PYTHON, Answer, NotSetUp, TpuWorkers, WorkerArgs, Workers
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
    """Start train on all workers at once; if one does not start, end the others and try again."""

    settle: float = 15.0
    """Seconds for which all processes must stay alive before the launch counts."""


def launch(workers: Workers, flags: Sequence[str], args: LaunchArgs) -> None:
    """Start `train` with `flags` on all workers.

    The others would wait for a worker that does not start, so they are ended and all try again.

    **Raises**: `EchoError` if a run is alive already, a worker fails at every try, or a process
    ends with an error.
    """
    launches: set[str] = set()
    reason = ""
    for attempt in range(args.tries):
        if attempt:
            logger.info(f"{reason}; the others were ended; trying again in {args.pause:g} s")
            time.sleep(args.pause)
        answers = workers.status()
        others = (a for a in answers if a.value and a.alive and a.value["launch"] not in launches)
        if other := next(others, None):
            raise EchoError(f"a run is alive on worker {other.worker} of {workers}; stop it first")
        failed = _first_silent(answers)
        launch_id = secrets.token_hex(4)
        if failed is None:
            launches.add(launch_id)
            failed = _start(workers, launch_id, flags, args)
        if workers.shell.dry_run:
            return
        if failed is None:
            logger.info(f"the run is alive on {len(workers.ids)} workers of {workers}")
            return
        if launches:
            workers.call(lambda worker: ["end", workers.run_name(worker), "KILL"])
        if _crashed(failed, launch_id):
            for answer in workers.status({failed.worker: -_LAST_LINES}, among=[failed.worker]):
                for line in answer.value["lines"] if answer.value else []:
                    logger.info(f"{failed.worker}| {line}")
            raise EchoError(
                f"the run on worker {failed.worker} of {workers} {failed} at once; its last lines "
                "are above"
            )
        reason = f"worker {failed.worker} of {workers} did not start: {failed.problem or failed}"
    raise EchoError(f"{reason} ({args.tries} tries); the run is ended on the others")


def _start(
    workers: Workers, launch_id: str, flags: Sequence[str], args: LaunchArgs
) -> Answer | None:
    """Start all processes; one that failed before they settled, if any."""

    def arguments(worker: str) -> list[str]:
        train = [PYTHON, "-m", "echo_eqx", "train", *flags, *workers.train_flags(worker)]
        return ["start", workers.run_name(worker), launch_id, *train]

    answers, deadline = workers.call(arguments), time.monotonic() + args.settle
    while not workers.shell.dry_run:
        failed = [answer for answer in answers if _is_failed(answer, launch_id)]
        # A process that crashed took others with it, and says more than they do.
        failed.sort(key=lambda answer: not _crashed(answer, launch_id))
        if failed or time.monotonic() > deadline:
            return failed[0] if failed else None
        time.sleep(args.poll)
        answers = workers.status()
    return None


def _is_failed(answer: Answer, launch_id: str) -> bool:
    """Whether it did not start, or ended though it was neither done nor asked to stop."""
    value = answer.value
    if value is None or value["launch"] != launch_id:
        return True
    return not value["alive"] and value["code"] not in (0, EXIT_PREEMPTED)


def _crashed(answer: Answer, launch_id: str) -> bool:
    """Whether it ended by an error of its own, not by a signal or for want of another process."""
    value = answer.value
    if value is None or value["launch"] != launch_id or value["code"] is None:
        return False
    return value["code"] not in (0, EXIT_PEER_LOST, EXIT_PREEMPTED) and value["code"] < 128


def stop(workers: Workers, *, now: bool, wait: float, poll: float) -> None:
    """Stop the run on all workers: it saves and ends, or with `now` ends at once.

    **Raises**: `EchoError` naming a worker where it is alive, or that is silent, after `wait` s.
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
        silent = _first_silent(answers)
        left = silent or next((answer for answer in answers if answer.alive), None)
        if left is None:
            break
        if silent is not None and _is_deleted(workers):
            logger.info(f"{workers} is deleted, and the run on it has ended")
            return
        if time.monotonic() > deadline:
            raise EchoError(
                f"worker {left.worker} of {workers} did not end within {wait:g} s: {left}"
            )
        time.sleep(poll)
    for answer in answers:
        logger.info(f"worker {answer.worker}: {answer}")


def _first_silent(answers: list[Answer]) -> Answer | None:
    return next((answer for answer in answers if answer.value is None), None)


def _is_deleted(workers: Workers) -> bool:
    try:
        return isinstance(workers, TpuWorkers) and describe(workers.shell, workers.pod).absent
    except GcloudError:
        return False


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

    **Raises**: `EchoError` for a worker that has had no run, or does not answer any more.
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
