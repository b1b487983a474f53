"""The two errors a user can cause. Commands print them as one line and exit with their code."""

import importlib
from typing import Any


class EchoError(Exception):
    """An input cannot be used. The message names it: `expected X, got Y`, and what to do."""

    exit_code = 1


class UsageError(EchoError):
    """A setting or flag is out of its range, or two of them contradict each other."""

    exit_code = 2


def printable(text: str) -> str:
    """`text` with unprintable characters escaped: names in files may contain terminal escape
    sequences."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def optional(module: str, extra: str) -> Any:
    """The module of a package that `pip install 'echo_eqx[extra]'` installs.

    **Raises**: `EchoError` if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise EchoError(f"{module} is not installed; run pip install 'echo_eqx[{extra}]'") from None
