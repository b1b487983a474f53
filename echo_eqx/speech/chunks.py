"""The length to generate, and long texts split into chunks that fit it."""

import dataclasses
import logging
import math
from dataclasses import dataclass

import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.data.text import (
    CHARACTERS_PER_SECOND,
    check_text,
    encode_text,
    halve_text,
    normalize_text,
    says_something,
    speaking_width,
    split_text,
)
from echo_eqx.data.text.clean import TAG
from echo_eqx.errors import UsageError
from echo_eqx.flow.sampler import padded_frames
from echo_eqx.model.dit import EchoDiT

DEFAULT_SECONDS = 15.0
RETRY_FILL = 0.5
"""A chunk whose speech does not end within its length is halved if its text is estimated to need at
least this fraction of the length. For a shorter text, the halves would not end either."""

_MAX_NAMED = 5
_log = logging.getLogger("echo_eqx.speech")


@dataclass(frozen=True)
class Chunk:
    """A part of an utterance, generated in one go."""

    index: tuple[int, ...]
    """Number of the utterance, number of the chunk in it, then 0 or 1 for each halving."""
    text: str
    speaker: np.ndarray | None
    """Reference latents (r, c)."""
    seed: int
    num_frames: int
    """Latent frames to generate: the speech and some silence after it."""

    @property
    def utterance(self) -> int:
        return self.index[0]

    @property
    def ids(self) -> np.ndarray:
        return encode_text(self.text)


def target_seconds(dit: EchoDiT, codec: Codec, duration: float | None = None) -> float:
    """Seconds generated for each chunk: `duration`, by default what the model recommends, or else
    15, but at most the longest seen in training.

    **Raises**: `UsageError` if `duration` is not positive or longer than that.
    """
    longest = dit.config.max_frames / codec.config.frame_rate
    if duration is None:
        return min(dit.generation.duration or DEFAULT_SECONDS, longest)
    if not 0 < duration <= longest + 1e-6:
        raise UsageError(
            f"duration: expected more than 0 and at most {longest:.2f} s, the longest the model "
            f"was trained with, got {duration} s (longer texts are split and joined)"
        )
    return duration


def frames_for_text(text: str, dit: EchoDiT, codec: Codec, most: int) -> int:
    """Latent frames that the speech of a chunk needs, rounded up to one of few lengths, at most
    `most`.

    The estimate is `dit.generation.frames_per_byte` times the bytes that the model reads, or, for
    weights without it, how long the text takes to read aloud.
    """
    per_byte = dit.generation.frames_per_byte
    if per_byte is None:
        frames = speaking_width(text) / CHARACTERS_PER_SECOND * codec.config.frame_rate
    else:
        frames = per_byte * len(encode_text(text))
    return padded_frames(min(max(1, math.ceil(frames)), most), most)


def split_into_chunks(
    text: str, dit: EchoDiT, seconds: float, normalize: bool, expand: bool | None
) -> list[str]:
    """Texts of at most `seconds` of speech and at most as many bytes as the model takes. Without
    `expand`, numbers are written out if the model recommends it.

    **Raises**: `EchoError` if `text` cannot be spoken.
    """
    check_text(text)
    if dit.generation.expand_text if expand is None else expand:
        from echo_eqx.data.text.english import expand_english  # compiles many patterns

        text = expand_english(text)
    text = normalize_text(text) if normalize else text
    chunks = split_text(text, dit.config.max_text_bytes - 1, seconds * CHARACTERS_PER_SECOND)
    return [chunk for chunk in chunks if says_something(chunk)]


def split_first(text: str, dit: EchoDiT, seconds: float) -> list[str]:
    """A chunk of text cut once, so that its first part takes at most `seconds` to speak.

    It stays whole if it is that short, or if one of the parts would have nothing to say.
    """
    first, *others = split_text(
        text, dit.config.max_text_bytes - 1, seconds * CHARACTERS_PER_SECOND
    )
    rest = text.removeprefix(first).strip()
    if not others or rest == text:
        return [text]
    tags = TAG.findall(first)
    if tags and not TAG.match(rest):
        rest = tags[-1].strip() + " " + rest
    return [first, rest] if says_something(first) and says_something(rest) else [text]


def halve_chunk(chunk: Chunk, speaker: np.ndarray, seconds: float) -> list[Chunk]:
    """Two shorter chunks in the same voice.

    Empty if the text cannot be split, or is so short that `seconds` should have been enough.
    """
    if speaking_width(chunk.text) < RETRY_FILL * seconds * CHARACTERS_PER_SECOND:
        return []
    halves = halve_text(chunk.text)
    if len(halves) == 1:
        return []
    return [
        dataclasses.replace(chunk, index=(*chunk.index, i), text=text, speaker=speaker)
        for i, text in enumerate(halves)
    ]


def warn_of_missing_ends(chunks: list[Chunk], seconds: float) -> None:
    """Log which chunks are still speaking in their last frame."""
    texts = [repr(chunk.text) for chunk in sorted(chunks, key=lambda chunk: chunk.index)]
    more = f" and {len(texts) - _MAX_NAMED} more" if len(texts) > _MAX_NAMED else ""
    _log.warning(
        "the speech of %s%s does not end within %.2f s, so its end may be missing; try another "
        "seed, a longer duration, or shorter sentences",
        ", ".join(texts[:_MAX_NAMED]),
        more,
        seconds,
    )
