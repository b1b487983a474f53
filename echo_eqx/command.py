"""What every command shares: errors as one line and an exit code, compilation cache, clocks."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
from tqdm import tqdm

from echo_eqx.errors import EchoError


def run(main: Callable[[], None]) -> None:
    """Run a command; what a user can cause ends as one sentence on stderr.

    Exit codes: 0 done, 1 something given could not be used, 2 usage, 130 interrupted.
    """
    try:
        main()
    except EchoError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except MemoryError:
        _fail("this machine has no memory left", 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(f"the device has no memory left ({str(error).splitlines()[0][:200]})", 1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that the next start is quick."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "echo_eqx" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class CompileClock:
    """Seconds spent on tracing, lowering and compiling, or on loading what was compiled before."""

    _EVENTS = ("jaxpr_to_mlir_module_duration", "backend_compile_duration", "jaxpr_trace_duration")

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.endswith(self._EVENTS):
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))

    @property
    def seconds(self) -> float:
        """Functions are traced within functions, so it is the union of all spans that counts."""
        total = until = 0.0
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total


class StepBar:
    """A progress bar on a terminal, nothing elsewhere. Call it with steps done and in all."""

    def __init__(self, description: str):
        self._bar = tqdm(desc=description, unit="step", disable=not sys.stderr.isatty())

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()


def on_terminal() -> bool:
    return sys.stderr.isatty()


def note(message: str) -> None:
    """A line for the person at the command, on stderr."""
    print(message, file=sys.stderr)
