"""Job files for engines that restart a run after preemptions: a SkyPilot managed job, a Kubernetes
JobSet and a SLURM batch script.

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
from echo_eqx.ops.pods.gcloud import SpotArgs, check_name, split_flags
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
    """Machines. For SkyPilot a TPU pod counts as one."""
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
    """US dollars; SkyPilot takes no machine that costs more."""


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
    """Limit of each attempt; after it the job fails."""


@dataclass(frozen=True, kw_only=True)
class SlurmArgs(JobArgs):
    """Print a batch script for `sbatch`; srun starts one process for each GPU."""

    gpus: int = 8
    """GPUs of each node; 0 starts one process on each node."""
    time: str = "24:00:00"
    """Limit of each attempt. The run saves before it and is queued again."""
    sbatch_flags: str = ""
    """More flags of sbatch: --sbatch_flags='--partition=gpu --account=mine'."""


def job_file(args: JobArgs, flags: Sequence[str], run_dir: str) -> str:
    """The job file of one engine, for `train` with `flags`."""
    check_name(args.name)
    match args:
        case SkyPilotArgs():
            return _skypilot_yaml(args, flags, run_dir)
        case KubernetesArgs():
            return _jobset_yaml(args, flags, run_dir)
        case SlurmArgs():
            return _slurm_script(args, flags)
        case _:
            raise TypeError(args)


def _mount_point(flag: str, volume: str | None, run_dir: str) -> str | None:
    """The parent folder of --run_dir, if there is a volume to mount at it.

    **Raises**: `UsageError` if the volume would hide a folder of the system.
    """
    if volume is None:
        warn_if_local(run_dir)
        return None
    if not run_dir.startswith("/") or len(PurePosixPath(run_dir).parts) < 4:
        raise UsageError(
            f"--{flag} is mounted at the parent folder of --run_dir: expected --run_dir such as "
            f"/mnt/echo/run, got {run_dir}"
        )
    return str(PurePosixPath(run_dir).parent)


def _skypilot_yaml(args: SkyPilotArgs, flags: Sequence[str], run_dir: str) -> str:
    """A task for `sky jobs launch` (https://docs.skypilot.co/en/latest/reference/yaml-spec.html).

    SkyPilot copies the source tree that the command is run in. On TPU pods JAX finds the other
    workers; on GPU nodes each node runs one process.
    """
    is_tpu = args.accelerators.startswith("tpu")
    rendezvous = ""
    if args.nodes > 1:
        rendezvous = (
            f' --coordinator "$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{PORT}"'
            ' --num_processes "$SKYPILOT_NUM_NODES" --process_id "$SKYPILOT_NODE_RANK"'
        )
    resources: dict[str, Any] = {
        "accelerators": args.accelerators,
        "use_spot": args.spot,
        "job_recovery": {
            "max_restarts_on_errors": args.max_restarts,
            "recover_on_exit_codes": list(RESTART_CODES),
        },
    }
    if args.max_hourly_cost is not None:
        resources["max_hourly_cost"] = args.max_hourly_cost
    task: dict[str, Any] = {
        "name": args.name,
        "num_nodes": args.nodes,
        "workdir": ".",
        "resources": resources,
    }
    if (mount := _mount_point("bucket", args.bucket, run_dir)) is not None:
        task["file_mounts"] = {mount: {"source": args.bucket, "mode": "MOUNT"}}
    # Images may have an older Python than the package needs; uv brings one.
    task["setup"] = (
        "pip install --quiet uv\n"
        "[ -x ~/echo_eqx_venv/bin/python ] || uv venv --python '>=3.11,<3.14' ~/echo_eqx_venv\n"
        "uv pip install --quiet --python ~/echo_eqx_venv/bin/python "
        f"-e '.[{'tpu' if is_tpu else 'cuda'}]'\n"
    )
    train = shlex.join(["-m", "echo_eqx", "train", *flags])
    task["run"] = f"exec ~/echo_eqx_venv/bin/python {train}{rendezvous}\n"
    return _to_yaml(task)


def _jobset_yaml(args: KubernetesArgs, flags: Sequence[str], run_dir: str) -> str:
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
    resource = "nvidia.com/gpu" if args.tpu is None else "google.com/tpu"
    container: dict[str, Any] = {
        "name": "train",
        "image": args.image,
        "command": ["sh", "-c", f"exec {train}"],
        "resources": {"limits": {resource: args.chips}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
    }
    selector = {}
    if args.tpu is not None:
        selector["cloud.google.com/gke-tpu-accelerator"] = args.tpu
        selector["cloud.google.com/gke-tpu-topology"] = args.topology
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if selector:
        pod["nodeSelector"] = selector
    if (mount := _mount_point("claim", args.claim, run_dir)) is not None:
        container["volumeMounts"] = [{"name": "runs", "mountPath": mount}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": args.claim}}]
    metadata: dict[str, Any] = {"name": args.name}
    if args.tpu is not None:  # one TPU slice is one node pool
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    error_codes = {"containerName": "train", "operator": "In", "values": list(ERROR_CODES)}
    spec = {
        "completionMode": "Indexed",
        "parallelism": args.nodes,
        "completions": args.nodes,
        "backoffLimit": 0,
        "activeDeadlineSeconds": math.ceil(args.max_hours * 3600),
        "podFailurePolicy": {
            "rules": [
                # The first rule that matches counts: a preempted pod may show any exit code.
                {
                    "action": "Count",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {"action": "FailJob", "onExitCodes": error_codes},
            ]
        },
        "template": {"spec": pod},
    }
    return _to_yaml(
        {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": {
                "network": {"enableDNSHostnames": True, "subdomain": args.name},
                "failurePolicy": {
                    "maxRestarts": args.max_restarts,
                    "rules": [
                        {
                            "name": "errorOrDeadline",
                            "action": "FailJobSet",
                            "onJobFailureReasons": ["PodFailurePolicy", "DeadlineExceeded"],
                        }
                    ],
                },
                "replicatedJobs": [{"name": "train", "replicas": 1, "template": {"spec": spec}}],
            },
        }
    )


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
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            "# srun returns the highest exit code. Processes that lose a peer end by themselves.",
            f"srun --kill-on-bad-exit=0 --label {train}",
            "code=$?",
            f"case $code in {final}) exit $code ;; esac",
            f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {args.max_restarts} ] && '
            'scontrol requeue "$SLURM_JOB_ID"',
            "exit $code",
            "",
        ]
    )


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as literal blocks."""

    def represent_text(self, data: str) -> yaml.Node:
        style = "|" if "\n" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _to_yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
