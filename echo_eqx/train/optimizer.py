"""AdamW, its schedules, and the moving average of the weights."""

from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from echo_eqx.train.settings import OptimizerConfig
from echo_eqx.trees import leaf_names

T = TypeVar("T")


def learning_rate(config: OptimizerConfig, num_steps: int, step: Int[Array, ""]) -> Array:
    """Rate of the update that step `step` (from 0) makes; 0 for the first one."""
    warmup = int(num_steps * config.warmup)
    if config.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, config.learning_rate, warmup, max(num_steps, warmup + 1)
        )
    else:
        decay = int(num_steps * config.decay)
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


def is_decayed(name: str) -> bool:
    """Matrices decay; AdaLN projections and `out_proj` do not, as in the published trainer."""
    matrix = name.endswith("weight") and not name.endswith("norm.weight")
    return matrix and "_adaln." not in name and not name.startswith("out_proj")


def adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def adamw_update(
    config: OptimizerConfig,
    rate: Float[Array, ""],
    model: T,
    gradients: T,
    gradient_norm: Float[Array, ""],
    state: optax.ScaleByAdamState,
) -> tuple[T, optax.ScaleByAdamState]:
    """New weights and moments: clip, Adam, decay of matrices, step of `-rate`."""
    too_long = gradient_norm > config.clip
    scale = jnp.where(too_long, config.clip / gradient_norm, 1.0)
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    with jax.numpy_dtype_promotion("standard"):
        direction, moments = adam(config).update(cast(Any, gradients), state)
    leaves, treedef = jax.tree.flatten(model)
    decay = [config.weight_decay * is_decayed(name) for name in leaf_names(model)]
    moves = treedef.flatten_up_to(direction)
    updated = [
        leaf - rate * (move + amount * leaf)
        for leaf, move, amount in zip(leaves, moves, decay, strict=True)
    ]
    return treedef.unflatten(updated), cast(optax.ScaleByAdamState, moments)


def moved_average(ema: T, model: T, decay: float, step: Int[Array, ""]) -> T:
    """`decay * ema + (1 - decay) * model`; over the first steps the decay rises with the step, so
    that the weights a run began with do not linger."""
    n = step.astype(jnp.float32)
    kept = jnp.minimum(decay, (1.0 + n) / (10.0 + n))
    return jax.tree.map(lambda a, b: kept * a + (1.0 - kept) * b, ema, model)


def global_norm(tree: Any) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)))
