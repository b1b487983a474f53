"""DACVAE: audio of any length to latents and back (github.com/facebookresearch/dacvae).

Long signals are processed in chunks with the same result as in one go: encoder and decoder have a
finite receptive field, so each chunk is read with that much context on both sides, and the
watermark, which is causal, carries its state from chunk to chunk.
"""

import math
from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from echo_eqx.codec.codec import Codec, check_audio, chunk_frames, split_frames
from echo_eqx.codec.decoder import Decoder
from echo_eqx.codec.encoder import Bottleneck, Encoder
from echo_eqx.codec.residual import DILATIONS
from echo_eqx.codec.watermark import Watermark, add_watermark, initial_state
from echo_eqx.config import CodecConfig, FishConfig


class DACVAE(Codec):
    """The codec. `DACVAE.init(config, key=key)` returns one with random weights.

    `encode` and `decode` take one recording; use `jax.vmap` for batches.
    """

    encoder: Encoder
    bottleneck: Bottleneck
    decoder: Decoder
    watermark: Watermark | None
    config: CodecConfig = eqx.field(static=True)  # type: ignore[override]  # it is frozen

    @classmethod
    def init(cls, config: CodecConfig, *, key: PRNGKeyArray) -> "DACVAE":
        """Random weights."""
        keys = jr.split(key, 4)
        watermark = config.watermark
        return cls(
            encoder=Encoder.init(config, key=keys[0]),
            bottleneck=Bottleneck.init(config, key=keys[1]),
            decoder=Decoder.init(config, key=keys[2]),
            watermark=None if watermark is None else Watermark.init(watermark, key=keys[3]),
            config=config,
        )

    @property
    def encoder_context(self) -> tuple[int, int]:
        frames = encoder_context_frames(self.config)
        return frames, frames

    @property
    def decoder_padding(self) -> int:
        """The receptive field: the decoder pads with zeros, which do not decode to silence, so that
        audio would start and end with a click."""
        return decoder_context_frames(self.config)

    @property
    def decoder_context(self) -> tuple[int, int]:
        frames = decoder_context_frames(self.config)
        return frames, frames

    @property
    def encoding_parts(self) -> tuple[eqx.Module, ...]:
        return self.encoder, self.bottleneck

    def encode(
        self, audio: Float[Array | np.ndarray, " samples"]
    ) -> tuple[Float[Array, "t c"], Float[Array, "t c"]]:
        """Mean and standard deviation of the latents, (frames, latent_dim) each.

        `audio` is mono at `config.sample_rate`, in [-1, 1]. If it ends within a frame, that frame
        is filled by reflection.

        **Raises**: `EchoError` if `audio` is empty or not one-dimensional.
        """
        check_audio(audio.shape)
        hop = self.config.hop
        xp = np if isinstance(audio, np.ndarray) else jnp  # on the host nothing is compiled
        audio = xp.asarray(audio, self.encoder.conv_in.weight.dtype)
        audio = xp.concatenate([audio, audio[_reflection(audio.shape[0], -audio.shape[0] % hop)]])
        means, stds = [], []
        context, _ = self.encoder_context
        for start, stop, crop in split_frames(audio.shape[0] // hop, context):
            mean, std = _encode(self, jnp.asarray(audio[start * hop : stop * hop]))
            means.append(mean[crop])
            stds.append(std[crop])
        return jnp.concatenate(means), jnp.concatenate(stds)

    def moments(
        self, audio: Float[Array, " samples"]
    ) -> tuple[Float[Array, "t c"], Float[Array, "t c"]]:
        return self.bottleneck.moments(self.encoder(audio))

    def decode(
        self,
        latents: Float[Array | np.ndarray, "t c"],
        message: Shaped[Array | np.ndarray, " bits"] | Sequence[int] | None = None,
    ) -> Float[Array, " samples"]:
        """Audio of `t * config.hop` samples at `config.sample_rate`, mono.

        `message`, a sequence of `config.watermark.num_bits` zeros and ones, is embedded as a
        watermark. The sum of audio and watermark is not clipped.

        **Raises**: `EchoError` if a shape or the number of bits is wrong, or if the codec cannot
        embed watermarks.
        """
        self.check_latents(latents.shape)
        self.check_message(message)
        watermark = None if message is None else self.watermark
        bits = None if message is None else jnp.asarray(message).astype(jnp.int32)
        state = None if watermark is None else initial_state(watermark)
        latents = jnp.asarray(latents, self.decoder.conv_in.weight.dtype)
        hop, frames = self.config.hop, latents.shape[0]
        out = []
        for start, stop, crop in split_frames(frames, self.decoder_padding):
            audio = _decode(self, latents[start:stop])[crop.start * hop : crop.stop * hop]
            if watermark is not None and bits is not None:
                samples = audio.shape[0]
                if frames > stop - start:  # several chunks: pad the last one to the same length
                    audio = jnp.pad(audio, (0, chunk_frames() * hop - samples))
                audio, state = add_watermark(watermark, audio, bits, state)
                audio = audio[:samples]
            out.append(audio)
        return jnp.concatenate(out)

    def decoder_input(self, latents: Float[np.ndarray, "t c"]) -> Float[np.ndarray, "t c"]:
        return latents

    def decode_window(self, rows: Float[Array | np.ndarray, "u d"]) -> Float[Array, " samples"]:
        return _decode(self, jnp.asarray(rows, self.decoder.conv_in.weight.dtype))


@eqx.filter_jit
def _encode(codec: DACVAE, audio: Array) -> tuple[Array, Array]:
    return codec.moments(audio)


@eqx.filter_jit
def _decode(codec: DACVAE, latents: Array) -> Array:
    return codec.decoder(codec.bottleneck.out_proj(latents))


def _reflection(samples: int, padding: int) -> np.ndarray:
    """Indices of the samples that reflect `padding` samples past the end, edges not repeated."""
    return np.pad(np.arange(samples), (0, padding), mode="reflect")[samples:]


# One side of the receptive field, in samples: 3 times the dilation for each kernel of 7, one stride
# for each change of rate, and the convolutions at both ends.
_UNITS_RECEPTIVE_FIELD = 3 * sum(DILATIONS)


def encoder_context_frames(config: CodecConfig) -> int:
    """Frames on each side of a latent whose audio it depends on."""
    receptive_field, step = 3, 1
    for rate in config.encoder_rates:
        receptive_field += step * (_UNITS_RECEPTIVE_FIELD + rate)
        step *= rate
    return -(-(receptive_field + step) // config.hop)


def decoder_context_frames(config: CodecConfig | FishConfig, *, causal: bool = False) -> int:
    """Frames on each side of a frame of audio whose latents the decoder's convolutions read.

    Causal ones read at most twice as many frames, all of them before.
    """
    step = math.prod(config.decoder_rates)
    receptive_field = 3 * step
    for rate in config.decoder_rates:
        receptive_field += step  # a transposed convolution joins two neighboring frames
        step = step // rate
        receptive_field += step * _UNITS_RECEPTIVE_FIELD
    return -(-(1 + causal) * (receptive_field + 3) // config.hop)
