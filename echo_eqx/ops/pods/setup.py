"""The package on all workers: copied as it is here, installed, and compared."""

import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import echo_eqx
from echo_eqx.command import note
from echo_eqx.errors import EchoError
from echo_eqx.ops.pods.shell import Done, Shell
from echo_eqx.ops.pods.workers import PYTHON, SOURCE, Answer, Workers, ask
from echo_eqx.sharding.hosts import code_digest

_PARTS = ("pyproject.toml", "README.md", "LICENSE", "echo_eqx", "scripts")
_INSTALL_SECONDS = 1800.0

# $1: the archive; $2: the extra. Images have an older Python than the package needs, so uv brings
# one. Hosts may share their home folder, so one at a time. Without the archive all was done before,
# and gcloud has asked a second time.
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


@dataclass(frozen=True)
class SetupSettings:
    extra: str = "tpu"
    """Of the package, such as tpu or cuda; empty for none."""
    before: str = ""
    """Shell text that every worker runs first."""
    tries: int = 3
    timeout: float = 180.0
    pause: float = 10.0
    """Seconds between tries: a new pod takes a while to let anyone in."""


def set_up(shell: Shell, workers: Workers, settings: SetupSettings) -> None:
    """Install this package on all workers and see that it is the same everywhere.

    **Raises**: `EchoError` naming the worker where it failed, or which differs, and in what.
    """
    with tempfile.TemporaryDirectory(prefix="echo_eqx.") as folder:
        archive = Path(folder) / f"echo_eqx-{code_digest()[:12]}.tar.gz"
        if not shell.dry_run:
            pack(archive)

        def copy(worker: str) -> list[str]:
            return workers.copy(worker, archive, target(worker))

        def target(worker: str) -> str:
            return f"{workers.run_name(worker)}-{archive.name}"

        def install(worker: str) -> list[str]:
            extra = f"[{settings.extra}]" if settings.extra else ""
            remote = ["sh", "-c", _INSTALL, "sh", target(worker), extra]
            return workers.command(worker, remote)

        def before(worker: str) -> list[str]:
            return workers.command(worker, ["sh", "-c", settings.before])

        # The first connection may make a key and hand it to the pod; several would each make one.
        first, rest = workers.ids[:1], workers.ids[1:]
        _on(shell, workers, first, "copying the package", copy, settings)
        _on(shell, workers, rest, "copying the package", copy, settings)
        if settings.before:
            _on(shell, workers, workers.ids, "--before", before, settings, _INSTALL_SECONDS)
        _on(shell, workers, workers.ids, "installing", install, settings, _INSTALL_SECONDS)
    answers = ask(shell, workers, lambda _: ["versions"], settings.timeout, asks=False)
    if not shell.dry_run:
        check_versions(workers, answers)
        found = answers[0].value or {}
        note(f"{len(answers)} workers of {workers} have the same: jax {found.get('jax')}")


def pack(archive: Path) -> None:
    """The source tree that this package lies in, as a tar.

    **Raises**: `EchoError` if it lies in none.
    """
    root = Path(echo_eqx.__file__).parents[1]
    missing = [
        part for part in ("pyproject.toml", "scripts/train.py") if not (root / part).exists()
    ]
    if missing:
        raise EchoError(f"{root} has no {missing[0]}; wanted a source tree, as git clones it")

    def source_only(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if "__pycache__" in member.name else member

    with tarfile.open(archive, "w:gz") as tar:
        for part in _PARTS:
            if (root / part).exists():
                tar.add(root / part, part, filter=source_only)


def check_versions(workers: Workers, answers: list[Answer]) -> None:
    """**Raises**: `EchoError` naming a worker that says nothing, or other than most."""
    for answer in answers:
        if answer.value is None:
            raise EchoError(f"worker {answer.worker} of {workers} has no version: {answer.trouble}")
    found = {answer.worker: answer.value or {} for answer in answers}
    for name in sorted({name for value in found.values() for name in value}):
        usual = Counter(value.get(name) for value in found.values()).most_common(1)[0][0]
        for worker, value in found.items():
            if value.get(name) != usual:
                raise EchoError(
                    f"worker {worker} of {workers} has {value.get(name)} as {name}; wanted "
                    f"{usual}, as on the others"
                )


def _on(
    shell: Shell,
    workers: Workers,
    ids: Iterable[str],
    what: str,
    command: Callable[[str], list[str]],
    settings: SetupSettings,
    timeout: float | None = None,
) -> None:
    """Run on these workers at once; where it fails, again."""
    left, timeout = list(ids), timeout or settings.timeout
    reason = ""
    for attempt in range(settings.tries):
        done = shell.run_all([command(worker) for worker in left], timeout)
        failed: dict[str, Done] = {
            worker: end for worker, end in zip(left, done, strict=bool(done)) if end.code != 0
        }
        if not failed:
            return
        left = list(failed)
        reason = f"{what} on worker {left[0]} of {workers}: {failed[left[0]].reason(timeout)}"
        if attempt + 1 < settings.tries:
            note(f"{reason}; trying again in {settings.pause:g} s")
            time.sleep(settings.pause)
    raise EchoError(f"{reason} (in {settings.tries} tries)")
