"""Loss on held-out data, with noise and times that are the same at every evaluation."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.flow.noising import Batch, draw, frame_weight, squared_errors
from echo_eqx.layers.split import DATA, FSDP
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.mesh import BATCH_SPEC
from echo_eqx.sharding.specs import as_slices, parameter_specs
from echo_eqx.train.config import ObjectiveConfig
from echo_eqx.trees import cast

NUM_BANDS = 4
"""Equal parts of [0, 1] that losses are told apart by: the first is nearly data, the last noise."""

Evaluate = Callable[[EchoDiT, Batch, PRNGKeyArray], Float[Array, "2 bands"]]


def make_evaluate(mesh: Mesh, objective: ObjectiveConfig) -> Evaluate:
    """A jitted `(model, batch, key) -> sums`: squared errors and their weights by band of time."""

    def sums(model: EchoDiT, batch: Batch, key: PRNGKeyArray) -> Float[Array, "2 bands"]:
        batch_size, frames, channels = batch.latents.shape

        def on_device(model: EchoDiT, batch: Batch, key: PRNGKeyArray) -> Array:
            rows = batch.latents.shape[0]
            index = jax.lax.axis_index((DATA, FSDP)) * rows + jnp.arange(rows)
            draws = draw(
                key, index, batch_size, (frames, channels), text_dropout=0.0, speaker_dropout=0.0
            )
            errors = squared_errors(as_slices(cast(model, objective.dtype)), batch, draws)
            weight = frame_weight(batch, objective.loss_frames == "valid")
            band = jnp.minimum((draws.t * NUM_BANDS).astype(jnp.int32), NUM_BANDS - 1)
            in_band = jax.nn.one_hot(band, NUM_BANDS)
            of_rows = jnp.stack([jnp.sum(errors * weight, 1), jnp.sum(weight, 1)])
            exact = jax.lax.Precision.HIGHEST
            return jax.lax.psum(jnp.matmul(of_rows, in_band, precision=exact), (DATA, FSDP))

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(parameter_specs(model), BATCH_SPEC, P()),
            out_specs=P(),
        )(model, batch, key)

    return jax.jit(sums)


def evaluate(run: Evaluate, model: EchoDiT, batches: list[Batch]) -> dict[str, object]:
    """`eval_loss` and `eval_loss_by_time` over `batches`; a band without any time is None."""
    total = sum(run(model, batch, jr.fold_in(jr.key(0), i)) for i, batch in enumerate(batches))
    errors, weights = jax.device_get(total)
    return {
        "eval_loss": float(errors.sum() / weights.sum()),
        "eval_loss_by_time": [
            float(error / weight) if weight else None
            for error, weight in zip(errors, weights, strict=True)
        ],
    }
