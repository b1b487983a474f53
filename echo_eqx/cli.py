"""What all commands share: flags, output, one-line errors, timing and progress."""

import contextlib
import dataclasses
import gc
import io
import itertools
import logging
import os
import select
import shlex
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import tyro
from tqdm import tqdm

from echo_eqx.errors import EchoError
from echo_eqx.files import expand

T = TypeVar("T")


def run(main: Callable[[], None]) -> None:
    """Run a command. Errors that a user can cause are printed as one line on stderr.

    Exit codes: 0 success, 1 an input could not be used, 2 wrong usage, 130 interrupted, 141 nobody
    reads the audio that is streamed. A broken stdout or stderr does not change them otherwise: see
    `_Lossy`.
    """
    # JAX allocates so much while it traces that the default threshold costs a sixth of the start.
    gc.set_threshold(50_000, 20, 20)
    _protect_output()
    log_to_stderr()
    try:
        main()
    except EchoError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except MemoryError:
        _fail("out of memory", 1)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(f"out of device memory ({str(error).splitlines()[0][:200]})", 1)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


# --- Flags --------------------------------------------------------------------------------------


@typing.overload
def parse(
    kind: type[T],
    description: str | None,
    *,
    default: T | None = None,
    base: Callable[[T], T] | None = None,
    arguments: Sequence[str] | None = None,
) -> T: ...


@typing.overload
def parse(kind: Any, description: str | None, *, arguments: Sequence[str] | None = None) -> Any: ...


def parse(
    kind: Any,
    description: str | None,
    *,
    default: Any = None,
    base: Callable[[Any], Any] | None = None,
    arguments: Sequence[str] | None = None,
) -> Any:
    """Parse flags into a dataclass, or into one of a union of subcommands.

    If some flags choose the defaults of others, as a preset does, `base` returns these defaults,
    given the flags parsed over `default`.

    `~` at the start of a path is expanded, also in `--flag=~/x`, which shells leave alone.

    **Raises**: `EchoError` if `~` cannot be expanded. Exits with code 2 if the flags are wrong.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if base is not None:
        flags = [word for word in words if word not in ("-h", "--help")]
        default = base(parse(kind, description, default=default, arguments=flags))
    given = {} if default is None else {"default": default}
    try:
        parsed = tyro.cli(kind, description=description, args=words, use_underscores=True, **given)
    except SystemExit:
        _hint_at_dashes(kind, words)
        raise
    return _expand_paths(parsed)


def _expand_paths(value: Any) -> Any:
    if isinstance(value, Path):
        return expand(value)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(_expand_paths, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changed = {name: new for name, old in fields.items() if (new := _expand_paths(old)) != old}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _hint_at_dashes(kind: Any, words: Sequence[str]) -> None:
    """Explain how to write a value that starts with a dash, which was parsed as a flag."""
    takes_value = dict(_flags(kind))
    for word, value in itertools.pairwise(words):
        flag, name = value.partition("=")[0], _field_name(word)
        is_flag = flag.startswith("--") and _field_name(flag).removeprefix("no_") in takes_value
        if not value.startswith("-") or is_flag or flag == "--help" or not takes_value.get(name):
            continue
        with contextlib.suppress(ValueError):
            float(value)  # argparse accepts negative numbers
            continue
        print(
            f"if {value!r} is the value of {word}, write {shlex.quote(f'{word}={value}')}",
            file=sys.stderr,
        )


def _field_name(flag: str) -> str:
    return flag.removeprefix("--").rpartition(".")[2].replace("-", "_")


def _flags(kind: Any) -> Iterator[tuple[str, bool]]:
    """Field names, and whether their flags take a value."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        for part in typing.get_args(kind):
            yield from _flags(part)
        return
    for name, hint in typing.get_type_hints(kind).items():
        yield name, hint is not bool
        yield from _flags(hint)


# --- Output -------------------------------------------------------------------------------------


class _Lossy(io.RawIOBase):
    """A file descriptor that ignores write errors: a closed pipe, a full disk or a terminal that
    has gone away must not end hours of work."""

    def __init__(self, number: int):
        self._number = number

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        while True:
            try:
                return os.write(self._number, data)
            except BlockingIOError:  # wait for a slow reader
                select.select([], [self._number], [])
            except OSError:
                return len(data)


def _protect_output() -> None:
    """Make stdout and stderr safe to write to, whatever they are connected to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would take its number
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, number)
            os.set_inheritable(number, True)
            if nothing != number:
                os.close(nothing)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # redirected by the caller
        new = io.TextIOWrapper(
            io.BufferedWriter(_Lossy(number)),
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace",  # for terminals that cannot show a character
            line_buffering=True,
        )
        setattr(sys, name, new)


def reader_left() -> bool:
    """Whether stdout is a pipe that its reader has closed, as `head` does."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def on_terminal() -> bool:
    return sys.stderr.isatty()


class _ToStderr(logging.Handler):
    """Prints `message`, or `warning: message`, to the current `sys.stderr`."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"{level}{record.getMessage()}", file=sys.stderr)


def log_to_stderr() -> None:
    """Show the package's log to the user of a command."""
    logger = logging.getLogger("echo_eqx")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        logger.addHandler(_ToStderr())
        logger.propagate = False  # a handler that a library gives the root would print it again


# --- Clocks and progress ------------------------------------------------------------------------


class CompileClock:
    """Seconds spent tracing, lowering and compiling, or loading programs from the cache."""

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
        """The union of all spans, because functions are traced inside functions."""
        total = until = 0.0
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        return total


class StepBar:
    """A progress bar on a terminal, nothing elsewhere. Call it with steps done and total steps."""

    def __init__(self, description: str):
        self._bar = tqdm(desc=description, unit="step", disable=not sys.stderr.isatty())

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        self._bar.close()
