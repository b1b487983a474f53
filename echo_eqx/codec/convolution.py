"""One-dimensional convolutions, channels last: x is (t, c) and kernels are (k, i, o).

Strided and transposed kernels are twice as long as their stride. Both are therefore computed as
matrix products over blocks of `stride` samples, which is faster than a strided convolution.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.layers.precision import matmul_precision


def init_kernel(
    kernel: int, in_dim: int, out_dim: int, key: PRNGKeyArray, fan_in: int | None = None
) -> Array:
    """Variance-preserving (LeCun) init: truncated normal, std 1 / sqrt(fan_in), cut at 2 sigma.

    `fan_in` defaults to `kernel * in_dim`.
    """
    std = 1 / math.sqrt(fan_in or kernel * in_dim)
    return std * jr.truncated_normal(key, -2.0, 2.0, (kernel, in_dim, out_dim))


class Convolution(eqx.Module):
    """Stride 1. `__call__` pads to keep the length; `valid` does not pad."""

    weight: Float[Array, "w i o"]
    bias: Float[Array, " o"]
    dilation: int = eqx.field(static=True, default=1)
    causal: bool = eqx.field(static=True, default=False)
    """Pad only at the start, instead of both sides."""

    @classmethod
    def init(
        cls,
        kernel: int,
        in_dim: int,
        out_dim: int,
        *,
        dilation: int = 1,
        causal: bool = False,
        key: PRNGKeyArray,
    ) -> "Convolution":
        weight = init_kernel(kernel, in_dim, out_dim, key)
        return cls(weight, jnp.zeros(out_dim), dilation, causal)

    @property
    def total_padding(self) -> int:
        """Padding, both sides together, that keeps the length: the receptive field minus 1."""
        return self.dilation * (self.weight.shape[0] - 1)

    def __call__(self, x: Float[Array, "t i"]) -> Float[Array, "t o"]:
        end = 0 if self.causal else self.total_padding // 2
        return self.valid(jnp.pad(x, ((self.total_padding - end, end), (0, 0))))

    def valid(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        y = jax.lax.conv_general_dilated(
            x[None],
            self.weight.astype(x.dtype),
            window_strides=(1,),
            padding="VALID",
            rhs_dilation=(self.dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=matmul_precision(x.dtype),
        )[0]
        return y + self.bias.astype(x.dtype)[None]


class Downsample(eqx.Module):
    """Convolution with stride s and kernel 2s."""

    weight: Float[Array, "w i o"]
    bias: Float[Array, " o"]
    causal: bool = eqx.field(static=True, default=False)

    @classmethod
    def init(
        cls, stride: int, in_dim: int, out_dim: int, *, causal: bool = False, key: PRNGKeyArray
    ) -> "Downsample":
        return cls(init_kernel(2 * stride, in_dim, out_dim, key), jnp.zeros(out_dim), causal)

    @property
    def stride(self) -> int:
        return self.weight.shape[0] // 2

    def __call__(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        """Pads (s + 1) // 2 samples at the start and s // 2 at the end, or all s at the start if it
        is causal; t is a multiple of s."""
        end = 0 if self.causal else self.stride // 2
        return self.valid(jnp.pad(x, ((self.stride - end, end), (0, 0))))

    def valid(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        weight = self.weight.astype(x.dtype)
        blocks = x.reshape(-1, self.stride * x.shape[1])
        first = weight[: self.stride].reshape(blocks.shape[1], -1)
        second = weight[self.stride :].reshape(blocks.shape[1], -1)
        precision = matmul_precision(x.dtype)
        y = jnp.matmul(blocks[:-1], first, precision=precision)
        y = y + jnp.matmul(blocks[1:], second, precision=precision)
        return y + self.bias.astype(x.dtype)[None]


class Upsample(eqx.Module):
    """Transposed convolution with stride s and kernel 2s."""

    weight: Float[Array, "w i o"]
    bias: Float[Array, " o"]
    causal: bool = eqx.field(static=True, default=False)

    @classmethod
    def init(
        cls, stride: int, in_dim: int, out_dim: int, *, causal: bool = False, key: PRNGKeyArray
    ) -> "Upsample":
        # Each output sample is a sum over two frames.
        weight = init_kernel(2 * stride, in_dim, out_dim, key, fan_in=2 * in_dim)
        return cls(weight, jnp.zeros(out_dim), causal)

    @property
    def stride(self) -> int:
        return self.weight.shape[0] // 2

    def __call__(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        """Crops (s + 1) // 2 samples at the start and s // 2 at the end, or all s at the end if it
        is causal."""
        crop = 0 if self.causal else (self.stride + 1) // 2
        y = self.overlap_add(jnp.pad(x, ((1, 1), (0, 0))))
        return y[crop : crop + x.shape[0] * self.stride]

    def overlap_add(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        """Block j of the output is the first half of x[j + 1] plus the second half of x[j]."""
        weight = self.weight.astype(x.dtype)
        precision = matmul_precision(x.dtype)
        first = jnp.einsum("ti,sio->tso", x[1:], weight[: self.stride], precision=precision)
        second = jnp.einsum("ti,sio->tso", x[:-1], weight[self.stride :], precision=precision)
        y = (first + second).reshape(-1, weight.shape[2])
        return y + self.bias.astype(x.dtype)[None]
