"""A run on all workers at once, or on none: begun, watched until it stands, and ended."""

import secrets
import time
from dataclasses import dataclass

from echo_eqx.command import note
from echo_eqx.errors import EchoError
from echo_eqx.ops.pods.gcloud import GcloudError, look
from echo_eqx.ops.pods.shell import Shell
from echo_eqx.ops.pods.workers import PYTHON, TRAIN, Answer, TpuWorkers, Workers, ask, status
from echo_eqx.sharding.hosts import EXIT_PEER_LOST, EXIT_PREEMPTED

LAST_LINES = 10
"""Of a log, to say why a process ended."""


@dataclass(frozen=True)
class LaunchSettings:
    tries: int = 3
    timeout: float = 180.0
    """Seconds for a worker's answer. gcloud itself tries for about a minute."""
    settle: float = 15.0
    """Seconds that all must stay alive for the launch to count."""
    poll: float = 2.0
    pause: float = 5.0
    """Seconds between tries."""


def launch(
    shell: Shell, workers: Workers, flags: tuple[str, ...], settings: LaunchSettings
) -> None:
    """Begin train.py with `flags` on all workers.

    A worker on which it does not begin would leave the others waiting: they are ended, and all are
    tried again.

    **Raises**: `EchoError` if a run is alive already, a worker is missing at every try, or a
    process ends with an error.
    """
    ours: set[str] = set()
    reason = ""
    for attempt in range(settings.tries):
        mark = secrets.token_hex(4)

        def begin(worker: str, mark: str = mark) -> list[str]:
            train = [PYTHON, TRAIN, *flags, *workers.train_flags(worker)]
            return ["start", workers.run_name(worker), mark, *train]

        if shell.dry_run:
            status(shell, workers, settings.timeout)
            ask(shell, workers, begin, settings.timeout, asks=False)
            return
        answers = status(shell, workers, settings.timeout)
        others = [a for a in answers if a.alive and a.value and a.value["mark"] not in ours]
        if others:
            raise EchoError(
                f"a run is alive on worker {others[0].worker} of {workers}; wanted none: stop it "
                "before"
            )
        trouble = _silent(answers)
        if trouble is None:
            ours.add(mark)
            answers = ask(shell, workers, begin, settings.timeout, asks=False)
            trouble = _missing(answers, mark) or _settle(shell, workers, mark, settings)
        if trouble is None:
            note(f"the run is alive on {len(answers)} workers of {workers}")
            return
        if ours:
            end_all(shell, workers, settings.timeout)
        if _crashed_itself(trouble, mark):
            raise _crashed(shell, workers, trouble, settings.timeout)
        reason = f"worker {trouble.worker} of {workers} did not start ({trouble.trouble})"
        if attempt + 1 < settings.tries:
            note(f"{reason}; the others are ended, and all tried again in {settings.pause:g} s")
            time.sleep(settings.pause)
    raise EchoError(f"{reason}, in {settings.tries} tries; on the others the run is ended")


def end(
    shell: Shell, workers: Workers, *, now: bool, seconds: float, poll: float, timeout: float
) -> bool:
    """Stop the run everywhere: it saves and ends, or, with `now`, ends at once.

    False if the pod was deleted meanwhile.

    **Raises**: `EchoError` naming a worker where it is alive after `seconds`, or that says nothing.
    """

    def tell(worker: str) -> list[str]:
        return ["end", workers.run_name(worker), "KILL" if now else "TERM", "stopped"]

    untold, until = list(workers.ids), time.monotonic() + seconds
    while True:
        if untold:
            told = ask(shell, workers, tell, timeout, among=untold, asks=False)
            untold = [answer.worker for answer in told if answer.value is None]
        if shell.dry_run:
            return True
        answers = status(shell, workers, timeout)
        silent = _silent(answers)
        left = silent or next((answer for answer in answers if answer.alive), None)
        if left is None:
            break
        if silent is not None and _is_gone(shell, workers):
            note(f"{workers} is deleted, and what ran on it is over")
            return False
        if time.monotonic() > until:
            raise EchoError(
                f"worker {left.worker} of {workers} has not ended in {seconds:g} s: "
                f"{how_it_fares(left)}"
            )
        time.sleep(poll)
    for answer in answers:
        note(f"worker {answer.worker}: {how_it_fares(answer)}")
    return True


def end_all(shell: Shell, workers: Workers, timeout: float) -> None:
    """End what is left of a run at once, as far as its workers can be reached."""
    ask(shell, workers, lambda i: ["end", workers.run_name(i), "KILL"], timeout, asks=False)


def how_it_fares(answer: Answer) -> str:
    """A worker's run in a few words."""
    value = answer.value
    if value is None:
        return f"no answer ({answer.trouble})"
    if value["alive"]:
        return "alive"
    if value["mark"] is None:
        return "no run yet"
    if value["code"] is None:
        return "gone with its machine"
    return f"ended with code {value['code']}"


def is_own_error(code: int | None) -> bool:
    """Rather than by a signal, for want of another process, or when asked to."""
    return code is not None and code not in (0, EXIT_PEER_LOST, EXIT_PREEMPTED) and code < 128


def _silent(answers: list[Answer]) -> Answer | None:
    return next((answer for answer in answers if answer.value is None), None)


def _is_gone(shell: Shell, workers: Workers) -> bool:
    """Their pod is there no more, as far as gcloud can say."""
    try:
        return isinstance(workers, TpuWorkers) and look(shell, workers.pod).absent
    except GcloudError:
        return False


def _missing(answers: list[Answer], mark: str) -> Answer | None:
    """One that did not begin, or has ended since, unless it was done or stopped."""
    missing = []
    for answer in answers:
        value = answer.value
        if value is None:
            missing.append(answer)
            continue
        ended = not value["alive"] and value["code"] != 0 and not value["stopped"]
        if value["mark"] != mark or ended:
            missing.append(Answer(answer.worker, value, how_it_fares(answer)))
    # A process that crashed has ended others, and says more than they do.
    missing.sort(key=lambda answer: not _crashed_itself(answer, mark))
    return missing[0] if missing else None


def _crashed_itself(answer: Answer, mark: str) -> bool:
    value = answer.value
    return value is not None and value["mark"] == mark and is_own_error(value["code"])


def _settle(shell: Shell, workers: Workers, mark: str, settings: LaunchSettings) -> Answer | None:
    until = time.monotonic() + settings.settle
    while True:
        trouble = _missing(status(shell, workers, settings.timeout), mark)
        if trouble is not None or time.monotonic() > until:
            return trouble
        time.sleep(settings.poll)


def _crashed(shell: Shell, workers: Workers, answer: Answer, timeout: float) -> EchoError:
    assert answer.value is not None
    show_last_lines(shell, workers, answer.worker, timeout)
    return EchoError(
        f"the run on worker {answer.worker} of {workers} ended at once with code "
        f"{answer.value['code']}; its last lines are above"
    )


def show_last_lines(shell: Shell, workers: Workers, worker: str, timeout: float) -> None:
    """Print the end of a worker's log."""
    for answer in status(shell, workers, timeout, lines=LAST_LINES, among=[worker]):
        for line in answer.value["lines"] if answer.value else []:
            note(f"{worker}| {line}")
