"""Loss on held-out data, with the same noise and timesteps at every evaluation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.flow.objective import (
    Batch,
    frame_weight,
    sample_bounds,
    sample_noise,
    squared_errors,
)
from echo_eqx.layers.parallel import DATA, FSDP
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.mesh import BATCH_SPEC
from echo_eqx.sharding.specs import mark_fsdp_shards, parameter_specs
from echo_eqx.train.config import ObjectiveConfig

NUM_BANDS = 4
"""Timestep bands, equal parts of [0, 1], with a loss each: the first is almost clean data."""

Evaluate = Callable[[EchoDiT, Batch, PRNGKeyArray], Float[Array, "2 bands"]]


def make_evaluate(mesh: Mesh, objective: ObjectiveConfig, after_prefix: bool = False) -> Evaluate:
    """A jitted `(model, batch, key) -> sums` of squared errors and weights per timestep band.

    `after_prefix` is for block-wise models: the loss of what follows a prefix of random length.
    """

    def sums(model: EchoDiT, batch: Batch, key: PRNGKeyArray) -> Float[Array, "2 bands"]:
        batch_size, frames, channels = batch.latents.shape

        def on_device(model: EchoDiT, batch: Batch, key: PRNGKeyArray) -> Array:
            rows = batch.latents.shape[0]
            index = jax.lax.axis_index((DATA, FSDP)) * rows + jnp.arange(rows)
            sample = sample_noise(
                key, index, batch_size, (frames, channels), text_dropout=0.0, speaker_dropout=0.0
            )
            bounds = None
            if after_prefix:
                bounds = sample_bounds(
                    key,
                    index,
                    frames,
                    model.config.patch_size,
                    prefix_probability=1.0,
                    cut_probability=0.0,
                )
            marked = mark_fsdp_shards(model, objective.dtype)
            errors = squared_errors(marked, batch, sample, bounds=bounds)
            weight = frame_weight(batch, objective.loss_frames == "valid", bounds)
            band = jnp.minimum((sample.t * NUM_BANDS).astype(jnp.int32), NUM_BANDS - 1)
            in_band = jax.nn.one_hot(band, NUM_BANDS)
            of_rows = jnp.stack([jnp.sum(errors * weight, 1), jnp.sum(weight, 1)])
            exact = jax.lax.Precision.HIGHEST
            return jax.lax.psum(jnp.matmul(of_rows, in_band, precision=exact), (DATA, FSDP))

        return jax.shard_map(
            on_device, mesh=mesh, in_specs=(parameter_specs(model), BATCH_SPEC, P()), out_specs=P()
        )(model, batch, key)

    return jax.jit(sums)


def evaluate(run: Evaluate, model: EchoDiT, batches: list[Batch]) -> dict[str, object]:
    """`eval_loss` and `eval_loss_by_time` over `batches`; None for bands without timesteps."""
    total = sum(run(model, batch, jr.fold_in(jr.key(0), i)) for i, batch in enumerate(batches))
    errors, weights = jax.device_get(total)
    return {
        "eval_loss": float(errors.sum() / weights.sum()),
        "eval_loss_by_time": [
            float(error / weight) if weight else None
            for error, weight in zip(errors, weights, strict=True)
        ],
    }
