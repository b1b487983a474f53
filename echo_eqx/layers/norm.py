"""Root-mean-square norm, computed in float32 for every input dtype."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "*n d"], eps: float) -> Float[Array, "*n d"]:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(eqx.Module):
    """`rms_norm(x) * weight`. A weight of shape (h, k) normalizes each head separately."""

    weight: Float[Array, "*d"]
    eps: float = eqx.field(static=True)

    @classmethod
    def init(cls, shape: int | tuple[int, ...], eps: float) -> "RMSNorm":
        return cls(jnp.ones(shape), eps)

    def __call__(self, x: Float[Array, "*n"]) -> Float[Array, "*n"]:
        weight = jnp.broadcast_to(self.weight.astype(jnp.float32), x.shape)
        return (rms_norm(x, self.eps) * weight).astype(x.dtype)
