"""A SLURM job of the same training, where srun begins all processes at once."""

import shlex
from dataclasses import dataclass

from echo_eqx.sharding.hosts import EXIT_PEER_LOST, EXIT_PREEMPTED


@dataclass(frozen=True)
class Job:
    name: str
    nodes: int
    gpus: int
    """Of each node."""
    time: str
    save_seconds: int
    flags: tuple[str, ...]
    """Of sbatch, such as --partition=gpu."""


def batch_script(job: Job, command: tuple[str, ...]) -> str:
    """The script for sbatch. A process takes one GPU, as JAX does it under SLURM."""
    options = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={max(1, job.gpus)}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        f"--time={job.time}",
        f"--signal=TERM@{job.save_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.name}-%j.log",
        *job.flags,
    ]
    lines = [f"#SBATCH {option}" for option in options]
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "# When a process is gone the others end by themselves, each with a code of its own.",
            "# Then, and when the time is up, the job goes on from its last checkpoint.",
            f"srun --kill-on-bad-exit=0 --label {shlex.join(command)}",
            "code=$?",
            f'case $code in {EXIT_PEER_LOST}|{EXIT_PREEMPTED}) scontrol requeue "$SLURM_JOB_ID" ;; '
            "esac",
            "exit $code",
            "",
        ]
    )
