"""Train on Cloud TPU pods (gcloud), on machines reached by ssh, or under a job engine.

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

The flags of train.py follow --. Every command is printed before it runs; --dry_run only prints.
setup, launch, status, logs and stop also take --hosts a,b,c instead of a pod. --run_dir must be on
a disk that all workers see and that outlives the pod, such as a mounted bucket or NFS.
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated

import tyro

from echo_eqx.command import note, parse
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.pods import gcloud
from echo_eqx.ops.pods.flags import check_train_flags, warn_of_own_disk
from echo_eqx.ops.pods.jobs import (
    KubernetesJob,
    SkyPilotJob,
    SlurmJob,
    jobset_yaml,
    skypilot_yaml,
    slurm_script,
)
from echo_eqx.ops.pods.launch import LaunchSettings, end, how_it_fares, launch
from echo_eqx.ops.pods.logs import follow
from echo_eqx.ops.pods.setup import SetupSettings, set_up
from echo_eqx.ops.pods.shell import Shell
from echo_eqx.ops.pods.workers import NotSetUp, TpuWorkers, Workers, ssh_hosts, status


@dataclass(frozen=True, kw_only=True)
class OfPod:
    name: str
    """Of the pod, and of the run on its workers."""
    zone: str | None = None
    """Such as us-central2-b; by default gcloud's own."""
    project: str | None = None
    """By default gcloud's own."""
    dry_run: bool = False
    """Print the commands, and run none."""


@dataclass(frozen=True, kw_only=True)
class OfWorkers(OfPod):
    hosts: str | None = None
    """Machines in place of a pod, such as a,me@b,c; ssh must reach them without a password."""
    coordinator: str | None = None
    """HOST:PORT by which all --hosts reach the first; by default its name, and port 8476."""
    ssh_flags: str = ""
    """More of ssh and scp, or of gcloud's: --ssh_flags='--internal-ip'."""
    timeout: float = 180.0
    """Seconds for a worker's answer."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    accelerator_type: str
    """As gcloud names it: v4-64, v5litepod-16, v5p-32, v6e-16."""
    runtime_version: str | None = None
    """Image of the workers; by default the one for the generation."""
    spot: bool = False
    """Cheaper, and may be preempted at any time."""
    valid_until: str | None = None
    """Give the request up after this time in the queue, such as 6h."""
    create_flags: str = ""
    """More of `gcloud compute tpus queued-resources create`: --create_flags='--network=mine'."""


@dataclass(frozen=True, kw_only=True)
class Installing:
    extra: str | None = None
    """Of the package: by default tpu on a pod, cuda on --hosts. '' for none."""
    before: str = ""
    """Shell text that every worker runs first, such as one that mounts the disk of --run_dir."""
    setup_tries: int = 5
    """How often each step of the setup is tried on a worker."""
    setup_pause: float = 15.0
    """Seconds between these: a new pod takes a while to let anyone in."""


@dataclass(frozen=True, kw_only=True)
class Launching:
    tries: int = 3
    """How often all are started, until none is missing."""
    settle: float = 15.0
    """Seconds that all must stay alive."""
    poll: float = 2.0
    """Seconds between two looks at the workers."""
    pause: float = 5.0
    """Seconds between two tries."""


@dataclass(frozen=True, kw_only=True)
class Create(Wanted, OfPod):
    """Ask for a pod, as a queued resource."""


@dataclass(frozen=True, kw_only=True)
class Setup(Installing, OfWorkers):
    """Install this source tree on all workers, and see that it is the same everywhere."""


@dataclass(frozen=True, kw_only=True)
class Launch(Launching, OfWorkers):
    """Start train.py on all workers at once; a worker that is missing ends all, for another try."""


@dataclass(frozen=True, kw_only=True)
class Status(OfWorkers):
    """How the pod and the run on each worker fare."""


@dataclass(frozen=True, kw_only=True)
class Logs(OfWorkers):
    """What the processes print."""

    follow: bool = False
    """Go on until the run has ended."""
    lines: int = 20
    """Last lines of each worker."""
    worker: int | None = None
    """Of this worker alone."""
    pause: float = 2.0
    """Seconds until a connection that broke is made again."""


@dataclass(frozen=True, kw_only=True)
class Stop(OfWorkers):
    """Stop the run: it saves, and ends with code 76."""

    now: bool = False
    """End it at once; the steps since the last checkpoint are lost."""
    wait: float = 900.0
    """Seconds for all to end in."""
    poll: float = 2.0
    """Seconds between two looks at the workers."""


@dataclass(frozen=True, kw_only=True)
class Delete(OfPod):
    """Delete the pod, unless a run is alive on it."""

    now: bool = False
    """Even then."""
    timeout: float = 180.0
    """Seconds for a worker's answer."""


