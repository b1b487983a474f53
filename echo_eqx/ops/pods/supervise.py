"""A preemptible pod from its creation to the end of the run, over as many pods as it takes."""

import shlex
import time
from dataclasses import dataclass
from typing import NoReturn

from echo_eqx.command import note
from echo_eqx.errors import EchoError
from echo_eqx.ops.pods.gcloud import GcloudError, Pod, PodState, Request, create, delete, look
from echo_eqx.ops.pods.launch import (
    LAST_LINES,
    Crashed,
    LaunchSettings,
    end,
    end_all,
    how_it_fares,
    is_own_error,
    launch,
    show_last_lines,
)
from echo_eqx.ops.pods.setup import SetupSettings, set_up
from echo_eqx.ops.pods.shell import Shell
from echo_eqx.ops.pods.tally import TallyFile
from echo_eqx.ops.pods.workers import Answer, NotSetUp, TpuWorkers, status
from echo_eqx.sharding.hosts import EXIT_PREEMPTED


@dataclass(frozen=True)
class SuperviseSettings:
    max_hours: float
    """Hours that pods of this name may exist, all together."""
    max_restarts: int = 3
    """Restarts in a row without a new checkpoint."""
    poll: float = 30.0
    grace: float = 120.0
    """Seconds that other workers get to end once one has."""
    stop_seconds: float = 900.0
    """Seconds to save in, when the hours are spent."""
    delete_when_done: bool = False


class Over(EchoError):
    """Supervising is over, and not because the run is done."""


@dataclass(frozen=True)
class Watched:
    """What is to be kept going: train.py with `flags`, which name `run_dir`, on such a pod."""

    pod: Pod
    wanted: Request
    flags: tuple[str, ...]
    run_dir: str
    ssh_flags: tuple[str, ...]
    setting_up: SetupSettings
    launching: LaunchSettings


def show_round(shell: Shell, watched: Watched) -> None:
    """The commands of a whole round, from no pod to none. For a dry run."""
    workers = TpuWorkers(watched.pod, ("all",), watched.ssh_flags)
    for group in ("tpu-vm", "queued-resources"):
        shell.say(watched.pod.describe_command(group))
    create(shell, watched.pod, watched.wanted)
    set_up(shell, workers, watched.setting_up)
    launch(shell, workers, watched.flags, watched.launching)
    status(shell, workers, watched.launching.timeout, run_dir=watched.run_dir)
    delete(shell, watched.pod)


