"""One training step over a mesh: loss, gradients, update."""

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.config import DiTConfig
from echo_eqx.flow.objective import (
    Batch,
    Bounds,
    frame_weight,
    sample_bounds,
    sample_noise,
    squared_errors,
)
from echo_eqx.layers.parallel import DATA, FSDP
from echo_eqx.model.attention import attention_kernel
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.mesh import BATCH_SPEC, batch_sharding
from echo_eqx.sharding.specs import (
    mark_fsdp_shards,
    parameter_specs,
    replicated_axes,
    state_shardings,
)
from echo_eqx.train.config import ObjectiveConfig, OptimizerConfig
from echo_eqx.train.state import TrainState
from echo_eqx.train.update import apply_gradients, jit_step


def loss_and_gradients(
    model: EchoDiT,
    batch: Batch,
    key: PRNGKeyArray,
    mesh: Mesh,
    objective: ObjectiveConfig,
    grad_accum_steps: int = 1,
) -> tuple[Float[Array, ""], EchoDiT]:
    """Loss and gradient of a global batch; the gradient is sharded like the parameters.

    Each device processes its rows of the batch. A layer's parameters are gathered over `fsdp` in
    the compute dtype when the layer runs, in the forward and again in the backward pass, and its
    gradients are reduce-scattered. Gradients are summed over `data` once, at the end, in float32.

    A block-wise model trains a random block of each row, behind the latents before it.
    """
    specs = parameter_specs(model)
    batch_size, frames, channels = batch.latents.shape

    def on_device(model: EchoDiT, batch: Batch, key: PRNGKeyArray):
        rows = batch.latents.shape[0]
        index = jax.lax.axis_index((DATA, FSDP)) * rows + jnp.arange(rows)
        bounds = None
        if model.config.blockwise:
            bounds = sample_bounds(
                key,
                index,
                frames,
                model.config.patch_size,
                prefix_probability=objective.prefix_probability,
                cut_probability=objective.cut_probability,
            )
        weight = frame_weight(batch, objective.loss_frames == "valid", bounds)
        total = jax.lax.psum(jnp.sum(weight), (DATA, FSDP))
        if bounds is not None:
            total = jnp.maximum(total, 1.0)  # all blocks may lie behind their recordings

        def loss(
            model: EchoDiT, part: tuple[Batch, Array, Array, Bounds | None]
        ) -> Float[Array, ""]:
            batch, index, weight, bounds = part
            sample = sample_noise(
                key,
                index,
                batch_size,
                (frames, channels),
                text_dropout=objective.text_dropout,
                speaker_dropout=objective.speaker_dropout,
                timestep_logit_mean=objective.timestep_logit_mean,
            )
            model = mark_fsdp_shards(model, objective.dtype, objective.grad_reduce_dtype)
            with attention_kernel(objective.attention):
                errors = squared_errors(model, batch, sample, objective.remat, bounds)
            return jnp.sum(errors * weight) / total

        # Marking replicated parameters as varying delays the sum of their gradients to the end.
        model = jax.tree.map(lambda leaf, spec: _varying(leaf, replicated_axes(spec)), model, specs)
        parts = (batch, index, weight, bounds)
        if grad_accum_steps == 1:
            value, gradients = jax.value_and_grad(loss)(model, parts)
        else:
            parts = jax.tree.map(lambda x: x.reshape(grad_accum_steps, -1, *x.shape[1:]), parts)

            def add(total, part):
                return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(model, part)), None

            zeros = (_varying(jnp.zeros(()), (DATA, FSDP)), jax.tree.map(jnp.zeros_like, model))
            (value, gradients), _ = jax.lax.scan(add, zeros, parts)
        gradients = jax.tree.map(
            lambda leaf, spec: jax.lax.psum(leaf, replicated_axes(spec)), gradients, specs
        )
        return jax.lax.psum(value, (DATA, FSDP)), gradients

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, BATCH_SPEC, P()), out_specs=(P(), specs)
    )(model, batch, key)


def _varying(x: Array, axes: tuple[str, ...]) -> Array:
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def make_train_step(
    mesh: Mesh,
    state: TrainState,
    objective: ObjectiveConfig,
    optimizer: OptimizerConfig,
    num_steps: int,
) -> jax.stages.Wrapped:
    """The jitted step `(state, batch, key) -> (state, metrics)`, which donates the old state.

    `state` may be abstract: only its shapes are used. `key` is the run's key, the same in each
    step.
    """

    def step(state: TrainState, batch: Batch, key: PRNGKeyArray):
        key = jr.fold_in(key, state.step)
        loss, gradients = loss_and_gradients(
            state.model, batch, key, mesh, objective, optimizer.grad_accum_steps
        )
        return apply_gradients(
            optimizer,
            num_steps,
            state,
            loss,
            gradients,
            frames=jnp.sum(batch.frame_mask, dtype=jnp.int32),
            terms={},
            others={},
        )

    return jit_step(step, state_shardings(state, mesh), mesh)


def abstract_batch(mesh: Mesh, batch_size: int, config: DiTConfig) -> Batch:
    """Shapes and sharding of a global batch for a model of `config`."""
    t, s, r = config.max_frames, config.max_text_bytes, config.max_speaker_frames

    def batch() -> Batch:
        return Batch(
            latents=jnp.zeros((batch_size, t, config.latent_dim)),
            frame_mask=jnp.zeros((batch_size, t), bool),
            text_ids=jnp.zeros((batch_size, s), jnp.int32),
            text_mask=jnp.zeros((batch_size, s), bool),
            speaker_latents=jnp.zeros((batch_size, r, config.latent_dim)),
            speaker_mask=jnp.zeros((batch_size, r), bool),
        )

    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(batch),
    )
