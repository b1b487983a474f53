"""Text to audio: reference, sampling, decoding, trimming, and joining of long texts."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float

from echo_eqx.codec.dacvae import DACVAE, decoder_context_frames
from echo_eqx.compilation import use_compilation_cache
from echo_eqx.data.text import (
    CHARACTERS_PER_SECOND,
    check_text,
    encode_text,
    expand_english,
    halve_text,
    normalize_text,
    says_something,
    speaking_width,
    split_text,
)
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.flow.sampler import (
    FRAME_BUCKET,
    Progress,
    SamplerSettings,
    sample,
    sample_blockwise,
)
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speaker import (
    Speaker,
    longest_reference,
    silence_latent,
    speaker_latents,
    whole_patches,
)

FLAT_FRAMES, FLAT_DEVIATION = 20, 0.05
CROSSFADE_SECONDS, EDGE_SECONDS = 0.05, 0.005
_DECODED_BEHIND_END = 16
_TEXT_CLASSES = (64, 128, 256, 512)
CROWDED = 0.5
"""Speech that fills its canvas is spoken again in halves if its text, by its width, needs more than
this part of it. If it needs less, the model does not end, and halves would not either."""

_NAMED = 5
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Utterance:
    """A text to speak, and with which voice and seed."""

    text: str
    speaker: Speaker | None = None
    """The voice to take, as in `synthesize`; None for any voice."""
    seed: int = 42


def synthesize(
    dit: EchoDiT,
    codec: DACVAE,
    text: str,
    speaker: Speaker | None = None,
    *,
    duration: float | None = None,
    seed: int = 42,
    settings: SamplerSettings | None = None,
    message: Sequence[int] | np.ndarray | None = None,
    trim: bool = True,
    normalise: bool = True,
    expand_text: bool | None = None,
    progress: Progress | None = None,
) -> Float[np.ndarray, " samples"]:
    """Speak `text`: (samples,) float32, mono, at `codec.config.sample_rate`.

    **Arguments**: `speaker` the voice to take, a recording or its latents, None for any voice;
    `duration` seconds of the canvas that a piece of text is spoken on, which the model fills with
    speech and then silence, None for `dit.generation.duration`, and without one for 15 or the
    longest it knows; `settings` by default `dit.generation.sampler`; `message` bits to embed as a
    watermark, None for none; `trim` cuts the silence at the end; `normalise` cleans the text as in
    training; `expand_text` writes out numbers, dates, money, addresses and abbreviations, as
    English, None for `dit.generation.expand_text`; `progress` is called after each step. Text that
    does not fit is split at ends of sentences, spoken in one voice and joined.

    If the speech of a piece fills its canvas to the last frame, its end may be missing, and the
    piece is spoken again as two smaller ones. A warning of the logger `echo_eqx.speech` names the
    pieces that still fill it. Without `trim`, which keeps the canvases as they are, it only warns.

    The audio begins and ends at zero. Compiled programs are kept: see `use_compilation_cache`.

    **Raises**: `EchoError` naming what cannot be used.
    """
    (audio,) = synthesize_all(
        dit,
        codec,
        [Utterance(text, speaker, seed)],
        duration=duration,
        settings=settings,
        message=message,
        trim=trim,
        normalise=normalise,
        expand_text=expand_text,
        progress=progress,
    )
    return audio


def synthesize_all(
    dit: EchoDiT,
    codec: DACVAE,
    utterances: Sequence[Utterance],
    *,
    duration: float | None = None,
    settings: SamplerSettings | None = None,
    message: Sequence[int] | np.ndarray | None = None,
    trim: bool = True,
    normalise: bool = True,
    expand_text: bool | None = None,
    batch_size: int = 8,
    block_frames: int | None = None,
    progress: Progress | None = None,
) -> list[Float[np.ndarray, " samples"]]:
    """`synthesize` for many utterances, sampled in batches of at most `batch_size` pieces.

    With `block_frames`, block-wise models generate the canvas in blocks of so many frames.
    """
    use_compilation_cache()
    settings = settings or dit.generation.sampler
    settings.check()
    check_pair(dit, codec)
    check_message(codec, message)
    for utterance in utterances:
        if not 0 <= utterance.seed < 2**32:
            raise UsageError(f"seed is {utterance.seed}; expected 0 to 2^32 - 1")
    voices = _voices(dit, codec, utterances)
    seconds = canvas_seconds(dit, codec, duration)
    num_frames = max(1, round(seconds * codec.config.frame_rate))
    expand = dit.generation.expand_text if expand_text is None else expand_text
    pieces = [_pieces_of(u, dit, seconds, normalise, expand) for u in utterances]

    # Without a reference the first piece of a text finds a voice, which the others then take.
    first, second = [], []
    for i, (utterance, parts) in enumerate(zip(utterances, pieces, strict=True)):
        for j, part in enumerate(parts):
            row = _Row((i, j), part, voices[i], utterance.seed)
            (second if voices[i] is None and j > 0 else first).append(row)
    silence = silence_latent(codec)
    blocks = _blocks(num_frames, block_frames, dit.config.patch_size)
    steps = settings.steps * max(1, len(blocks))
    count = _Counter(progress, steps, _num_batches([first, second], batch_size))

    def sample_rows(rows: list[_Row]) -> dict[_Place, np.ndarray]:
        return _sample_rows(dit, rows, num_frames, blocks, settings, batch_size, count)

    spoken = sample_rows(first)
    voices = [
        _voice_of(spoken[i, 0], silence, dit) if given is None else given
        for i, given in enumerate(voices)
    ]
    second = [dataclasses.replace(row, speaker=voices[row.utterance]) for row in second]
    count.batches = _num_batches([first, second], batch_size)
    spoken |= sample_rows(second)

    rows, unended = first + second, []
    while full := [row for row in rows if speech_end(spoken[row.place], silence) == num_frames]:
        rows = []
        for row in full:
            halves = _halves(row, voices[row.utterance], seconds) if trim else []
            if halves:
                del spoken[row.place]
                rows += halves
            else:
                unended.append(row)
        count.batches += _num_batches([rows], batch_size)
        spoken |= sample_rows(rows)
    if unended:
        _warn_of_full_canvases(unended, seconds)

    def clip_of(latents: np.ndarray) -> tuple[np.ndarray, int]:
        end = (speech_end(latents, silence) if trim else 0) or len(latents)
        # Silence far behind the end is not decoded, but few lengths ever are.
        needed = -(-(end + _DECODED_BEHIND_END) // FRAME_BUCKET) * FRAME_BUCKET
        audio = decode_in_silence(codec, latents[:needed], message, silence)
        return audio, end * codec.config.hop

    fade = int(CROSSFADE_SECONDS * codec.config.sample_rate)
    return [
        faded(
            _join([clip_of(spoken[place]) for place in sorted(spoken) if place[0] == i], fade),
            codec.config.sample_rate,
        )
        for i in range(len(pieces))
    ]


# --- Checks -------------------------------------------------------------------------------------


def check_pair(dit: EchoDiT, codec: DACVAE) -> None:
    """Raises `EchoError` if the codec cannot decode what the model generates."""
    if dit.config.latent_dim != codec.config.latent_dim:
        raise EchoError(
            f"the checkpoint generates latents of {dit.config.latent_dim} channels, the codec "
            f"decodes {codec.config.latent_dim}; expected the codec that the model was trained with"
        )


def check_message(codec: DACVAE, message: Sequence[int] | np.ndarray | None) -> None:
    """Raises `EchoError` if the codec cannot embed `message`, before anything is sampled."""
    if message is None:
        return
    if codec.watermark is None:
        raise EchoError(
            "message: expected None, since this codec has no watermark path; leave the message out"
        )
    bits = np.asarray(message)
    if bits.shape != (codec.watermark.num_bits,):
        raise EchoError(
            f"message: expected {codec.watermark.num_bits} bits, got shape {bits.shape}"
        )
    if not np.isin(bits, (0, 1)).all():
        raise EchoError("message: expected 0 and 1 only")


def canvas_seconds(dit: EchoDiT, codec: DACVAE, duration: float | None = None) -> float:
    """`duration`, by default what the model's file recommends, or else 15 or the longest canvas
    the model was trained with.

    **Raises**: `UsageError` if the model knows no such canvas.
    """
    longest = dit.config.max_frames / codec.config.frame_rate
    if duration is None:
        return min(dit.generation.duration or 15.0, longest)
    if not 0 < duration <= longest + 1e-6:
        raise UsageError(
            f"duration is {duration} s; expected more than 0 and at most the {longest:.2f} s the "
            "model was trained with (longer texts are split and joined)"
        )
    return duration


def _voices(
    dit: EchoDiT, codec: DACVAE, utterances: Sequence[Utterance]
) -> list[np.ndarray | None]:
    """Reference latents of each utterance; a recording that several name is read once."""
    read: dict[str, np.ndarray] = {}
    voices: list[np.ndarray | None] = []
    for utterance in utterances:
        speaker = utterance.speaker
        if isinstance(speaker, str | Path):
            if str(speaker) not in read:
                read[str(speaker)] = speaker_latents(dit, codec, speaker)
            voices.append(read[str(speaker)])
        elif speaker is None:
            voices.append(None)
        elif not isinstance(speaker, np.ndarray | jax.Array):
            raise EchoError(
                f"the speaker is a {type(speaker).__name__}; expected the path of a recording, or "
                "an array of audio or latents"
            )
        else:
            # Who gives latents has chosen their length.
            seconds = longest_reference(dit, codec) if speaker.ndim == 2 else None
            voices.append(speaker_latents(dit, codec, speaker, max_seconds=seconds))
    return voices


# --- Ends ---------------------------------------------------------------------------------------


def decode_in_silence(
    codec: DACVAE,
    latents: Float[np.ndarray, "t c"],
    message: Sequence[int] | np.ndarray | None = None,
    silence: Float[np.ndarray, " c"] | None = None,
) -> Float[np.ndarray, " samples"]:
    """`codec.decode` of `latents` as if silence stood before and behind them.

    A codec pads with zeros, which are no silence to it: it would begin and end with a click.
    """
    silence = silence_latent(codec) if silence is None else silence
    frames = decoder_context_frames(codec.config)
    around = np.tile(silence, (frames, 1))
    audio = codec.decode(np.concatenate([around, latents, around]), message)
    return np.asarray(audio)[frames * codec.config.hop :][: len(latents) * codec.config.hop]


def faded(audio: Float[np.ndarray, " samples"], sample_rate: int) -> np.ndarray:
    """`audio` with a raised cosine of 5 ms at both ends, so that it begins and ends at zero."""
    length = min(int(EDGE_SECONDS * sample_rate), len(audio) // 2)
    ramp = np.sin(np.linspace(0, np.pi / 2, length, endpoint=False, dtype=np.float32)) ** 2
    out = audio.copy()
    out[:length] *= ramp
    out[len(out) - length :] *= ramp[::-1]
    return out


def speech_end(latents: Float[np.ndarray, "t c"], silence: Float[np.ndarray, " c"]) -> int:
    """Frame from which on every window of 20 frames deviates less than 0.05 from silence."""
    deviation = np.mean(np.square(latents - silence[None]), axis=1)
    padded = np.concatenate([deviation, np.zeros(FLAT_FRAMES)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, FLAT_FRAMES).mean(axis=1)
    loud = np.flatnonzero(windows >= FLAT_DEVIATION**2)
    return min(int(loud[-1]) + 1, len(latents)) if len(loud) else 0


def _join(clips: list[tuple[np.ndarray, int]], fade: int) -> np.ndarray:
    """Clips, each up to its end, one after the other.

    The samples behind a clip's end fade out while the next clip fades in, so that nothing said is
    lost; where there are none behind it, the fade runs out of silence.
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


