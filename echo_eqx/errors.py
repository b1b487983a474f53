"""The two errors a user can cause; scripts turn them into one line and an exit code."""


class EchoError(Exception):
    """Something given could not be used. The message names it, what came and what was wanted."""

    exit_code = 1


class UsageError(EchoError):
    """A setting or flag is out of its range, or two of them contradict each other."""

    exit_code = 2
