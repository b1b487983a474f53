"""Reference voices: from a recording to the latents a model takes."""

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float

from echo_eqx.codec.codec import Codec
from echo_eqx.data.reference import extract_speech, load_reference, set_loudness
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.flow.sampler import FRAME_BUCKET
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.batching import round_up
from echo_eqx.speech.voices import MAX_SECONDS, SUFFIX, check_codec, load_voice

_WINDOW = 2 * FRAME_BUCKET
"""Frames that one window of a long reference yields."""

Speaker = str | Path | Float[np.ndarray | Array, "..."]
"""Path of a recording, of a voice (`*.safetensors`) or of latents (`*.npy`); or an array: latents
(r, c), or audio (samples,) at the sample rate of the codec."""


LEVEL_TOLERANCE = 1.0
"""Largest difference in LU between a voice's level and the model's that is not mentioned."""
_log = logging.getLogger("echo_eqx.speech")


def speaker_latents(
    dit: EchoDiT,
    codec: Codec,
    speaker: Speaker,
    *,
    max_seconds: float | None = None,
    lufs: float | None = None,
) -> Float[np.ndarray, "r c"]:
    """Latents (r, c) of a reference voice, cropped to whole patches.

    Only the speech of a recording is used: silence, steady noise and DC offset are removed, and the
    loudness is set to that of the training data. Latents are used as they are.

    **Arguments**:
    - `speaker`: as in `synthesize`.
    - `max_seconds`: seconds of speech to use, by default the longest seen in training.
    - `lufs`: integrated loudness to normalize a recording to, by default
      `dit.generation.reference_lufs`, where None keeps the level as recorded.

    **Raises**: `EchoError` naming the reference if it is unreadable, too short, silent, clipped,
    not finite, has the wrong shape, or is a voice of another codec; `UsageError` if `max_seconds`
    or `lufs` is out of range, or `lufs` is given for a voice.
    """
    rate, hop = codec.config.sample_rate, codec.config.hop
    trained = dit.config.max_speaker_frames / codec.config.frame_rate
    max_seconds = trained if max_seconds is None else max_seconds
    if lufs is not None and not -70 <= lufs <= 0:
        raise UsageError(f"loudness of the reference: expected -70 to 0 LUFS, got {lufs}")
    longest = longest_reference(dit, codec)
    if not 0 < max_seconds <= longest:
        raise UsageError(
            f"length of the reference: expected more than 0 and at most {longest:.0f} s, got "
            f"{max_seconds} s"
        )
    max_frames = int(max_seconds * codec.config.frame_rate + 1e-6)
    name = str(speaker) if isinstance(speaker, str | Path) else "the reference"
    is_clean = False
    if isinstance(speaker, str | Path):
        path = Path(speaker)
        if path.suffix == SUFFIX:
            speaker = _voice_latents(path, dit, codec, lufs)
        elif path.suffix == ".npy":
            speaker = _load_latents(path)
        else:
            speaker = load_reference(path, rate, max_seconds)
        is_clean = speaker.ndim == 1
    array = np.asarray(speaker if speaker.ndim == 1 else speaker[:max_frames], np.float32)
    if not np.isfinite(array).all():
        raise EchoError(f"{name}: expected finite values, got NaN or infinity")
    if array.ndim == 1:
        speech = array if is_clean else extract_speech(array, rate, name)
        speech = speech[: max_frames * hop]
        level = dit.generation.reference_lufs if lufs is None else lufs
        latents = encode_speech(codec, speech, level)
    elif array.ndim == 2 and array.shape[1] == dit.config.latent_dim:
        latents = array
    else:
        raise EchoError(
            f"{name}: expected audio (samples,) or latents (frames, {dit.config.latent_dim}), got "
            f"shape {array.shape}"
        )
    patch = dit.config.patch_size
    if len(latents) < patch:
        raise EchoError(f"{name}: expected at least {patch} frames, got {len(latents)}")
    return trim_to_patches(latents, dit)


def read_speakers(
    dit: EchoDiT, codec: Codec, speakers: Sequence[Speaker | None]
) -> list[np.ndarray | None]:
    """`speaker_latents` of each speaker. A recording that is named several times is read once."""
    by_path: dict[str, np.ndarray] = {}
    latents: list[np.ndarray | None] = []
    for speaker in speakers:
        if isinstance(speaker, str | Path):
            if str(speaker) not in by_path:
                by_path[str(speaker)] = speaker_latents(dit, codec, speaker)
            latents.append(by_path[str(speaker)])
        elif speaker is None:
            latents.append(None)
        elif not isinstance(speaker, np.ndarray | jax.Array):
            raise EchoError(
                "speaker: expected the path of a recording, or an array of audio or latents, got "
                f"{type(speaker).__name__}"
            )
        else:
            # Latents have the length that the caller chose.
            seconds = longest_reference(dit, codec) if speaker.ndim == 2 else None
            latents.append(speaker_latents(dit, codec, speaker, max_seconds=seconds))
    return latents


