"""Snake activations and the residual units of the codec's main path."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.codec.convolution import Convolution

DILATIONS = (1, 3, 9)

# pi as the sum of two numbers, the first exact in float32; sin(r) / r on [-pi/2, pi/2] as a
# polynomial in r^2.
_PI_HIGH, _PI_LOW = 3.140625, 9.67653589793e-4
_SINE = (1.0, -1 / 6, 8.3333310e-3, -1.9840874e-4, 2.7525562e-6, -2.3889859e-8)


def sine_squared(z: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """`sin(z)^2` in float32 by range reduction and a polynomial; maximum error 8e-7.

    Four times as fast as `jnp.sin` on CPU, where the codec spends half of its time here.
    """
    turns = jnp.round(z * (1 / jnp.pi))
    r = (z - turns * _PI_HIGH) - turns * _PI_LOW
    r2 = r * r
    series = jnp.full_like(r2, _SINE[-1])
    for coefficient in reversed(_SINE[:-1]):
        series = series * r2 + coefficient
    sine = r * series
    return sine * sine


class Snake(eqx.Module):
    """`x + sin^2(alpha x) / (alpha + 1e-9)` (Ziyin et al., 2020, arXiv:2006.08195)."""

    alpha: Float[Array, " c"]

    @classmethod
    def init(cls, dim: int) -> "Snake":
        return cls(jnp.ones(dim))

    def __call__(self, x: Float[Array, "t c"]) -> Float[Array, "t c"]:
        alpha = self.alpha.astype(jnp.float32)[None]
        z = x.astype(jnp.float32)
        return (z + sine_squared(alpha * z) * (1 / (alpha + 1e-9))).astype(x.dtype)


class ResidualUnit(eqx.Module):
    """`x + conv1(snake(conv7(snake(x))))`."""

    snake1: Snake
    conv1: Convolution
    snake2: Snake
    conv2: Convolution

    @classmethod
    def init(
        cls, dim: int, dilation: int, *, causal: bool = False, key: PRNGKeyArray
    ) -> "ResidualUnit":
        key1, key2 = jr.split(key)
        conv2 = Convolution.init(1, dim, dim, key=key2)
        return cls(
            snake1=Snake.init(dim),
            conv1=Convolution.init(7, dim, dim, dilation=dilation, causal=causal, key=key1),
            snake2=Snake.init(dim),
            # Small at first, so that a dozen residual units in a row do not blow up the variance.
            conv2=eqx.tree_at(lambda conv: conv.weight, conv2, 0.3 * conv2.weight),
        )

    def __call__(self, x: Float[Array, "t c"]) -> Float[Array, "t c"]:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))


def init_units(dim: int, key: PRNGKeyArray, causal: bool = False) -> tuple[ResidualUnit, ...]:
    keys = jr.split(key, len(DILATIONS))
    pairs = zip(DILATIONS, keys, strict=True)
    return tuple(
        ResidualUnit.init(dim, dilation, causal=causal, key=key) for dilation, key in pairs
    )
