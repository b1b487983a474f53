"""How the velocities with and without a condition are combined, and what may follow."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def guidance_update(
    velocity: Float[Array, "b t c"],
    dropped: Float[Array, "b t c"],
    scale: Float[Array, ""],
    eta: Float[Array, ""],
) -> Float[Array, "b t c"]:
    """`scale * (difference - (1 - eta) * its part along the velocity)`, to be added.

    With eta = 1 this is classifier-free guidance (Ho & Salimans, arXiv:2207.12598). With eta < 1
    the part of the difference that only lengthens the velocity is weakened: adaptive projected
    guidance (Sadat et al., arXiv:2410.02416).
    """
    difference = velocity - dropped
    axes = (1, 2)
    length2 = jnp.sum(velocity * velocity, axes, keepdims=True)
    along = jnp.sum(difference * velocity, axes, keepdims=True) / jnp.maximum(length2, 1e-24)
    return scale * (difference - (1.0 - eta) * along * velocity)


def rescale_score(
    velocity: Float[Array, "b t c"],
    x: Float[Array, "b t c"],
    t: Float[Array, ""],
    k: Float[Array, ""],
    sigma: Float[Array, ""],
) -> Float[Array, "b t c"]:
    """Temporal score rescaling (Xu et al., arXiv:2510.01184); k = 1 changes nothing.

    `ratio = (snr sigma^2 + 1) / (snr sigma^2 / k + 1)` with `snr = (1 - t)^2 / t^2`, and the new
    velocity is `(ratio ((1 - t) v + x) - x) / (1 - t)`, for t < 1.
    """
    data_share = jnp.where(t < 1.0, 1.0 - t, 1.0)
    snr = jnp.square(data_share / t)
    ratio = (snr * sigma**2 + 1.0) / (snr * sigma**2 / k + 1.0)
    rescaled = (ratio * (data_share * velocity + x) - x) / data_share
    return jnp.where((k == 1.0) | (t >= 1.0), velocity, rescaled)
