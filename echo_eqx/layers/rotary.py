"""Rotary position embedding over interleaved pairs (Su et al., 2021, arXiv:2104.09864)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from echo_eqx.layers.split import in_first_half

THETA = 10_000.0


def rotary_angles(length: int, head_dim: int, *, stride: int = 1) -> Float[Array, "t a"]:
    """Angle of pair i at position p: `p * theta^(-2i / head_dim)`, for p = 0, stride, ...

    Computed in float64 and reduced to one turn, so that late positions are as exact as early ones.
    """
    frequencies = THETA ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = np.outer(np.arange(length) * stride, frequencies)
    return jnp.asarray(np.remainder(angles, 2 * np.pi), jnp.float32)


def rotate(x: Float[Array, "t h k"], angles: Float[Array, "t a"]) -> Float[Array, "t h k"]:
    """Turn each pair `(x[2i], x[2i + 1])` of every head by its angle."""
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def rotate_half_of_heads(
    x: Float[Array, "t h k"], angles: Float[Array, "t a"]
) -> Float[Array, "t h k"]:
    """`rotate` for the first half of the heads; the others carry no position."""
    turns = in_first_half(x.shape[1])
    return jnp.where(turns[None, :, None], rotate(x, angles), x)
