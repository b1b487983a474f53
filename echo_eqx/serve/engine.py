"""The thread that owns the device: it advances the chunks being spoken step by step."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import jax

from echo_eqx.errors import EchoError
from echo_eqx.serve.errors import ApiError
from echo_eqx.serve.programs import Programs, Row
from echo_eqx.serve.speech import Speech

T = TypeVar("T")
MAX_UNREAD_SECONDS = 60.0
"""A request is not spoken further while its client has this much audio to read."""
_log = logging.getLogger("echo_eqx.serve")


class Engine:
    """Speaks `Speech`es: up to `programs.batch_size` chunks at a time, each a step per turn.

    A free place goes to the chunk whose listener needs it first, so a short text never waits for
    the end of a long one. At most `max_requests` speeches wait or are spoken.
    """

    def __init__(self, programs: Programs, max_requests: int):
        self.programs, self._max_requests = programs, max_requests
        self._changed = threading.Condition()
        self._speeches: list[Speech] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._rows: list[tuple[Speech, Row]] = []
        self._stops = False
        self._chunk_seconds = 1.0  # a moving average
        self.num_steps = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Return once the thread has ended. What is being spoken is cut off."""
        with self._changed:
            self._stops = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_requests(self) -> int:
        return len(self._speeches)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def submit(self, speech: Speech) -> None:
        """**Raises**: `ApiError` 503 if too many requests are waiting."""
        with self._changed:
            if len(self._speeches) >= self._max_requests:
                waiting = sum(speech.num_waiting for speech in self._speeches)
                seconds = (waiting + 1) * self._chunk_seconds / self.programs.batch_size
                raise ApiError(
                    503,
                    f"{len(self._speeches)} requests are waiting already; try again later",
                    code="overloaded",
                    retry_after=min(60, max(1, round(seconds))),
                )
            self._speeches.append(speech)
            self._changed.notify()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run `function` in the engine's thread, between two steps."""
        future: Future[T] = Future()
        with self._changed:
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def _run(self) -> None:
        computing: list[Any] = []
        while True:
            with self._changed:
                self._speeches = [s for s in self._speeches if not (s.is_over or s.is_cancelled)]
                calls, self._calls = self._calls, []
                if self._stops:
                    return
            self._rows = [(s, row) for s, row in self._rows if s in self._speeches]
            for function, future in calls:
                _answer(function, future)
            # A first sound is wanted before anything else; other audio while the device computes.
            silent = [speech for speech in self._speeches if speech.is_silent]
            is_busy = _decode(silent)
            self._fill()
            is_busy |= bool(self._rows)
            started = time.monotonic()
            self._advance()
            is_busy |= _decode([speech for speech in self._speeches if speech not in silent])
            # The device may be one step behind, so that it never waits for this thread.
            jax.block_until_ready(computing)
            computing = [row.state for _, row in self._rows]
            if self._rows:
                steps = max(row.num_steps for _, row in self._rows)
                seconds = (time.monotonic() - started) * steps
                self._chunk_seconds += 0.01 * (seconds - self._chunk_seconds)
            self._finish()
            with self._changed:
                if not (is_busy or self._calls or self._stops):
                    self._changed.wait(0.1 if self._speeches else None)

    def _fill(self) -> None:
        while len(self._rows) < self.programs.batch_size:
            ready = [s for s in self._speeches if s.can_start and s.unread < MAX_UNREAD_SECONDS]
            if not ready:
                return
            speech = min(ready, key=lambda speech: speech.due)
            with _failing([speech]):
                self._rows.append((speech, speech.start_chunk()))

    def _advance(self) -> None:
        with _failing([speech for speech, _ in self._rows]):
            self.programs.advance([row for _, row in self._rows])
            self.num_steps += len(self._rows)
            for speech, _ in self._rows:
                speech.count_step()

    def _finish(self) -> None:
        for speech, row in self._rows:
            if row.is_done:
                with _failing([speech]):
                    speech.finish_chunk(row)
        self._rows = [(s, row) for s, row in self._rows if not (row.is_done or s.is_over)]


def _answer(function: Callable[[], Any], future: "Future[Any]") -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)


def _decode(speeches: list[Speech]) -> bool:
    """Decode the next piece of each; whether there was any."""
    is_busy = False
    for speech in speeches:
        with _failing([speech]):
            is_busy |= speech.decode_next()
    return is_busy


@contextlib.contextmanager
def _failing(speeches: list[Speech]) -> Iterator[None]:
    """An error inside ends these speeches, not the engine."""
    try:
        yield
    except EchoError as error:
        for speech in speeches:
            speech.fail(str(error), is_internal=False)
    except Exception:
        _log.exception("speaking failed")
        for speech in speeches:
            speech.fail("the server failed to speak this text", is_internal=True)
