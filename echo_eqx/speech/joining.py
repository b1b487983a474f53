"""Latents to audio: where the speech ends, decoding, crossfades between chunks, faded edges."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from echo_eqx.codec.codec import Codec
from echo_eqx.flow.sampler import FRAME_BUCKET
from echo_eqx.speech.batching import round_up
from echo_eqx.speech.codec import silence_latent

FLAT_SECONDS, FLAT_STD = 0.8, 0.05
CROSSFADE_SECONDS, EDGE_SECONDS = 0.05, 0.005

Message = Sequence[int] | np.ndarray | None


def speech_end(
    latents: Float[np.ndarray, "t c"], padding: Float[np.ndarray, " c"], frame_rate: float
) -> int:
    """First frame after which every window of 0.8 s differs by less than 0.05 RMS from `padding`,
    which the model generates after the speech."""
    window = max(1, round(FLAT_SECONDS * frame_rate))
    square = np.mean(np.square(latents - padding[None]), axis=1)
    padded = np.concatenate([square, np.zeros(window)])
    means = np.lib.stride_tricks.sliding_window_view(padded, window).mean(axis=1)
    loud = np.flatnonzero(means >= FLAT_STD**2)
    return min(int(loud[-1]) + 1, len(latents)) if len(loud) else 0


def decode_with_silence(
    codec: Codec,
    latents: Float[np.ndarray, "t c"],
    message: Message = None,
    silence: Float[np.ndarray, " c"] | None = None,
) -> Float[np.ndarray, " samples"]:
    """`codec.decode(latents, message)` as if silence preceded and followed the latents.

    A codec that pads with zeros, which do not decode to silence, would start and end audio with a
    click. See `Codec.decoder_padding`.
    """
    frames = codec.decoder_padding
    if frames == 0:
        return np.asarray(codec.decode(latents, message))
    silence = silence_latent(codec) if silence is None else silence
    padding = np.tile(silence, (frames, 1))
    audio = codec.decode(np.concatenate([padding, latents, padding]), message)
    return np.asarray(audio)[frames * codec.config.hop :][: len(latents) * codec.config.hop]


def decode_and_join(
    codec: Codec,
    chunks: Sequence[Float[np.ndarray, "t c"]],
    message: Message,
    trim: bool,
    padding: Float[np.ndarray, " c"],
    silence: Float[np.ndarray, " c"] | None,
) -> Float[np.ndarray, " samples"]:
    """Audio of one utterance from the latents of its chunks; `trim` cuts the padding after each."""
    config = codec.config
    fade_frames = math.ceil(CROSSFADE_SECONDS * config.frame_rate)
    clips = []
    for latents in chunks:
        end = (speech_end(latents, padding, config.frame_rate) if trim else 0) or len(latents)
        # Most of the silence is not decoded. Lengths are bucketed, so that few are compiled.
        needed = round_up(end + fade_frames + codec.decoder_padding, FRAME_BUCKET)
        audio = decode_with_silence(codec, latents[:needed], message, silence)
        clips.append((audio, end * config.hop))
    joined = crossfade(clips, int(CROSSFADE_SECONDS * config.sample_rate))
    return fade_edges(joined, config.sample_rate)


def crossfade(clips: list[tuple[np.ndarray, int]], fade: int) -> Float[np.ndarray, " samples"]:
    """Clips of audio joined at their ends, given as (samples, end) pairs.

    The `fade` samples after the end of a clip fade out while the next clip fades in, so that no
    speech is lost. Samples that a clip does not have count as silence.
    """
    total = sum(end for _, end in clips)
    out = np.zeros(total + fade, np.float32)
    ramp = np.linspace(0, 1, fade, endpoint=False, dtype=np.float32)
    start = 0
    for index, (clip, end) in enumerate(clips):
        shaped = np.zeros(end + fade, np.float32)
        available = min(len(clip), end + fade)
        shaped[:available] = clip[:available]
        if index < len(clips) - 1:
            shaped[end:] *= 1 - ramp
        if index > 0:
            shaped[:fade] *= ramp[: len(shaped[:fade])]
        out[start : start + len(shaped)] += shaped
        start += end
    return out[:total]


def fade_edges(audio: Float[np.ndarray, " samples"], sample_rate: int) -> np.ndarray:
    """`audio` with raised-cosine fades of 5 ms, so that it starts and ends at zero."""
    length = min(int(EDGE_SECONDS * sample_rate), len(audio) // 2)
    ramp = np.sin(np.linspace(0, np.pi / 2, length, endpoint=False, dtype=np.float32)) ** 2
    out = audio.copy()
    out[:length] *= ramp
    out[len(out) - length :] *= ramp[::-1]
    return out