def longest_reference(dit: EchoDiT, codec: Codec) -> float:
    """The longest reference that a model takes, in seconds."""
    return max(MAX_SECONDS, dit.config.max_speaker_frames / codec.config.frame_rate)


def encode_speech(
    codec: Codec, speech: Float[np.ndarray, " samples"], lufs: float | None
) -> np.ndarray:
    """Mean latents (r, c) of speech at an integrated loudness of `lufs`, None for as recorded."""
    peak = float(np.abs(speech).max())
    if lufs is None:
        return encode_padded(codec, speech / max(peak, 1.0))
    # The loudness meter ignores everything below -70 LUFS, so quiet speech is scaled first.
    return encode_padded(codec, set_loudness(speech * (0.5 / peak), codec.config.sample_rate, lufs))


def encode_padded(codec: Codec, audio: Float[np.ndarray, " samples"]) -> np.ndarray:
    """Mean latents of the whole frames in `audio`, padded with zeros to a multiple of
    `FRAME_BUCKET`. Long audio is encoded in windows, so that few lengths are ever compiled."""
    hop, (before, after) = codec.config.hop, codec.encoder_context
    frames = len(audio) // hop
    total, window = round_up(max(frames, 1), FRAME_BUCKET), _WINDOW + before + after
    padded = np.zeros(max(total, window if total > _WINDOW else 0) * hop, np.float32)
    padded[: frames * hop] = audio[: frames * hop]
    if total <= _WINDOW:
        return np.asarray(codec.encode(padded)[0], np.float32)[:frames]
    latents = []
    for first in range(0, frames, _WINDOW):
        start = min(max(first - before, 0), len(padded) // hop - window)
        mean, _ = codec.encode(padded[start * hop : (start + window) * hop])
        latents.append(np.asarray(mean, np.float32)[first - start :][:_WINDOW])
    return np.concatenate(latents)[:frames]


def _voice_latents(path: Path, dit: EchoDiT, codec: Codec, lufs: float | None) -> np.ndarray:
    voice = load_voice(path)
    check_codec(voice, codec)
    level, recommended = voice.info.lufs, dit.generation.reference_lufs
    if level is not None and recommended is not None and abs(level - recommended) > LEVEL_TOLERANCE:
        _log.warning(
            "voice %s has a level of %g LUFS, but the model was trained on references of %g; make "
            "it again with --checkpoint or --speaker_lufs",
            voice.name,
            level,
            recommended,
        )
    if lufs is not None and lufs != voice.info.lufs:
        raise UsageError(
            f"{path}: expected no loudness for a voice, whose level was set to {voice.info.lufs} "
            f"LUFS when it was made; got {lufs}"
        )
    return voice.latents


def _load_latents(path: Path) -> np.ndarray:
    try:
        # Memory-mapped, so that a header that claims too large a shape allocates nothing.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise EchoError(f"{path} does not exist; expected a file of reference latents") from None
    except Exception as error:  # NumPy raises many kinds of errors for a damaged header
        raise EchoError(f"{path}: not a readable .npy file ({type(error).__name__})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise EchoError(f"{path}: expected latents, floats of shape (frames, channels)")
    return array


def trim_to_patches(latents: np.ndarray, dit: EchoDiT) -> np.ndarray:
    """Latents cropped to whole patches, or padded to one patch if there are fewer frames."""
    patch = dit.config.patch_size
    whole = latents[: len(latents) // patch * patch]
    return whole if len(whole) else np.pad(latents, ((0, patch - len(latents)), (0, 0)))


def nearest_voice(dit: EchoDiT, latents: Float[np.ndarray, "r c"]) -> tuple[str, float] | None:
    """Name of the voice in the model's training data nearest to a reference, and its distance.

    None if the model takes any voice.

    The Mahalanobis distance between mean latents is divided by the distance of the voice's own
    farthest recording, so above 1 the reference is another voice.

    **Arguments**: `latents` (r, c), from `speaker_latents`.
    """
    known, whitening = dit.generation.voices, np.asarray(dit.generation.voice_whitening)
    if not known or whitening.shape[0] != latents.shape[1]:
        return None
    mean = np.mean(latents, axis=0)
    distances = {
        voice.name: float(np.sqrt(np.mean(np.square((mean - voice.mean) @ whitening))))
        / voice.radius
        for voice in known
    }
    return min(distances.items(), key=lambda item: item[1])


def describe_reference(dit: EchoDiT, codec: Codec, latents: Float[np.ndarray, "r c"]) -> str:
    """A sentence about the length of a reference and the voice it resembles."""
    used = f"{len(latents) / codec.config.frame_rate:.2f} s of speech"
    nearest = nearest_voice(dit, latents)
    if nearest is None:
        return used
    name, distance = nearest
    if distance <= 1:
        return f"{used}, sounds like {name} (distance {distance:.2f})"
    names = ", ".join(voice.name for voice in dit.generation.voices)
    return (
        f"{used}, unlike the voices this model knows ({names}); expect the nearest, {name} "
        f"(distance {distance:.2f}; a known voice stays below 1)"
    )
