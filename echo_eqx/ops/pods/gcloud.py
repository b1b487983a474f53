"""Cloud TPU pods: created, described and deleted through gcloud."""

import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.pods.shell import Completed, Shell, failure_reason

RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""Runtime version by generation (https://cloud.google.com/tpu/docs/runtimes)."""

_QUERY_SECONDS, _CHANGE_SECONDS = 120.0, 1800.0


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A queued resource and its one node, both of this name, or a node without a queue."""

    name: str
    """Name of the pod, and of the run on its workers."""
    zone: str | None = None
    """Zone such as us-central2-b; by default gcloud's own."""
    project: str | None = None
    """Project; by default gcloud's own."""
    dry_run: bool = False
    """Print the commands without running them."""

    def command(self, group: str, verb: str, *flags: str) -> list[str]:
        """A gcloud command for this pod. gcloud answers its own prompts with their defaults."""
        place = {"--zone": self.zone, "--project": self.project}
        places = [f"{flag}={value}" for flag, value in place.items() if value is not None]
        return ["gcloud", "compute", "tpus", group, verb, *flags, *places, "--quiet"]

    def describe_command(self, group: str) -> list[str]:
        return self.command(group, "describe", self.name, "--format=json")

    def delete_command(self) -> list[str]:
        """Delete the queued resource; --force includes its node."""
        return self.command("queued-resources", "delete", self.name, "--force")

    def __str__(self) -> str:
        return f"pod {self.name}" + (f" in {self.zone}" if self.zone else "")


@dataclass(frozen=True, kw_only=True)
class SpotArgs:
    spot: bool = False
    """Use cheaper machines that may be preempted at any time."""


@dataclass(frozen=True, kw_only=True)
class CreateArgs(SpotArgs, Pod):
    """Request a pod, as a queued resource."""

    accelerator_type: str
    """Type as gcloud names it: v4-64, v5litepod-16, v5p-32, v6e-16."""
    runtime_version: str | None = None
    """Image of the workers; by default the one for the TPU generation."""
    valid_until: str | None = None
    """Give up if the pod has not been created after this time, such as 6h."""
    create_flags: str = ""
    """More flags for gcloud's queued-resources create: --create_flags='--network=mine'."""

    def create_command(self) -> list[str]:
        """**Raises**: `UsageError` for a generation without a known image."""
        flags = [
            f"--node-id={self.name}",
            f"--accelerator-type={self.accelerator_type}",
            f"--runtime-version={runtime_version(self)}",
        ]
        if self.spot:
            flags.append("--spot")
        if self.valid_until is not None:
            flags.append(f"--valid-until-duration={self.valid_until}")
        flags += split_flags("create_flags", self.create_flags)
        return self.command("queued-resources", "create", self.name, *flags)


@dataclass(frozen=True)
class PodState:
    """States of the node and of its queued resource, as gcloud names them, and a reason if any."""

    node: str | None
    queue: str | None
    num_workers: int
    reason: str | None

    @property
    def ready(self) -> bool:
        return self.node == "READY" and self.num_workers > 0

    def __str__(self) -> str:
        queue = self.queue and f"queue: {self.queue}"
        return ", ".join(part for part in (self.node, queue, self.reason) if part)


def check_name(name: str) -> None:
    """**Raises**: `UsageError` for a name that no pod or job can have."""
    if re.fullmatch(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?", name) is None:
        raise UsageError(
            f"--name: expected a letter, then up to 61 of a-z, 0-9 and -, got {name!r}"
        )


def runtime_version(args: CreateArgs) -> str:
    """**Raises**: `UsageError` if none is given or known."""
    generation = args.accelerator_type.partition("-")[0]
    runtime = args.runtime_version or RUNTIMES.get(generation)
    if runtime is None:
        raise UsageError(
            f"--accelerator_type: expected one of {', '.join(RUNTIMES)}, such as v4-64, got "
            f"{args.accelerator_type!r}; for another type add --runtime_version"
        )
    return runtime


def split_flags(name: str, text: str) -> tuple[str, ...]:
    """Flags for another program, given as one string.

    **Raises**: `UsageError` for an unclosed quote.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"cannot split --{name} {text!r}: {error}") from None


def create(shell: Shell, pod: CreateArgs) -> None:
    """Request the pod; it is usable once `describe` says READY. **Raises**: `EchoError`."""
    for completed in shell.run_all([pod.create_command()], _CHANGE_SECONDS):
        if completed.returncode != 0:
            raise _failure(f"cannot create {pod}", completed)


def delete(shell: Shell, pod: Pod) -> None:
    """Delete the pod, with or without a queued resource. **Raises**: `EchoError`."""
    for completed in shell.run_all([pod.delete_command()], _CHANGE_SECONDS):
        if _is_not_found(completed):
            (completed,) = shell.run_all(
                [pod.command("tpu-vm", "delete", pod.name)], _CHANGE_SECONDS
            )
        if _is_not_found(completed):
            raise _not_found(pod)
        if completed.returncode != 0:
            raise _failure(f"cannot delete {pod}, which is still billed", completed)


def describe(shell: Shell, pod: Pod) -> PodState:
    """The state of the pod. **Raises**: `EchoError` if it does not exist, or gcloud fails."""
    node = _describe(shell, pod, "tpu-vm") or {}
    queued = {}
    if node.get("state") != "READY":
        queued = (_describe(shell, pod, "queued-resources") or {}).get("state") or {}
    if not node and not queued:
        raise _not_found(pod)
    endpoints, networks = (node.get(f"network{name}") or [] for name in ("Endpoints", "Configs"))
    error = (queued.get("failedData") or {}).get("error") or {}
    reason = error.get("message") or node.get("healthDescription")
    num_workers = len(endpoints) // max(1, len(networks))
    return PodState(node.get("state"), queued.get("state"), num_workers, reason)


def _describe(shell: Shell, pod: Pod, group: str) -> dict[str, Any] | None:
    """None if there is no such resource."""
    (completed,) = shell.run_all([pod.describe_command(group)], _QUERY_SECONDS, is_query=True)
    if _is_not_found(completed):
        return None
    if completed.returncode != 0:
        raise _failure(f"cannot describe {pod}", completed)
    return json.loads(completed.stdout)


def _not_found(pod: Pod) -> EchoError:
    return EchoError(f"{pod} does not exist; create it first")


def _is_not_found(completed: Completed) -> bool:
    return completed.returncode != 0 and "NOT_FOUND" in completed.stderr


def _failure(problem: str, completed: Completed) -> EchoError:
    signs = ("active account", "auth login", "auth tokens")
    if any(sign in completed.stderr for sign in signs):
        return EchoError(f"{problem}: gcloud is not logged in; run gcloud auth login")
    reason = re.sub(r"^ERROR: (\(gcloud[\w.-]*\) )?", "", failure_reason(completed))
    return EchoError(f"{problem}: {reason}")