# --- Rows of a batch ----------------------------------------------------------------------------


_Place = tuple[int, ...]
"""An utterance's number, the piece's within it, and which half of the piece, and of that half."""


@dataclass(frozen=True)
class _Row:
    place: _Place
    text: str
    speaker: np.ndarray | None
    seed: int

    @property
    def utterance(self) -> int:
        return self.place[0]

    @property
    def ids(self) -> np.ndarray:
        return encode_text(self.text)


class _Counter:
    """Adds the steps of all batches up for one progress bar."""

    def __init__(self, progress: Progress | None, steps: int, batches: int):
        self.progress, self.steps, self.batches, self.done = progress, steps, batches, 0

    def next_batch(self) -> Progress | None:
        base, self.done = self.done, self.done + self.steps
        progress = self.progress
        if progress is None:
            return None
        return lambda step, _: progress(base + step, self.steps * self.batches)


def _pieces_of(
    utterance: Utterance, dit: EchoDiT, duration: float, normalise: bool, expand: bool
) -> list[str]:
    check_text(utterance.text)
    text = expand_english(utterance.text) if expand else utterance.text
    text = normalize_text(text) if normalise else text
    width = duration * CHARACTERS_PER_SECOND
    pieces = split_text(text, dit.config.max_text_bytes - 1, width)
    return [piece for piece in pieces if says_something(piece)]


