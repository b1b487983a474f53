"""One request in the engine: its chunks of text in order, their voice, and their audio joined."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from echo_eqx.generation import SamplerSettings
from echo_eqx.serve.programs import Programs
from echo_eqx.speech.chunks import Chunk, halve_chunk
from echo_eqx.speech.joining import CROSSFADE_SECONDS, EDGE_SECONDS, Message, speech_end
from echo_eqx.speech.speaker import trim_to_patches


@dataclass(frozen=True)
class Progress:
    """Sampling steps done, and the total as far as it is known."""

    step: int
    total: int


@dataclass(frozen=True)
class Audio:
    """The next samples of the answer."""

    samples: Float[np.ndarray, " samples"]


@dataclass(frozen=True)
class Done:
    """The whole text was spoken."""

    frames: int
    """Latent frames of the audio."""
    endless: int
    """Chunks whose speech does not end within their length, so that its end may be missing."""


@dataclass(frozen=True)
class Failed:
    """Nothing more will come."""

    message: str
    is_internal: bool


Event = Progress | Audio | Done | Failed


@dataclass(frozen=True)
class Task:
    """What to speak, and how."""

    texts: Sequence[str]
    """Chunks of the text, each spoken in one go."""
    voice: Float[np.ndarray, "r c"] | None
    """Reference latents. None: the first chunk settles on a voice."""
    seed: int
    settings: SamplerSettings
    frames: int
    """Frames to generate for each chunk."""
    trim: bool
    message: Message


class Speech:
    """A task in the engine. `emit` is called in the engine's thread with each event.

    `cancel` may be called in any thread, and `unread` may be set by the reader: the seconds of
    audio that were emitted and that the client has not taken yet.
    """

    def __init__(self, programs: Programs, task: Task, emit: Callable[[Event], None]):
        self._programs, self._task, self._emit = programs, task, emit
        self._voice = task.voice
        self._waiting = deque(
            Chunk((0, j), text, None, task.seed, task.frames) for j, text in enumerate(task.texts)
        )
        self._order = [chunk.index for chunk in self._waiting]
        self._latents: dict[tuple[int, ...], tuple[np.ndarray, int]] = {}
        self._joiner = Joiner(programs.codec.config.sample_rate)
        self._num_started = self._num_steps = self._num_chunks = self._frames = self._endless = 0
        self._num_chunks = len(task.texts)
        self.arrived, self.is_cancelled, self.is_over = time.monotonic(), False, False
        self.unread = 0.0

    @property
    def settings(self) -> SamplerSettings:
        return self._task.settings

    @property
    def frames(self) -> int:
        return self._task.frames

    @property
    def due(self) -> float:
        """When a listener who began at the arrival of the request needs the next chunk."""
        return self.arrived + self._num_started * self._seconds

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def can_start(self) -> bool:
        """Whether a chunk may start now: later ones need the voice of the first."""
        return bool(self._waiting) and (self._voice is not None or self._num_started == 0)

    @property
    def _seconds(self) -> float:
        return self._task.frames / self._programs.codec.config.frame_rate

    def cancel(self) -> None:
        self.is_cancelled = True

    def start_chunk(self) -> Chunk:
        self._num_started += 1
        return dataclasses.replace(self._waiting.popleft(), speaker=self._voice)

    def count_step(self) -> None:
        self._num_steps += 1
        self._emit(Progress(self._num_steps, self._num_chunks * self._task.settings.steps))

    def fail(self, message: str, is_internal: bool) -> None:
        self.is_over = True
        self._emit(Failed(message, is_internal))

    def finish_chunk(self, chunk: Chunk, latents: Float[np.ndarray, "t c"]) -> None:
        """Take the latents of a chunk, and emit the audio that they complete."""
        programs, trim = self._programs, self._task.trim
        dit, frame_rate = programs.dit, programs.codec.config.frame_rate
        end = speech_end(latents, programs.padding, frame_rate)
        if self._voice is None:
            spoken = latents[: end or None][: dit.config.max_speaker_frames]
            self._voice = trim_to_patches(spoken, dit)
        if end == len(latents):
            halves = halve_chunk(chunk, self._voice, self._seconds) if trim else []
            if halves:
                self._waiting.extendleft(reversed(halves))
                at = self._order.index(chunk.index)
                self._order[at : at + 1] = [half.index for half in halves]
                self._num_chunks += 2
                return
            self._endless += 1
        self._latents[chunk.index] = latents, (end if trim else 0) or len(latents)
        while self._order and self._order[0] in self._latents:
            latents, end = self._latents.pop(self._order.pop(0))
            clip = programs.decode(latents, self._task.message)
            samples = self._joiner.join(clip, end * programs.codec.config.hop, not self._order)
            self._frames += end
            self._emit(Audio(samples))
        if not self._order:
            self.is_over = True
            self._emit(Done(self._frames, self._endless))


class Joiner:
    """`crossfade` and `fade_edges` of clips that come one after the other."""

    def __init__(self, sample_rate: int):
        self._fade, self._edge = (
            int(CROSSFADE_SECONDS * sample_rate),
            int(EDGE_SECONDS * sample_rate),
        )
        self._tail = np.zeros(0, np.float32)
        self._held = np.zeros(0, np.float32)
        self._is_first = True

    def join(self, clip: np.ndarray, end: int, is_last: bool) -> Float[np.ndarray, " samples"]:
        """Samples that are final once `clip` is known, whose speech ends before sample `end`."""
        ramp = np.linspace(0, 1, self._fade, endpoint=False, dtype=np.float32)
        shaped = np.zeros(end + self._fade, np.float32)
        available = min(len(clip), len(shaped))
        shaped[:available] = clip[:available]
        if not is_last:
            shaped[end:] *= 1 - ramp
        if not self._is_first:
            shaped[: self._fade] *= ramp
            shaped[: len(self._tail)] += self._tail
        out, self._tail = np.concatenate([self._held, shaped[:end]]), shaped[end:]
        length = min(self._edge, len(out) // 2)
        rise = np.sin(np.linspace(0, math.pi / 2, length, endpoint=False, dtype=np.float32)) ** 2
        if self._is_first:
            out[:length] *= rise
            self._is_first = False
        if is_last:
            out[len(out) - length :] *= rise[::-1]
            return out
        held = min(self._edge, len(out))
        out, self._held = out[: len(out) - held], out[len(out) - held :]
        return out
