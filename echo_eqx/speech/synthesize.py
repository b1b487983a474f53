"""Text to audio: one utterance, or many in batches."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from echo_eqx.codec.codec import Codec
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.flow.sampler import Progress
from echo_eqx.generation import Length, SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.arguments import check_arguments
from echo_eqx.speech.batching import BatchSampler
from echo_eqx.speech.chunks import (
    Chunk,
    frames_for_text,
    halve_chunk,
    split_into_chunks,
    target_seconds,
    warn_of_missing_ends,
)
from echo_eqx.speech.codec import silence_latents
from echo_eqx.speech.joining import Message, decode_and_join, speech_end
from echo_eqx.speech.speaker import Speaker, read_speakers, trim_to_patches


@dataclass(frozen=True)
class Utterance:
    """A text to speak, with its voice and seed."""

    text: str
    speaker: Speaker | None = None
    """The reference voice, as in `synthesize`."""
    seed: int = 42
    """Seed of the noise, from 0 to 2^32 - 1."""


def synthesize(
    dit: EchoDiT,
    codec: Codec,
    text: str,
    speaker: Speaker | None = None,
    *,
    duration: float | None = None,
    length: Length | None = None,
    seed: int = 42,
    settings: SamplerSettings | None = None,
    message: Message = None,
    trim: bool = True,
    normalize_text: bool = True,
    expand_text: bool | None = None,
    progress: Progress | None = None,
) -> Float[np.ndarray, " samples"]:
    """Speak `text`: mono audio (samples,), float32, at `codec.config.sample_rate`.

    **Arguments**:
    - `speaker`: the reference voice: the path of a recording, of a voice `*.safetensors` or of
      latents `*.npy`, audio (samples,) at `codec.config.sample_rate`, or latents (r, c). None for
      an arbitrary voice.
    - `duration`: seconds generated for each chunk of text, which the model fills with speech and
      then silence. None for `dit.generation.duration`, or else 15 s or the longest the model was
      trained with.
    - `length`: "full" generates `duration` for every chunk. "auto" generates less for chunks whose
      text needs less, which is faster; since all frames attend to each other, it changes what is
      spoken. A chunk whose speech does not end then is spoken again with "full". None for
      `dit.generation.length`.
    - `seed`: seed of the noise, from 0 to 2^32 - 1.
    - `settings`: of the sampler; None for `dit.generation.sampler`.
    - `message`: bits to embed as a watermark; None for no watermark.
    - `trim`: cut the silence at the end.
    - `normalize_text`: clean the text as in training.
    - `expand_text`: write out numbers, dates, money, addresses and abbreviations in English. None
      for `dit.generation.expand_text`.
    - `progress`: called after each sampling step with the steps done and the total.

    Texts that are too long are split into chunks at the ends of sentences; the chunks are spoken in
    one voice and joined. If the speech of a chunk does not end within `duration`, the chunk is
    spoken again as two shorter ones. If that does not help, the logger `echo_eqx.speech` warns that
    its end may be missing. Without `trim` chunks are never spoken again.

    Audio starts and ends at zero. Compiled programs are cached on disk, see
    `use_compilation_cache`.

    **Raises**: `EchoError` naming the argument that cannot be used.
    """
    (audio,) = synthesize_all(
        dit,
        codec,
        [Utterance(text, speaker, seed)],
        duration=duration,
        length=length,
        settings=settings,
        message=message,
        trim=trim,
        normalize_text=normalize_text,
        expand_text=expand_text,
        progress=progress,
    )
    return audio


def synthesize_all(
    dit: EchoDiT,
    codec: Codec,
    utterances: Sequence[Utterance],
    *,
    duration: float | None = None,
    length: Length | None = None,
    settings: SamplerSettings | None = None,
    message: Message = None,
    trim: bool = True,
    normalize_text: bool = True,
    expand_text: bool | None = None,
    batch_size: int = 8,
    block_frames: int | None = None,
    progress: Progress | None = None,
) -> list[Float[np.ndarray, " samples"]]:
    """`synthesize` for many utterances, in batches of at most `batch_size` chunks.

    Returns one array (samples,) per utterance, in order. `block_frames` makes block-wise models
    generate each chunk in blocks of that many frames.

    **Raises**: `EchoError` naming the argument that cannot be used.
    """
    use_compilation_cache()
    seeds = [utterance.seed for utterance in utterances]
    settings, length = check_arguments(dit, codec, seeds, settings, message, length)
    speakers = read_speakers(dit, codec, [utterance.speaker for utterance in utterances])
    seconds = target_seconds(dit, codec, duration)
    num_frames = max(1, round(seconds * codec.config.frame_rate))
    texts = [
        split_into_chunks(utterance.text, dit, seconds, normalize_text, expand_text)
        for utterance in utterances
    ]
    sampler = BatchSampler(dit, block_frames, settings, batch_size, progress)
    sampler.block_sizes(num_frames)
    padding, silence = silence_latents(dit, codec)

    def end_of(latents: np.ndarray) -> int:
        return speech_end(latents, padding, codec.config.frame_rate)

    def spoken(chunks: list[Chunk], later: list[Chunk]) -> dict[tuple[int, ...], np.ndarray]:
        """Latents of the chunks; those that do not end within a shorter length get the full one."""
        latents = sampler(chunks, later)
        longer = [
            dataclasses.replace(chunk, num_frames=num_frames)
            for chunk in chunks
            if end_of(latents[chunk.index]) == chunk.num_frames < num_frames
        ]
        return latents | sampler(longer, later)

    # Without a reference, the first chunk settles on a voice, which becomes the others' reference.
    first, second = [], []
    for i, (utterance, parts) in enumerate(zip(utterances, texts, strict=True)):
        for j, part in enumerate(parts):
            frames = num_frames
            if length == "auto":
                frames = frames_for_text(part, dit, codec, num_frames)
            chunk = Chunk((i, j), part, speakers[i], utterance.seed, frames)
            (second if speakers[i] is None and j > 0 else first).append(chunk)
    latents = spoken(first, second)
    for i, speaker in enumerate(speakers):
        if speaker is None:
            voice = latents[i, 0]
            voice = voice[: end_of(voice) or None][: dit.config.max_speaker_frames]
            speakers[i] = trim_to_patches(voice, dit)
    second = [dataclasses.replace(chunk, speaker=speakers[chunk.utterance]) for chunk in second]
    latents |= spoken(second, [])

    chunks, endless = first + second, []
    while full := [
        dataclasses.replace(chunk, num_frames=num_frames)
        for chunk in chunks
        if end_of(latents[chunk.index]) == num_frames
    ]:
        chunks = []
        for chunk in full:
            speaker = speakers[chunk.utterance]
            halves = halve_chunk(chunk, speaker, seconds) if trim and speaker is not None else []
            if halves:
                del latents[chunk.index]
                chunks += halves
            else:
                endless.append(chunk)
        latents |= sampler(chunks)
    if endless:
        warn_of_missing_ends(endless, seconds)
    return [
        decode_and_join(
            codec,
            [latents[k] for k in sorted(latents) if k[0] == i],
            message,
            trim,
            padding,
            silence,
        )
        for i in range(len(utterances))
    ]
