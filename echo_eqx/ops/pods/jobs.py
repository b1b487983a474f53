"""Job files for schedulers that restart a run after preemption.

A SkyPilot managed job, a Kubernetes JobSet and a SLURM batch script.

`train` exits with 75 if another process of the run is lost and with 76 if it was asked to stop and
has saved. Both mean "start the same command again", and each job file says so. Exit codes 1 and 2
are errors that a restart would only repeat.
"""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from echo_eqx.errors import UsageError
from echo_eqx.ops.pods.gcloud import SpotArgs, split_flags
from echo_eqx.ops.pods.train_flags import warn_if_local
from echo_eqx.ops.pods.workers import PORT
from echo_eqx.sharding.hosts import EXIT_PEER_LOST, EXIT_PREEMPTED

RESTART_CODES = (EXIT_PEER_LOST, EXIT_PREEMPTED)
ERROR_CODES = (1, 2)
GRACE_SECONDS = 300
"""Between SIGTERM and SIGKILL, for the run to save."""


@dataclass(frozen=True, kw_only=True)
class JobArgs:
    name: str = "echo"
    """Name of the job."""
    nodes: int = 1
    """Number of machines. For SkyPilot a TPU pod counts as one."""
    max_restarts: int = 20
    """Restarts before the job fails. SkyPilot counts errors only, not preemptions."""


@dataclass(frozen=True, kw_only=True)
class SkyPilotArgs(SpotArgs, JobArgs):
    """Print a managed job for `sky jobs launch`; it restarts after preemptions."""

    accelerators: str
    """Accelerators as SkyPilot names them: tpu-v4-64, tpu-v6e-16, H100:8."""
    bucket: str | None = None
    """Bucket to mount at the parent folder of --run_dir, such as gs://MINE."""
    max_hourly_cost: float | None = None
    """In US dollars; SkyPilot uses no machine that costs more."""


@dataclass(frozen=True, kw_only=True)
class KubernetesArgs(SpotArgs, JobArgs):
    """Print a JobSet for `kubectl apply -f -`, for GKE TPU slices or GPU nodes."""

    image: str
    """Container image with echo_eqx installed."""
    chips: int = 4
    """TPU chips or GPUs of each node."""
    tpu: str | None = None
    """GKE's name of the TPU, such as tpu-v4-podslice or tpu-v6e-slice; leave it out for GPUs."""
    topology: str | None = None
    """Topology of the TPU slice, such as 2x4x4."""
    claim: str | None = None
    """PersistentVolumeClaim to mount at the parent folder of --run_dir."""
    max_hours: float = 168.0
    """Time limit of each attempt, after which the job fails."""


@dataclass(frozen=True, kw_only=True)
class SlurmArgs(JobArgs):
    """Print a batch script for `sbatch`; srun starts one process for each GPU."""

    gpus: int = 8
    """GPUs of each node; 0 starts one process on each node."""
    time: str = "24:00:00"
    """Time limit of each attempt. Before it is reached, the run saves and is queued again."""
    sbatch_flags: str = ""
    """More flags of sbatch: --sbatch_flags='--partition=gpu --account=mine'."""


def job_file(args: JobArgs, flags: Sequence[str], run_dir: str) -> str:
    """The job file for one scheduler, which runs `train` with `flags`."""
    if isinstance(args, SlurmArgs):
        return _slurm_script(args, flags)
    if isinstance(args, SkyPilotArgs):
        content = _skypilot_task(args, flags, run_dir)
    else:
        assert isinstance(args, KubernetesArgs)
        content = _jobset(args, flags, run_dir)
    return yaml.safe_dump(content, sort_keys=False, width=1000, allow_unicode=True)


def _mount_point(flag: str, volume: str | None, run_dir: str) -> str | None:
    """The parent folder of --run_dir, if there is a volume to mount at it.

    **Raises**: `UsageError` if the volume would hide a system folder.
    """
    if volume is None:
        warn_if_local(run_dir)
        return None
    if not run_dir.startswith("/") or len(PurePosixPath(run_dir).parts) < 4:
        raise UsageError(
            f"--run_dir: expected a path such as /mnt/echo/run, because --{flag} is mounted at its "
            f"parent folder, got {run_dir}"
        )
    return str(PurePosixPath(run_dir).parent)