class Supervisor:
    """Keeps a run going. The file of the tally outlives this process."""

    def __init__(
        self, shell: Shell, watched: Watched, tally: TallyFile, settings: SuperviseSettings
    ):
        self._shell, self._pod, self._watched = shell, watched.pod, watched
        self._launching = watched.launching
        self._tally, self._settings = tally, settings
        self._was_ready = False
        self._saw_run = False
        self._restarts = self._newest = 0
        self._some_ended: float | None = None
        self._said = ""

    def run(self) -> int:
        """The exit code of the run once it is done, or was stopped by `stop`.

        **Raises**: `EchoError` if what is first asked of gcloud fails, the run crashes, or the
        hours are spent.
        """
        first = True
        while True:
            try:
                code = self._step()
            except GcloudError as error:
                if first:
                    raise
                self._say(f"{error}; trying again every {self._settings.poll:g} s")
                code = None
            first = False
            if code is not None:
                return code
            time.sleep(self._settings.poll)

    def _step(self) -> int | None:
        state = look(self._shell, self._pod)
        tally = self._tally.now
        if state.ready or (state.waiting and state.created):
            self._tally.set(tally.begun(state.created))
        elif not state.waiting:
            self._tally.set(tally.ended())
        if self._tally.now.spent() >= self._settings.max_hours:
            self._stop_spending(state)
        if state.ready:
            self._was_ready = True
            return self._look_at_run(self._workers(state))
        if state.waiting or state.leaving:
            return self._say(f"{self._pod}: {state}")
        if state.node == "STOPPED" or (state.queued == "FAILED" and not self._was_ready):
            raise Over(f"{self._pod} is {state}; wanted one that can become ready")
        note(f"{self._pod} is {state}; {self._tally.now.spent():.2f} h are spent so far")
        if not state.absent:
            delete(self._shell, self._pod)
        create(self._shell, self._pod, self._watched.wanted)
        return None

    def _workers(self, state: PodState) -> TpuWorkers:
        return TpuWorkers(self._pod, state.worker_ids, self._watched.ssh_flags)

    def _look_at_run(self, workers: TpuWorkers) -> int | None:
        timeout = self._launching.timeout
        try:
            answers = status(
                self._shell, workers, timeout, lines=LAST_LINES, run_dir=self._watched.run_dir
            )
        except NotSetUp:
            return self._begin(workers, setup=True)
        known = [answer for answer in answers if answer.value is not None]
        if not known:
            trouble = answers[0].trouble if answers else "the pod names none"
            return self._say(f"no worker answers: {trouble}")
        alive = [answer for answer in known if answer.alive]
        if alive:
            self._saw_run = True
            return self._wait_for_the_rest(workers, known, alive)
        self._some_ended = None
        # What had ended before anyone looked was someone else's, who may have mended it since.
        fresh = all(answer.value and answer.value["mark"] is None for answer in known)
        if fresh or not self._saw_run:
            return self._begin(workers, setup=True)
        return self._after(workers, answers, known)

    def _wait_for_the_rest(
        self, workers: TpuWorkers, known: list[Answer], alive: list[Answer]
    ) -> None:
        """A process that is gone ends the others; where it does not, they hang."""
        if len(alive) == len(known):
            self._some_ended = None
            return self._say(f"the run is alive on {len(alive)} workers")
        self._some_ended = self._some_ended or time.monotonic()
        if time.monotonic() - self._some_ended > self._settings.grace:
            note(f"worker {alive[0].worker} is alive without the others, and is ended")
            end_all(self._shell, workers, self._launching.timeout)

    def _after(self, workers: TpuWorkers, answers: list[Answer], known: list[Answer]) -> int | None:
        """The run has ended everywhere."""
        values = [answer.value for answer in known if answer.value is not None]
        codes = {value["code"] for value in values}
        self._say("; ".join(f"worker {a.worker}: {how_it_fares(a)}" for a in answers))
        if codes == {0}:
            return self._done() if len(known) == len(answers) else None
        if any(value["stopped"] for value in values):
            if EXIT_PREEMPTED not in codes:
                self._over("the run was stopped and has not saved")
            self._leave()
            return EXIT_PREEMPTED
        newest = max(value["checkpoint"] or 0 for value in values)
        progress = newest > self._newest
        own = [a for a in known if a.value and is_own_error(a.value["code"])]
        own = [a for a in own if not _waited_in_vain(a)]
        if own and (not progress or 2 in codes):
            self._restarts += 1
            self._fail(workers, own[0])
        self._restarts = 0 if progress else self._restarts + 1
        if self._restarts > self._settings.max_restarts:
            self._fail(workers, known[0])
        note(f"the run goes on from its checkpoint of step {newest}" if newest else "once more")
        return self._begin(workers, setup=False)

    def _begin(self, workers: TpuWorkers, setup: bool) -> None:
        self._saw_run = True
        try:
            if setup:
                set_up(self._shell, workers, self._watched.setting_up)
            run_dir, timeout = self._watched.run_dir, self._launching.timeout
            before = status(self._shell, workers, timeout, run_dir=run_dir)
            self._newest = max((a.value["checkpoint"] or 0 for a in before if a.value), default=0)
            launch(self._shell, workers, self._watched.flags, self._launching)
        except Crashed as error:
            self._over(str(error))
        except GcloudError:
            raise
        except EchoError as error:
            reason = str(error)
            if not look(self._shell, self._pod).ready:
                return note(f"{reason}: the pod is gone")
            self._restarts += 1
            if self._restarts > self._settings.max_restarts:
                self._over(reason)
            self._saw_run = False
            note(f"{reason}; trying again")

    def _done(self) -> int:
        note(f"the run is done; {self._tally.now.spent():.2f} h were spent")
        self._leave()
        self._tally.forget()
        return 0

    def _fail(self, workers: TpuWorkers, answer: Answer) -> NoReturn:
        show_last_lines(self._shell, workers, answer.worker, self._launching.timeout)
        self._over(
            f"the run on worker {answer.worker} of {self._pod} {how_it_fares(answer)}, "
            f"{self._restarts} times without a new checkpoint; its last lines are above"
        )

    def _over(self, reason: str) -> NoReturn:
        try:
            self._leave()
        except GcloudError as error:
            note(str(error))
        raise Over(reason)

    def _leave(self) -> None:
        """Delete the pod, or say that it costs."""
        if self._settings.delete_when_done:
            delete(self._shell, self._pod)
            self._tally.set(self._tally.now.ended())
        else:
            command = shlex.join(self._pod.delete_command())
            note(f"{self._pod} is still there and costs, until: {command}")

    def _stop_spending(self, state: PodState) -> NoReturn:
        how = "no run was alive"
        if state.ready:
            try:
                ended = end(
                    self._shell,
                    self._workers(state),
                    now=False,
                    seconds=self._settings.stop_seconds,
                    poll=self._launching.poll,
                    timeout=self._launching.timeout,
                )
                how = "the run has saved and ended" if ended else "the pod was gone before"
            except EchoError as error:
                how = str(error)
        if not state.absent:
            delete(self._shell, self._pod)
        self._tally.set(self._tally.now.ended())
        spent, pods = self._tally.now.spent(), self._tally.now.pods
        raise Over(
            f"the limit of {self._settings.max_hours:g} hours is reached ({spent:.2f} over {pods} "
            f"pods): {how}, and {self._pod} is deleted; more --max_hours go on"
        )

    def _say(self, message: str) -> None:
        """What stays the same is said once."""
        if message != self._said:
            note(message)
        self._said = message


def _waited_in_vain(answer: Answer) -> bool:
    """train.py gave up on a process that did not come, which is no error of the run."""
    lines = answer.value["lines"] if answer.value else []
    return any("did not come together" in line for line in lines)
