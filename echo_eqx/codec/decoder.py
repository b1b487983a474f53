"""The codec's decoder, from hidden frames to audio, without the watermark."""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.codec.convolution import Convolution, Upsample
from echo_eqx.codec.residual import ResidualUnit, Snake, init_units
from echo_eqx.config import CodecConfig, FishConfig


class DecoderBlock(eqx.Module):
    """An upsampling that halves the channels, then three residual units."""

    snake: Snake
    up: Upsample
    units: tuple[ResidualUnit, ...]

    @classmethod
    def init(
        cls, dim: int, stride: int, *, causal: bool = False, key: PRNGKeyArray
    ) -> "DecoderBlock":
        key_units, key_up = jr.split(key)
        return cls(
            snake=Snake.init(dim),
            up=Upsample.init(stride, dim, dim // 2, causal=causal, key=key_up),
            units=init_units(dim // 2, key_units, causal),
        )

    def __call__(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        x = self.up(self.snake(x))
        for unit in self.units:
            x = unit(x)
        return x


class Decoder(eqx.Module):
    """(frames, hidden) to (samples,) in [-1, 1]."""

    conv_in: Convolution
    blocks: tuple[DecoderBlock, ...]
    snake_out: Snake
    conv_out: Convolution

    @classmethod
    def init(
        cls, config: CodecConfig | FishConfig, *, causal: bool = False, key: PRNGKeyArray
    ) -> "Decoder":
        key_in, key_out, *keys = jr.split(key, 2 + len(config.decoder_rates))
        dims = [config.decoder_dim // 2**i for i in range(len(keys) + 1)]
        return cls(
            conv_in=Convolution.init(7, config.hidden_dim, dims[0], causal=causal, key=key_in),
            blocks=tuple(
                DecoderBlock.init(dim, rate, causal=causal, key=key)
                for dim, rate, key in zip(dims[:-1], config.decoder_rates, keys, strict=True)
            ),
            snake_out=Snake.init(dims[-1]),
            conv_out=Convolution.init(7, dims[-1], 1, causal=causal, key=key_out),
        )

    def __call__(self, hidden: Float[Array, "frames hidden"]) -> Float[Array, " samples"]:
        x = self.conv_in(hidden)
        for block in self.blocks:
            x = block(x)
        return jnp.tanh(self.conv_out(self.snake_out(x)))[:, 0]
