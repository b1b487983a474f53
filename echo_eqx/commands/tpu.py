"""Train on Cloud TPU pods (gcloud), on machines reached by ssh, or under a job scheduler.

    echo-eqx tpu create --name echo --zone us-central2-b --accelerator_type v4-64 --spot
    echo-eqx tpu setup --name echo --zone us-central2-b
    echo-eqx tpu launch --name echo --zone us-central2-b -- --data ... --run_dir /mnt/echo
    echo-eqx tpu logs --name echo --zone us-central2-b --follow

These work on one pod until it is preempted. SkyPilot, Kubernetes and SLURM restart a run by
themselves; these commands print the job file:

    echo-eqx tpu skypilot --accelerators tpu-v4-64 --spot --bucket gs://MINE \\
        -- --data ... --run_dir /mnt/echo/run > echo.yaml && sky jobs launch echo.yaml
    echo-eqx tpu kubernetes --image IMAGE --tpu tpu-v4-podslice --topology 2x4x4 \\
        --nodes 8 --chips 4 --claim runs -- --data ... --run_dir /mnt/echo/run | kubectl apply -f -
    echo-eqx tpu slurm --nodes 4 --gpus 8 -- --data ... --run_dir /shared/run | sbatch

The flags of train follow --. Every command is printed before it runs; --dry_run only prints.
setup, launch, status, logs and stop also take --hosts a,b,c instead of a pod. --run_dir must be on
a disk that all workers see and that outlives the pod, such as a mounted bucket or NFS.
"""

import logging
import shlex
import sys
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import subcommand

from echo_eqx.cli import parse
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.pods import gcloud
from echo_eqx.ops.pods.gcloud import CreateArgs, Pod
from echo_eqx.ops.pods.install import InstallArgs, install
from echo_eqx.ops.pods.jobs import JobArgs, KubernetesArgs, SkyPilotArgs, SlurmArgs, job_file
from echo_eqx.ops.pods.launch import LaunchArgs, PollArgs, check_no_run, follow, launch, stop
from echo_eqx.ops.pods.shell import Shell
from echo_eqx.ops.pods.train_flags import check_train_flags, warn_if_local
from echo_eqx.ops.pods.workers import WorkerArgs, find_workers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Status(WorkerArgs):
    """Show the state of the pod and of the run on each worker."""


@dataclass(frozen=True, kw_only=True)
class Logs(PollArgs, WorkerArgs):
    """Print the logs of the run; each line starts with the number of its worker."""

    follow: bool = False
    """Keep printing until the run has ended."""
    lines: int = 20
    """Number of last lines to print for each worker."""
    worker: int | None = None
    """Print only this worker's log."""


@dataclass(frozen=True, kw_only=True)
class Stop(PollArgs, WorkerArgs):
    """Stop the run: it saves, and exits with code 76."""

    now: bool = False
    """Kill it; you lose the steps since the last checkpoint."""
    wait: float = 900.0
    """Seconds to wait for all processes to exit."""


@dataclass(frozen=True, kw_only=True)
class Delete(Pod):
    """Delete the pod, unless a run is alive on it."""

    now: bool = False
    """Delete it even if a run is alive."""


def main() -> None:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    words, separator, train_flags = sys.argv[1:at], at < len(sys.argv), sys.argv[at + 1 :]
    args = parse(
        Annotated[CreateArgs, subcommand("create")]
        | Annotated[InstallArgs, subcommand("setup")]
        | Annotated[LaunchArgs, subcommand("launch")]
        | Annotated[Status, subcommand("status")]
        | Annotated[Logs, subcommand("logs")]
        | Annotated[Stop, subcommand("stop")]
        | Annotated[Delete, subcommand("delete")]
        | Annotated[SkyPilotArgs, subcommand("skypilot")]
        | Annotated[KubernetesArgs, subcommand("kubernetes")]
        | Annotated[SlurmArgs, subcommand("slurm")],
        __doc__,
        arguments=words,
    )
    check_numbers(args)
    gcloud.check_name(args.name)
    run_dir = ""
    if isinstance(args, LaunchArgs | JobArgs):
        if not separator:
            raise UsageError("expected the flags of train after --, got none")
        run_dir = check_train_flags(train_flags)
    elif separator:
        raise UsageError(
            f"expected no flags of train for this command, got -- {shlex.join(train_flags)}"
        )
    if isinstance(args, JobArgs):
        print(job_file(args, train_flags, run_dir), end="")
        return
    shell = Shell(args.dry_run)
    match args:
        case CreateArgs():
            gcloud.create(shell, args)
        case InstallArgs():
            workers = find_workers(shell, args)
            check_no_run(workers, "stop it first")
            install(workers, args)
        case LaunchArgs():
            if args.hosts is None:
                warn_if_local(run_dir)
            launch(find_workers(shell, args), train_flags, args)
        case Status():
            show_status(args, shell)
        case Logs():
            show_logs(args, shell)
        case Stop():
            stop(find_workers(shell, args), now=args.now, wait=args.wait, poll=args.poll)
        case Delete():
            if not args.now and not shell.dry_run and gcloud.describe(shell, args).ready:
                at = WorkerArgs(name=args.name, zone=args.zone, project=args.project)
                check_no_run(find_workers(shell, at), "stop it first, or add --now")
            gcloud.delete(shell, args)


def check_numbers(args: object) -> None:
    positive = ("max_hours", "max_hourly_cost", "timeout")
    at_least_1 = ("tries", "nodes", "lines", "chips")
    for name, value in vars(args).items():
        least = 1 if name in at_least_1 else 0
        if isinstance(value, int | float) and not least <= value < float("inf"):
            raise UsageError(f"--{name}: expected at least {least}, got {value}")
        if name in positive and value == 0:
            raise UsageError(f"--{name}: expected a positive number, got {value}")


def show_status(args: Status, shell: Shell) -> None:
    if args.hosts is None and not shell.dry_run:
        state = gcloud.describe(shell, args)
        print(f"{args}: {state}")
        if not state.ready:
            return
    for answer in find_workers(shell, args).status():
        lines = answer.value["lines"] if answer.value else []
        print(f"worker {answer.worker}: {'; '.join([str(answer), *lines])}")


def show_logs(args: Logs, shell: Shell) -> None:
    workers = find_workers(shell, args)
    ids = workers.ids
    if args.worker is not None and not shell.dry_run:
        ids = tuple(worker for worker in ids if worker == str(args.worker))
        if not ids:
            raise UsageError(f"--worker: expected 0 to {len(workers.ids) - 1}, got {args.worker}")
    if args.follow:
        for worker, code in follow(workers, ids, args.lines, args.poll).items():
            logger.info(
                f"worker {worker} has ended" + ("" if code is None else f" with code {code}")
            )
        return
    answers = workers.status(dict.fromkeys(ids, -args.lines), among=ids)
    for answer in answers:
        value = answer.value
        for line in value["lines"] if value and value["launch"] else [answer]:
            print(f"{answer.worker}| {line}")
    if answers and all(answer.value is None for answer in answers):
        raise EchoError(f"no worker of {workers} answers: {answers[0].problem}")
