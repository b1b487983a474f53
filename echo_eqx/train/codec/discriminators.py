"""Discriminators of a codec's sound, as the published codec was trained with.

Multi-period discriminators look at every 2nd, 3rd, 5th ... sample (Kong et al., 2020,
arXiv:2010.05646), multi-band ones at bands of the complex spectrum (Kumar et al., 2023,
arXiv:2306.06546), here without weight norm.
"""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.train.codec.losses import spectrum

PERIODS = (2, 3, 5, 7, 11)
WINDOWS = (2048, 1024, 512)
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
_EXACT = jax.lax.Precision.HIGHEST


class Convolution2d(eqx.Module):
    """(t, f, i) to (t / stride, f / stride, o), followed by a leaky ReLU where asked for."""

    weight: Float[Array, "kt kf i o"]
    bias: Float[Array, " o"]
    strides: tuple[int, int] = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        kernel: tuple[int, int],
        in_dim: int,
        out_dim: int,
        strides: tuple[int, int] = (1, 1),
        *,
        key: PRNGKeyArray,
    ) -> "Convolution2d":
        bound = float(np.sqrt(1 / (kernel[0] * kernel[1] * in_dim)))
        weight = jr.uniform(key, (*kernel, in_dim, out_dim), minval=-bound, maxval=bound)
        return cls(weight, jnp.zeros(out_dim), strides)

    def __call__(self, x: Float[Array, "t f i"]) -> Float[Array, "u g o"]:
        padding = [(size // 2, size // 2) for size in self.weight.shape[:2]]
        y = jax.lax.conv_general_dilated(
            x[None],
            self.weight,
            self.strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_EXACT,
        )
        return y[0] + self.bias[None, None]


class Stack(eqx.Module):
    """Convolutions with leaky ReLUs, then one to a single channel; what each gives is kept."""

    layers: tuple[Convolution2d, ...]
    out: Convolution2d

    def __call__(self, x: Float[Array, "t f i"]) -> list[Array]:
        seen = []
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(x), 0.1)
            seen.append(x)
        return [*seen, self.out(x)]


def _period_stack(width: int, key: PRNGKeyArray) -> Stack:
    keys = jr.split(key, 6)
    dims = (1, width, 4 * width, 16 * width, 32 * width, 32 * width)
    layers = tuple(
        Convolution2d.init((5, 1), a, b, (3 if i < 4 else 1, 1), key=keys[i])
        for i, (a, b) in enumerate(itertools.pairwise(dims))
    )
    return Stack(layers, Convolution2d.init((3, 1), dims[-1], 1, key=keys[5]))


def _band_stack(width: int, key: PRNGKeyArray) -> Stack:
    keys = jr.split(key, 6)
    shapes = [((3, 9), 2, 1), *[((3, 9), width, 2)] * 3, ((3, 3), width, 1)]
    layers = tuple(
        Convolution2d.init(kernel, dim, width, (1, stride), key=keys[i])
        for i, (kernel, dim, stride) in enumerate(shapes)
    )
    return Stack(layers, Convolution2d.init((3, 3), width, 1, key=keys[5]))


class Critic(eqx.Module):
    """All discriminators of audio (samples,). The published widths are 32."""

    periods: tuple[Stack, ...]
    bands: tuple[tuple[Stack, ...], ...]

    @classmethod
    def init(cls, width: int = 32, *, key: PRNGKeyArray) -> "Critic":
        key_periods, key_bands = jr.split(key)
        periods = tuple(_period_stack(width, k) for k in jr.split(key_periods, len(PERIODS)))
        bands = tuple(
            tuple(_band_stack(width, k) for k in jr.split(window_key, len(BANDS) - 1))
            for window_key in jr.split(key_bands, len(WINDOWS))
        )
        return cls(periods, bands)

    def __call__(self, audio: Float[Array, " samples"]) -> list[list[Array]]:
        """What each discriminator's layers give, the last of them its verdict: 1 for a recording,
        0 for what was decoded. Windows longer than the audio are left out."""
        audio = audio - jnp.mean(audio)
        audio = 0.8 * audio / (jnp.max(jnp.abs(audio)) + 1e-9)
        seen = []
        for period, stack in zip(PERIODS, self.periods, strict=True):
            padded = jnp.pad(audio, (0, -audio.shape[0] % period), mode="reflect")
            seen.append(stack(padded.reshape(-1, period, 1)))
        for window, stacks in zip(WINDOWS, self.bands, strict=True):
            if window > audio.shape[0]:
                continue
            parts = spectrum(audio, window)
            edges = [int(edge * parts.shape[1]) for edge in BANDS]
            for low, high, stack in zip(edges[:-1], edges[1:], stacks, strict=True):
                seen.append(stack(parts[:, low:high]))
        return seen


def critic_loss(real: list[list[Array]], decoded: list[list[Array]]) -> Float[Array, ""]:
    """Least squares (Mao et al., 2017, arXiv:1611.04076): what a critic learns."""
    terms = [
        jnp.mean(jnp.square(1 - a[-1])) + jnp.mean(jnp.square(b[-1]))
        for a, b in zip(real, decoded, strict=True)
    ]
    return jnp.sum(jnp.stack(terms))


def decoder_losses(
    real: list[list[Array]], decoded: list[list[Array]]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """What a decoder learns of critics: to be taken for a recording, and to look alike to them."""
    verdict = jnp.sum(jnp.stack([jnp.mean(jnp.square(1 - b[-1])) for b in decoded]))
    alike = [
        jnp.mean(jnp.abs(jax.lax.stop_gradient(x) - y))
        for a, b in zip(real, decoded, strict=True)
        for x, y in zip(a[:-1], b[:-1], strict=True)
    ]
    return verdict, jnp.sum(jnp.stack(alike))
