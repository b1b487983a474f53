"""A training run of EchoDiT, from its settings to the loop."""

import dataclasses
import logging
from pathlib import Path

import jax
import jax.random as jr
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from echo_eqx.data.loader import HostBatch
from echo_eqx.flow.objective import Batch
from echo_eqx.generation import GenerationConfig
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.hosts import Heartbeat
from echo_eqx.sharding.mesh import check_batch, make_mesh, mesh_shape
from echo_eqx.sharding.specs import check_mesh
from echo_eqx.train.config import TrainConfig
from echo_eqx.train.data import TrainData
from echo_eqx.train.device_loader import DeviceLoader
from echo_eqx.train.evaluate import evaluate, make_evaluate
from echo_eqx.train.flops import step_flops
from echo_eqx.train.loop import Run, claim, compile_step, run_folder, run_steps
from echo_eqx.train.restore import begin, check_same_run, pinned_source
from echo_eqx.train.samples import Samples
from echo_eqx.train.state import TrainState, abstract_state, sharded_abstract_state
from echo_eqx.train.step import abstract_batch, make_train_step
from echo_eqx.weights.find import SHIPPED

logger = logging.getLogger(__name__)


def train(config: TrainConfig, heartbeat: Heartbeat) -> int:
    """Train until `num_steps`, or until asked to stop; returns the exit code.

    **Raises**: `EchoError` for what was given and cannot be used, as far as possible before
    anything is compiled or fetched.
    """
    config = _resolved(config)
    sizes = config.dit_config()
    ways = mesh_shape(config.mesh, jax.device_count())
    check_batch(config.batch_size, config.optimizer.grad_accum_steps, ways)
    check_mesh(abstract_state(sizes, config.optimizer).model, ways)
    mesh = make_mesh(ways)
    source = pinned_source(config)
    data = TrainData(source, config, sizes, mesh)
    held_out = TrainData(config.eval_data, config, sizes, mesh) if config.eval_data else None
    digest = data.shard_index.digest()
    both = digest + (held_out.shard_index.digest() if held_out else "")
    generation = _generation(config, data)
    with run_folder(config, both) as (folder, launch_id, checkpoint):
        facts = {"revision": data.shard_index.revision, "digest": digest}
        if checkpoint is not None:
            check_same_run(checkpoint, sizes, config, facts, data.shard_index.source)
        claim(folder, config, checkpoint)
        state, samples_seen, cursor = begin(config, checkpoint, mesh)
        compiled = compile_step(lambda: lower_step(config, mesh))
        broken_log = config.run_dir / f"broken-{jax.process_index()}.jsonl"
        batches = data.loader(config.batch_size, cursor=cursor, broken_log=broken_log)
        eval_batches, samples = _held_out(config, held_out or data, generation, mesh)
        figures = make_evaluate(mesh, config.objective)

        def weights(state: TrainState) -> EchoDiT:
            return state.model if state.ema is None else state.ema

        run = Run(
            config=config,
            mesh=mesh,
            sizes=sizes,
            generation=generation,
            data=facts,
            state=state,
            samples_seen=samples_seen,
            compiled=compiled,
            step_flops=step_flops(sizes, config.batch_size),
            frame_rate=data.frame_rate,
            loader=DeviceLoader(batches, Batch, mesh, config.batch_size),
            evaluate=(lambda state: evaluate(figures, weights(state), eval_batches))
            if eval_batches
            else None,
            speak=(lambda state, step: samples.speak(weights(state), step)) if samples else None,
        )
        return run_steps(run, launch_id, heartbeat)


def lower_step(config: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The training step, lowered from shapes alone."""
    dit_config = config.dit_config()
    state = sharded_abstract_state(dit_config, config.optimizer, mesh)
    batch = abstract_batch(mesh, config.batch_size, dit_config)
    step = make_train_step(mesh, state, config.objective, config.optimizer, config.num_steps)
    key = jax.eval_shape(lambda: jr.key(0))
    return step.lower(state, batch, key)


def _generation(config: TrainConfig, data: TrainData) -> GenerationConfig:
    """What the weights of this run say about how to speak with them."""
    codec = config.codec
    if codec is not None and codec not in SHIPPED and (path := Path(codec).expanduser()).exists():
        codec = str(path.resolve())  # the weights may be used from another folder
    middle = data.silence[len(data.silence) // 2].tolist()
    return GenerationConfig(
        sampler=config.sampler,
        expand_text=config.expand_text,
        reference_lufs=config.reference_lufs,
        codec=codec,
        codec_silence=None if config.silence == "zeros" else tuple(middle),
    )


def _held_out(
    config: TrainConfig, data: TrainData, generation: GenerationConfig, mesh: Mesh
) -> tuple[list, Samples | None]:
    """Batches to evaluate on, and the speaker of samples, as far as they are asked for."""
    samples, batches = None, []
    if config.sample_every:
        source = data.loader(config.batch_size)
        rows = _first_rows(next(source).batch, config.sample_count)
        source.close()
        assert config.codec is not None
        samples = Samples(
            config.run_dir,
            rows,
            config.codec,
            mesh,
            config.objective.dtype,
            generation,
            writes=jax.process_index() == 0,
        )
    if config.eval_data:
        source = data.loader(config.batch_size)
        loader = DeviceLoader(source, Batch, mesh, config.batch_size)
        batches = [loader.next().batch for _ in range(config.eval_batches)]
        for sentence in loader.news():
            logger.warning(f"held-out data: {sentence}")
        source.close()
    return batches, samples


def _first_rows(batch: HostBatch, count: int) -> HostBatch:
    """The first rows of process 0, in all processes."""
    rows = HostBatch(*(array[:count] for array in batch))
    return HostBatch(*map(np.asarray, multihost_utils.broadcast_one_to_all(tuple(rows))))


def _resolved(config: TrainConfig) -> TrainConfig:
    if config.objective.dtype != "auto":
        return config
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return dataclasses.replace(config, objective=dataclasses.replace(config.objective, dtype=dtype))
