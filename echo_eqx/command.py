"""What every command shares: flags, output, errors as one line, clocks and progress."""

import contextlib
import dataclasses
import io
import itertools
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
    """Run a command; what a user can cause ends as one sentence on stderr.

    Exit codes: 0 done, 1 something given could not be used, 2 usage, 130 interrupted. They do not
    depend on stdout and stderr: see `_Dropping`.
    """
    _guard_output()
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


# --- Flags --------------------------------------------------------------------------------------


@typing.overload
def parse(
    kind: type[T],
    description: str | None,
    *,
    default: T | None = None,
    arguments: Sequence[str] | None = None,
) -> T: ...


@typing.overload
def parse(kind: Any, description: str | None, *, arguments: Sequence[str] | None = None) -> Any: ...


def parse(
    kind: Any,
    description: str | None,
    *,
    default: Any = None,
    arguments: Sequence[str] | None = None,
) -> Any:
    """The flags of a command as a dataclass, or as one of a union of subcommands.

    In every path `~` is the home folder, in `--flag=~/x` too, which no shell expands.

    **Raises**: `EchoError` for `~` where there is no home folder; exits with 2 for bad flags.
    """
    words = sys.argv[1:] if arguments is None else arguments
    given = {} if default is None else {"default": default}
    try:
        return _expanded(tyro.cli(kind, description=description, args=words, **given))
    except SystemExit:
        _explain_dashes(kind, words)
        raise


def flag_value(arguments: Sequence[str], name: str) -> str | None:
    """What a flag is set to, for defaults that depend on it; None if it is not given."""
    value = None
    for word, after in itertools.zip_longest(arguments, arguments[1:]):
        flag, equals, rest = word.partition("=")
        if flag.replace("-", "_") == f"__{name}":
            value = rest if equals else after
            if not equals and (after or "-").startswith("-"):
                value = None  # which `parse` refuses
    return value


def _expanded(value: Any) -> Any:
    if isinstance(value, Path):
        return expand(value)
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(map(_expanded, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        changed = {name: new for name, old in fields.items() if (new := _expanded(old)) != old}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _explain_dashes(kind: Any, words: Sequence[str]) -> None:
    """After refused flags: a value that begins with a dash was taken for a flag."""
    takes_value = dict(_flags(kind))
    for word, value in itertools.pairwise(words):
        flag, name = value.partition("=")[0], _field_name(word)
        is_flag = flag.startswith("--") and _field_name(flag).removeprefix("no_") in takes_value
        if not value.startswith("-") or is_flag or flag == "--help" or not takes_value.get(name):
            continue
        with contextlib.suppress(ValueError):
            float(value)  # a negative number is taken for a value
            continue
        note(f"if {value!r} is the value of {word}, write {shlex.quote(f'{word}={value}')}")


def _field_name(flag: str) -> str:
    return flag.removeprefix("--").rpartition(".")[2].replace("-", "_")


def _flags(kind: Any) -> Iterator[tuple[str, bool]]:
    """Names of fields, and whether a value follows the flag."""
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        for part in typing.get_args(kind):
            yield from _flags(part)
        return
    for name, hint in typing.get_type_hints(kind).items():
        yield name, hint is not bool
        yield from _flags(hint)


# --- Output -------------------------------------------------------------------------------------


class _Dropping(io.RawIOBase):
    """Writes to a file descriptor. What cannot be written is dropped: a closed pipe, a full disk or
    a terminal that is gone must not end hours of work."""

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
            except BlockingIOError:  # a slow reader is no reason to drop anything
                select.select([], [self._number], [])
            except OSError:
                return len(data)


def _guard_output() -> None:
    """Let neither stdout nor stderr fail, whatever they are."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get what is printed
            nothing = os.open(os.devnull, os.O_RDWR)
            os.dup2(nothing, number)
            os.set_inheritable(number, True)
            if nothing != number:
                os.close(nothing)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # a caller has redirected it
        # What the terminal cannot show is escaped.
        new = io.TextIOWrapper(
            io.BufferedWriter(_Dropping(number)),
            encoding=stream.encoding if stream else "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, new)


def reader_left() -> bool:
    """Whether stdout is a pipe whose reader has closed it, as `head` does once it has enough."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def on_terminal() -> bool:
    return sys.stderr.isatty()


def note(message: str) -> None:
    """A line for the person at the command, on stderr."""
    print(message, file=sys.stderr)


# --- Clocks and progress ------------------------------------------------------------------------


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
