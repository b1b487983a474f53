"""Latents decoded to audio piece by piece, while later latents are still unknown."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from echo_eqx.codec.codec import Codec
from echo_eqx.codec.watermark import add_watermark, initial_state
from echo_eqx.flow.sampler import FRAME_BUCKET
from echo_eqx.speech.batching import round_up
from echo_eqx.speech.codec import silence_latent
from echo_eqx.speech.joining import Message

FIRST_PIECE, PIECE = 32, 128
"""Frames decoded in the first piece, which is wanted soon, and in later ones. A piece costs as much
as its frames and the decoder's context on both sides."""


@dataclass(frozen=True)
class Piece:
    """A piece of audio, which the device may still be computing."""

    _audio: Array
    _start: int
    _stop: int

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self) -> Float[np.ndarray, " samples"]:
        """The samples, float32; waits for the device."""
        return np.asarray(self._audio, np.float32)[self._start : self._stop]


class PieceDecoder:
    """`decode_with_silence` of latents that become known bit by bit.

        decoder = PieceDecoder(codec)
        for latents in blocks:
            for piece in decoder.push(latents):
                play(piece.read())
        for piece in decoder.finish():
            play(piece.read())

    Together the pieces are the audio of all latents. They depend, to the last bit, neither on how
    the latents were cut into pushes (except for codecs that read all latents before a frame, by
    rounding errors), nor on anything that was decoded before; `decode_with_silence` differs by
    rounding errors. Two shapes are compiled, whatever is pushed. The watermark carries its state
    from piece to piece, so a message is embedded as in one go.

    **Arguments**: as for `decode_with_silence`.

    **Raises**: `EchoError` if the codec cannot embed `message`.
    """

    def __init__(
        self,
        codec: Codec,
        message: Message = None,
        silence: Float[np.ndarray, " c"] | None = None,
    ):
        codec.check_message(message)
        self._codec = codec
        self._pad = codec.decoder_padding
        if self._pad and silence is None:
            silence = silence_latent(codec)
        self._silence = np.zeros(codec.config.latent_dim) if silence is None else silence
        self._latents = np.tile(self._silence.astype(np.float32), (self._pad, 1))
        self._next = 0  # the first frame of `_latents` that is not decoded yet
        self._bits = self._state = None
        if message is not None:
            assert codec.watermark is not None
            self._bits = jnp.asarray(message).astype(jnp.int32)
            self._state = initial_state(codec.watermark)

    def push(self, latents: Float[np.ndarray, "t c"]) -> list[Piece]:
        """The audio that is known now. Only starts to compute it.

        **Raises**: `EchoError` if the shape is wrong.
        """
        self._codec.check_latents(latents.shape)
        self._latents = np.concatenate([self._latents, np.asarray(latents, np.float32)])
        known = len(self._latents) - self._codec.decoder_context[1]
        return list(self._decode(known, is_last=False))

    def finish(self, frames: int | None = None) -> list[Piece]:
        """The rest of the audio, in which silence follows the latents.

        With `frames`, no audio after that many frames from the start.
        """
        stop = len(self._latents)
        if frames is not None:
            stop = min(stop, self._pad + frames)
        _, after = self._codec.decoder_context
        silence = np.tile(self._silence.astype(np.float32), (after, 1))
        self._latents = np.concatenate([self._latents, silence])
        return list(self._decode(stop, is_last=True))

    def _decode(self, stop: int, is_last: bool) -> Iterator[Piece]:
        """Pieces of whole frames before `stop`; the last one may be cut."""
        rows, hop = None, self._codec.config.hop
        while (first := self._next) < stop:
            size = FIRST_PIECE if first == 0 else PIECE
            if first + size > stop:
                if not is_last:
                    return
                size = FIRST_PIECE if stop - first <= PIECE // 2 else size
            rows = self._rows() if rows is None else rows
            audio = self._decode_piece(rows, first, size)
            self._next = min(first + size, stop)
            begin = min(max(first, self._pad), self._next)
            if begin < self._next:  # not only the silence before the latents
                yield Piece(audio, (begin - first) * hop, (self._next - first) * hop)

    def _rows(self) -> tuple[Shaped[Array | np.ndarray, "u d"], int]:
        """The decoder's input, long enough for each window, and its rows for each frame."""
        longest = PIECE + sum(self._codec.decoder_context)
        frames = round_up(len(self._latents) + longest, FRAME_BUCKET)
        padding = np.zeros((frames - len(self._latents), self._latents.shape[1]), np.float32)
        rows = self._codec.decoder_input(np.concatenate([self._latents, padding]))
        return rows, len(rows) // frames

    def _decode_piece(
        self, rows: tuple[Shaped[Array | np.ndarray, "u d"], int], first: int, size: int
    ) -> Float[Array, " samples"]:
        """Audio of `size` frames from `first`, with the watermark."""
        before, after = self._codec.decoder_context
        start, hop = max(first - before, 0), self._codec.config.hop
        array, per_frame = rows
        window = array[start * per_frame : (start + before + size + after) * per_frame]
        audio = _crop(self._codec.decode_window(window), (first - start) * hop, size * hop)
        if self._bits is not None and self._codec.watermark is not None:
            audio, self._state = add_watermark(
                self._codec.watermark, audio, self._bits, self._state
            )
        return audio


@partial(jax.jit, static_argnames="samples")
def _crop(audio: Array, start: int | Array, samples: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(audio, start, samples)
