"""AdamW, learning-rate schedules, and the moving average of the weights."""

from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from echo_eqx.train.settings import OptimizerConfig
from echo_eqx.trees import leaf_names

T = TypeVar("T")


def learning_rate(config: OptimizerConfig, num_steps: int, step: Int[Array, ""]) -> Array:
    """Learning rate of step `step`, counted from 0; a warm-up starts from 0 at step 0."""
    warmup = int(num_steps * config.warmup_ratio)
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, warmup, max(num_steps, warmup + 1)
        )
    else:
        decay = int(num_steps * config.decay_ratio)
        schedule = optax.join_schedules(
            [
                optax.linear_schedule(0.0, config.learning_rate, warmup),
                optax.constant_schedule(config.learning_rate),
                optax.linear_schedule(config.learning_rate, 0.0, decay),
            ],
            [warmup, num_steps - decay],
        )
    # optax mixes integer counts with floats.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.asarray(schedule(step), jnp.float32)


def weight_decay_mask(model: T) -> T:
    """True for matrices, except AdaLN projections and `out_proj`, as in the published trainer."""

    def decays(name: str) -> bool:
        is_matrix = name.endswith("weight") and not name.endswith("norm.weight")
        return is_matrix and "_adaln." not in name and not name.startswith("out_proj")

    return jax.tree.structure(model).unflatten(map(decays, leaf_names(model)))


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def adamw_update(
    config: OptimizerConfig,
    lr: Float[Array, ""],
    model: T,
    gradients: T,
    state: optax.ScaleByAdamState,
) -> tuple[T, optax.ScaleByAdamState]:
    """New weights and moments: clip by global norm, Adam, decoupled weight decay, step of `-lr`."""
    mask: Any = weight_decay_mask(model)
    chain = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        adam(config),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.scale_by_learning_rate(lr),
    )
    # Only Adam has a state.
    empty = optax.EmptyState()
    states = (empty, state, optax.MaskedState(empty), empty)
    with jax.numpy_dtype_promotion("standard"):
        updates, states = chain.update(cast(Any, gradients), states, cast(Any, model))
    return cast(T, optax.apply_updates(cast(Any, model), updates)), cast(Any, states)[1]


def update_ema(ema: T, model: T, decay: float, step: Int[Array, ""]) -> T:
    """`decay * ema + (1 - decay) * model`, with a decay that starts low and rises with the step, so
    that the initial weights are forgotten quickly."""
    n = step.astype(jnp.float32)
    decay_now = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    return cast(T, optax.incremental_update(cast(Any, model), cast(Any, ema), 1.0 - decay_now))