def _skypilot_task(args: SkyPilotArgs, flags: Sequence[str], run_dir: str) -> dict[str, Any]:
    """A task for `sky jobs launch` (https://docs.skypilot.co/en/latest/reference/yaml-spec.html).

    SkyPilot copies the source tree that the command is run in. On TPU pods JAX finds the other
    workers; on GPU nodes each node runs one process.
    """
    extra = "tpu" if args.accelerators.startswith("tpu") else "cuda"
    python = "~/echo_eqx_venv/bin/python"
    run = f"exec {python} {shlex.join(['-m', 'echo_eqx', 'train', *flags])}"
    if args.nodes > 1:
        run += (
            f' --coordinator "$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{PORT}"'
            ' --num_processes "$SKYPILOT_NUM_NODES" --process_id "$SKYPILOT_NODE_RANK"'
        )
    recovery = {
        "max_restarts_on_errors": args.max_restarts,
        "recover_on_exit_codes": list(RESTART_CODES),
    }
    resources: dict[str, Any] = {"accelerators": args.accelerators, "use_spot": args.spot}
    resources["job_recovery"] = recovery
    if args.max_hourly_cost is not None:
        resources["max_hourly_cost"] = args.max_hourly_cost
    mount = _mount_point("bucket", args.bucket, run_dir)
    return {
        "name": args.name,
        "num_nodes": args.nodes,
        "workdir": ".",
        "resources": resources,
        "file_mounts": {mount: {"source": args.bucket, "mode": "MOUNT"}} if mount else {},
        # Images may have an older Python than the package needs; uv brings one.
        "setup": "pip install --quiet uv && "
        f"([ -x {python} ] || uv venv --python '>=3.11,<3.14' ~/echo_eqx_venv) && "
        f"uv pip install --quiet --python {python} -e '.[{extra}]'",
        "run": run,
    }


def _jobset(args: KubernetesArgs, flags: Sequence[str], run_dir: str) -> dict[str, Any]:
    """A JobSet for `kubectl apply`, as GKE and xpk run them (https://jobset.sigs.k8s.io).

    A pod that is preempted or exits with 75 or 76 restarts all pods, `max_restarts` times. One that
    exits with 1 or 2 fails the JobSet.
    """
    if (args.tpu is None) != (args.topology is None):
        raise UsageError("expected --tpu and --topology together, got one of them")
    train = shlex.join(["python", "-m", "echo_eqx", "train", *flags])
    if args.tpu is None and args.nodes > 1:  # on GKE's TPU slices JAX finds the other pods
        train += (
            f" --coordinator {args.name}-train-0-0.{args.name}:{PORT}"
            f' --num_processes {args.nodes} --process_id "$JOB_COMPLETION_INDEX"'
        )
    metadata: dict[str, Any] = {"name": args.name}
    resource, selector = "nvidia.com/gpu", {}
    if args.tpu is not None:
        resource = "google.com/tpu"
        selector["cloud.google.com/gke-tpu-accelerator"] = args.tpu
        selector["cloud.google.com/gke-tpu-topology"] = args.topology
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"  # one TPU slice is one node pool
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    container: dict[str, Any] = {
        "name": "train",
        "image": args.image,
        "command": ["sh", "-c", f"exec {train}"],
        "resources": {"limits": {resource: args.chips}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "nodeSelector": selector,
        "containers": [container],
    }
    if (mount := _mount_point("claim", args.claim, run_dir)) is not None:
        container["volumeMounts"] = [{"name": "runs", "mountPath": mount}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": args.claim}}]
    preempted = {"type": "DisruptionTarget", "status": "True"}
    error_codes = {"containerName": "train", "operator": "In", "values": list(ERROR_CODES)}
    # The first matching rule applies: a preempted pod may have any exit code.
    rules = [
        {"action": "Count", "onPodConditions": [preempted]},
        {"action": "FailJob", "onExitCodes": error_codes},
    ]
    job = {
        "completionMode": "Indexed",
        "parallelism": args.nodes,
        "completions": args.nodes,
        "backoffLimit": 0,
        "activeDeadlineSeconds": math.ceil(args.max_hours * 3600),
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": pod},
    }
    fail_rule = {
        "name": "errorOrDeadline",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
    }
    spec = {
        "network": {"enableDNSHostnames": True, "subdomain": args.name},
        "failurePolicy": {"maxRestarts": args.max_restarts, "rules": [fail_rule]},
        "replicatedJobs": [{"name": "train", "replicas": 1, "template": {"spec": job}}],
    }
    api = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
    return {**api, "metadata": metadata, "spec": spec}


def _slurm_script(args: SlurmArgs, flags: Sequence[str]) -> str:
    """A script for `sbatch` (https://slurm.schedmd.com/sbatch.html).

    SLURM sends SIGTERM `GRACE_SECONDS` before the limit; the run saves, and the job is requeued.
    """
    options = [
        f"--job-name={args.name}",
        f"--nodes={args.nodes}",
        f"--ntasks-per-node={max(1, args.gpus)}",
        *([f"--gpus-per-node={args.gpus}"] if args.gpus else []),
        f"--time={args.time}",
        f"--signal=TERM@{GRACE_SECONDS}",
        "--requeue",
        "--open-mode=append",
        f"--output={args.name}-%j.log",
        *split_flags("sbatch_flags", args.sbatch_flags),
    ]
    train = shlex.join([sys.executable, "-m", "echo_eqx", "train", *flags])
    final = "|".join(map(str, (0, *ERROR_CODES)))
    lines = [f"#SBATCH {option}" for option in options]
    return (
        "\n".join(["#!/bin/bash", *lines])
        + f"""
# srun returns the highest exit code. Processes that lose a peer end by themselves.
srun --kill-on-bad-exit=0 --label {train}
code=$?
case $code in {final}) exit $code ;; esac
[ "${{SLURM_RESTART_COUNT:-0}}" -lt {args.max_restarts} ] && scontrol requeue "$SLURM_JOB_ID"
exit $code
"""
    )
