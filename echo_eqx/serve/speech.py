"""One request in the engine: its chunks of text in order, their voice, and their audio joined."""

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from echo_eqx.generation import SamplerSettings
from echo_eqx.serve.programs import Programs, Reference, Row
from echo_eqx.speech.chunks import Chunk, halve_chunk
from echo_eqx.speech.joining import CROSSFADE_SECONDS, Joiner, Message, speech_end
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
    lengths: Sequence[int]
    """Frames to generate for each chunk."""
    voice: Reference | None
    """None: the first chunk settles on a voice."""
    seed: int
    settings: SamplerSettings
    most: int
    """Frames to generate for a chunk whose speech does not end within fewer."""
    trim: bool
    message: Message


class Speech:
    """A task in the engine. `emit` is called in the engine's thread with each event.

    `cancel` may be called in any thread. `unread` are the seconds of audio that were emitted and
    that the client has not taken yet; the reader lowers it.
    """

    def __init__(self, programs: Programs, task: Task, emit: Callable[[Event], None]):
        self._programs, self._task, self._emit = programs, task, emit
        self._voice = task.voice
        self._waiting = deque(
            Chunk((0, j), text, None, task.seed, frames)
            for j, (text, frames) in enumerate(zip(task.texts, task.lengths, strict=True))
        )
        self._order = [chunk.index for chunk in self._waiting]
        self._latents: dict[tuple[int, ...], tuple[np.ndarray, int]] = {}
        self._joiner = Joiner(programs.codec.config.sample_rate)
        self._clip: Iterator[np.ndarray] | None = None
        self._num_steps = self._frames = self._endless = 0
        self._frames_begun = 0
        self._num_chunks = len(task.texts)
        self.arrived, self.is_cancelled, self.is_over = time.monotonic(), False, False
        self.unread = 0.0

    @property
    def due(self) -> float:
        """When a listener who began at the arrival of the request needs the next chunk."""
        return self.arrived + self._frames_begun / self._programs.codec.config.frame_rate

    @property
    def is_silent(self) -> bool:
        """Whether no audio was decoded yet."""
        return self._clip is None and not self._frames

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def can_start(self) -> bool:
        """Whether a chunk may start now: later ones need the voice of the first."""
        return bool(self._waiting) and (
            self._voice is not None or len(self._waiting) == len(self._order)
        )

    def cancel(self) -> None:
        self.is_cancelled = True

    def start_chunk(self) -> Row:
        """The row of the next chunk."""
        chunk, voice = self._waiting.popleft(), self._voice or self._programs.no_reference
        self._frames_begun += chunk.num_frames
        return self._programs.begin(chunk, voice, self._task.settings)

    def count_step(self) -> None:
        self._num_steps += 1
        self._emit(Progress(self._num_steps, self._num_chunks * self._task.settings.steps))

    def fail(self, message: str, is_internal: bool) -> None:
        self.is_over = True
        self._emit(Failed(message, is_internal))

    def finish_chunk(self, row: Row) -> None:
        """Take the latents of a chunk, to be decoded when it is their turn."""
        programs, chunk = self._programs, row.chunk
        latents = programs.latents(row)
        end = speech_end(latents, programs.padding, programs.codec.config.frame_rate)
        self._frames_begun -= chunk.num_frames
        if end == len(latents) < self._task.most:
            self._waiting.appendleft(dataclasses.replace(chunk, num_frames=self._task.most))
            self._num_chunks += 1
            return
        if self._voice is None:
            spoken = latents[: end or None][: programs.dit.config.max_speaker_frames]
            self._voice = programs.reference(trim_to_patches(spoken, programs.dit))
        if end == len(latents):
            voice, seconds = self._voice.latents, end / programs.codec.config.frame_rate
            halves = halve_chunk(chunk, voice, seconds) if self._task.trim else []
            if halves:
                self._waiting.extendleft(reversed(halves))
                at = self._order.index(chunk.index)
                self._order[at : at + 1] = [half.index for half in halves]
                self._num_chunks += 2
                return
            self._endless += 1
        end = (end if self._task.trim else 0) or len(latents)
        self._frames_begun += end
        self._latents[chunk.index] = latents, end

    def decode_next(self) -> bool:
        """Decode and emit the next piece of audio, if its latents are known."""
        if self._clip is None:
            if not self._order or self._order[0] not in self._latents:
                return False
            latents, end = self._latents.pop(self._order.pop(0))
            self._frames += end
            config, is_last = self._programs.codec.config, not self._order
            fade = 0 if is_last else math.ceil(CROSSFADE_SECONDS * config.frame_rate)
            pieces = self._programs.decode(latents, end + fade, self._task.message)
            self._clip = self._join(pieces, end * config.hop, is_last)
        samples = next(self._clip, None)
        if samples is None:
            self._clip = None
            if not self._order:
                self.is_over = True
                self._emit(Done(self._frames, self._endless))
        elif len(samples):
            self._emit(Audio(samples))
        return True

    def _join(
        self, pieces: Iterator[np.ndarray], end: int, is_last: bool
    ) -> Iterator[Float[np.ndarray, " samples"]]:
        """The audio that each piece of a clip completes."""
        for piece in pieces:
            yield self._joiner.add(piece, end)
        self._joiner.end_clip(end)
        if is_last:
            yield self._joiner.finish()
