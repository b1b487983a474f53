"""Pods of Cloud TPU as gcloud makes, describes and deletes them."""

import dataclasses
import json
import re
import shlex
from dataclasses import dataclass
from typing import Any

from echo_eqx.errors import EchoError, UsageError
from echo_eqx.ops.pods.shell import Done, Shell

RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""Image of a worker by generation (https://cloud.google.com/tpu/docs/runtimes)."""

_ASK_SECONDS, _CHANGE_SECONDS = 120.0, 1800.0


class GcloudError(EchoError):
    """gcloud could not do what it was asked to. It may be able to later on."""


@dataclass(frozen=True)
class Request:
    """What a pod is to be: `flags` are further ones of `queued-resources create`."""

    accelerator_type: str
    runtime_version: str
    spot: bool = False
    valid_until: str | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pod:
    """A queued resource with one node, both of this name, or a node without one."""

    name: str
    zone: str | None = None
    project: str | None = None

    def command(self, group: str, verb: str, *flags: str) -> list[str]:
        """A command about this pod; gcloud's questions are answered by their defaults."""
        return ["gcloud", "compute", "tpus", group, verb, *flags, *self.place(), "--quiet"]

    def place(self) -> list[str]:
        named = {"--zone": self.zone, "--project": self.project}
        return [f"{flag}={value}" for flag, value in named.items() if value is not None]

    def create_command(self, request: Request) -> list[str]:
        flags = [
            f"--node-id={self.name}",
            f"--accelerator-type={request.accelerator_type}",
            f"--runtime-version={request.runtime_version}",
        ]
        if request.spot:
            flags.append("--spot")
        if request.valid_until is not None:
            flags.append(f"--valid-until-duration={request.valid_until}")
        return self.command("queued-resources", "create", self.name, *flags, *request.flags)

    def describe_command(self, group: str) -> list[str]:
        return self.command(group, "describe", self.name, "--format=json")

    def delete_command(self) -> list[str]:
        """--force: with its node."""
        return self.command("queued-resources", "delete", self.name, "--force")

    def __str__(self) -> str:
        return f"pod {self.name}" + (f" in {self.zone}" if self.zone else "")


@dataclass(frozen=True)
class PodState:
    """States as gcloud names them, None if the pod has no such resource."""

    node: str | None = None
    queued: str | None = None
    workers: int = 0
    reason: str = ""

    @property
    def ready(self) -> bool:
        return self.node == "READY"

    @property
    def worker_ids(self) -> tuple[str, ...]:
        return tuple(str(index) for index in range(self.workers))

    @property
    def absent(self) -> bool:
        return self.node is None and self.queued is None

    def __str__(self) -> str:
        if self.absent:
            return "absent"
        known = [self.node, None if self.ready else self.queued and f"queue: {self.queued}"]
        return ", ".join([part for part in known if part] + ([self.reason] if self.reason else []))


def named_pod(name: str, zone: str | None, project: str | None) -> Pod:
    """**Raises**: `UsageError` for a name that no pod can have."""
    if re.fullmatch(r"[a-z]([-a-z0-9]{0,60}[a-z0-9])?", name) is None:
        raise UsageError(f"name is {name!r}; wanted up to 62 of a-z, 0-9 and -, a letter first")
    return Pod(name, zone, project)


def request(
    accelerator_type: str,
    runtime_version: str | None,
    spot: bool,
    valid_until: str | None,
    flags: str,
) -> Request:
    """**Raises**: `UsageError` for what gcloud would only refuse later."""
    match = re.fullmatch(r"(v\d+[a-z]*)-(\d+)", accelerator_type)
    if match is None:
        raise UsageError(f"accelerator_type is {accelerator_type!r}; wanted one such as v4-64")
    if match[1] == "v5e":
        raise UsageError(
            f"accelerator_type is {accelerator_type}; wanted v5litepod-{match[2]}, the name of v5e"
        )
    runtime = runtime_version or RUNTIMES.get(match[1])
    if runtime is None:
        raise UsageError(
            f"accelerator_type {accelerator_type} has no known image; wanted --runtime_version"
        )
    if valid_until is not None and not re.fullmatch(r"(\d+[smhd])+", valid_until):
        raise UsageError(f"valid_until is {valid_until!r}; wanted a duration such as 6h")
    return Request(accelerator_type, runtime, spot, valid_until, split_flags("create_flags", flags))


def split_flags(name: str, text: str) -> tuple[str, ...]:
    """Flags for another program, given in one text.

    **Raises**: `UsageError` for an open quote.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"{name} is {text!r}: {error}") from None


def create(shell: Shell, pod: Pod, wanted: Request) -> None:
    """Ask for the pod; it is there once its state says so. **Raises**: `GcloudError`."""
    done = shell.run_all([pod.create_command(wanted)], _CHANGE_SECONDS)
    if done and done[0].code != 0:
        raise _failure(done[0], _CHANGE_SECONDS, f"{pod} could not be created")


def delete(shell: Shell, pod: Pod) -> None:
    """Delete the pod; one that was made without a queue, too. **Raises**: `GcloudError`."""
    command = pod.delete_command()
    done = shell.run_all([command], _CHANGE_SECONDS)
    if done and _not_found(done[0]):
        done = [shell.run(pod.command("tpu-vm", "delete", pod.name), _CHANGE_SECONDS)]
        if _not_found(done[0]):
            raise unknown(pod)
    if done and done[0].code != 0:
        raise _failure(done[0], _CHANGE_SECONDS, f"{pod} could not be deleted and still costs")


def look(shell: Shell, pod: Pod) -> PodState:
    """How the pod is. **Raises**: `GcloudError` if that cannot be known."""
    node = _node(shell, pod)
    if node.ready:
        return node
    queued = _describe(shell, pod, "queued-resources")
    if queued is None:
        return node
    about = queued.get("state") or {}
    if about.get("state") == "ACTIVE" and node.absent:
        node = _node(shell, pod)  # it came between the two questions, or was deleted by itself
        if node.ready:
            return node
    error = (about.get("failedData") or {}).get("error") or {}
    reason = str(error.get("message") or node.reason)
    return dataclasses.replace(node, queued=str(about.get("state")), reason=reason)


def _node(shell: Shell, pod: Pod) -> PodState:
    node = _describe(shell, pod, "tpu-vm")
    if node is None:
        return PodState()
    endpoints = node.get("networkEndpoints") or []
    networks = node.get("networkConfigs") or [None]
    return PodState(
        node=str(node.get("state")),
        workers=len(endpoints) // len(networks),
        reason=str(node.get("healthDescription") or ""),
    )


def unknown(pod: Pod) -> GcloudError:
    return GcloudError(f"{pod} is not there; wanted one that was created")


def _describe(shell: Shell, pod: Pod, group: str) -> dict[str, Any] | None:
    """None if there is none."""
    done = shell.run(pod.describe_command(group), _ASK_SECONDS, asks=True)
    if _not_found(done):
        return None
    try:
        found = json.loads(done.out) if done.code == 0 else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise _failure(done, _ASK_SECONDS, f"{pod} could not be looked at")
    return found


def _not_found(done: Done) -> bool:
    return bool(done.code) and "NOT_FOUND" in done.err


def _failure(done: Done, seconds: float, what: str) -> GcloudError:
    if any(sign in done.err for sign in ("active account", "auth login", "auth tokens")):
        return GcloudError(f"{what}: gcloud is not logged in; wanted an account: gcloud auth login")
    reason = re.sub(r"^ERROR: (\(gcloud[\w.-]*\) )?", "", done.reason(seconds))
    return GcloudError(f"{what}: {reason}")
