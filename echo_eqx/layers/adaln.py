"""Timestep conditioning: sinusoidal embedding, its MLP, and a low-rank AdaLN for each sub-layer."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.layers.linear import Linear
from echo_eqx.layers.norm import rms_norm

MAX_PERIOD = 10_000.0


def timestep_embedding(t: Float[Array, ""], dim: int) -> Float[Array, " {dim}"]:
    """`cat(cos a, sin a)` with `a_i = 1000 t * exp(-ln(10000) i / (dim / 2))`, for t in [0, 1]."""
    angles = t.astype(jnp.float32) * jnp.asarray(timestep_frequencies(dim), jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)])


def timestep_frequencies(dim: int) -> np.ndarray:
    """The angles at t = 1, (dim / 2,)."""
    half = dim // 2
    return 1000.0 * np.exp(-np.log(MAX_PERIOD) * np.arange(half) / half)


class Modulation(eqx.Module):
    """Shift, scale and gate vectors in float32. A stack of layers has a leading layer axis."""

    shift: Float[Array, "*n d"]
    scale: Float[Array, "*n d"]
    gate: Float[Array, "*n d"]


class TimeConditioner(eqx.Module):
    """Maps t to the shift, scale and gate shared by all blocks."""

    dense0: Linear
    dense1: Linear
    dense2: Linear
    embed_dim: int = eqx.field(static=True)

    @classmethod
    def init(cls, embed_dim: int, model_dim: int, *, key: PRNGKeyArray) -> "TimeConditioner":
        key0, key1, key2 = jr.split(key, 3)
        return cls(
            dense0=Linear.init(embed_dim, model_dim, key=key0),
            dense1=Linear.init(model_dim, model_dim, key=key1),
            dense2=Linear.init(model_dim, 3 * model_dim, key=key2),
            embed_dim=embed_dim,
        )

    def __call__(self, t: Float[Array, ""]) -> Modulation:
        c = self.dense1(jax.nn.silu(self.dense0(timestep_embedding(t, self.embed_dim))))
        shift, scale, gate = jnp.split(self.dense2(jax.nn.silu(c)), 3)
        return Modulation(shift, scale, gate)


class LowRankResidual(eqx.Module):
    """`up(down(silu(v))) + v`."""

    down: Linear
    up: Linear

    @classmethod
    def init(cls, dim: int, rank: int, *, key: PRNGKeyArray) -> "LowRankResidual":
        down = Linear.init(dim, rank, key=key)
        return cls(down, Linear.init(rank, dim, bias=True, zero=True, key=key))

    def __call__(self, v: Float[Array, " d"]) -> Float[Array, " d"]:
        return self.up(self.down(jax.nn.silu(v)), row_parallel=True) + v


class LowRankAdaLN(eqx.Module):
    """The shift, scale and gate of one sub-layer: the shared ones plus a low-rank correction."""

    shift: LowRankResidual
    scale: LowRankResidual
    gate: LowRankResidual

    @classmethod
    def init(cls, dim: int, rank: int, *, key: PRNGKeyArray) -> "LowRankAdaLN":
        key_shift, key_scale, key_gate = jr.split(key, 3)
        return cls(
            shift=LowRankResidual.init(dim, rank, key=key_shift),
            scale=LowRankResidual.init(dim, rank, key=key_scale),
            gate=LowRankResidual.init(dim, rank, key=key_gate),
        )

    def __call__(self, time: Modulation) -> Modulation:
        return Modulation(
            shift=self.shift(time.shift),
            scale=self.scale(time.scale),
            gate=jnp.tanh(self.gate(time.gate)),
        )


def modulate(x: Float[Array, "t d"], by: Modulation, eps: float) -> Float[Array, "t d"]:
    """A sub-layer's input, `rms(x) * (1 + scale) + shift`."""
    normed = rms_norm(x, eps) * (1.0 + by.scale[None]) + by.shift[None]
    return normed.astype(x.dtype)
