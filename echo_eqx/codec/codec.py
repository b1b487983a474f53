"""What every codec offers, and the checks and chunks that they share."""

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped

from echo_eqx.codec.watermark import Watermark
from echo_eqx.config import CodecConfig, FishConfig
from echo_eqx.errors import EchoError

CHUNK_FRAMES = 256
"""Frames that one chunk yields on CPU."""
ACCELERATOR_CHUNK_FRAMES = 1024
"""Frames that one chunk yields on GPU and TPU, where few large chunks keep the device busy."""


class Codec(eqx.Module):
    """Audio of any length to latents and back. Methods take one recording; use `jax.vmap` for
    batches."""

    config: eqx.AbstractVar[CodecConfig | FishConfig]
    watermark: eqx.AbstractVar[Watermark | None]

    @property
    @abc.abstractmethod
    def encoder_context(self) -> tuple[int, int]:
        """Frames before and after a latent whose audio decides about it, as far as it matters."""

    @property
    @abc.abstractmethod
    def decoder_padding(self) -> int:
        """Frames of silence to decode before and after latents, so that the edges of the signal do
        not change how they sound. 0 for a codec that was trained to begin with the first latent."""

    @property
    @abc.abstractmethod
    def decoder_context(self) -> tuple[int, int]:
        """Frames before and after a frame of audio that `decode_window` reads for it."""

    @property
    @abc.abstractmethod
    def encoding_parts(self) -> tuple[eqx.Module, ...]:
        """The modules that make the latents: equal ones make equal latents."""

    @abc.abstractmethod
    def encode(
        self, audio: Float[Array | np.ndarray, " samples"]
    ) -> tuple[Float[Array, "t c"], Float[Array, "t c"]]:
        """Mean and standard deviation of the latents, (frames, latent_dim) each.

        `audio` is mono at `config.sample_rate`, full scale 1. If it ends within a frame, that frame
        is filled up.

        **Raises**: `EchoError` if `audio` is empty or not one-dimensional.
        """

    @abc.abstractmethod
    def moments(
        self, audio: Float[Array, " samples"]
    ) -> tuple[Float[Array, "t c"], Float[Array, "t c"]]:
        """`encode` for whole frames, without checks and with no more chunks than the result
        needs."""

    @abc.abstractmethod
    def decode(
        self,
        latents: Float[Array | np.ndarray, "t c"],
        message: Shaped[Array | np.ndarray, " bits"] | Sequence[int] | None = None,
    ) -> Float[Array, " samples"]:
        """Audio of `t * config.hop` samples at `config.sample_rate`, mono.

        `message` is embedded as a watermark, as many zeros and ones as the codec's watermark has
        bits.

        **Raises**: `EchoError` if a shape or the number of bits is wrong, or if the codec cannot
        embed watermarks.
        """

    @abc.abstractmethod
    def decoder_input(
        self, latents: Float[np.ndarray, "t c"]
    ) -> Float[np.ndarray, "u d"] | Float[Array, "u d"]:
        """What `decode_window` takes windows of: the same number of rows for each frame, which
        depend on no later frame."""

    @abc.abstractmethod
    def decode_window(self, rows: Float[Array | np.ndarray, "u d"]) -> Float[Array, " samples"]:
        """Audio of consecutive rows of `decoder_input`, as if they were all. It equals `decode`,
        without a message, where `decoder_context` lies within the window."""

    def check_message(self, message: Any) -> None:
        """**Raises**: `EchoError` unless `message` is None or bits that this codec can embed."""
        if message is None:
            return
        if self.watermark is None:
            raise EchoError("message: expected None, since this codec cannot embed watermarks")
        if np.shape(message) != (self.watermark.num_bits,):
            raise EchoError(
                f"message: expected {self.watermark.num_bits} bits, got shape {np.shape(message)}"
            )
        if not isinstance(message, Tracer) and not np.isin(message, (0, 1)).all():
            raise EchoError("message: expected only 0 and 1")

    def check_latents(self, shape: tuple[int, ...]) -> None:
        """**Raises**: `EchoError` unless latents of `shape` can be decoded."""
        channels = self.config.latent_dim
        if len(shape) != 2 or shape[0] == 0 or shape[1] != channels:
            raise EchoError(
                f"latents: expected shape (frames, {channels}) with at least one frame, got "
                f"{shape} (for a batch use jax.vmap)"
            )


def check_audio(shape: tuple[int, ...]) -> None:
    """**Raises**: `EchoError` unless audio of `shape` can be encoded."""
    if len(shape) != 1 or shape[0] == 0:
        raise EchoError(
            f"audio: expected shape (samples,) with at least one sample, got {shape} "
            "(for a batch use jax.vmap)"
        )


def chunk_frames() -> int:
    return CHUNK_FRAMES if jax.default_backend() == "cpu" else ACCELERATOR_CHUNK_FRAMES


def split_frames(frames: int, context_frames: int) -> Iterator[tuple[int, int, slice]]:
    """The frames each chunk reads, `start` to `stop`, and the part of its output to keep.

    All chunks of a long signal read the same number of frames, so they share one compiled program.
    The first and the last chunk end where the signal ends, so that the codec pads there.
    """
    length = chunk_frames() + 2 * context_frames
    if frames <= length:
        yield 0, frames, slice(0, frames)
        return
    for first in range(0, frames, chunk_frames()):
        last = min(first + chunk_frames(), frames)
        start = min(max(first - context_frames, 0), frames - length)
        yield start, start + length, slice(first - start, last - start)
