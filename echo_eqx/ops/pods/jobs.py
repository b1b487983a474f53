"""Job files for engines that outlive preemptions: a SkyPilot managed job, a Kubernetes JobSet and a
SLURM batch script, all for the same train.py command.

train.py exits with 75 if another process of the run is lost and with 76 once it was asked to stop
and has saved. Both mean "start the same command again", and each engine is told so. Exit codes 1
and 2 are errors that a restart would only repeat.
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from echo_eqx.sharding.hosts import EXIT_PEER_LOST, EXIT_PREEMPTED

PORT = 8476
RESTART_CODES = (EXIT_PEER_LOST, EXIT_PREEMPTED)
ERROR_CODES = (1, 2)
GRACE_SECONDS = 300
"""Between SIGTERM and SIGKILL; the run saves in them."""


@dataclass(frozen=True)
class SkyPilotJob:
    """A managed job of SkyPilot; a TPU pod is one node, named such as tpu-v4-64."""

    name: str
    accelerators: str
    nodes: int
    spot: bool
    bucket: str | None
    """Mounted at the parent folder of --run_dir, such as gs://mine."""
    max_hourly_cost: float | None
    """US dollars. SkyPilot chooses no machine that costs more."""
    max_restarts: int
    """After errors other than `RESTART_CODES`, such as a machine out of memory."""


def skypilot_yaml(job: SkyPilotJob, flags: Sequence[str], run_dir: str) -> str:
    """A task for `sky jobs launch` (https://docs.skypilot.co/en/latest/reference/yaml-spec.html).

    SkyPilot copies the source tree that the command is run in. On TPU pods JAX finds the other
    workers; on GPU nodes each node runs one process.
    """
    is_tpu = job.accelerators.startswith("tpu")
    together = ""
    if job.nodes > 1:
        together = (
            f' --coordinator "$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):{PORT}"'
            ' --num_processes "$SKYPILOT_NUM_NODES" --process_id "$SKYPILOT_NODE_RANK"'
        )
    resources: dict[str, Any] = {
        "accelerators": job.accelerators,
        "use_spot": job.spot,
        "job_recovery": {
            "max_restarts_on_errors": job.max_restarts,
            "recover_on_exit_codes": list(RESTART_CODES),
        },
    }
    if job.max_hourly_cost is not None:
        resources["max_hourly_cost"] = job.max_hourly_cost
    task: dict[str, Any] = {
        "name": job.name,
        "num_nodes": job.nodes,
        "workdir": ".",
        "resources": resources,
    }
    if job.bucket is not None:
        mount = str(PurePosixPath(run_dir).parent)
        task["file_mounts"] = {mount: {"source": job.bucket, "mode": "MOUNT"}}
    # Images may have an older Python than the package needs; uv brings one.
    task["setup"] = (
        "pip install --quiet uv\n"
        "[ -x ~/echo_eqx_venv/bin/python ] || uv venv --python '>=3.11,<3.14' ~/echo_eqx_venv\n"
        "uv pip install --quiet --python ~/echo_eqx_venv/bin/python "
        f"-e '.[{'tpu' if is_tpu else 'cuda'}]'\n"
    )
    train = shlex.join(["scripts/train.py", *flags])
    task["run"] = f"exec ~/echo_eqx_venv/bin/python {train}{together}\n"
    return _to_yaml(task)


@dataclass(frozen=True)
class KubernetesJob:
    """A JobSet with one job of `nodes` pods, either on a TPU slice or on GPU nodes."""

    name: str
    image: str
    """With echo_eqx installed, and its source tree as the working folder."""
    nodes: int
    chips: int
    """TPU chips or GPUs of each node."""
    tpu: str | None
    """GKE's name of the TPU, such as tpu-v4-podslice; None for GPUs."""
    topology: str | None
    """Of the TPU slice, such as 2x4x4."""
    claim: str | None
    """PersistentVolumeClaim mounted at the parent folder of --run_dir."""
    spot: bool
    max_restarts: int
    max_hours: float
    """Of each attempt; after them the JobSet fails."""


def jobset_yaml(job: KubernetesJob, flags: Sequence[str], run_dir: str) -> str:
    """A JobSet for `kubectl apply`, as GKE and xpk run them (https://jobset.sigs.k8s.io).

    A pod that is preempted or exits with 75 or 76 restarts all pods, `max_restarts` times. One that
    exits with 1 or 2 fails the JobSet.
    """
    train = shlex.join(["python", "scripts/train.py", *flags])
    if job.tpu is None and job.nodes > 1:  # on GKE's TPU slices JAX finds the other pods
        train += (
            f" --coordinator {job.name}-train-0-0.{job.name}:{PORT}"
            f' --num_processes {job.nodes} --process_id "$JOB_COMPLETION_INDEX"'
        )
    resource = "nvidia.com/gpu" if job.tpu is None else "google.com/tpu"
    container: dict[str, Any] = {
        "name": "train",
        "image": job.image,
        "command": ["sh", "-c", f"exec {train}"],
        "resources": {"limits": {resource: job.chips}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [container],
    }
    selector = {}
    if job.tpu is not None:
        selector["cloud.google.com/gke-tpu-accelerator"] = job.tpu
        selector["cloud.google.com/gke-tpu-topology"] = job.topology
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if selector:
        pod["nodeSelector"] = selector
    if job.claim is not None:
        mount = str(PurePosixPath(run_dir).parent)
        container["volumeMounts"] = [{"name": "runs", "mountPath": mount}]
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": job.claim}}]
    metadata: dict[str, Any] = {"name": job.name}
    if job.tpu is not None:  # one TPU slice is one node pool
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    spec = {
        "completionMode": "Indexed",
        "parallelism": job.nodes,
        "completions": job.nodes,
        "backoffLimit": 0,
        "activeDeadlineSeconds": math.ceil(job.max_hours * 3600),
        "podFailurePolicy": {
            "rules": [
                # The first rule that matches counts: a preempted pod may show any exit code.
                {
                    "action": "Count",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "train",
                        "operator": "In",
                        "values": list(ERROR_CODES),
                    },
                },
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
                "network": {"enableDNSHostnames": True, "subdomain": job.name},
                "failurePolicy": {
                    "maxRestarts": job.max_restarts,
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


@dataclass(frozen=True)
class SlurmJob:
    """A batch job in which srun starts one process for each GPU, as JAX expects under SLURM."""

    name: str
    nodes: int
    gpus: int
    """Of each node; 0 starts one process on each node."""
    time: str
    """Limit of each attempt."""
    max_restarts: int
    sbatch_flags: tuple[str, ...]
    """Further ones, such as --partition=gpu."""


def slurm_script(job: SlurmJob, command: Sequence[str]) -> str:
    """A script for `sbatch` (https://slurm.schedmd.com/sbatch.html).

    SLURM sends SIGTERM `GRACE_SECONDS` before the limit; the run saves, and the job is requeued.
    """
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={max(1, job.gpus)}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        f"--time={job.time}",
        f"--signal=TERM@{GRACE_SECONDS}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.name}-%j.log",
        *job.sbatch_flags,
    ]
    final = "|".join(map(str, (0, *ERROR_CODES)))
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {option}" for option in options),
            "# srun returns the highest exit code. Processes that lose a peer end by themselves.",
            f"srun --kill-on-bad-exit=0 --label {shlex.join(command)}",
            "code=$?",
            f"case $code in {final}) exit $code ;; esac",
            f'[ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ] && '
            'scontrol requeue "$SLURM_JOB_ID"',
            "exit $code",
            "",
        ]
    )


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as literal blocks, as a person would write them."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _to_yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
