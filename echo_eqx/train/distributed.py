"""The start of a training run: its processes, and what becomes of their errors."""

import traceback
from collections.abc import Callable
from typing import NoReturn

import jax

from echo_eqx.compilation import use_compilation_cache
from echo_eqx.errors import EchoError
from echo_eqx.sharding.hosts import Heartbeat, start_processes
from echo_eqx.train.settings import Config


def run_training(config: Config, train: Callable[[Config, Heartbeat], int]) -> NoReturn:
    """Check the settings, start what processes there are, train, and exit with the code."""
    config.check()
    use_compilation_cache()
    start_processes(
        config.coordinator, config.num_processes, config.process_id, config.start_timeout
    )
    heartbeat = Heartbeat(config.coordinator)
    try:
        code = train(config, heartbeat)
    except OSError as error:
        place = error.filename or config.run_dir
        _end(heartbeat, EchoError(f"{place} cannot be read or written: {error.strerror or error}"))
    except (Exception, KeyboardInterrupt) as error:
        _end(heartbeat, error)
    else:
        raise SystemExit(code)


def _end(heartbeat: Heartbeat, error: BaseException) -> NoReturn:
    """An error of one process is the end of all; of several, each says whose it is."""
    if jax.process_count() == 1:
        raise error
    who = f"process {jax.process_index()}"
    if isinstance(error, EchoError):
        heartbeat.fail(f"{who}: {error}", error.exit_code)
    heartbeat.wait_for_news()
    traceback.print_exception(error)
    heartbeat.fail(f"{who}: {type(error).__name__}", 1)
