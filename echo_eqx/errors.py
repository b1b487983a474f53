"""The two errors a user can cause; scripts turn them into one line and an exit code."""


class EchoError(Exception):
    """Something given could not be used. The message names it, what came and what was wanted."""

    exit_code = 1


class UsageError(EchoError):
    """A setting or flag is out of its range, or two of them contradict each other."""

    exit_code = 2


def printable(text: str) -> str:
    """`text` with escapes for what cannot be printed: names in files may hold commands to a
    terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
