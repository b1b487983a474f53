"""Memory of a process that runs for months: what requests needed goes back to the system.

Arrays and Python objects do not grow with requests, but glibc keeps what was freed: in a minute
of load the process grew by a seventh. It stays flat with one arena that is trimmed now and then.
"""

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable
from typing import Any

TRIM_SECONDS = 10.0
_M_ARENA_MAX = -8  # of malloc.h


def use_one_arena() -> None:
    """Let all threads allocate from one arena, unless MALLOC_ARENA_MAX says otherwise. Call it
    before there are many threads."""
    mallopt = _of_libc("mallopt")
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, 1)


def collect_often() -> None:
    """What was made until now is kept, and no longer searched for garbage: later searches are
    short, so they may be frequent."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(2000, 10, 10)


async def keep_trimming() -> None:
    """Give freed memory back every few seconds, which takes about 10 ms."""
    trim = _of_libc("malloc_trim")
    while trim is not None:
        await asyncio.sleep(TRIM_SECONDS)
        await asyncio.to_thread(trim, 0)


def _of_libc(name: str) -> Callable[..., Any] | None:
    """A function of the C library; None where it is not glibc."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
