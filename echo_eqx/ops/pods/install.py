"""Install this source tree on all workers: copy it, install it, and compare versions."""

import logging
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import echo_eqx
from echo_eqx.errors import EchoError
from echo_eqx.ops.pods.shell import failure_reason
from echo_eqx.ops.pods.workers import PYTHON, SOURCE, Answer, WorkerArgs, Workers
from echo_eqx.sharding.hosts import code_digest

logger = logging.getLogger(__name__)

_PARTS = ("pyproject.toml", "README.md", "LICENSE", "echo_eqx", "scripts")
_INSTALL_SECONDS = 1800.0

# $1: the archive; $2: the extra. TPU images have an older Python than the package needs, so uv
# installs one. Hosts may share a home folder, so they take turns. If the archive is gone, this has
# already been done, and gcloud is running it a second time.
_INSTALL = f"""set -e
mkdir -p echo_eqx && exec 9>echo_eqx/lock && flock 9
[ -e "$1" ] || exit 0
rm -rf echo_eqx/new echo_eqx/old && mkdir echo_eqx/new && tar -xzf "$1" -C echo_eqx/new
if [ -e {SOURCE} ]; then mv {SOURCE} echo_eqx/old; fi
mv echo_eqx/new {SOURCE} && rm -rf echo_eqx/old
PATH=$HOME/.local/bin:$PATH
command -v uv >/dev/null || python3 -m pip install --user --quiet uv ||
  curl -LsSf https://astral.sh/uv/install.sh | sh >&2
[ -x {PYTHON} ] || uv venv --quiet --python '>=3.11,<3.14' echo_eqx/venv
uv pip install --quiet --python {PYTHON} -e "{SOURCE}$2"
rm "$1"
"""


@dataclass(frozen=True, kw_only=True)
class RetryArgs:
    tries: int = 5
    """Number of attempts; a new pod takes a while to accept connections."""
    pause: float = 10.0
    """Seconds between attempts."""


@dataclass(frozen=True, kw_only=True)
class InstallArgs(RetryArgs, WorkerArgs):
    """Install this source tree on all workers and check that all have the same versions."""

    extra: str | None = None
    """Extra of the package: by default tpu on a pod, cuda on --hosts. '' for none."""
    before: str = ""
    """Shell command that every worker runs first, for example to mount the disk of --run_dir."""


def install(workers: Workers, args: InstallArgs) -> None:
    """Install this package on all workers and check that all have the same versions.

    **Raises**: `EchoError` naming the worker where it failed, or the version that differs.
    """
    extra = args.extra if args.extra is not None else "cuda" if args.hosts else "tpu"
    with tempfile.TemporaryDirectory(prefix="echo_eqx.") as folder:
        archive = Path(folder) / f"echo_eqx-{code_digest()[:12]}.tar.gz"
        if not workers.shell.dry_run:
            pack(archive)
        extra, before = f"[{extra}]" if extra else "", ["sh", "-c", args.before]

        def target(worker: str) -> str:
            return f"{workers.run_name(worker)}-{archive.name}"

        def copy(worker: str) -> list[str]:
            return workers.copy_command(worker, archive, target(worker))

        def unpack(worker: str) -> list[str]:
            return workers.command(worker, ["sh", "-c", _INSTALL, "sh", target(worker), extra])

        # gcloud may create an ssh key on the first connection, so the first one is made alone.
        for ids in (workers.ids[:1], workers.ids[1:]):
            _run_on(workers, ids, "copying the package", copy, args, args.timeout)
        if args.before:
            _run_on(workers, workers.ids, "--before", lambda w: workers.command(w, before), args)
        _run_on(workers, workers.ids, "installing", unpack, args)
    answers = workers.call(lambda _: ["versions"])
    if answers:
        jax = check_versions(workers, answers)["jax"]
        logger.info(f"{len(answers)} workers of {workers} have the same versions: jax {jax}")


def pack(archive: Path) -> None:
    """Write the source tree of this package as a tar.

    **Raises**: `EchoError` if it was not installed from one.
    """
    root = Path(echo_eqx.__file__).parents[1]
    if not (root / "pyproject.toml").exists():
        raise EchoError(f"{root} has no pyproject.toml; run setup from a clone of the repository")

    def source_only(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in member.name else member

    with tarfile.open(archive, "w:gz") as tar:
        for part in _PARTS:
            if (root / part).exists():
                tar.add(root / part, part, filter=source_only)


def check_versions(workers: Workers, answers: list[Answer]) -> dict[str, str]:
    """The versions, the same on all workers.

    **Raises**: `EchoError` naming a worker that does not answer, or differs from the first.
    """
    for answer in answers:
        if answer.value is None:
            raise EchoError(f"no versions from worker {answer.worker} of {workers}: {answer}")
    common = answers[0].value or {}
    for answer in answers[1:]:
        found = answer.value or {}
        for name in sorted(found.keys() | common.keys()):
            if found.get(name) != common.get(name):
                raise EchoError(
                    f"worker {answer.worker} of {workers}: expected {name} {common.get(name)}, as "
                    f"on worker {answers[0].worker}, got {found.get(name)}; run setup again"
                )
    return common


def _run_on(
    workers: Workers,
    ids: Iterable[str],
    what: str,
    command: Callable[[str], list[str]],
    args: InstallArgs,
    timeout: float = _INSTALL_SECONDS,
) -> None:
    """Run a command on these workers in parallel, and again on those where it fails."""
    left, reason = list(ids), ""
    for attempt in range(args.tries):
        if attempt:
            logger.info(f"{reason}; trying again in {args.pause:g} s")
            time.sleep(args.pause)
        completed = workers.shell.run_all([command(worker) for worker in left], timeout)
        pairs = zip(left, completed, strict=bool(completed))
        failed = [(worker, end) for worker, end in pairs if end.returncode != 0]
        if not failed:
            return
        left = [worker for worker, _ in failed]
        reason = f"{what} on worker {left[0]} of {workers}: {failure_reason(failed[0][1])}"
    raise EchoError(f"{reason} ({args.tries} tries)")
