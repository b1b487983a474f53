"""Setup before the training loop: agreement between hosts, the run folder, compilation."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from echo_eqx.config import CodecConfig, DiTConfig
from echo_eqx.json_data import to_json
from echo_eqx.sharding.hosts import check_agreement, code_digest
from echo_eqx.train.plan import step_memory_warning
from echo_eqx.train.restore import check_same_run, newest_restorable
from echo_eqx.train.run_folder import RunFolder, note_end
from echo_eqx.train.settings import RunConfig
from echo_eqx.weights.checkpoint.reader import TrainingCheckpoint
from echo_eqx.weights.checkpoint.retention import Retention
from echo_eqx.weights.checkpoint.writer import (
    clean_checkpoints,
    make_missing_export,
    prune_checkpoints,
)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run(
    config: RunConfig, sizes: DiTConfig | CodecConfig, data: dict[str, Any], eval_digest: str = ""
) -> Iterator[tuple[str, TrainingCheckpoint | None]]:
    """Lock the run folder, and yield the id of this launch and the checkpoint to resume from.

    `data` identifies the data in checkpoints, `eval_digest` the held-out data. Only after all
    checks have passed is the folder cleaned up and this launch's settings written.

    **Raises**: `EchoError` if the hosts differ in code, settings, data or devices, or if the folder
    holds another run.
    """
    launch_id = check_agreement(
        {
            "code": code_digest(),
            "settings": json.dumps({**to_json(config), "process_id": None}),
            "data": data["digest"] + eval_digest,
            "jax version": jax.__version__,
            "number of processes and devices": f"{jax.process_count()} {jax.device_count()}",
        }
    )
    first = jax.process_index() == 0
    with RunFolder(config.run_dir, writes=first) as folder:
        folder.check_shared(launch_id)
        checkpoint = newest_restorable(config.run_dir)
        if checkpoint is not None:
            check_same_run(checkpoint, sizes, config, data)
        if first:
            clean_checkpoints(config.run_dir, checkpoint)
            if checkpoint is not None:  # finish what a killed launch had left to do
                if config.export:
                    make_missing_export(checkpoint)
                retention = Retention(config.keep_last, config.keep_every)
                prune_checkpoints(config.run_dir, checkpoint.step, retention)
            folder.describe(config)
        multihost_utils.sync_global_devices("ready")
        yield launch_id, checkpoint


def is_done(config: RunConfig, checkpoint: TrainingCheckpoint | None) -> bool:
    """Whether the run has done all its steps, so that nothing has to be compiled or read;
    `check_same_run` has said so."""
    if checkpoint is None or checkpoint.step < config.num_steps:
        return False
    if jax.process_index() == 0:
        note_end(config.run_dir, checkpoint.step)
    return True


def compile_step(lower: Callable[[], jax.stages.Lowered]) -> Any:
    """Compile the training step; logs the time taken, and warns if memory is short.

    A compiled step never recompiles: a batch of another shape is an error.
    """
    first = jax.process_index() == 0
    started = time.perf_counter()
    if first:
        logger.info("compiling the step")
    compiled = lower().compile()
    if first:
        logger.info(f"compiled the step in {time.perf_counter() - started:.1f} s")
        if warning := step_memory_warning(compiled.memory_analysis(), jax.local_devices()[0]):
            logger.warning(warning)
    return compiled
