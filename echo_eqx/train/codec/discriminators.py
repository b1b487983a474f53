"""Discriminators for adversarial training of a codec, as used for the published codec.

Multi-period discriminators see every 2nd, 3rd, 5th ... sample (Kong et al., 2020,
arXiv:2010.05646), multi-band ones see bands of the complex spectrum (Kumar et al., 2023,
arXiv:2306.06546). Here they have no weight norm.
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


class Conv2d(eqx.Module):
    """A 2-D convolution, (t, f, i) to (t / stride, f / stride, o)."""

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
    ) -> "Conv2d":
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


class Discriminator(eqx.Module):
    """Convolutions with leaky ReLUs, then one to a single channel of scores."""

    layers: tuple[Conv2d, ...]
    out: Conv2d

    def __call__(self, x: Float[Array, "t f i"]) -> list[Array]:
        """The features of each layer, then the scores."""
        features = []
        for layer in self.layers:
            x = jax.nn.leaky_relu(layer(x), 0.1)
            features.append(x)
        return [*features, self.out(x)]


def _period_discriminator(width: int, key: PRNGKeyArray) -> Discriminator:
    keys = jr.split(key, 6)
    dims = (1, width, 4 * width, 16 * width, 32 * width, 32 * width)
    layers = tuple(
        Conv2d.init((5, 1), a, b, (3 if i < 4 else 1, 1), key=keys[i])
        for i, (a, b) in enumerate(itertools.pairwise(dims))
    )
    return Discriminator(layers, Conv2d.init((3, 1), dims[-1], 1, key=keys[5]))


def _band_discriminator(width: int, key: PRNGKeyArray) -> Discriminator:
    keys = jr.split(key, 6)
    shapes = [((3, 9), 2, 1), *[((3, 9), width, 2)] * 3, ((3, 3), width, 1)]
    layers = tuple(
        Conv2d.init(kernel, dim, width, (1, stride), key=keys[i])
        for i, (kernel, dim, stride) in enumerate(shapes)
    )
    return Discriminator(layers, Conv2d.init((3, 3), width, 1, key=keys[5]))


class Discriminators(eqx.Module):
    """All discriminators, of audio (samples,). The published width is 32."""

    periods: tuple[Discriminator, ...]
    bands: tuple[tuple[Discriminator, ...], ...]

    @classmethod
    def init(cls, width: int = 32, *, key: PRNGKeyArray) -> "Discriminators":
        key_periods, key_bands = jr.split(key)
        periods = tuple(
            _period_discriminator(width, k) for k in jr.split(key_periods, len(PERIODS))
        )
        bands = tuple(
            tuple(_band_discriminator(width, k) for k in jr.split(window_key, len(BANDS) - 1))
            for window_key in jr.split(key_bands, len(WINDOWS))
        )
        return cls(periods, bands)

    def __call__(self, audio: Float[Array, " samples"]) -> list[list[Array]]:
        """The features of each discriminator's layers, then its scores: trained to 1 for recordings
        and 0 for decoded audio. Windows longer than the audio are left out."""
        audio = audio - jnp.mean(audio)
        audio = 0.8 * audio / (jnp.max(jnp.abs(audio)) + 1e-9)
        outputs = []
        for period, net in zip(PERIODS, self.periods, strict=True):
            padded = jnp.pad(audio, (0, -audio.shape[0] % period), mode="reflect")
            outputs.append(net(padded.reshape(-1, period, 1)))
        for window, nets in zip(WINDOWS, self.bands, strict=True):
            if window > audio.shape[0]:
                continue
            parts = spectrum(audio, window)
            edges = [int(edge * parts.shape[1]) for edge in BANDS]
            for low, high, net in zip(edges[:-1], edges[1:], nets, strict=True):
                outputs.append(net(parts[:, low:high]))
        return outputs


def discriminator_loss(real: list[list[Array]], decoded: list[list[Array]]) -> Float[Array, ""]:
    """Least-squares loss of the discriminators (Mao et al., 2017, arXiv:1611.04076)."""
    terms = [
        jnp.mean(jnp.square(1 - a[-1])) + jnp.mean(jnp.square(b[-1]))
        for a, b in zip(real, decoded, strict=True)
    ]
    return jnp.sum(jnp.stack(terms))


def generator_losses(
    real: list[list[Array]], decoded: list[list[Array]]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Losses of the codec: least-squares adversarial loss, and feature matching."""
    adversarial = jnp.sum(jnp.stack([jnp.mean(jnp.square(1 - b[-1])) for b in decoded]))
    feature_matching = [
        jnp.mean(jnp.abs(jax.lax.stop_gradient(x) - y))
        for a, b in zip(real, decoded, strict=True)
        for x, y in zip(a[:-1], b[:-1], strict=True)
    ]
    return adversarial, jnp.sum(jnp.stack(feature_matching))