@dataclass(frozen=True, kw_only=True)
class JobFile:
    name: str = "echo"
    """Of the job."""
    nodes: int = 1
    """Machines. For SkyPilot a TPU pod counts as one."""
    max_restarts: int = 20
    """Restarts before the job fails. SkyPilot counts errors only, not preemptions."""


@dataclass(frozen=True, kw_only=True)
class SkyPilot(JobFile):
    """Print a managed job for `sky jobs launch`; it restarts after preemptions."""

    accelerators: str
    """As SkyPilot names them: tpu-v4-64, tpu-v6e-16, H100:8."""
    spot: bool = False
    """Cheaper, and may be preempted at any time."""
    bucket: str | None = None
    """Bucket to mount at the parent folder of --run_dir, such as gs://MINE."""
    max_hourly_cost: float | None = None
    """US dollars; SkyPilot takes no machine that costs more."""


@dataclass(frozen=True, kw_only=True)
class Kubernetes(JobFile):
    """Print a JobSet for `kubectl apply -f -`, for GKE TPU slices or GPU nodes."""

    image: str
    """Container image with echo_eqx installed and its source tree as the working folder."""
    chips: int = 4
    """TPU chips or GPUs of each node."""
    tpu: str | None = None
    """GKE's name of the TPU, such as tpu-v4-podslice or tpu-v6e-slice; leave it out for GPUs."""
    topology: str | None = None
    """Topology of the TPU slice, such as 2x4x4."""
    claim: str | None = None
    """PersistentVolumeClaim to mount at the parent folder of --run_dir."""
    spot: bool = False
    """Run on GKE spot nodes."""
    max_hours: float = 168.0
    """Limit of each attempt; after it the job fails."""


@dataclass(frozen=True, kw_only=True)
class Slurm(JobFile):
    """Print a batch script for `sbatch`; srun starts one process for each GPU."""

    gpus: int = 8
    """GPUs of each node; 0 starts one process on each node."""
    time: str = "24:00:00"
    """Limit of each attempt. The run saves before it and is queued again."""
    sbatch_flags: str = ""
    """Further options of sbatch: --sbatch_flags='--partition=gpu --account=mine'."""


