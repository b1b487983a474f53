"""Fish S1-DAC with the principal components of its frames: the codec of Echo-TTS base.

Facts: github.com/jordandare/echo-tts, `autoencoder.py` (the codec) and `inference.py` (principal
components, and the encoding of long recordings in pieces).
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from echo_eqx.codec.codec import Codec, check_audio, split_frames
from echo_eqx.codec.convolution import Convolution
from echo_eqx.codec.dacvae import decoder_context_frames
from echo_eqx.codec.decoder import Decoder
from echo_eqx.codec.encoder import EncoderBlock
from echo_eqx.codec.fish.quantizer import Quantizer
from echo_eqx.codec.fish.transformer import WindowTransformer
from echo_eqx.codec.residual import Snake
from echo_eqx.codec.watermark import Watermark
from echo_eqx.config import FishConfig
from echo_eqx.layers.precision import matmul_precision

ENCODER_WINDOW = 512
"""Positions that the encoder's transformer attends to."""
ENCODE_FRAMES = 640
"""Frames that are encoded at once. Longer recordings are encoded in pieces of this length, each as
if nothing came before it: that is how the references of Echo-TTS base were made, in training too.
"""


class FishEncoder(eqx.Module):
    """(samples,) to (steps, hidden); the number of samples is a multiple of the rates' product."""

    conv_in: Convolution
    blocks: tuple[EncoderBlock, ...]
    transformer: WindowTransformer
    snake_out: Snake
    conv_out: Convolution

    @classmethod
    def init(cls, config: FishConfig, *, key: PRNGKeyArray) -> "FishEncoder":
        key_in, key_out, key_transformer, *keys = jr.split(key, 3 + len(config.encoder_rates))
        dims = [config.encoder_dim * 2**i for i in range(len(keys) + 1)]
        return cls(
            conv_in=Convolution.init(7, 1, dims[0], causal=True, key=key_in),
            blocks=tuple(
                EncoderBlock.init(dim, rate, causal=True, key=key)
                for dim, rate, key in zip(dims[:-1], config.encoder_rates, keys, strict=True)
            ),
            transformer=WindowTransformer.init(
                dims[-1],
                config.encoder_layers,
                config.encoder_mlp_dim,
                config.head_dim,
                ENCODER_WINDOW,
                key=key_transformer,
            ),
            snake_out=Snake.init(dims[-1]),
            conv_out=Convolution.init(3, dims[-1], config.hidden_dim, causal=True, key=key_out),
        )

    def __call__(self, audio: Float[Array, " samples"]) -> Float[Array, "steps hidden"]:
        x = self.conv_in(audio[:, None])
        for block in self.blocks:
            x = block(x)
        return self.conv_out(self.snake_out(self.transformer(x)))


class PrincipalComponents(eqx.Module):
    """The projection of quantized frames to the latents that Echo-TTS base generates, and back."""

    components: Float[Array, "c hidden"]
    mean: Float[Array, " hidden"]
    scale: Float[Array, ""]

    @classmethod
    def init(cls, config: FishConfig, *, key: PRNGKeyArray) -> "PrincipalComponents":
        shape = (config.latent_dim, config.hidden_dim)
        components = jr.normal(key, shape) / math.sqrt(config.hidden_dim)
        return cls(components, jnp.zeros(config.hidden_dim), jnp.ones(()))

    def project(self, frames: Float[Array, "t hidden"]) -> Float[Array, "t c"]:
        centred = frames.astype(jnp.float32) - self.mean[None]
        precision = matmul_precision(jnp.float32)
        return jnp.matmul(centred, self.components.T, precision=precision) * self.scale

    def restore(self, latents: Float[Array, "t c"]) -> Float[Array, "t hidden"]:
        precision = matmul_precision(jnp.float32)
        scaled = latents.astype(jnp.float32) / self.scale
        return jnp.matmul(scaled, self.components, precision=precision) + self.mean[None]


