"""DACVAE: audio to latents and back (github.com/facebookresearch/dacvae), any length.

Long signals pass in pieces. The main path reads a bounded stretch around every frame, so a piece
with that much on both sides gives the same samples as the whole; the watermark hands its state on.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, Shaped

from echo_eqx.codec.decoder import Decoder
from echo_eqx.codec.encoder import Bottleneck, Encoder
from echo_eqx.codec.residual import DILATIONS
from echo_eqx.codec.watermark import State, Watermark
from echo_eqx.config import CodecConfig
from echo_eqx.errors import EchoError

PIECE_FRAMES = 256
"""Frames that come out of one piece: 10 s of audio at 25 frames a second."""


class DACVAE(eqx.Module):
    """The codec. Calls are for one recording; batches are made with `jax.vmap`."""

    encoder: Encoder
    bottleneck: Bottleneck
    decoder: Decoder
    watermark: Watermark | None
    config: CodecConfig = eqx.field(static=True)

    @classmethod
    def init(cls, config: CodecConfig, *, key: PRNGKeyArray) -> "DACVAE":
        """Fresh weights."""
        keys = jr.split(key, 4)
        watermark = config.watermark
        return cls(
            encoder=Encoder.init(config, key=keys[0]),
            bottleneck=Bottleneck.init(config, key=keys[1]),
            decoder=Decoder.init(config, key=keys[2]),
            watermark=None if watermark is None else Watermark.init(watermark, key=keys[3]),
            config=config,
        )

    def encode(
        self, audio: Float[Array | np.ndarray, " samples"]
    ) -> tuple[Float[Array, "t c"], Float[Array, "t c"]]:
        """Mean and standard deviation of the latents, (frames, latent_dim) each.

        `audio` is mono at `config.sample_rate`, full scale 1. Its end is mirrored to a whole frame.

        **Raises**: `EchoError` if `audio` is empty or not one-dimensional.
        """
        if audio.ndim != 1 or audio.shape[0] == 0:
            raise EchoError(
                f"audio has shape {audio.shape}; encode wants (samples,), at least one sample "
                "(jax.vmap makes batches)"
            )
        hop = self.config.hop
        audio = jnp.asarray(audio, self.encoder.conv_in.weight.dtype)
        audio = jnp.concatenate([audio, audio[_mirrored(audio.shape[0], -audio.shape[0] % hop)]])
        margin = encoder_margin(self.config)
        means, deviations = [], []
        for start, stop, crop in _pieces(audio.shape[0] // hop, margin):
            mean, deviation = _encode(self, audio[start * hop : stop * hop])
            means.append(mean[crop])
            deviations.append(deviation[crop])
        return jnp.concatenate(means), jnp.concatenate(deviations)

    def decode(
        self,
        latents: Float[Array | np.ndarray, "t c"],
        message: Shaped[Array | np.ndarray, " bits"] | Sequence[int] | None = None,
    ) -> Float[Array, " samples"]:
        """Audio of `t * config.hop` samples at `config.sample_rate`, mono.

        With a `message` of as many zeros and ones as the watermark has bits, the watermark that
        carries it is added; the sum is not clipped.

        **Raises**: `EchoError` on another shape, another number of bits, or if the codec has no
        watermark path.
        """
        if latents.ndim != 2 or latents.shape[0] == 0 or latents.shape[1] != self.config.latent_dim:
            raise EchoError(
                f"latents have shape {latents.shape}; decode wants "
                f"(frames, {self.config.latent_dim}), at least one frame (jax.vmap makes batches)"
            )
        watermark = None if message is None else self._watermark_for(message)
        bits = None if message is None else jnp.asarray(message).astype(jnp.int32)
        state = None if watermark is None else _initial_state(watermark)
        latents = jnp.asarray(latents, self.decoder.conv_in.weight.dtype)
        hop, frames = self.config.hop, latents.shape[0]
        margin = decoder_margin(self.config)
        out = []
        for start, stop, crop in _pieces(frames, margin):
            audio = _decode(self, latents[start:stop])[crop.start * hop : crop.stop * hop]
            if watermark is not None and bits is not None:
                samples = audio.shape[0]
                if frames > stop - start:  # the last of several pieces is filled up to their length
                    audio = jnp.pad(audio, (0, PIECE_FRAMES * hop - samples))
                audio, state = _watermarked(watermark, audio, bits, state)
                audio = audio[:samples]
            out.append(audio)
        return jnp.concatenate(out)

    def _watermark_for(self, message: Any) -> Watermark:
        if self.watermark is None:
            raise EchoError("the codec has no watermark path, so it can carry no message")
        if np.shape(message) != (self.watermark.num_bits,):
            raise EchoError(
                f"the message has shape {np.shape(message)}; wanted {self.watermark.num_bits} bits"
            )
        if not isinstance(message, Tracer) and not np.isin(message, (0, 1)).all():
            raise EchoError("the message has values other than 0 and 1")
        return self.watermark


@eqx.filter_jit
def _encode(codec: DACVAE, audio: Array) -> tuple[Array, Array]:
    return codec.bottleneck.moments(codec.encoder(audio))


@eqx.filter_jit
def _decode(codec: DACVAE, latents: Array) -> Array:
    return codec.decoder(codec.bottleneck.out_proj(latents))


@eqx.filter_jit
def _initial_state(watermark: Watermark) -> State:
    return watermark.init_state()


@eqx.filter_jit
def _watermarked(watermark: Watermark, audio: Array, message: Array, state: State):
    signal, state = watermark(audio, message, state)
    return audio + signal, state


def _pieces(frames: int, margin: int) -> Iterator[tuple[int, int, slice]]:
    """What each piece reads, from start to stop, and which part of its output counts.

    All pieces of a long signal read the same number of frames, so one program serves them. A piece
    at an end of the signal begins or stops right there, where the codec pads.
    """
    length = PIECE_FRAMES + 2 * margin
    if frames <= length:
        yield 0, frames, slice(0, frames)
        return
    for first in range(0, frames, PIECE_FRAMES):
        last = min(first + PIECE_FRAMES, frames)
        start = min(max(first - margin, 0), frames - length)
        yield start, start + length, slice(first - start, last - start)


def _mirrored(samples: int, padding: int) -> np.ndarray:
    """Where to find the samples behind the end: back and forth, the ends not repeated."""
    period = max(2 * samples - 2, 1)
    place = np.arange(samples, samples + padding) % period
    return np.minimum(place, period - place) if samples > 1 else np.zeros(padding, int)


# Samples that the main path reads on each side of a frame: 3 dilations of a kernel of 7 in every
# residual stack, a stride on each side in every change of rate, the convolutions at both ends.
_UNIT_REACH = 3 * sum(DILATIONS)


def encoder_margin(config: CodecConfig) -> int:
    """Frames beyond which audio has no influence on a latent."""
    return _ceil_div(_encoder_reach(config), config.hop)


def decoder_margin(config: CodecConfig) -> int:
    """Frames beyond which a latent has no influence on the audio."""
    return _ceil_div(_decoder_reach(config), config.hop)


def _encoder_reach(config: CodecConfig) -> int:
    reach, step = 3, 1
    for rate in config.encoder_rates:
        reach += step * (_UNIT_REACH + rate)
        step *= rate
    return reach + step


def _decoder_reach(config: CodecConfig) -> int:
    step = config.hop
    reach = 3 * step
    for rate in config.decoder_rates:
        reach += step  # a transposed convolution joins two neighbours
        step = step // rate
        reach += step * _UNIT_REACH
    return reach + 3


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
