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
    chunks: Sequence[Float[np.ndarray, "_ c"]],
    message: Message,
    trim: bool,
    padding: Float[np.ndarray, " c"],
    silence: Float[np.ndarray, " c"] | None,
) -> Float[np.ndarray, " samples"]:
    """Audio of one utterance from the latents of its chunks; `trim` cuts the padding after each."""
    config = codec.config
    fade_frames = math.ceil(CROSSFADE_SECONDS * config.frame_rate)
    joiner = Joiner(config.sample_rate)
    parts = []
    for latents in chunks:
        end = (speech_end(latents, padding, config.frame_rate) if trim else 0) or len(latents)
        # Most of the silence is not decoded. Lengths are bucketed, so that few are compiled.
        needed = round_up(end + fade_frames + codec.decoder_padding, FRAME_BUCKET)
        audio = decode_with_silence(codec, latents[:needed], message, silence)
        parts.append(joiner.add(audio, end * config.hop))
        joiner.end_clip(end * config.hop)
    return np.concatenate([*parts, joiner.finish()])


class Joiner:
    """Clips of audio joined at their ends while they become known.

    A clip ends where its speech ends. The 50 ms after that fade out while the next clip fades in,
    so that no speech is lost; samples that a clip does not have count as silence. The whole starts
    and ends with a raised-cosine fade of 5 ms, as by `fade_edges`, so the last 5 ms are always held
    back.
    """

    def __init__(self, sample_rate: int):
        self._rate, self._edge = sample_rate, int(EDGE_SECONDS * sample_rate)
        fade = int(CROSSFADE_SECONDS * sample_rate)
        self._ramp = np.linspace(0, 1, fade, endpoint=False, dtype=np.float32)
        self._out = np.zeros(0, np.float32)  # joined and not given out yet
        self._clip = np.zeros(0, np.float32)  # samples of the current clip that are not in _out
        self._start = self._length = 0  # the current clip's place in _out, and its samples there
        self._is_first_clip, self._is_started = True, False

    def add(
        self, audio: Float[np.ndarray, " samples"], end: int | None = None
    ) -> Float[np.ndarray, " given"]:
        """Samples of the joined audio that are final now, given the next samples of the clip.

        The clip ends at its sample `end` or later; by default after all samples so far.
        """
        self._clip = np.concatenate([self._clip, audio], dtype=np.float32)
        end = self._length + len(self._clip) if end is None else end
        self._join(min(end - self._length, len(self._clip)))
        return self._give(self._start + self._length - self._edge)

    def end_clip(self, end: int) -> None:
        """The clip ends at its sample `end`; the rest of it fades out under the next clip."""
        self._join(min(end - self._length, len(self._clip)))
        self._start, self._length = self._start + end, 0
        tail = self._clip[: len(self._ramp)]
        self._write(self._start, tail * (1 - self._ramp[: len(tail)]))
        self._clip, self._is_first_clip = self._clip[:0], False

    def finish(self) -> Float[np.ndarray, " samples"]:
        """The rest, after the last clip."""
        self._write(self._start, self._clip[:0])
        out = self._out[: self._start]
        if not self._is_started:
            return fade_edges(out, self._rate)
        out[len(out) - self._edge :] *= _rise(self._edge)[::-1]
        return out

    def _join(self, count: int) -> None:
        """Move `count` samples of the clip to the joined audio."""
        if count <= 0:
            return
        audio, self._clip = self._clip[:count], self._clip[count:]
        if not self._is_first_clip:
            ramp = self._ramp[self._length :][:count]
            audio = np.concatenate([audio[: len(ramp)] * ramp, audio[len(ramp) :]])
        self._write(self._start + self._length, audio)
        self._length += count

    def _write(self, start: int, audio: np.ndarray) -> None:
        missing = start + len(audio) - len(self._out)
        if missing > 0:
            self._out = np.concatenate([self._out, np.zeros(missing, np.float32)])
        self._out[start : start + len(audio)] += audio

    def _give(self, count: int) -> np.ndarray:
        # The first fade is shorter if the whole is shorter than two.
        if count < (1 if self._is_started else max(1, self._edge)):
            return self._out[:0]
        out, self._out = self._out[:count].copy(), self._out[count:]
        self._start -= count
        if not self._is_started:
            out[: self._edge] *= _rise(self._edge)
            self._is_started = True
        return out


def fade_edges(audio: Float[np.ndarray, " samples"], sample_rate: int) -> np.ndarray:
    """`audio` with raised-cosine fades of 5 ms, so that it starts and ends at zero."""
    length = min(int(EDGE_SECONDS * sample_rate), len(audio) // 2)
    out = audio.copy()
    out[:length] *= _rise(length)
    out[len(out) - length :] *= _rise(length)[::-1]
    return out


def _rise(length: int) -> np.ndarray:
    return np.sin(np.linspace(0, np.pi / 2, length, endpoint=False, dtype=np.float32)) ** 2
