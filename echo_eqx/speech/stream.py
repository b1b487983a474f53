"""Text to audio piece by piece, so that the first sound comes early."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Array, Float

from echo_eqx.codec.codec import Codec
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.errors import UsageError
from echo_eqx.generation import Length, SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.arguments import check_arguments
from echo_eqx.speech.batching import plan_blocks, read_latents, start_blocks, start_chunk
from echo_eqx.speech.chunks import (
    Chunk,
    frames_for_text,
    halve_chunk,
    split_first,
    split_into_chunks,
    target_seconds,
    warn_of_missing_ends,
)
from echo_eqx.speech.codec import silence_latents
from echo_eqx.speech.joining import (
    CROSSFADE_SECONDS,
    FLAT_SECONDS,
    Joiner,
    Message,
    speech_end,
)
from echo_eqx.speech.pieces import Piece, PieceDecoder
from echo_eqx.speech.speaker import Speaker, read_speakers, trim_to_patches

FIRST_SECONDS = 3.0
Blocks = Sequence[tuple[int, int]]
"""Frames and sampling steps of each block; the last one repeats until the length is reached."""
BLOCKS: Blocks = ((32, 8), (128, 15), (480, 20))


def stream(
    dit: EchoDiT,
    codec: Codec,
    text: str,
    speaker: Speaker | None = None,
    *,
    duration: float | None = None,
    length: Length | None = None,
    first_seconds: float | None = FIRST_SECONDS,
    blocks: Blocks | None = None,
    seed: int = 42,
    settings: SamplerSettings | None = None,
    message: Message = None,
    trim: bool = True,
    normalize_text: bool = True,
    expand_text: bool | None = None,
) -> Iterator[Float[np.ndarray, " samples"]]:
    """Speak `text` piece by piece: mono audio (samples,), float32, at `codec.config.sample_rate`.

        for audio in echo_eqx.stream(dit, codec, "Hello. How are you?"):
            play(audio)

    The next chunk of text is sampled while the audio of the one before is taken. Without block-wise
    weights, a chunk is sampled whole and then decoded in pieces. With them, it is sampled in blocks
    that grow, and each block is decoded at once.

    **Arguments**: as for `synthesize`, and
    - `first_seconds`: the first chunk of text takes at most about as long to speak, and only as
      many frames as it needs are generated for it, as with `length="auto"`. None for the chunks of
      `synthesize`: then, without blocks, the pieces are exactly the audio of `synthesize`, but for
      rounding errors. Block-wise models ignore it.
    - `blocks`: (frames, sampling steps) of each block, of which the last one repeats until
      `duration` is reached. None for `BLOCKS` if the model has block-wise weights. Without blocks,
      `()`, each chunk is sampled in one go with `settings.steps`.

    With blocks, a chunk ends with the first block that ends in 0.8 s of silence, and it is never
    spoken again: its sound may have been heard.

    Errors in the arguments are raised before the first piece is asked for.

    **Raises**: `EchoError` naming the argument that cannot be used.
    """
    use_compilation_cache()
    settings, length = check_arguments(dit, codec, [seed], settings, message, length)
    if first_seconds is not None and not 0 < first_seconds < math.inf:
        raise UsageError(f"first_seconds: expected more than 0 or None, got {first_seconds}")
    if blocks is None:
        blocks = BLOCKS if dit.config.blockwise else ()
    seconds = target_seconds(dit, codec, duration)
    num_frames = max(1, round(seconds * codec.config.frame_rate))
    planned = _plan(dit, blocks, settings, num_frames)
    (voice,) = read_speakers(dit, codec, [speaker])
    texts = split_into_chunks(text, dit, seconds, normalize_text, expand_text)
    if first_seconds is not None and not blocks:
        texts[:1] = split_first(texts[0], dit, first_seconds)
    chunks = []
    for index, part in enumerate(texts):
        is_short = length == "auto" or (index == 0 and first_seconds is not None)
        frames = num_frames
        if is_short and not blocks:
            frames = frames_for_text(part, dit, codec, num_frames)
        chunks.append(Chunk((0, index), part, None, seed, frames))
    speaking = _Speaking(dit, codec, settings, message, trim, voice, seconds, num_frames)
    return speaking.blocks(chunks, *planned) if blocks else speaking.chunks(chunks)


def _plan(
    dit: EchoDiT, blocks: Blocks, settings: SamplerSettings, num_frames: int
) -> tuple[list[int], list[SamplerSettings]]:
    """Frames and settings of the blocks of a chunk."""
    if not blocks:
        return [], []
    if not dit.config.blockwise:
        raise UsageError("blocks: this model has no latent_encoder, so it cannot generate blocks")
    patch, frames = dit.config.patch_size, [size for size, _ in blocks]
    sizes = plan_blocks(frames, max(num_frames // patch, 1) * patch, patch)
    each = [dataclasses.replace(settings, steps=steps) for _, steps in blocks]
    for one in each:
        one.check()
    return sizes, [each[min(i, len(each) - 1)] for i in range(len(sizes))]


@dataclasses.dataclass
class _Speaking:
    """Speaks the chunks of one text."""

    dit: EchoDiT
    codec: Codec
    settings: SamplerSettings
    message: Message
    trim: bool
    voice: np.ndarray | None
    """None until the first chunk has settled on a voice."""
    seconds: float
    num_frames: int

    def __post_init__(self) -> None:
        config = self.codec.config
        self.padding, self.silence = silence_latents(self.dit, self.codec)
        self.fade_frames = math.ceil(CROSSFADE_SECONDS * config.frame_rate)
        self.joiner = Joiner(config.sample_rate)

    def chunks(self, chunks: Sequence[Chunk]) -> Iterator[np.ndarray]:
        """Audio of chunks that are sampled in one go."""
        waiting = deque(chunks)
        sampling = self._start(waiting[0])

        def start_next() -> None:
            nonlocal sampling
            if waiting:
                sampling = self._start(waiting[0])

        while waiting:
            chunk = waiting.popleft()
            latents = read_latents(sampling)[0]
            end = self._end(latents)
            if end == chunk.num_frames < self.num_frames:  # its length was too short
                chunk = dataclasses.replace(chunk, num_frames=self.num_frames)
                latents = read_latents(self._start(chunk))[0]
                end = self._end(latents)
            voice = self._settle(latents, end)
            if end == self.num_frames:
                halves = halve_chunk(chunk, voice, self.seconds) if self.trim else []
                if halves:
                    waiting.extendleft(reversed(halves))
                    start_next()
                    continue
                warn_of_missing_ends([chunk], self.seconds)
            frames = (end if self.trim else 0) or len(latents)
            stop = frames + self.fade_frames
            decoder = self._decoder()
            known = decoder.push(latents[: stop + self.codec.decoder_context[1]])
            yield from self._read(known + decoder.finish(stop), frames, start_next)
            self._end_clip(frames)
        yield from self._finish()

    def blocks(
        self, chunks: Sequence[Chunk], sizes: list[int], settings: list[SamplerSettings]
    ) -> Iterator[np.ndarray]:
        """Audio of chunks that are sampled block by block."""
        flat = round(FLAT_SECONDS * self.codec.config.frame_rate)
        waiting = deque(chunks)
        sampling: Iterator[Array] = iter(())
        block: Array | None = None

        def start_chunk() -> None:
            nonlocal sampling, block
            if waiting:
                chunk = dataclasses.replace(waiting[0], speaker=self.voice)
                sampling = start_blocks(self.dit, chunk, sizes, settings)
                block = next(sampling)

        def start_block() -> None:
            nonlocal block
            block = next(sampling)

        start_chunk()
        while waiting:
            chunk, decoder = waiting.popleft(), self._decoder()
            latents, is_last = np.zeros((0, self.dit.config.latent_dim), np.float32), False
            end = frames = 0
            while not is_last:
                assert block is not None
                new = read_latents(block)[0]
                latents = np.concatenate([latents, new])
                end = self._end(latents)
                has_ended = 0 < end <= len(latents) - flat
                is_last = len(latents) == sum(sizes) or (has_ended and self.trim)
                frames = end if self.trim else len(latents)
                pieces = decoder.push(new)
                if is_last:
                    frames = frames or len(latents)
                    pieces += decoder.finish(frames + self.fade_frames)
                    self._settle(latents, end)
                yield from self._read(pieces, frames, start_chunk if is_last else start_block)
            if end == len(latents):
                warn_of_missing_ends([chunk], self.seconds)
            self._end_clip(frames)
        yield from self._finish()

    def _start(self, chunk: Chunk) -> Array:
        chunk = dataclasses.replace(chunk, speaker=self.voice)
        return start_chunk(self.dit, chunk, self.settings)

    def _decoder(self) -> PieceDecoder:
        return PieceDecoder(self.codec, self.message, self.silence)

    def _end(self, latents: np.ndarray) -> int:
        return speech_end(latents, self.padding, self.codec.config.frame_rate)

    def _settle(self, latents: np.ndarray, end: int) -> np.ndarray:
        """The voice: without a reference, that of the first chunk, for all others."""
        if self.voice is None:
            spoken = latents[: end or None][: self.dit.config.max_speaker_frames]
            self.voice = trim_to_patches(spoken, self.dit)
        return self.voice

    def _read(
        self, pieces: list[Piece], frames: int, start_next: Callable[[], None]
    ) -> Iterator[np.ndarray]:
        """Joined audio of pieces of a clip that ends after `frames` or later.

        The device samples what comes next once there are two pieces to hear.
        """
        if not pieces:
            start_next()
        for number, piece in enumerate(pieces):
            audio = piece.read()
            if number == min(1, len(pieces) - 1):
                start_next()
            joined = self.joiner.add(audio, frames * self.codec.config.hop)
            if len(joined):
                yield joined

    def _end_clip(self, frames: int) -> None:
        self.joiner.end_clip(frames * self.codec.config.hop)

    def _finish(self) -> Iterator[np.ndarray]:
        rest = self.joiner.finish()
        if len(rest):
            yield rest
