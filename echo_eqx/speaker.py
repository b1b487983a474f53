"""A reference voice as the latents a model is given."""

from pathlib import Path

import numpy as np
from jaxtyping import Array, Float

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.data.reference import load_reference, set_loudness, speech_of
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.flow.sampler import FRAME_BUCKET
from echo_eqx.generation import GenerationConfig
from echo_eqx.model.dit import EchoDiT

Speaker = str | Path | Float[np.ndarray | Array, "..."]
"""A recording's path, a path `*.npy` or array (r, c) of latents, or audio (samples,) at the codec's
rate."""

MAX_SPEAKER_SECONDS = 120.0
CODEC_TOLERANCE = 0.05
"""RMS difference of two latents of silence above which they are of two codecs. Rounding weights to
bfloat16 changes them by less; latents have a standard deviation of about 1."""


def speaker_latents(
    dit: EchoDiT,
    codec: DACVAE,
    speaker: Speaker,
    *,
    max_seconds: float | None = None,
    lufs: float | None = None,
) -> Float[np.ndarray, "r c"]:
    """Latents of a reference, as many whole patches as it has.

    Of a recording the speech is taken, without silence or steady noise in front, without a constant
    offset, and at the loudness that the model knows. Latents are taken as they are.

    **Arguments**: `speaker` as in `synthesize`; `max_seconds` of speech that are used, by default
    what the model was trained with; `lufs` an integrated loudness to bring a recording to, by
    default `dit.generation.reference_lufs`.

    **Raises**: `EchoError` naming the recording if it is unreadable, too short, silent or clipped,
    or latents of another width or with values that are not finite.
    """
    rate, hop = codec.config.sample_rate, codec.config.hop
    trained = dit.config.max_speaker_frames / codec.config.frame_rate
    max_seconds = trained if max_seconds is None else max_seconds
    if lufs is not None and not -70 <= lufs <= 0:
        raise UsageError(f"the reference's loudness is {lufs} LUFS; expected -70 to 0")
    longest = longest_reference(dit, codec)
    if not 0 < max_seconds <= longest:
        raise UsageError(f"{max_seconds} s of reference; expected up to {longest:.0f} s")
    max_frames = int(max_seconds * codec.config.frame_rate + 1e-6)
    name = str(speaker) if isinstance(speaker, str | Path) else "the reference"
    is_clean = False
    if isinstance(speaker, str | Path):
        speaker = (
            _load_latents(Path(speaker))
            if Path(speaker).suffix == ".npy"
            else load_reference(speaker, rate, max_seconds)
        )
        is_clean = speaker.ndim == 1
    array = np.asarray(speaker if speaker.ndim == 1 else speaker[:max_frames], np.float32)
    if not np.isfinite(array).all():
        raise EchoError(f"{name} has values that are not finite")
    if array.ndim == 1:
        speech = array if is_clean else speech_of(array, rate, name)
        speech = speech[: max_frames * hop]
        # Loudness is measured above -70 LUFS only, and nothing said of a level before.
        speech = speech * (0.5 / float(np.abs(speech).max()))
        level = dit.generation.reference_lufs if lufs is None else lufs
        latents = encode_padded(codec, set_loudness(speech, rate, level))
    elif array.ndim == 2 and array.shape[1] == dit.config.latent_dim:
        latents = array
    else:
        raise EchoError(
            f"{name} has shape {array.shape}; expected audio (samples,) or latents "
            f"(frames, {dit.config.latent_dim})"
        )
    patch = dit.config.patch_size
    if len(latents) < patch:
        raise EchoError(f"{name} has {len(latents)} frames; expected {patch} or more")
    return whole_patches(latents, dit)


def longest_reference(dit: EchoDiT, codec: DACVAE) -> float:
    """Seconds of reference that a model can be given."""
    return max(MAX_SPEAKER_SECONDS, dit.config.max_speaker_frames / codec.config.frame_rate)


def encode_padded(codec: DACVAE, audio: Float[np.ndarray, " samples"]) -> np.ndarray:
    """Mean latents of the whole frames in `audio`, with silence behind it up to a few lengths."""
    hop = codec.config.hop
    frames = len(audio) // hop
    samples = -(-max(frames, 1) // FRAME_BUCKET) * FRAME_BUCKET * hop
    padded = np.zeros(samples, np.float32)
    padded[: frames * hop] = audio[: frames * hop]
    mean, _ = codec.encode(padded)
    return np.asarray(mean[:frames], np.float32)


def _load_latents(path: Path) -> np.ndarray:
    try:
        # Mapped, so that a header that claims more than the file holds takes no memory.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise EchoError(f"{path} does not exist; wanted reference latents") from None
    except Exception as error:  # a damaged header fails in many ways within NumPy
        raise EchoError(f"{path} is no readable array ({type(error).__name__})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f":
        raise EchoError(f"{path} holds no latents; wanted floats of shape (frames, channels)")
    return array


def whole_patches(latents: np.ndarray, dit: EchoDiT) -> np.ndarray:
    patch = dit.config.patch_size
    whole = latents[: len(latents) // patch * patch]
    return whole if len(whole) else np.pad(latents, ((0, patch - len(latents)), (0, 0)))


def silence_latent(codec: DACVAE) -> Float[np.ndarray, " c"]:
    """The latent of digital silence, from the middle of a stretch of it."""
    frames = 32
    mean, _ = codec.encode(np.zeros(frames * codec.config.hop, np.float32))
    return np.asarray(mean[frames // 2], np.float32)


def codec_problem(generation: GenerationConfig, silence: Float[np.ndarray, " c"]) -> str | None:
    """What shows that a model was trained on latents of another codec, None if nothing does.

    **Arguments**: `generation` of the model; `silence` the `silence_latent` of the codec.
    """
    expected = generation.codec_silence
    if expected is None or len(expected) != len(silence):
        return None
    difference = silence - np.asarray(expected, np.float32)
    distance = float(np.sqrt(np.mean(np.square(difference))))
    if distance < CODEC_TOLERANCE:
        return None
    return (
        f"expected the codec that the model's data were made with, got another: its latents of "
        f"silence differ by {distance:.2f} (RMS); speech may be noise, see --codec"
    )


def nearest_voice(dit: EchoDiT, latents: Float[np.ndarray, "r c"]) -> tuple[str, float] | None:
    """Name of the voice the model knows that is nearest to a reference, and how far that is.

    At a distance above 1 the reference is further away than any recording of the known voice. None
    if the model takes any voice. It is the Mahalanobis distance of mean latents.

    **Arguments**: `latents` from `speaker_latents`.
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
