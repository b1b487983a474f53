"""Trains EchoDiT: from the settings to the training loop."""

import contextlib
import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from echo_eqx.data.loader import HostBatch
from echo_eqx.data.pace import measure_frames_per_byte
from echo_eqx.errors import UsageError
from echo_eqx.flow.objective import Batch
from echo_eqx.generation import GenerationConfig
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.hosts import Heartbeat
from echo_eqx.sharding.mesh import check_batch, make_mesh, mesh_shape
from echo_eqx.sharding.specs import check_mesh
from echo_eqx.train.config import ObjectiveConfig, TrainConfig
from echo_eqx.train.data import TrainData
from echo_eqx.train.device_loader import DeviceLoader
from echo_eqx.train.evaluate import evaluate, make_evaluate
from echo_eqx.train.flops import step_flops
from echo_eqx.train.loop import Trainer, train_loop
from echo_eqx.train.plan import lower_step
from echo_eqx.train.restore import init_or_restore, pinned_source
from echo_eqx.train.samples import SampleWriter
from echo_eqx.train.setup import compile_step, is_done, open_run
from echo_eqx.train.state import TrainState, abstract_state
from echo_eqx.weights.find import SHIPPED


def train(config: TrainConfig, heartbeat: Heartbeat) -> int:
    """Train until `num_steps`, or until asked to stop; returns the exit code.

    **Raises**: `EchoError` for unusable inputs, before anything is downloaded or compiled wherever
    possible.
    """
    if config.objective.dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        objective = dataclasses.replace(config.objective, dtype=dtype)
        config = dataclasses.replace(config, objective=objective)
    _check_attention(config.objective)
    sizes = config.dit_config()
    axes = mesh_shape(config.mesh, jax.device_count())
    check_batch(config.batch_size, config.optimizer.grad_accum_steps, axes)
    check_mesh(abstract_state(sizes, config.optimizer).model, axes)
    mesh = make_mesh(axes)
    data = TrainData(pinned_source(config), config, sizes, mesh)
    held_out = TrainData(config.eval_data, config, sizes, mesh) if config.eval_data else None
    data_id = {"revision": data.shard_index.revision, "digest": data.shard_index.digest()}
    eval_digest = held_out.shard_index.digest() if held_out else ""
    generation = _generation(config, data)
    with open_run(config, sizes, data_id, eval_digest) as (launch_id, checkpoint):
        if is_done(config, checkpoint):
            heartbeat.close()
            return 0
        writer = _sample_writer(config, held_out or data, generation, mesh)
        eval_batches = _eval_batches(config, held_out, mesh)
        state, samples_seen, cursor = init_or_restore(config, checkpoint, mesh)
        compiled = compile_step(lambda: lower_step(config, mesh))
        broken_log = config.run_dir / f"broken-{jax.process_index()}.jsonl"
        loader = data.loader(config.batch_size, cursor=cursor, broken_log=broken_log)
        sums = make_evaluate(mesh, config.objective)
        sums_after_prefix = make_evaluate(mesh, config.objective, after_prefix=True)

        def weights(state: TrainState) -> EchoDiT:
            return state.model if state.ema is None else state.ema

        def evaluation(state: TrainState) -> dict[str, object]:
            values = evaluate(sums, weights(state), eval_batches)
            if sizes.blockwise:
                continued = evaluate(sums_after_prefix, weights(state), eval_batches)
                values["eval_loss_after_prefix"] = continued["eval_loss"]
            return values

        trainer = Trainer(
            config=config,
            mesh=mesh,
            sizes=sizes,
            generation=generation,
            data=data_id,
            state=state,
            samples_seen=samples_seen,
            compiled=compiled,
            step_flops=step_flops(sizes, config.batch_size),
            frame_rate=data.frame_rate,
            loader=DeviceLoader(loader, Batch, mesh, config.batch_size),
            evaluate=evaluation if eval_batches else None,
            log_samples=(lambda state, step: writer.write(weights(state), step))
            if writer
            else None,
        )
        return train_loop(trainer, launch_id, heartbeat)


def _check_attention(objective: ObjectiveConfig) -> None:
    backend = jax.default_backend()
    if objective.attention == "pallas" and (backend, objective.dtype) != ("tpu", "bfloat16"):
        raise UsageError(
            f"attention: expected auto on {backend} in {objective.dtype}, got pallas, which needs "
            "a TPU and bfloat16"
        )


def _generation(config: TrainConfig, data: TrainData) -> GenerationConfig:
    """Defaults for generating with the weights of this run, stored with them."""
    codec = config.codec
    if codec is not None and codec not in SHIPPED and (path := Path(codec).expanduser()).exists():
        codec = str(path.resolve())  # the weights may be loaded from another working directory
    middle = data.silence[len(data.silence) // 2].tolist()
    return GenerationConfig(
        sampler=config.sampler,
        expand_text=config.expand_text,
        reference_lufs=config.speaker_lufs,
        padding="zeros" if config.silence == "zeros" else "silence",
        codec=codec,
        codec_silence=None if config.silence == "zeros" else tuple(middle),
        frames_per_byte=measure_frames_per_byte(data.shard_index),
    )


def _sample_writer(
    config: TrainConfig, data: TrainData, generation: GenerationConfig, mesh: Mesh
) -> SampleWriter | None:
    """A writer of samples for process 0's first rows of `data`, if --sample_every asks for any."""
    if not config.sample_every:
        return None
    with contextlib.closing(data.loader(config.batch_size)) as loader:
        rows = (array[: config.sample_count] for array in next(loader).batch)
        rows = tuple(row.astype(np.float32) if row.dtype == np.float16 else row for row in rows)
    rows = HostBatch(*map(np.asarray, multihost_utils.broadcast_one_to_all(rows)))
    assert config.codec is not None
    return SampleWriter(
        config.run_dir,
        rows,
        config.codec,
        mesh,
        config.objective.dtype,
        generation,
        writes=jax.process_index() == 0,
    )


def _eval_batches(config: TrainConfig, held_out: TrainData | None, mesh: Mesh) -> list[Batch]:
    if held_out is None:
        return []
    loader = DeviceLoader(held_out.loader(config.batch_size), Batch, mesh, config.batch_size)
    with contextlib.closing(loader):
        batches = [loader.next().arrays for _ in range(config.eval_batches)]
        loader.log_warnings("held-out data: ")
    return batches
