"""Speech that continues a recording, by block-wise models."""

from itertools import accumulate
from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Float

from echo_eqx.codec.codec import Codec
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.data.audio import load_audio
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.flow.sampler import FRAME_BUCKET, Progress, sample_blockwise
from echo_eqx.generation import SamplerSettings
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.arguments import check_arguments
from echo_eqx.speech.batching import conditions, plan_blocks, round_up
from echo_eqx.speech.chunks import Chunk, split_into_chunks, target_seconds, warn_of_missing_ends
from echo_eqx.speech.codec import silence_latents
from echo_eqx.speech.joining import Message, decode_with_silence, fade_edges, speech_end
from echo_eqx.speech.speaker import Speaker, encode_padded, read_speakers


def continue_recording(
    dit: EchoDiT,
    codec: Codec,
    text: str,
    recording: str | Path,
    speaker: Speaker | None = None,
    *,
    duration: float | None = None,
    block_frames: int | None = None,
    seed: int = 42,
    settings: SamplerSettings | None = None,
    message: Message = None,
    trim: bool = True,
    normalize_text: bool = True,
    expand_text: bool | None = None,
    progress: Progress | None = None,
) -> Float[np.ndarray, " samples"]:
    """The speech after `recording`, mono, float32, at `codec.config.sample_rate`.

    The result begins where the recording ends and does not include it: what somebody has really
    said is neither decoded again nor watermarked.

    **Arguments**: as in `synthesize`, and
    - `text`: what the recording says, and then what to say. It must fit one chunk.
    - `recording`: used as it is, level and silence included.
    - `duration`: seconds of recording and result together, before silence is cut.
    - `block_frames`: frames of the blocks that are generated, by default all in one block.

    **Raises**: `EchoError` naming the recording if it cannot be read, is too short or too long, or
    nothing is spoken after it; `UsageError` if the model has no `latent_encoder`, or the text does
    not fit one chunk.
    """
    patch, rate = dit.config.patch_size, codec.config.frame_rate
    if not dit.config.blockwise:
        raise UsageError(
            f"cannot continue {recording}: expected a block-wise model, got one without "
            "latent_encoder"
        )
    use_compilation_cache()
    settings, _ = check_arguments(dit, codec, [seed], settings, message)
    seconds = target_seconds(dit, codec, duration)
    total = int(seconds * rate + 1e-6) // patch * patch
    sizes = None if block_frames is None else [block_frames]
    plan_blocks(sizes or [total], total, patch)
    texts = split_into_chunks(text, dit, seconds, normalize_text, expand_text)
    if len(texts) != 1:
        raise UsageError(
            f"text: expected at most what can be spoken in {seconds:.2f} s, with what {recording} "
            f"says, got enough for {len(texts)} times as long"
        )
    given = _latents_of(codec, recording, seconds, patch)
    if len(given) > total - patch:
        raise EchoError(
            f"{recording}: expected a recording shorter than the {total / rate:.2f} s of it and "
            f"its continuation together, got {len(given) / rate:.2f} s; see duration"
        )
    new = total - len(given)
    sizes = plan_blocks(sizes or [new], new, patch)
    noise = jr.normal(jr.key(seed), (1, new, dit.config.latent_dim))
    (reference,) = read_speakers(dit, codec, [speaker])
    chunk = Chunk((0, 0), texts[0], reference, seed, total)
    latents = sample_blockwise(
        dit,
        *conditions([chunk]),
        block_sizes=sizes,
        continuation=given[None],
        noise=jnp.split(noise, list(accumulate(sizes))[:-1], axis=1),
        settings=settings,
        progress=progress,
    )
    latents = np.asarray(latents[0])
    padding, silence = silence_latents(dit, codec)
    end = speech_end(latents, padding, rate) if trim else total
    if end <= len(given):
        raise EchoError(
            f"nothing is spoken after {recording}; expected a text that goes on after what the "
            "recording says, or try another seed"
        )
    if trim and end == total:
        warn_of_missing_ends([chunk], seconds)
    # The recording is decoded too, so that its sound leads into the result.
    needed = min(total, round_up(end + codec.decoder_padding, FRAME_BUCKET))
    audio = decode_with_silence(codec, latents[:needed], message, silence)
    hop = codec.config.hop
    return fade_edges(audio[len(given) * hop : end * hop], codec.config.sample_rate)


def _latents_of(codec: Codec, recording: str | Path, seconds: float, patch: int) -> np.ndarray:
    """Latents of the whole patches at the end of a recording, of which more than `seconds` are
    enough to see that it is too long."""
    audio = load_audio(recording, codec.config.sample_rate, seconds + 1.0)
    samples = patch * codec.config.hop
    if len(audio) < samples:
        raise EchoError(
            f"{recording}: expected at least {samples / codec.config.sample_rate:.2f} s to "
            f"continue, got {len(audio) / codec.config.sample_rate:.2f} s"
        )
    return encode_padded(codec, audio[len(audio) % samples :])
