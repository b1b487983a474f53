"""The compiled programs of the server. Their shapes are fixed, so no request compiles anything."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from echo_eqx.codec.codec import Codec
from echo_eqx.errors import EchoError
from echo_eqx.flow.euler import euler_steps, guidance_branches
from echo_eqx.flow.sampler import FRAME_BUCKET
from echo_eqx.generation import SamplerSettings
from echo_eqx.model.dit import ConditionCache, EchoDiT
from echo_eqx.speech.batching import round_up
from echo_eqx.speech.chunks import Chunk
from echo_eqx.speech.codec import padding_latent, silence_latent
from echo_eqx.speech.joining import Message, decode_with_silence
from echo_eqx.speech.speaker import encode_padded

TEXT_MULTIPLE, CANVAS_MULTIPLE = 64, 16


@dataclass
class Row:
    """A chunk of text that is being sampled."""

    chunk: Chunk
    settings: SamplerSettings
    frames: int
    """Frames to generate, at most the length of `x`."""
    conditions: ConditionCache
    x: Array
    update: Array
    """The guidance that was last added to the velocity of `x`."""
    step: int = 0

    @property
    def is_done(self) -> bool:
        return self.step == self.settings.steps


class Programs:
    """The models with all their programs.

    **Arguments**:
    - `max_frames`: the longest length to generate.
    - `max_speaker_frames`: the longest reference.
    """

    def __init__(self, dit: EchoDiT, codec: Codec, max_frames: int, max_speaker_frames: int):
        self.dit, self.codec = dit, codec
        self.max_frames = max_frames
        self.max_speaker_frames = round_up(max_speaker_frames, dit.config.patch_size)
        self._text_length = round_up(dit.config.max_text_bytes, TEXT_MULTIPLE)
        lengths = [FRAME_BUCKET << i for i in range(max_frames.bit_length())]
        longest = round_up(max_frames, CANVAS_MULTIPLE)
        self.canvases = [length for length in lengths if length < longest] + [longest]
        self.padding = padding_latent(dit, codec)
        self.silence = silence_latent(codec)

    def compile(self, message: Message) -> None:
        """Compile everything, or read it from the compilation cache."""
        quick = SamplerSettings(steps=1)
        voice = np.zeros((self.dit.config.patch_size, self.dit.config.latent_dim), np.float32)
        for canvas in self.canvases:
            for speaker in (None, voice):
                for guidance in ("independent", "joint", "alternating"):
                    settings = dataclasses.replace(quick, guidance=guidance)
                    row = self.begin(Chunk((0, 0), "a", speaker, 0, canvas), settings, canvas)
                    self.advance([row])
            self.decode(self.latents(row), message)
        longest = round_up(self.max_speaker_frames, FRAME_BUCKET)
        for frames in range(FRAME_BUCKET, longest + 1, FRAME_BUCKET):
            encode_padded(self.codec, np.zeros(frames * self.codec.config.hop, np.float32))

    def begin(self, chunk: Chunk, settings: SamplerSettings, frames: int) -> Row:
        """A row before its first step."""
        canvas = next(length for length in self.canvases if frames <= length)
        ids, text_mask = _padded(chunk.ids.astype(np.int32), self._text_length)
        width = self.dit.config.latent_dim
        speaker = np.zeros((0, width), np.float32) if chunk.speaker is None else chunk.speaker
        speaker, speaker_mask = _padded(speaker, self.max_speaker_frames)
        conditions = _conditions(self.dit, ids, text_mask, speaker, speaker_mask)
        key = reduce(_fold, map(np.uint32, chunk.index[1:]), _key(np.uint32(chunk.seed)))
        x = _noise(key, np.float32(settings.noise_scale), canvas, width)
        return Row(chunk, settings, frames, conditions, x, np.zeros(x.shape, np.float32))

    def advance(self, rows: Sequence[Row]) -> None:
        """One step of each row. Returns before the device has computed it."""
        for row in rows:
            branches = guidance_branches(row.settings.guidance, row.chunk.speaker is not None)
            row.x, row.update = euler_steps(
                self.dit,
                (row.x, row.update),
                np.arange(row.x.shape[1]) < row.frames,
                row.conditions,
                None,
                _traced(row.settings, self.dit.config.num_layers),
                branches,
                (np.int32(row.step), np.int32(row.step + 1)),
            )
            row.step += 1

    def latents(self, row: Row) -> Float[np.ndarray, "t c"]:
        """(frames, c) of a finished row.

        **Raises**: `EchoError` if they are not finite.
        """
        latents = np.asarray(row.x)[0, : row.frames]
        if not np.isfinite(latents).all():
            raise EchoError(
                "expected finite latents from the sampler, got NaN or infinity; use gentler "
                "settings (guidance scales, rescale_k, noise_scale)"
            )
        return latents

    def decode(
        self, latents: Float[np.ndarray, "t c"], message: Message
    ) -> Float[np.ndarray, " samples"]:
        """Audio of latents with silence after them, at least as long as they are."""
        canvas = next(length for length in self.canvases if len(latents) <= length)
        rest = np.tile(self.silence, (canvas - len(latents), 1))
        return decode_with_silence(
            self.codec, np.concatenate([latents, rest]), message, self.silence
        )


@eqx.filter_jit
def _conditions(dit: EchoDiT, *inputs: Array) -> ConditionCache:
    return jax.vmap(dit.encode_conditions)(*(jnp.asarray(array)[None] for array in inputs))


_key, _fold = jax.jit(jr.key), jax.jit(jr.fold_in)


@eqx.filter_jit
def _noise(key: Array, scale: Array, frames: int, width: int) -> Float[Array, "1 t c"]:
    return scale * jr.normal(key, (1, frames, width))


def _padded(array: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    padding = [(0, length - len(array))] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, padding), np.arange(length) < len(array)


def _traced(settings: SamplerSettings, num_layers: int) -> dict[str, Any]:
    numbers = dataclasses.asdict(settings) | {"start_t": settings.first_time}
    del numbers["guidance"]
    if settings.speaker_kv_layers is None:
        numbers["speaker_kv_layers"] = num_layers
    return {name: np.float32(number) for name, number in numbers.items()}
