"""Run commands in this process, or in a fork of a process that has imported everything.

A new Python process takes three seconds of CPU to import JAX and the package. A call in this
process also reuses what earlier calls have traced and compiled.
"""

import atexit
import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

from echo_eqx.commands import COMMANDS, run_command

SCRIPTS = Path(__file__).parents[1] / "scripts"
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["echo_eqx", *(f"echo_eqx.commands.{name}" for name in COMMANDS)])


# Programs run only briefly in tests, so they are compiled quickly rather than well.
QUICK_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)


def xla_flags(devices: int = 1) -> str:
    return f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"


def flags(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def call(name: str, *args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in this process."""
    words, code = [str(SCRIPTS / f"{name}.py"), *map(str, args)], 0
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or Path.cwd()),
    ):
        try:
            run_command(name)
        except SystemExit as end:
            code = end.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


class Process:
    """A Python script that runs in a fork, with the methods of `subprocess.Popen`.

    `env` is the whole environment, or that of this process with `changes`.
    """

    def __init__(
        self,
        script: Path,
        *args: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        **changes: str,
    ):
        self._folder = tempfile.TemporaryDirectory(prefix="echo_eqx_output_")
        self._output = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self.args = [str(script), *map(str, args)]
        environment = {**(os.environ if env is None else env), **changes}
        options = (self.args, environment, cwd or Path.cwd(), self._output)
        self._process = FORKS.Process(target=_run_script, args=options, daemon=True)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    @property
    def errors_so_far(self) -> str:
        return self._output[1].read_text("utf-8") if self._output[1].exists() else ""

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Standard output and error, once the process has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        out, err = (path.read_text("utf-8") if path.exists() else "" for path in self._output)
        return out, err


def run(
    script: Path, *args: object, timeout: float = 300, **options
) -> subprocess.CompletedProcess[str]:
    process = Process(script, *args, **options)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_source(source: str, *args: object, **options) -> subprocess.CompletedProcess[str]:
    """`run` for a script given as text, as for `python -c`."""
    with tempfile.TemporaryDirectory(prefix="echo_eqx_source_") as folder:
        script = Path(folder) / "script.py"
        script.write_text(source)
        return run(script, *args, **options)


def _run_script(
    args: list[str], environment: dict[str, str], cwd: Path, output: list[Path]
) -> None:
    import jax

    for number, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # What JAX and the Hub read from the environment when they are imported.
    if hub := sys.modules.get("huggingface_hub.constants"):
        importlib.reload(hub)
    for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):
        jax.config.update(name.lower(), environment.get(name))
    sys.argv = args
    try:
        runpy.run_path(args[0], run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
