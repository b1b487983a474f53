"""Starts the processes of a run, stops them on signals, and reports their errors."""

import os
import signal
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

from echo_eqx.compilation import use_compilation_cache
from echo_eqx.errors import EchoError
from echo_eqx.layers.precision import set_matmul_precision
from echo_eqx.sharding.hosts import EXIT_PREEMPTED, Heartbeat, start_processes
from echo_eqx.train.settings import Config


def run_training(config: Config, train: Callable[[Config, Heartbeat], int]) -> NoReturn:
    """Check the settings, connect the processes, train, and exit with the code of `train`."""
    config.check()
    use_compilation_cache()
    set_matmul_precision(config.matmul_precision)
    start_processes(
        config.coordinator, config.num_processes, config.process_id, config.start_timeout
    )
    heartbeat = Heartbeat(config.coordinator)
    try:
        if jax.process_count() > 1 and jax.default_backend() == "cpu":
            # Process 0 alone finds its programs in the cache. On CPU their collectives may then run
            # in another order than in the programs that the others compile, and all wait forever.
            jax.config.update("jax_enable_compilation_cache", False)
        code = train(config, heartbeat)
    except OSError as error:
        place = error.filename or config.run_dir
        _fail(heartbeat, EchoError(f"cannot read or write {place}: {error.strerror or error}"))
    except (Exception, KeyboardInterrupt) as error:
        _fail(heartbeat, error)
    else:
        raise SystemExit(code)


def _fail(heartbeat: Heartbeat, error: BaseException) -> NoReturn:
    """End all processes because of an error in this one, which is named if there are several."""
    if jax.process_count() == 1:
        raise error
    process = f"process {jax.process_index()}"
    if isinstance(error, EchoError):
        heartbeat.fail(f"{process}: {error}", error.exit_code)
    heartbeat.wait_for_peer_error()
    traceback.print_exception(error)
    heartbeat.fail(f"{process}: {type(error).__name__}", 1)


class StopSignal:
    """A request to stop, seen by all hosts at the same step: SIGTERM or SIGHUP, and Ctrl-C if there
    is a single process.

    A signal that was ignored at the start, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self) -> None:
        self.exit_code = EXIT_PREEMPTED
        self._received = False
        # With several processes, JAX handles SIGTERM itself, so its handler is kept.
        handlers = {signal.SIGHUP: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
        if jax.process_count() == 1:
            handlers = dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGINT), self._handle)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if number == signal.SIGINT:
            self.exit_code = 130
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C is final
        self._received = True

    def requested(self, step: int) -> bool:
        """Whether to stop after `step`."""
        if jax.process_count() == 1:
            return self._received
        return multihost_utils.reached_preemption_sync_point(step)
