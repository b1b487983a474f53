"""The compiled programs of the server. Their shapes are fixed, so no request compiles anything."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from echo_eqx.flow.conditions import encode_speaker
from echo_eqx.flow.euler import (
    EulerState,
    computes_guidance,
    euler_step,
    guidance_branches,
)
from echo_eqx.flow.sampler import FRAME_BUCKET, padded_frames, settings_numbers
from echo_eqx.generation import SamplerSettings
from echo_eqx.model.dit import ConditionCache, EchoDiT, SpeakerCache
from echo_eqx.model.joint_attention import KVCache
from echo_eqx.speech.batching import read_latents, round_up
from echo_eqx.speech.chunks import Chunk
from echo_eqx.speech.codec import silence_latents
from echo_eqx.speech.joining import Message
from echo_eqx.speech.pieces import PIECE, PieceDecoder
from echo_eqx.speech.speaker import encode_padded

TEXT_MULTIPLE = 64


@dataclass(frozen=True)
class Reference:
    """A reference voice on the device. Without latents it is none."""

    latents: Float[np.ndarray, "r c"]
    cache: SpeakerCache


@dataclass
class Row:
    """A chunk of text that is being sampled."""

    chunk: Chunk
    numbers: dict[str, np.float32]
    """The numbers of its settings."""
    branches: tuple[str, ...]
    computes_guidance: np.ndarray
    """Of each step, see `flow.euler`."""
    conditions: ConditionCache
    state: tuple[Float[Array, "t c"], Float[Array, "t c"]]
    step: int = 0

    @property
    def num_steps(self) -> int:
        return int(self.numbers["steps"])

    @property
    def is_done(self) -> bool:
        return self.step == self.num_steps

    @property
    def kind(self) -> tuple[Any, ...]:
        """Rows of the same kind can take their next step together."""
        is_new = bool(self.computes_guidance[self.step])
        return self.state[0].shape[0], self.branches, is_new


class Programs:
    """The models with all their programs.

    **Arguments**:
    - `batch_size`: rows that the program of a step computes. It is filled up with copies, so that a
      row has the same bits alone and in a batch.
    - `max_frames`: the longest length to generate.
    - `max_speaker_frames`: the longest reference.
    - `max_steps`: most sampling steps.
    - `all_lengths`: compile all lengths of `padded_frames`, not only a few of them.
    - `first_frames`: frames of the first chunk of a streamed answer, which is one of the few; None
      without such a length.
    """

    def __init__(
        self,
        dit: EchoDiT,
        codec: Codec,
        *,
        batch_size: int,
        max_frames: int,
        max_speaker_frames: int,
        max_steps: int,
        all_lengths: bool,
        first_frames: int | None = None,
    ):
        self.dit, self.codec, self.batch_size = dit, codec, batch_size
        self.max_frames, self.max_steps = max_frames, max_steps
        self.max_speaker_frames = round_up(max_speaker_frames, dit.config.patch_size)
        self._text_length = round_up(dit.config.max_text_bytes, TEXT_MULTIPLE)
        few = [first_frames or max_frames, 128, 256, 512, max_frames]
        wanted = range(1, max_frames + 1) if all_lengths else few
        lengths = {padded_frames(frames, max_frames) for frames in wanted if frames <= max_frames}
        self._lengths = sorted(lengths)
        self.padding, self.silence = silence_latents(dit, codec)
        empty = np.zeros((0, dit.config.latent_dim), np.float32)
        self.no_reference = self.reference(empty)

    def compile(self, message: Message) -> None:
        """Compile everything, or read it from the compilation cache."""
        quick = SamplerSettings(steps=1, cfg_min_t=0.0)
        reference = self.reference(np.zeros((4, self.dit.config.latent_dim), np.float32))
        for length in self._lengths:
            for guidance in ("independent", "joint", "alternating"):
                settings = dataclasses.replace(quick, guidance=guidance)
                row = self.begin(Chunk((0, 0), "a", None, 0, length), reference, settings)
                self.advance([row])
            for frames in range(PIECE, length + PIECE, PIECE):
                latents = np.tile(self.latents(row)[:1], (min(frames, length), 1))
                for _ in self.decode(latents, len(latents), message):
                    pass
        for frames in (FRAME_BUCKET, 2 * FRAME_BUCKET, 3 * FRAME_BUCKET):
            encode_padded(self.codec, np.zeros(frames * self.codec.config.hop, np.float32))

    def reference(self, latents: Float[np.ndarray, "r c"]) -> Reference:
        """A voice on the device, computed once for all its texts. Latents beyond the longest
        reference are not used."""
        latents = latents[: self.max_speaker_frames]
        return Reference(latents, encode_speaker(self.dit, latents, self.max_speaker_frames))

    def begin(self, chunk: Chunk, reference: Reference, settings: SamplerSettings) -> Row:
        """A row before its first step."""
        length = next(length for length in self._lengths if chunk.num_frames <= length)
        ids = np.zeros(self._text_length, np.int32)
        ids[: len(chunk.ids)] = chunk.ids
        mask = np.arange(self._text_length) < len(chunk.ids)
        text, mask = _encode_text(self.dit, ids, mask)
        conditions = ConditionCache(text, mask, reference.cache.keys_values, reference.cache.mask)
        # Without a reference the branch that drops it adds exactly nothing.
        guidance = settings.guidance
        if len(reference.latents) == 0 and guidance == "alternating":
            guidance = "independent"
        numbers = settings_numbers(settings, self.dit.config.num_layers)
        schedule = np.asarray(_schedule(numbers, self.max_steps))
        key = reduce(_fold, map(np.uint32, chunk.index[1:]), _key(np.uint32(chunk.seed)))
        x = _noise(key, numbers["noise_scale"], length, self.dit.config.latent_dim)
        state = x, _zeros(*x.shape)
        branches = guidance_branches(guidance, True)
        return Row(chunk, numbers, branches, schedule, conditions, state)

    def advance(self, rows: Sequence[Row]) -> None:
        """One step of each row. Returns before the device has computed it."""
        kinds = defaultdict(list)
        for row in rows:
            kinds[row.kind].append(row)
        for members in kinds.values():
            for start in range(0, len(members), self.batch_size):
                self._advance(members[start : start + self.batch_size])

    def _advance(self, rows: list[Row]) -> None:
        filled = rows + rows[:1] * (self.batch_size - len(rows))
        names = filled[0].numbers
        states = _step(
            self.dit,
            tuple(row.state for row in filled),
            tuple(row.conditions for row in filled),
            np.array([row.chunk.num_frames for row in filled], np.int32),
            {name: np.array([row.numbers[name] for row in filled]) for name in names},
            filled[0].branches,
            np.array([row.step for row in filled], np.int32),
            filled[0].computes_guidance[filled[0].step],
        )
        for row, state in zip(rows, states, strict=False):
            row.state = state
            row.step += 1

    def latents(self, row: Row) -> Float[np.ndarray, "t c"]:
        """(frames, c) of a finished row.

        **Raises**: `EchoError` if they are not finite.
        """
        return read_latents(row.state[0])[: row.chunk.num_frames]

    def decode(
        self, latents: Float[np.ndarray, "t c"], frames: int, message: Message
    ) -> Iterator[Float[np.ndarray, " samples"]]:
        """Audio of the first `frames` latents piece by piece, with silence around all latents."""
        decoder = PieceDecoder(self.codec, message, self.silence)
        for start in range(0, len(latents), PIECE):
            for piece in decoder.push(latents[start : start + PIECE]):
                yield piece.read()
        for piece in decoder.finish(frames):
            yield piece.read()


@eqx.filter_jit
def _encode_text(dit: EchoDiT, ids: Any, mask: Any) -> tuple[KVCache, Array]:
    return dit.encode_text(jnp.asarray(ids), jnp.asarray(mask))


@eqx.filter_jit
def _schedule(numbers: dict[str, Any], max_steps: int) -> Array:
    """Whether each step computes guidance."""
    settings = {name: jnp.broadcast_to(number, max_steps) for name, number in numbers.items()}
    return computes_guidance(jnp.arange(max_steps, dtype=jnp.int32), settings)


_key, _fold = jax.jit(jr.key), jax.jit(jr.fold_in)


@eqx.filter_jit
def _noise(key: Array, scale: Any, frames: int, width: int) -> Float[Array, "t c"]:
    return scale * jr.normal(key, (frames, width))


@eqx.filter_jit
def _zeros(frames: int, width: int) -> Float[Array, "t c"]:
    return jnp.zeros((frames, width))


@eqx.filter_jit
def _step(
    dit: EchoDiT,
    states: tuple[Any, ...],
    conditions: tuple[ConditionCache, ...],
    frames: Any,
    numbers: dict[str, Any],
    branches: tuple[str, ...],
    steps: Any,
    is_new: Any,
) -> tuple[EulerState, ...]:
    """`euler_step` of rows that come one by one and leave one by one."""
    x, update = (jnp.stack(arrays) for arrays in zip(*states, strict=True))
    stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *conditions)
    mask = jnp.arange(x.shape[1])[None] < jnp.asarray(frames)[:, None]
    numbers = {name: jnp.asarray(number) for name, number in numbers.items()}
    steps, is_new = jnp.asarray(steps), jnp.asarray(is_new)
    state = x, update
    x, update = euler_step(dit, state, mask, stacked, None, numbers, branches, steps, is_new)
    return tuple(zip(x, update, strict=True))
