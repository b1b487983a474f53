"""Classifier-free guidance, adaptive projected guidance, and temporal score rescaling."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def guidance_update(
    velocity: Float[Array, "b t c"],
    dropped: Float[Array, "b t c"],
    scale: Float[Array, ""],
    eta: Float[Array, ""],
) -> Float[Array, "b t c"]:
    """The term to add to `velocity`, given the velocity with the condition dropped.

    With `difference = velocity - dropped` it is `scale * (difference - (1 - eta) * parallel)`,
    where `parallel` is the projection of the difference onto the velocity. eta = 1 is
    classifier-free guidance (Ho & Salimans, arXiv:2207.12598). eta < 1 weakens the parallel part,
    which only lengthens the velocity: adaptive projected guidance (Sadat et al., arXiv:2410.02416).
    """
    difference = velocity - dropped
    square = jnp.sum(velocity * velocity, (1, 2), keepdims=True)
    product = jnp.sum(difference * velocity, (1, 2), keepdims=True)
    parallel = product / jnp.maximum(square, 1e-24) * velocity
    return scale * (difference - (1.0 - eta) * parallel)


def rescale_score(
    velocity: Float[Array, "b t c"],
    x: Float[Array, "b t c"],
    t: Float[Array, ""],
    k: Float[Array, ""],
    sigma: Float[Array, ""],
) -> Float[Array, "b t c"]:
    """Temporal score rescaling (Xu et al., arXiv:2510.01184); k = 1 returns `velocity`.

    For t < 1 the result is `(ratio ((1 - t) v + x) - x) / (1 - t)`, where
    `ratio = (snr sigma^2 + 1) / (snr sigma^2 / k + 1)` and `snr = (1 - t)^2 / t^2`.
    """
    data_share = jnp.where(t < 1.0, 1.0 - t, 1.0)
    snr = jnp.square(data_share / t)
    ratio = (snr * sigma**2 + 1.0) / (snr * sigma**2 / k + 1.0)
    rescaled = (ratio * (data_share * velocity + x) - x) / data_share
    return jnp.where((k == 1.0) | (t >= 1.0), velocity, rescaled)
