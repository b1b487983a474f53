"""Cloud TPU pods: created, described and deleted through gcloud."""

import dataclasses
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
class PodArgs:
    name: str
    """Name of the pod, and of the run on its workers."""
    zone: str | None = None
    """Zone such as us-central2-b; by default gcloud's own."""
    project: str | None = None
    """Project; by default gcloud's own."""
    dry_run: bool = False
    """Print the commands, and run none."""


@dataclass(frozen=True, kw_only=True)
class SpotArgs:
    spot: bool = False
    """Use machines that are cheaper and may be preempted at any time."""


@dataclass(frozen=True, kw_only=True)
class CreateArgs(SpotArgs, PodArgs):
    """Request a pod, as a queued resource."""

    accelerator_type: str
    """Type as gcloud names it: v4-64, v5litepod-16, v5p-32, v6e-16."""
    runtime_version: str | None = None
    """Image of the workers; by default the one for the generation."""
    valid_until: str | None = None
    """Give up if the pod is not there after this time, such as 6h."""
    create_flags: str = ""
    """More flags for gcloud's queued-resources create: --create_flags='--network=mine'."""


class GcloudError(EchoError):
    """gcloud failed. It may succeed later."""


@dataclass(frozen=True)
class Pod:
    """A queued resource and its one node, both of this name, or a node without a queue.

    **Raises**: `UsageError` for a name that no pod can have.
    """

    name: str
    zone: str | None = None
    project: str | None = None

    def __post_init__(self) -> None:
        check_name(self.name)

    def command(self, group: str, verb: str, *flags: str) -> list[str]:
        """A command about this pod; gcloud takes the default answer to its own questions."""
        place = {"--zone": self.zone, "--project": self.project}
        places = [f"{flag}={value}" for flag, value in place.items() if value is not None]
        return ["gcloud", "compute", "tpus", group, verb, *flags, *places, "--quiet"]

    def create_command(self, args: CreateArgs) -> list[str]:
        """**Raises**: `UsageError` for what gcloud would refuse only later."""
        if args.valid_until is not None and not re.fullmatch(r"(\d+[smhd])+", args.valid_until):
            raise UsageError(f"expected --valid_until such as 6h, got {args.valid_until!r}")
        flags = [
            f"--node-id={self.name}",
            f"--accelerator-type={args.accelerator_type}",
            f"--runtime-version={runtime_version(args)}",
        ]
        if args.spot:
            flags.append("--spot")
        if args.valid_until is not None:
            flags.append(f"--valid-until-duration={args.valid_until}")
        flags += split_flags("create_flags", args.create_flags)
        return self.command("queued-resources", "create", self.name, *flags)

    def describe_command(self, group: str) -> list[str]:
        return self.command(group, "describe", self.name, "--format=json")

    def delete_command(self) -> list[str]:
        """Delete the queued resource; --force includes its node."""
        return self.command("queued-resources", "delete", self.name, "--force")

    def __str__(self) -> str:
        return f"pod {self.name}" + (f" in {self.zone}" if self.zone else "")


@dataclass(frozen=True)
class PodState:
    """States as gcloud names them; None if there is no such resource."""

    node: str | None = None
    queued: str | None = None
    num_workers: int = 0
    reason: str = ""

    @property
    def ready(self) -> bool:
        return self.node == "READY" and self.num_workers > 0

    @property
    def absent(self) -> bool:
        return self.node is None and self.queued is None

    def __str__(self) -> str:
        queue = self.queued and not self.ready and f"queue: {self.queued}"
        return ", ".join(part for part in (self.node, queue, self.reason) if part) or "absent"