def _halves(row: _Row, voice: np.ndarray, duration: float) -> list[_Row]:
    """A piece that filled its canvas as two smaller ones in the same voice.

    There are none if it cannot be cut, or is so short that the canvas must have been enough.
    """
    if speaking_width(row.text) < CROWDED * duration * CHARACTERS_PER_SECOND:
        return []
    halves = halve_text(row.text)
    if len(halves) == 1:
        return []
    return [_Row((*row.place, i), text, voice, row.seed) for i, text in enumerate(halves)]


def _warn_of_full_canvases(rows: list[_Row], duration: float) -> None:
    named = ", ".join(repr(row.text) for row in sorted(rows, key=lambda row: row.place)[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    _log.warning(
        "the speech of %s%s fills its canvas of %.2f s to the last frame, so its end may be "
        "missing; try another seed, a longer duration, or shorter sentences",
        named,
        more,
        duration,
    )


def _voice_of(latents: np.ndarray, silence: np.ndarray, dit: EchoDiT) -> np.ndarray:
    """Of what was spoken, as a reference for other pieces."""
    end = speech_end(latents, silence) or len(latents)
    return whole_patches(latents[: min(end, dit.config.max_speaker_frames)], dit)


def _blocks(num_frames: int, block_frames: int | None, patch_size: int) -> list[int]:
    """Sizes of the blocks of a canvas, whole patches; none without `block_frames`."""
    if block_frames is None:
        return []
    if block_frames < 1 or block_frames % patch_size or num_frames % patch_size:
        raise UsageError(
            f"blocks of {block_frames} frames on a canvas of {num_frames}; wanted multiples of "
            f"{patch_size}"
        )
    whole, rest = divmod(num_frames, block_frames)
    return [block_frames] * whole + [rest] * (rest > 0)


def _num_batches(rounds: list[list[_Row]], batch_size: int) -> int:
    return sum(1 for rows in rounds for _ in _batches(rows, batch_size))


def _row_class(row: _Row) -> tuple[int, int]:
    """Padded lengths of text and reference. Rows of one class share a program."""
    text = next((n for n in _TEXT_CLASSES if len(row.ids) <= n), -(-len(row.ids) // 256) * 256)
    speaker = 0 if row.speaker is None else -(-len(row.speaker) // FRAME_BUCKET) * FRAME_BUCKET
    return text, speaker


def _batches(rows: list[_Row], batch_size: int) -> Iterator[tuple[tuple[int, int], list[_Row]]]:
    classes = defaultdict(list)
    for row in rows:
        classes[_row_class(row)].append(row)
    for lengths, members in sorted(classes.items(), key=lambda item: item[0]):
        for start in range(0, len(members), batch_size):
            yield lengths, members[start : start + batch_size]


def _sample_rows(
    dit: EchoDiT,
    rows: list[_Row],
    num_frames: int,
    blocks: list[int],
    settings: SamplerSettings,
    batch_size: int,
    count: _Counter,
) -> dict[_Place, np.ndarray]:
    """Latents of every row, by its place."""
    out = {}
    for (text_length, speaker_length), members in _batches(rows, batch_size):
        # Batches have a power of two of rows; the last one is filled up with its first row.
        size = 1 << (len(members) - 1).bit_length()
        filled = members + members[:1] * (size - len(members))
        ids = _padded([row.ids for row in filled], text_length)
        speakers = mask = None
        if speaker_length:
            references = [row.speaker for row in filled if row.speaker is not None]
            speakers = jnp.asarray(_padded(references, speaker_length))
            mask = jnp.asarray(_mask(references, speaker_length))
        conditions = (
            jnp.asarray(ids),
            jnp.asarray(_mask([row.ids for row in filled], text_length)),
            speakers,
            mask,
        )
        noise = _noise(filled, num_frames, dit.config.latent_dim)
        progress = count.next_batch()
        if blocks:
            latents = sample_blockwise(
                dit,
                *conditions,
                block_sizes=blocks,
                noise=jnp.split(noise, np.cumsum(blocks)[:-1], axis=1),
                settings=settings,
                progress=progress,
            )
        else:
            latents = sample(dit, *conditions, noise=noise, settings=settings, progress=progress)
        latents = np.asarray(latents)
        if not np.isfinite(latents).all():
            raise EchoError(
                "the sampler ended in values that are not finite; wanted gentler settings "
                "(guidance scales, rescale_k, noise_scale) or other weights"
            )
        for row, latent in zip(members, latents, strict=False):
            out[row.place] = latent
    return out


def _noise(rows: list[_Row], num_frames: int, latent_dim: int) -> Array:
    """Unit normals for each row from its seed and its place in the text, whatever the batch."""
    keys = jnp.stack([reduce(jr.fold_in, row.place[1:], jr.key(row.seed)) for row in rows])
    return jax.vmap(lambda key: jr.normal(key, (num_frames, latent_dim)))(keys)


def _padded(arrays: list[np.ndarray], length: int) -> np.ndarray:
    out = np.zeros((len(arrays), length, *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out


def _mask(arrays: list[np.ndarray], length: int) -> np.ndarray:
    return np.arange(length)[None] < np.array([[len(array)] for array in arrays])
