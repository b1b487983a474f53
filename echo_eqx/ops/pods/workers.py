"""Workers: how a command is run on one of them, and what several answer."""

import json
import re
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.pods.gcloud import Pod
from echo_eqx.ops.pods.shell import Done, Shell

# On a worker, from its home folder.
SOURCE = "echo_eqx/source"
PYTHON = "echo_eqx/venv/bin/python"
PROGRAM = f"{SOURCE}/echo_eqx/ops/pods/worker.py"
TRAIN = f"{SOURCE}/scripts/train.py"

PORT = 8476
"""At which the first host coordinates, unless told otherwise."""

# A connection that is gone is noticed within a minute.
_SSH = ("ConnectTimeout=20", "ServerAliveInterval=15")


@dataclass(frozen=True)
class TpuWorkers:
    """Workers of a pod, which find each other by themselves."""

    pod: Pod
    ids: tuple[str, ...]
    ssh_flags: tuple[str, ...] = ()

    def command(self, worker: str, remote: list[str]) -> list[str]:
        """What runs `remote` on a worker."""
        options = [f"--ssh-flag=-o{option}" for option in _SSH]
        flags = [f"--worker={worker}", f"--command={shlex.join(remote)}", *options]
        return self.pod.command("tpu-vm", "ssh", self.pod.name, *flags, *self.ssh_flags)

    def copy(self, worker: str, file: Path, target: str) -> list[str]:
        """What copies a file to `target` in a worker's home folder."""
        options = [f"--scp-flag=-o{option}" for option in _SSH]
        flags = [str(file), f"{self.pod.name}:{target}", f"--worker={worker}", *options]
        return self.pod.command("tpu-vm", "scp", *flags, *self.ssh_flags)

    def run_name(self, worker: str) -> str:
        """Folder of the run on a worker."""
        return self.pod.name

    def train_flags(self, worker: str) -> list[str]:
        """What train.py must be told on a worker besides the settings of the run."""
        return []

    def __str__(self) -> str:
        return self.pod.name


@dataclass(frozen=True)
class SshHosts:
    """Machines that plain ssh reaches, of which the first coordinates."""

    name: str
    hosts: tuple[str, ...]
    coordinator: str
    ssh_flags: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(str(index) for index in range(len(self.hosts)))

    def command(self, worker: str, remote: list[str]) -> list[str]:
        """What runs `remote` on a worker."""
        return ["ssh", *self._options(), self.hosts[int(worker)], shlex.join(remote)]

    def copy(self, worker: str, file: Path, target: str) -> list[str]:
        """What copies a file to `target` in a worker's home folder."""
        return ["scp", *self._options(), str(file), f"{self.hosts[int(worker)]}:{target}"]

    def _options(self) -> list[str]:
        return [f"-o{option}" for option in ("BatchMode=yes", *_SSH)] + list(self.ssh_flags)

    def run_name(self, worker: str) -> str:
        """Folder of the run on a worker; hosts may share a home folder."""
        return f"{self.name}-{worker}"

    def train_flags(self, worker: str) -> list[str]:
        """What train.py must be told on a worker besides the settings of the run."""
        count = str(len(self.hosts))
        together = ["--coordinator", self.coordinator, "--num_processes", count]
        return [*together, "--process_id", worker]

    def __str__(self) -> str:
        return self.name


def ssh_hosts(
    name: str, hosts: str, coordinator: str | None, ssh_flags: tuple[str, ...]
) -> SshHosts:
    """Hosts from a text such as a,me@b,c. **Raises**: `UsageError` for what is no such text."""
    names = tuple(hosts.split(","))
    for host in names:
        if re.fullmatch(r"(\w[\w.-]*@)?\w[\w.-]*", host) is None:
            raise UsageError(f"hosts has {host!r}; wanted names such as a,me@b,c")
    if len(set(names)) < len(names):
        raise UsageError(f"hosts is {hosts}; wanted each host once")
    coordinator = coordinator or f"{names[0].rpartition('@')[2]}:{PORT}"
    if re.fullmatch(r".+:\d+", coordinator) is None:
        raise UsageError(f"coordinator is {coordinator!r}; wanted HOST:PORT")
    return SshHosts(name, names, coordinator, ssh_flags)


Workers = TpuWorkers | SshHosts


@dataclass(frozen=True)
class Answer:
    """What a worker said; None and the trouble if it said nothing."""

    worker: str
    value: dict[str, Any] | None
    trouble: str = ""

    @property
    def alive(self) -> bool:
        return self.value is not None and self.value["alive"]


class NotSetUp(EchoError):
    """A worker has no package that could be asked."""


def ask(
    shell: Shell,
    workers: Workers,
    remote: Callable[[str], list[str]],
    timeout: float,
    *,
    among: Iterable[str] | None = None,
    asks: bool = True,
) -> list[Answer]:
    """Ask all, or some, at once by `worker.py` with the arguments of `remote`; [] in a dry run.

    **Raises**: `NotSetUp` if it is not there on one of them.
    """
    ids = tuple(workers.ids if among is None else among)
    commands = [workers.command(i, [PYTHON, "-P", PROGRAM, *remote(i)]) for i in ids]
    done = shell.run_all(commands, timeout, asks=asks)
    answers = [_answer(i, d, timeout) for i, d in zip(ids, done, strict=bool(done))]
    for answer, end in zip(answers, done, strict=True):
        if answer.value is None and (end.code == 127 or "can't open file" in end.err):
            raise NotSetUp(
                f"worker {answer.worker} of {workers} has no {PROGRAM}; wanted a setup before"
            )
    return answers


def status(
    shell: Shell,
    workers: Workers,
    timeout: float,
    *,
    lines: int = 0,
    among: Iterable[str] | None = None,
) -> list[Answer]:
    """How the run fares on each worker."""

    def remote(worker: str) -> list[str]:
        return ["status", workers.run_name(worker), str(lines)]

    return ask(shell, workers, remote, timeout, among=among)


def _answer(worker: str, done: Done, seconds: float) -> Answer:
    if done.code == 0:
        lines = [line for line in done.out.splitlines() if line.startswith("{")]
        try:
            return Answer(worker, json.loads(lines[-1]))
        except (IndexError, ValueError):
            return Answer(worker, None, "an answer that is none")
    return Answer(worker, None, done.reason(seconds))