def main() -> None:
    ours, theirs = sys.argv[1:], None
    if "--" in ours:
        at = ours.index("--")
        ours, theirs = ours[:at], tuple(ours[at + 1 :])
    command = parse(
        Annotated[Create, tyro.conf.subcommand("create")]
        | Annotated[Setup, tyro.conf.subcommand("setup")]
        | Annotated[Launch, tyro.conf.subcommand("launch")]
        | Annotated[Status, tyro.conf.subcommand("status")]
        | Annotated[Logs, tyro.conf.subcommand("logs")]
        | Annotated[Stop, tyro.conf.subcommand("stop")]
        | Annotated[Delete, tyro.conf.subcommand("delete")]
        | Annotated[SkyPilot, tyro.conf.subcommand("skypilot")]
        | Annotated[Kubernetes, tyro.conf.subcommand("kubernetes")]
        | Annotated[Slurm, tyro.conf.subcommand("slurm")],
        __doc__,
        arguments=ours,
    )
    check_numbers(command)
    flags, run_dir = theirs or (), ""
    if isinstance(command, Launch | JobFile):
        if theirs is None:
            raise UsageError("expected the flags of train.py after --, got none")
        run_dir = check_train_flags(flags)
    elif theirs is not None:
        raise UsageError(f"-- {shlex.join(flags)}: expected no flags of train.py here")
    if isinstance(command, JobFile):
        print(job_file(command, flags, run_dir), end="")
        return
    shell = Shell(command.dry_run)
    match command:
        case Create():
            gcloud.create(shell, pod_of(command), request_of(command))
        case Setup():
            workers = workers_of(command, shell)
            check_no_run(shell, workers, command.timeout, "wanted it stopped before")
            set_up(shell, workers, setup_settings(command, "cuda" if command.hosts else "tpu"))
        case Launch():
            if command.hosts is None:
                warn_of_own_disk(run_dir)
            launch(shell, workers_of(command, shell), flags, launch_settings(command))
        case Status():
            show_status(command, shell)
        case Logs():
            show_logs(command, shell)
        case Stop():
            workers = workers_of(command, shell)
            seconds, poll, timeout = command.wait, command.poll, command.timeout
            end(shell, workers, now=command.now, seconds=seconds, poll=poll, timeout=timeout)
        case Delete():
            delete(command, shell)


def check_numbers(command: object) -> None:
    positive = ("max_hours", "max_hourly_cost", "timeout")
    least = {"tries": 1, "setup_tries": 1, "nodes": 1, "lines": 1, "chips": 1}
    for name, value in vars(command).items():
        if type(value) is int and value < least.get(name, 0):
            raise UsageError(f"{name} is {value}; wanted at least {least.get(name, 0)}")
        if type(value) is float and not 0 <= value < float("inf"):
            raise UsageError(f"{name} is {value}; wanted a number of at least 0")
        if name in positive and value == 0:
            raise UsageError(f"{name} is {value}; wanted a positive number")


def pod_of(command: OfPod) -> gcloud.Pod:
    return gcloud.named_pod(command.name, command.zone, command.project)


def request_of(command: Wanted) -> gcloud.Request:
    return gcloud.request(
        command.accelerator_type,
        command.runtime_version,
        command.spot,
        command.valid_until,
        command.create_flags,
    )


def setup_settings(command: Setup, usual: str) -> SetupSettings:
    extra = usual if command.extra is None else command.extra
    if re.fullmatch(r"[\w,-]*", extra) is None:
        raise UsageError(f"extra is {extra!r}; wanted names such as tpu")
    tries, pause = command.setup_tries, command.setup_pause
    return SetupSettings(extra, command.before, tries, command.timeout, pause)


def launch_settings(command: Launch) -> LaunchSettings:
    return LaunchSettings(
        command.tries, command.timeout, command.settle, command.poll, command.pause
    )


def workers_of(command: OfWorkers, shell: Shell) -> Workers:
    """The hosts, or the workers of the pod, which must be ready."""
    pod, flags = pod_of(command), gcloud.split_flags("ssh_flags", command.ssh_flags)
    if command.hosts is not None:
        return ssh_hosts(command.name, command.hosts, command.coordinator, flags)
    if command.coordinator is not None:
        raise UsageError("--coordinator is for --hosts: the workers of a pod find each other")
    if shell.dry_run:
        return TpuWorkers(pod, ("all",), flags)
    state = gcloud.look(shell, pod)
    if state.absent:
        raise gcloud.unknown(pod)
    if not state.ready or not state.workers:
        raise EchoError(f"{pod} is {state}; wanted READY")
    return TpuWorkers(pod, state.worker_ids, flags)


