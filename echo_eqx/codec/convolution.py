"""One-dimensional convolutions, channels last: x is (t, c) and kernels are (k, i, o).

Strided and transposed kernels are twice their stride long, so both are one matrix product over
blocks of `stride` samples, which is faster than a strided convolution.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

_EXACT = jax.lax.Precision.HIGHEST


def init_kernel(
    kernel: int, in_dim: int, out_dim: int, key: PRNGKeyArray, fan_in: int | None = None
) -> Array:
    """Normal, cut at two deviations, that keeps the size of what passes: the deviation is
    1 / sqrt(fan_in), the numbers that are summed (LeCun et al., 1998). By default that is the whole
    kernel."""
    deviation = 1 / math.sqrt(fan_in or kernel * in_dim)
    return deviation * jr.truncated_normal(key, -2.0, 2.0, (kernel, in_dim, out_dim))


class Convolution(eqx.Module):
    """Stride 1. `__call__` pads both sides to keep the length; `valid` pads nothing."""

    weight: Float[Array, "w i o"]
    bias: Float[Array, " o"]
    dilation: int = eqx.field(static=True, default=1)

    @classmethod
    def init(
        cls, kernel: int, in_dim: int, out_dim: int, *, dilation: int = 1, key: PRNGKeyArray
    ) -> "Convolution":
        weight = init_kernel(kernel, in_dim, out_dim, key)
        return cls(weight, jnp.zeros(out_dim), dilation)

    @property
    def reach(self) -> int:
        """Samples beyond the current one that the kernel spans."""
        return self.dilation * (self.weight.shape[0] - 1)

    def __call__(self, x: Float[Array, "t i"]) -> Float[Array, "t o"]:
        return self.valid(jnp.pad(x, ((self.reach // 2, self.reach // 2), (0, 0))))

    def valid(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        y = jax.lax.conv_general_dilated(
            x[None],
            self.weight.astype(x.dtype),
            window_strides=(1,),
            padding="VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=_EXACT,
        )[0]
        return y + self.bias.astype(x.dtype)[None]


class Downsample(eqx.Module):
    """Convolution with stride s and kernel 2s."""

    weight: Float[Array, "w i o"]
    bias: Float[Array, " o"]

    @classmethod
    def init(cls, stride: int, in_dim: int, out_dim: int, *, key: PRNGKeyArray) -> "Downsample":
        return cls(init_kernel(2 * stride, in_dim, out_dim, key), jnp.zeros(out_dim))

    @property
    def stride(self) -> int:
        return self.weight.shape[0] // 2

    def __call__(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        """Pads (s + 1) // 2 in front and the rest of s behind; t is a multiple of s."""
        front = (self.stride + 1) // 2
        return self.valid(jnp.pad(x, ((front, self.stride - front), (0, 0))))

    def valid(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        weight = self.weight.astype(x.dtype)
        blocks = x.reshape(-1, self.stride * x.shape[1])
        first = weight[: self.stride].reshape(blocks.shape[1], -1)
        second = weight[self.stride :].reshape(blocks.shape[1], -1)
        y = jnp.matmul(blocks[:-1], first, precision=_EXACT)
        y = y + jnp.matmul(blocks[1:], second, precision=_EXACT)
        return y + self.bias.astype(x.dtype)[None]


class Upsample(eqx.Module):
    """Transposed convolution with stride s and kernel 2s."""

    weight: Float[Array, "w i o"]
    bias: Float[Array, " o"]

    @classmethod
    def init(cls, stride: int, in_dim: int, out_dim: int, *, key: PRNGKeyArray) -> "Upsample":
        # Each sample is a sum over two frames.
        weight = init_kernel(2 * stride, in_dim, out_dim, key, fan_in=2 * in_dim)
        return cls(weight, jnp.zeros(out_dim))

    @property
    def stride(self) -> int:
        return self.weight.shape[0] // 2

    def __call__(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        """Cuts (s + 1) // 2 samples in front and the rest of s behind."""
        front = (self.stride + 1) // 2
        y = self.overlapped(jnp.pad(x, ((1, 1), (0, 0))))
        return y[front : front + x.shape[0] * self.stride]

    def overlapped(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        """Block j of the output is the first half of x[j + 1] plus the second half of x[j]."""
        weight = self.weight.astype(x.dtype)
        first = jnp.einsum("ti,sio->tso", x[1:], weight[: self.stride], precision=_EXACT)
        second = jnp.einsum("ti,sio->tso", x[:-1], weight[self.stride :], precision=_EXACT)
        y = (first + second).reshape(-1, weight.shape[2])
        return y + self.bias.astype(x.dtype)[None]
