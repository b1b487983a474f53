"""Fish S1-DAC's quantizers, and the change of rate around them
(github.com/fishaudio/fish-speech, `fish_speech/models/dac/rvq.py`)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.codec.convolution import init_kernel
from echo_eqx.codec.fish.transformer import WindowTransformer
from echo_eqx.config import FishConfig
from echo_eqx.layers.linear import Linear
from echo_eqx.layers.precision import matmul_precision

WINDOW = 128
"""Frames that the transformers around the quantizers attend to."""
_CONVNEXT_KERNEL, _CONVNEXT_RATIO, _CONVNEXT_SCALE = 7, 4, 1e-6
_NORM_EPS = 1e-6


class LayerNorm(eqx.Module):
    """Layer norm over channels, in float32."""

    weight: Float[Array, " d"]
    bias: Float[Array, " d"]

    @classmethod
    def init(cls, dim: int) -> "LayerNorm":
        return cls(jnp.ones(dim), jnp.zeros(dim))

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        y = jax.nn.standardize(x.astype(jnp.float32), axis=1, epsilon=_NORM_EPS)
        y = y * self.weight.astype(jnp.float32)[None] + self.bias.astype(jnp.float32)[None]
        return y.astype(x.dtype)


class ConvNeXtBlock(eqx.Module):
    """A causal convolution per channel, then an MLP, added to the input (arXiv:2201.03545)."""

    depthwise: Float[Array, "w d"]
    depthwise_bias: Float[Array, " d"]
    norm: LayerNorm
    up: Linear
    down: Linear
    scale: Float[Array, " d"]

    @classmethod
    def init(cls, dim: int, *, key: PRNGKeyArray) -> "ConvNeXtBlock":
        key_depthwise, key_up, key_down = jr.split(key, 3)
        hidden = _CONVNEXT_RATIO * dim
        return cls(
            depthwise=init_kernel(_CONVNEXT_KERNEL, 1, dim, key_depthwise)[:, 0],
            depthwise_bias=jnp.zeros(dim),
            norm=LayerNorm.init(dim),
            up=Linear.init(dim, hidden, bias=True, key=key_up),
            down=Linear.init(hidden, dim, bias=True, key=key_down),
            scale=jnp.full(dim, _CONVNEXT_SCALE),
        )

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        width = self.depthwise.shape[0]
        padded = jnp.pad(x, ((width - 1, 0), (0, 0)))
        taps = self.depthwise.astype(x.dtype)
        y = sum(padded[i : i + len(x)] * taps[i][None] for i in range(width))
        y = self.norm(y + self.depthwise_bias.astype(x.dtype)[None])
        y = self.down(jax.nn.gelu(self.up(y), approximate=False))
        return x + y * self.scale.astype(x.dtype)[None]


class Merge(eqx.Module):
    """A convolution with stride s and kernel s, then a ConvNeXt block."""

    weight: Float[Array, "s i o"]
    bias: Float[Array, " o"]
    block: ConvNeXtBlock

    @classmethod
    def init(cls, stride: int, dim: int, *, key: PRNGKeyArray) -> "Merge":
        key_weight, key_block = jr.split(key)
        weight = init_kernel(stride, dim, dim, key_weight)
        return cls(weight, jnp.zeros(dim), ConvNeXtBlock.init(dim, key=key_block))

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "u d"]:
        """`t` is a multiple of the stride."""
        weight = self.weight.astype(x.dtype).reshape(-1, self.weight.shape[2])
        groups = x.reshape(-1, weight.shape[0])
        y = jnp.matmul(groups, weight, precision=matmul_precision(x.dtype))
        return self.block(y + self.bias.astype(x.dtype)[None])


class Split(eqx.Module):
    """A transposed convolution with stride s and kernel s, then a ConvNeXt block."""

    weight: Float[Array, "s i o"]
    bias: Float[Array, " o"]
    block: ConvNeXtBlock

    @classmethod
    def init(cls, stride: int, dim: int, *, key: PRNGKeyArray) -> "Split":
        key_weight, key_block = jr.split(key)
        weight = init_kernel(stride, dim, dim, key_weight, fan_in=dim)
        return cls(weight, jnp.zeros(dim), ConvNeXtBlock.init(dim, key=key_block))

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "u d"]:
        weight = self.weight.astype(x.dtype)
        y = jnp.einsum("ti,sio->tso", x, weight, precision=matmul_precision(x.dtype))
        y = y.reshape(-1, weight.shape[2])
        return self.block(y + self.bias.astype(x.dtype)[None])


class Codebook(eqx.Module):
    """Vector quantization in a few dimensions, by the largest cosine (arXiv:2110.04627)."""

    in_proj: Linear
    codes: Float[Array, "v z"]
    out_proj: Linear

    @classmethod
    def init(cls, size: int, code_dim: int, dim: int, *, key: PRNGKeyArray) -> "Codebook":
        key_in, key_codes, key_out = jr.split(key, 3)
        return cls(
            in_proj=Linear.init(dim, code_dim, bias=True, key=key_in),
            codes=jr.normal(key_codes, (size, code_dim)),
            out_proj=Linear.init(code_dim, dim, bias=True, key=key_out),
        )

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        codes = self.codes.astype(jnp.float32)
        place, table = _unit(self.in_proj(x).astype(jnp.float32)), _unit(codes)
        product = jnp.matmul(place, table.T, precision=jax.lax.Precision.HIGHEST)
        # Of unit vectors the product alone would do; with their rounded lengths, near ties are
        # decided as in the original.
        lengths = jnp.sum(place**2, axis=1)[:, None], jnp.sum(table**2, axis=1)[None]
        nearest = jnp.argmin(lengths[0] - 2 * product + lengths[1], axis=1)
        return self.out_proj(codes[nearest].astype(x.dtype))


def _unit(x: Float[Array, "n z"]) -> Float[Array, "n z"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1), 1e-12)[:, None]


class Quantizer(eqx.Module):
    """From hidden frames to quantized ones at a lower rate, and back to the rate of the decoder."""

    downsample: tuple[Merge, ...]
    pre: WindowTransformer
    codebooks: tuple[Codebook, ...]
    """The semantic one, then the residual ones."""
    post: WindowTransformer
    upsample: tuple[Split, ...]

    @classmethod
    def init(cls, config: FishConfig, *, key: PRNGKeyArray) -> "Quantizer":
        key_down, key_up, key_books, key_pre, key_post = jr.split(key, 5)
        dim, rates = config.hidden_dim, config.quantizer_rates
        sizes = (config.semantic_codebook_size, *(config.codebook_size,) * config.num_codebooks)

        def transformer(key: PRNGKeyArray) -> WindowTransformer:
            layers, mlp_dim = config.quantizer_layers, config.quantizer_mlp_dim
            return WindowTransformer.init(dim, layers, mlp_dim, config.head_dim, WINDOW, key=key)

        return cls(
            downsample=tuple(
                Merge.init(rate, dim, key=key)
                for rate, key in zip(rates, jr.split(key_down, len(rates)), strict=True)
            ),
            pre=transformer(key_pre),
            codebooks=tuple(
                Codebook.init(size, config.codebook_dim, dim, key=key)
                for size, key in zip(sizes, jr.split(key_books, len(sizes)), strict=True)
            ),
            post=transformer(key_post),
            upsample=tuple(
                Split.init(rate, dim, key=key)
                for rate, key in zip(rates[::-1], jr.split(key_up, len(rates)), strict=True)
            ),
        )

    def quantize(self, hidden: Float[Array, "u d"]) -> Float[Array, "t d"]:
        """Quantized frames: the sum of one code from each codebook."""
        for merge in self.downsample:
            hidden = merge(hidden)
        left = self.pre(hidden)
        total = jnp.zeros_like(left)
        for codebook in self.codebooks:
            code = codebook(left)
            total, left = total + code, left - code
        return total

    def restore(self, frames: Float[Array, "t d"]) -> Float[Array, "u d"]:
        """What the decoder takes, from frames that are quantized or near that."""
        hidden = self.post(frames)
        for split in self.upsample:
            hidden = split(hidden)
        return hidden