def show_status(command: Status, shell: Shell) -> None:
    if command.hosts is None and not shell.dry_run:
        pod = pod_of(command)
        state = gcloud.look(shell, pod)
        if state.absent:
            raise gcloud.unknown(pod)
        print(f"{pod}: {state}")
        if not state.ready:
            return
    workers = workers_of(command, shell)
    for answer in status(shell, workers, command.timeout, lines=1):
        last = answer.value["lines"] if answer.value else []
        print(f"worker {answer.worker}: {'; '.join([how_it_fares(answer), *last])}")


def show_logs(command: Logs, shell: Shell) -> None:
    workers = workers_of(command, shell)
    ids = workers.ids
    if command.worker is not None and not shell.dry_run:
        ids = tuple(worker for worker in ids if worker == str(command.worker))
        if not ids:
            raise UsageError(f"worker is {command.worker}; wanted 0 to {len(workers.ids) - 1}")
    if command.follow:
        codes = follow(shell, workers, ids, command.lines, command.pause)
        for worker, code in codes.items():
            note(f"worker {worker} has ended" + ("" if code is None else f" with code {code}"))
        return
    answers = status(shell, workers, command.timeout, lines=command.lines, among=ids)
    for answer in answers:
        value = answer.value
        for line in value["lines"] if value and value["mark"] else [how_it_fares(answer)]:
            print(f"{answer.worker}| {line}")
    if answers and all(answer.value is None for answer in answers):
        raise EchoError(f"no worker of {workers} answers: {answers[0].trouble}")


def delete(command: Delete, shell: Shell) -> None:
    pod = pod_of(command)
    if not command.now and not shell.dry_run:
        state = gcloud.look(shell, pod)
        if state.ready:
            workers = TpuWorkers(pod, state.worker_ids, ())
            check_no_run(shell, workers, command.timeout, "wanted it stopped before, or --now")
    gcloud.delete(shell, pod)


def check_no_run(shell: Shell, workers: Workers, timeout: float, wanted: str) -> None:
    if shell.dry_run:
        return
    try:
        answers = status(shell, workers, timeout)
    except NotSetUp:
        return
    alive = [answer.worker for answer in answers if answer.alive]
    if alive:
        raise EchoError(f"a run is alive on worker {alive[0]} of {workers}; {wanted}")


def job_file(command: JobFile, flags: tuple[str, ...], run_dir: str) -> str:
    name, nodes, restarts = command.name, command.nodes, command.max_restarts
    gcloud.named_pod(name, None, None)
    match command:
        case SkyPilot():
            if command.bucket is None:
                warn_of_own_disk(run_dir)
            else:
                check_mount("bucket", run_dir)
            job = SkyPilotJob(
                name,
                command.accelerators,
                nodes,
                command.spot,
                command.bucket,
                command.max_hourly_cost,
                restarts,
            )
            return skypilot_yaml(job, flags, run_dir)
        case Kubernetes():
            if (command.tpu is None) != (command.topology is None):
                raise UsageError("expected --tpu and --topology together, got one of them")
            if command.claim is None:
                warn_of_own_disk(run_dir)
            else:
                check_mount("claim", run_dir)
            job = KubernetesJob(
                name,
                command.image,
                nodes,
                command.chips,
                command.tpu,
                command.topology,
                command.claim,
                command.spot,
                restarts,
                command.max_hours,
            )
            return jobset_yaml(job, flags, run_dir)
        case Slurm():
            options = gcloud.split_flags("sbatch_flags", command.sbatch_flags)
            job = SlurmJob(name, nodes, command.gpus, command.time, restarts, options)
            return slurm_script(job, (sys.executable, "-m", "echo_eqx", "train", *flags))
        case _:
            raise TypeError(command)


def check_mount(flag: str, run_dir: str) -> None:
    """A volume is mounted at the parent folder of --run_dir, which must not hide the system's."""
    if not run_dir.startswith("/") or len(PurePosixPath(run_dir).parts) < 4:
        raise UsageError(
            f"--{flag} is mounted at the parent folder of --run_dir: expected --run_dir such as "
            f"/mnt/echo/run, got {run_dir}"
        )
