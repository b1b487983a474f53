"""The codec's encoder, from audio to hidden frames, and its variational bottleneck."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.codec.convolution import Convolution, Downsample
from echo_eqx.codec.residual import ResidualUnit, Snake, init_units
from echo_eqx.config import CodecConfig


class EncoderBlock(eqx.Module):
    """Three residual units, then a downsampling that doubles the channels."""

    units: tuple[ResidualUnit, ...]
    snake: Snake
    down: Downsample

    @classmethod
    def init(
        cls, dim: int, stride: int, *, causal: bool = False, key: PRNGKeyArray
    ) -> "EncoderBlock":
        key_units, key_down = jr.split(key)
        return cls(
            units=init_units(dim, key_units, causal),
            snake=Snake.init(dim),
            down=Downsample.init(stride, dim, 2 * dim, causal=causal, key=key_down),
        )

    def __call__(self, x: Float[Array, "t i"]) -> Float[Array, "u o"]:
        for unit in self.units:
            x = unit(x)
        return self.down(self.snake(x))


class Encoder(eqx.Module):
    """(samples,) to (frames, hidden); the number of samples is a multiple of the hop."""

    conv_in: Convolution
    blocks: tuple[EncoderBlock, ...]
    snake_out: Snake
    conv_out: Convolution

    @classmethod
    def init(cls, config: CodecConfig, *, key: PRNGKeyArray) -> "Encoder":
        key_in, key_out, *keys = jr.split(key, 2 + len(config.encoder_rates))
        dims = [config.encoder_dim * 2**i for i in range(len(keys) + 1)]
        return cls(
            conv_in=Convolution.init(7, 1, dims[0], key=key_in),
            blocks=tuple(
                EncoderBlock.init(dim, rate, key=key)
                for dim, rate, key in zip(dims[:-1], config.encoder_rates, keys, strict=True)
            ),
            snake_out=Snake.init(dims[-1]),
            conv_out=Convolution.init(3, dims[-1], config.hidden_dim, key=key_out),
        )

    def __call__(self, audio: Float[Array, " samples"]) -> Float[Array, "frames hidden"]:
        x = self.conv_in(audio[:, None])
        for block in self.blocks:
            x = block(x)
        return self.conv_out(self.snake_out(x))


class Bottleneck(eqx.Module):
    """Projections to the mean and standard deviation of the latents, and back."""

    in_proj: Convolution
    out_proj: Convolution

    @classmethod
    def init(cls, config: CodecConfig, *, key: PRNGKeyArray) -> "Bottleneck":
        key_in, key_out = jr.split(key)
        return cls(
            in_proj=Convolution.init(1, config.hidden_dim, 2 * config.latent_dim, key=key_in),
            out_proj=Convolution.init(1, config.latent_dim, config.hidden_dim, key=key_out),
        )

    def moments(
        self, hidden: Float[Array, "t hidden"]
    ) -> tuple[Float[Array, "t c"], Float[Array, "t c"]]:
        """Mean, and standard deviation `softplus(scale) + 1e-4`."""
        mean, scale = jnp.split(self.in_proj(hidden), 2, axis=1)
        return mean, jax.nn.softplus(scale) + 1e-4
