"""The part of a training step that all models share: update the state, report metrics."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from echo_eqx.sharding.mesh import batch_sharding, replicated
from echo_eqx.train.metrics import StepMetrics
from echo_eqx.train.optimizer import adamw_update, learning_rate, update_ema
from echo_eqx.train.settings import OptimizerConfig

State = TypeVar("State", bound=Any)


def apply_gradients(
    config: OptimizerConfig,
    num_steps: int,
    state: State,
    loss: Float[Array, ""],
    gradients: Any,
    *,
    frames: Int[Array, ""],
    terms: Mapping[str, Float[Array, ""]],
    others: Mapping[str, Any],
) -> tuple[State, StepMetrics]:
    """The next state and its metrics; if loss or gradient is not finite, only counters change.

    `others` are new values of other fields of the state. `frames` and `terms` go into the metrics.
    """
    norm = optax.tree.norm(gradients)
    lr = learning_rate(config, num_steps, state.step)
    model, adam = adamw_update(config, lr, state.model, gradients, state.adam)
    ema = state.ema
    if ema is not None:
        ema = update_ema(ema, model, config.ema_decay, state.step)
    new = {"model": model, "adam": adam, "ema": ema, **others}
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = jax.tree.map(
        lambda after, before: jnp.where(finite, after, before),
        new,
        {name: getattr(state, name) for name in new},
    )
    skipped = state.skipped + jnp.where(finite, 0, 1)
    metrics = StepMetrics(
        loss=loss,
        grad_norm=norm,
        param_norm=optax.tree.norm(new["model"]),
        lr=lr,
        updated=finite,
        skipped=skipped,
        frames=frames,
        terms=dict(terms),
    )
    return dataclasses.replace(state, step=state.step + 1, skipped=skipped, **new), metrics


def jit_step(step: Callable[..., Any], shardings: Any, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted `(state, batch, key) -> (state, metrics)`, which donates the old state.

    `shardings` has the structure of the state. The batch is sharded over `data` and `fsdp`.
    """
    everywhere = replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh), everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
    )
