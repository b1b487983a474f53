"""The training state: everything that a step changes."""

import functools
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from echo_eqx.config import DiTConfig
from echo_eqx.model.dit import EchoDiT
from echo_eqx.sharding.specs import state_shardings
from echo_eqx.train.optimizer import adam
from echo_eqx.train.settings import OptimizerConfig


class TrainState(eqx.Module):
    """Master weights, Adam's moments and the EMA, all float32, and counters.

    `step` counts batches. `adam.count` counts updates, which are fewer if some were skipped because
    the loss or gradient was not finite.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    """Updates skipped since the start of training."""
    model: EchoDiT
    adam: optax.ScaleByAdamState
    ema: EchoDiT | None


def init_train_state(model: EchoDiT, config: OptimizerConfig) -> TrainState:
    """The state before the first step from `model`."""
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, model) if config.ema_decay > 0 else None
    moments: Any = adam(config).init(cast(Any, model))
    return TrainState(zero, zero, model, moments, ema)


@functools.cache
def abstract_state(config: DiTConfig, optimizer: OptimizerConfig) -> TrainState:
    """A state of shapes only, as from `jax.eval_shape`: every leaf is a `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda: init_train_state(EchoDiT.init(config, key=jr.key(0)), optimizer))


def sharded_abstract_state(config: DiTConfig, optimizer: OptimizerConfig, mesh: Mesh) -> TrainState:
    """`abstract_state` with a sharding on every leaf."""
    state = abstract_state(config, optimizer)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, mesh),
    )


def init_state(config: DiTConfig, optimizer: OptimizerConfig, mesh: Mesh, seed: int) -> TrainState:
    """The state before the first step. Each device initializes only its own shards."""
    shardings = state_shardings(abstract_state(config, optimizer), mesh)

    def init(key):
        return init_train_state(EchoDiT.init(config, key=key), optimizer)

    return jax.jit(init, out_shardings=shardings)(jr.key(seed))