def check_name(name: str) -> None:
    """**Raises**: `UsageError` for a name that no pod or job can have."""
    if re.fullmatch(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?", name) is None:
        raise UsageError(
            f"expected --name of a letter and up to 61 of a-z, 0-9 and -, got {name!r}"
        )


def runtime_version(args: CreateArgs) -> str:
    """**Raises**: `UsageError` if none is given or known."""
    kind = args.accelerator_type
    match = re.fullmatch(r"(v\d+[a-z]*)-(\d+)", kind)
    if match is None:
        raise UsageError(f"expected --accelerator_type such as v4-64, got {kind!r}")
    if match[1] == "v5e":
        raise UsageError(
            f"expected --accelerator_type v5litepod-{match[2]}, as gcloud calls v5e, got {kind}"
        )
    runtime = args.runtime_version or RUNTIMES.get(match[1])
    if runtime is None:
        raise UsageError(f"no runtime version is known for {kind}; add --runtime_version")
    return runtime


def split_flags(name: str, text: str) -> tuple[str, ...]:
    """Flags for another program, given as one text.

    **Raises**: `UsageError` for an open quote.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"cannot split --{name} {text!r}: {error}") from None


def create(shell: Shell, pod: Pod, args: CreateArgs) -> None:
    """Request the pod; it is usable once `describe` says READY. **Raises**: `GcloudError`."""
    for completed in shell.run_all([pod.create_command(args)], _CHANGE_SECONDS):
        if completed.returncode != 0:
            raise _failure(f"cannot create {pod}", completed)


def delete(shell: Shell, pod: Pod) -> None:
    """Delete the pod, with or without a queued resource. **Raises**: `GcloudError`."""
    for completed in shell.run_all([pod.delete_command()], _CHANGE_SECONDS):
        if _is_not_found(completed):
            completed = shell.run(pod.command("tpu-vm", "delete", pod.name), _CHANGE_SECONDS)
        if _is_not_found(completed):
            raise not_found(pod)
        if completed.returncode != 0:
            raise _failure(f"cannot delete {pod}, which still costs", completed)


def describe(shell: Shell, pod: Pod) -> PodState:
    """The state of the pod. **Raises**: `GcloudError` if gcloud cannot tell."""
    node = _describe_node(shell, pod)
    queued = None if node.ready else _describe(shell, pod, "queued-resources")
    if queued is None:
        return node
    about = queued.get("state") or {}
    if about.get("state") == "ACTIVE" and node.absent:
        node = _describe_node(shell, pod)  # it was created between the two queries
        if node.ready:
            return node
    error = (about.get("failedData") or {}).get("error") or {}
    reason = str(error.get("message") or node.reason)
    return dataclasses.replace(node, queued=str(about.get("state")), reason=reason)


def _describe_node(shell: Shell, pod: Pod) -> PodState:
    node = _describe(shell, pod, "tpu-vm")
    if node is None:
        return PodState()
    endpoints = node.get("networkEndpoints") or []
    networks = node.get("networkConfigs") or [None]
    reason = str(node.get("healthDescription") or "")
    return PodState(str(node.get("state")), None, len(endpoints) // len(networks), reason)


def not_found(pod: Pod) -> GcloudError:
    return GcloudError(f"{pod} does not exist; create it first")


def _describe(shell: Shell, pod: Pod, group: str) -> dict[str, Any] | None:
    """None if there is no such resource."""
    completed = shell.run(pod.describe_command(group), _QUERY_SECONDS, is_query=True)
    if _is_not_found(completed):
        return None
    try:
        found = json.loads(completed.stdout) if completed.returncode == 0 else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _failure(f"cannot describe {pod}", completed)
    return found


def _is_not_found(completed: Completed) -> bool:
    return completed.returncode != 0 and "NOT_FOUND" in completed.stderr


def _failure(problem: str, completed: Completed) -> GcloudError:
    signs = ("active account", "auth login", "auth tokens")
    if any(sign in completed.stderr for sign in signs):
        return GcloudError(f"{problem}: gcloud is not logged in; run gcloud auth login")
    reason = re.sub(r"^ERROR: (\(gcloud[\w.-]*\) )?", "", failure_reason(completed))
    return GcloudError(f"{problem}: {reason}")
