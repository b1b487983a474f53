"""Workers: run a command on each machine and collect the answers."""

import json
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.pods.gcloud import Pod, describe, split_flags
from echo_eqx.ops.pods.shell import Completed, Shell, failure_reason

# On a worker, relative to its home folder.
SOURCE = "echo_eqx/source"
PYTHON = "echo_eqx/venv/bin/python"
PROGRAM = f"{SOURCE}/echo_eqx/ops/pods/worker.py"

PORT = 8476
"""Port of the coordinator, on the first host."""

_SSH = ("ConnectTimeout=20", "ServerAliveInterval=15")  # a lost connection ends within a minute


@dataclass(frozen=True, kw_only=True)
class WorkerArgs(Pod):
    hosts: str | None = None
    """Machines to use instead of a pod, such as a,me@b,c; ssh must not ask for a password."""
    coordinator: str | None = None
    """HOST:PORT at which all --hosts reach the first one; by default its name and port 8476."""
    ssh_flags: str = ""
    """More flags for ssh and scp, or for gcloud's: --ssh_flags='--internal-ip'."""
    timeout: float = 180.0
    """Seconds to wait for a worker's answer."""


@dataclass(frozen=True)
class Answer:
    """The answer of a worker, or the reason why there is none."""

    worker: str
    value: dict[str, Any] | None
    problem: str = ""

    @property
    def alive(self) -> bool:
        return self.value is not None and self.value["alive"]

    def __str__(self) -> str:
        """The state of the run on this worker, in words."""
        if self.value is None:
            return f"no answer ({self.problem})"
        if self.alive:
            return "alive"
        if self.value["launch"] is None:
            return "no run yet"
        code = self.value["code"]
        return "lost with its machine" if code is None else f"ended with code {code}"


class NotSetUp(EchoError):
    """A worker has no copy of the package."""


@dataclass(frozen=True)
class Workers:
    """Machines that each run one process of a run: `hosts` reached by ssh, or those of `pod`."""

    shell: Shell
    pod: Pod
    ids: tuple[str, ...]
    ssh_flags: tuple[str, ...]
    timeout: float
    hosts: tuple[str, ...] = ()
    coordinator: str = ""

    def command(self, worker: str, remote: list[str]) -> list[str]:
        """The command that runs `remote` on a worker."""
        if self.hosts:
            return [*self._ssh("ssh"), self.hosts[int(worker)], shlex.join(remote)]
        return self._gcloud("ssh", worker, self.pod.name, f"--command={shlex.join(remote)}")

    def copy_command(self, worker: str, file: Path, target: str) -> list[str]:
        """The command that copies a file to `target` in a worker's home folder."""
        if self.hosts:
            return [*self._ssh("scp"), str(file), f"{self.hosts[int(worker)]}:{target}"]
        return self._gcloud("scp", worker, str(file), f"{self.pod.name}:{target}")

    def _ssh(self, program: str) -> list[str]:
        return [program, *(f"-o{option}" for option in ("BatchMode=yes", *_SSH)), *self.ssh_flags]

    def _gcloud(self, program: str, worker: str, *words: str) -> list[str]:
        options = [f"--{program}-flag=-o{option}" for option in _SSH]
        flags = [f"--worker={worker}", *options, *self.ssh_flags]
        return self.pod.command("tpu-vm", program, *words, *flags)

    def run_name(self, worker: str) -> str:
        """Name of the run's folder on a worker; differs by host, since hosts may share a home."""
        return f"{self.pod.name}-{worker}" if self.hosts else self.pod.name

    def train_flags(self, worker: str) -> list[str]:
        """Flags of `train` that differ between workers. On a pod there are none: JAX finds them."""
        if not self.hosts:
            return []
        count = str(len(self.hosts))
        rendezvous = ["--coordinator", self.coordinator, "--num_processes", count]
        return [*rendezvous, "--process_id", worker]

    def call(
        self,
        arguments: Callable[[str], list[str]],
        *,
        among: Iterable[str] | None = None,
        is_query: bool = False,
    ) -> list[Answer]:
        """Run `worker.py` with `arguments(worker)` on all workers in parallel; [] in a dry run.

        **Raises**: `NotSetUp` if a worker has no `worker.py`.
        """
        ids = tuple(self.ids if among is None else among)
        commands = [self.command(i, [PYTHON, "-P", PROGRAM, *arguments(i)]) for i in ids]
        completed = self.shell.run_all(commands, self.timeout, is_query=is_query)
        for worker, end in zip(ids, completed, strict=bool(completed)):
            if end.returncode == 127 or "can't open file" in end.stderr:
                raise NotSetUp(f"worker {worker} of {self} has no {PROGRAM}; run setup first")
        return [_parse(*pair) for pair in zip(ids, completed, strict=bool(completed))]

    def status(
        self, starts: dict[str, int] | None = None, *, among: Iterable[str] | None = None
    ) -> list[Answer]:
        """State and log of each worker, from byte `starts[worker]`, or the last -start lines."""

        def arguments(worker: str) -> list[str]:
            return ["status", self.run_name(worker), str((starts or {}).get(worker, -1))]

        return self.call(arguments, among=among, is_query=True)

    def __str__(self) -> str:
        return self.pod.name


def find_workers(shell: Shell, args: WorkerArgs) -> Workers:
    """The hosts, or the workers of the pod.

    **Raises**: `UsageError` for bad hosts, `EchoError` for a pod that is not ready.
    """
    ssh_flags = split_flags("ssh_flags", args.ssh_flags)
    if args.hosts is not None:
        hosts = tuple(args.hosts.split(","))
        for host in hosts:
            if re.fullmatch(r"(\w[\w.-]*@)?\w[\w.-]*", host) is None:
                raise UsageError(f"--hosts: expected names such as a,me@b,c, got {host!r}")
        if len(set(hosts)) < len(hosts):
            raise UsageError(f"--hosts: expected each host once, got {args.hosts}")
        coordinator = args.coordinator or f"{hosts[0].rpartition('@')[2]}:{PORT}"
        if re.fullmatch(r".+:\d+", coordinator) is None:
            raise UsageError(f"--coordinator: expected HOST:PORT, got {coordinator!r}")
        ids = tuple(map(str, range(len(hosts))))
        return Workers(shell, args, ids, ssh_flags, args.timeout, hosts, coordinator)
    if args.coordinator is not None:
        raise UsageError("--coordinator needs --hosts: the workers of a pod find each other")
    ids = ("all",)
    if not shell.dry_run:
        state = describe(shell, args)
        if not state.ready:
            raise EchoError(f"expected {args} to be READY, got {state}")
        ids = tuple(map(str, range(state.num_workers)))
    return Workers(shell, args, ids, ssh_flags, args.timeout)


def _parse(worker: str, completed: Completed) -> Answer:
    if completed.returncode != 0:
        return Answer(worker, None, failure_reason(completed))
    try:  # lines before the last one are from a connection that broke
        return Answer(worker, json.loads(completed.stdout.rstrip().rpartition("\n")[2]))
    except ValueError:
        return Answer(worker, None, "unparseable reply")
