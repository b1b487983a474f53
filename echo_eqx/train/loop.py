"""The training loop, from the first batch to the last checkpoint."""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.random as jr
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from echo_eqx.config import CodecConfig, DiTConfig
from echo_eqx.data.record_log import describe_counts
from echo_eqx.generation import GenerationConfig
from echo_eqx.json_data import to_json
from echo_eqx.sharding.hosts import Heartbeat
from echo_eqx.sharding.mesh import replicated
from echo_eqx.train.device_loader import DeviceLoader
from echo_eqx.train.distributed import StopSignal
from echo_eqx.train.metrics import MetricsLog, ProgressLine, tensorboard_writer
from echo_eqx.train.run_folder import note_end, open_metrics
from echo_eqx.train.settings import RunConfig
from echo_eqx.weights.checkpoint.retention import Retention
from echo_eqx.weights.checkpoint.writer import CheckpointWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """What the loop needs to train one kind of model."""

    config: RunConfig
    mesh: Mesh
    sizes: DiTConfig | CodecConfig
    data: dict[str, Any]
    """Identifies the data in checkpoints, so that runs on other data do not resume from them."""
    state: Any
    samples_seen: int
    compiled: Callable[..., Any]
    """`(state, batch, key) -> (state, metrics)`, from `compile_step`."""
    step_flops: float
    frame_rate: float
    """Latent frames per second."""
    loader: DeviceLoader
    evaluate: Callable[[Any], dict[str, Any]] | None
    """Metrics of a state on held-out data."""
    log_samples: Callable[[Any, int], None] | None
    """Generates samples with a state and writes them, for the given step."""
    generation: GenerationConfig | None = None
    """Defaults for generating with the weights of an EchoDiT."""


def train_loop(trainer: Trainer, launch_id: str, heartbeat: Heartbeat) -> int:
    """Train until `num_steps`, or until asked to stop; returns the exit code."""
    config, loader, state = trainer.config, trainer.loader, trainer.state
    first = jax.process_index() == 0
    step = int(state.step)
    if first and step:
        logger.info(f"resuming after step {step}")
    writer = CheckpointWriter(
        config.run_dir,
        launch_id=launch_id,
        process=jax.process_index(),
        num_processes=jax.process_count(),
        retention=Retention(config.keep_last, config.keep_every),
        export=config.export,
    )
    log = MetricsLog(
        open_metrics(config.run_dir / "metrics.jsonl", step) if first else None,
        config.run_dir / f"nonfinite-{jax.process_index()}.jsonl",
        step_flops=trainer.step_flops,
        batch_size=config.batch_size,
        max_nonfinite=config.max_nonfinite,
        samples_seen=trainer.samples_seen,
        frame_rate=trainer.frame_rate,
        tensorboard=tensorboard_writer(config.run_dir) if first and config.tensorboard else None,
    )
    key = jax.jit(lambda: jr.key(config.seed + 1), out_shardings=replicated(trainer.mesh))()
    stop = StopSignal()
    progress = ProgressLine(config.num_steps, step, first)

    def save(state: Any, cursor: dict[str, list[int]]) -> None:
        manifest = {
            "step": step,
            "samples_seen": log.samples_seen,
            "model_kind": "dit" if isinstance(trainer.sizes, DiTConfig) else "codec",
            "model": to_json(trainer.sizes),
            "settings": to_json(config),
            "mesh": dict(trainer.mesh.shape),
            "processes": jax.process_count(),
            "seed": config.seed,
            "key": jr.key_data(jr.key(config.seed + 1)).tolist(),
            "data": trainer.data,
        }
        if trainer.generation is not None:
            manifest["generation"] = to_json(trainer.generation)
        writer.save(state, manifest, cursor)

    with contextlib.ExitStack() as cleanup:  # runs in reverse order, even if one of them raises
        cleanup.callback(loader.close)
        cleanup.callback(progress.close)
        cleanup.callback(writer.wait)  # an error elsewhere does not lose a checkpoint in progress
        batch = loader.next() if step < config.num_steps else None
        loader.log_warnings()
        # The first collective waits only 30 s, so all processes get here first.
        multihost_utils.sync_global_devices("begin")
        log.restart_clock(loader.waited)
        while batch is not None:
            with jax.transfer_guard_device_to_host("disallow"):  # nothing here waits for the device
                state, metrics = trainer.compiled(state, batch.arrays, key)
                step += 1
                log.add(step, metrics, batch.keys)
            writer.poll()

            last = step == config.num_steps
            stopping = stop.requested(step)
            saving = step % config.checkpoint_every == 0 or last or stopping
            evaluating = trainer.evaluate is not None and (step % config.eval_every == 0 or last)
            sampling = trainer.log_samples is not None and (step % config.sample_every == 0 or last)
            cursor = batch.cursor
            if not saving:  # sent while the device computes, before anything here waits for it
                batch = loader.next()
            if trainer.evaluate is not None and evaluating:
                with log.pause():
                    log.attach(trainer.evaluate(state))
            if step % config.log_every == 0 or evaluating or sampling or saving:
                progress.show(step, log.flush(loader.waited, loader.counts))
                loader.log_warnings()
            if trainer.log_samples is not None and sampling:
                with log.pause():
                    trainer.log_samples(state, step)
            if saving:
                started = time.perf_counter()
                save(state, cursor)
                log.attach({"save_time_s": time.perf_counter() - started})
                batch = None if last or stopping else loader.next()
    multihost_utils.sync_global_devices("saved")
    if first:
        note_end(config.run_dir, step)
        logger.info(f"saved step {step} in {config.run_dir}")
        if counted := describe_counts(loader.counts):
            logger.info(f"data read since this launch: {counted}")
    heartbeat.close()
    return 0 if step >= config.num_steps else stop.exit_code