class FishDAC(Codec):
    """The codec. All of it is causal; it has no watermark, and its latents have no spread."""

    encoder: FishEncoder
    quantizer: Quantizer
    decoder: Decoder
    pca: PrincipalComponents
    config: FishConfig = eqx.field(static=True)  # type: ignore[override]  # it is frozen
    watermark: Watermark | None = None

    @classmethod
    def init(cls, config: FishConfig, *, key: PRNGKeyArray) -> "FishDAC":
        """Random weights."""
        keys = jr.split(key, 4)
        return cls(
            encoder=FishEncoder.init(config, key=keys[0]),
            quantizer=Quantizer.init(config, key=keys[1]),
            decoder=Decoder.init(config, causal=True, key=keys[2]),
            pca=PrincipalComponents.init(config, key=keys[3]),
            config=config,
        )

    @property
    def encoder_context(self) -> tuple[int, int]:
        """The middle of a piece is far enough from its start."""
        return ENCODE_FRAMES // 2, 0

    @property
    def decoder_padding(self) -> int:
        return 0

    @property
    def decoder_context(self) -> tuple[int, int]:
        return decoder_context_frames(self.config, causal=True), 0

    @property
    def encoding_parts(self) -> tuple[eqx.Module, ...]:
        return self.encoder, self.quantizer, self.pca

    def encode(
        self, audio: Float[Array | np.ndarray, " samples"]
    ) -> tuple[Float[Array, "t c"], Float[Array, "t c"]]:
        """Latents, and zeros for their standard deviation, (frames, latent_dim) each.

        `audio` is mono at `config.sample_rate`, full scale 1. If it ends within a frame, silence
        fills that frame. Every `ENCODE_FRAMES` frames the encoder starts anew.

        **Raises**: `EchoError` if `audio` is empty or not one-dimensional.
        """
        check_audio(audio.shape)
        audio = jnp.asarray(audio, self.encoder.conv_in.weight.dtype)
        return self.moments(jnp.pad(audio, (0, -audio.shape[0] % self.config.hop)))

    def moments(
        self, audio: Float[Array, " samples"]
    ) -> tuple[Float[Array, "t c"], Float[Array, "t c"]]:
        piece = ENCODE_FRAMES * self.config.hop
        starts = range(0, audio.shape[0], piece)
        latents = jnp.concatenate([_encode(self, audio[at : at + piece]) for at in starts])
        return latents, jnp.zeros_like(latents)

    def decode(
        self,
        latents: Float[Array | np.ndarray, "t c"],
        message: Shaped[Array | np.ndarray, " bits"] | Sequence[int] | None = None,
    ) -> Float[Array, " samples"]:
        """Audio of `t * config.hop` samples at `config.sample_rate`, mono; `message` is None.

        **Raises**: `EchoError` if a shape is wrong or there is a message.
        """
        self.check_latents(latents.shape)
        self.check_message(message)
        hop, steps = self.config.hop, math.prod(self.config.quantizer_rates)
        hidden = _restore(self, jnp.asarray(latents, jnp.float32))
        context, _ = self.decoder_context
        out = []
        for start, stop, crop in split_frames(latents.shape[0], context):
            audio = _decode(self.decoder, hidden[start * steps : stop * steps])
            out.append(audio[crop.start * hop : crop.stop * hop])
        return jnp.concatenate(out)

    def decoder_input(self, latents: Float[np.ndarray, "t c"]) -> Float[Array, "u d"]:
        return _restore(self, jnp.asarray(latents, jnp.float32))

    def decode_window(self, rows: Float[Array | np.ndarray, "u d"]) -> Float[Array, " samples"]:
        return _decode(self.decoder, jnp.asarray(rows))


@eqx.filter_jit
def _encode(codec: FishDAC, audio: Array) -> Array:
    return codec.pca.project(codec.quantizer.quantize(codec.encoder(audio)))


@eqx.filter_jit
def _restore(codec: FishDAC, latents: Array) -> Array:
    frames = codec.pca.restore(latents)
    return codec.quantizer.restore(frames.astype(codec.decoder.conv_in.weight.dtype))


@eqx.filter_jit
def _decode(decoder: Decoder, hidden: Array) -> Array:
    return decoder(hidden)
