"""Whether a codec fits a model, and which codec a model needs."""

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Float

from echo_eqx.codec.codec import Codec
from echo_eqx.config import DIT_PRESETS
from echo_eqx.errors import EchoError
from echo_eqx.generation import ECHO_TTS_CHANNELS, GenerationConfig
from echo_eqx.model.dit import EchoDiT
from echo_eqx.trees import named_leaves
from echo_eqx.weights.find import find_weights
from echo_eqx.weights.fish import PUBLISHED_FISH

PUBLISHED_CODECS = {128: "facebook/dacvae-watermarked", ECHO_TTS_CHANNELS: PUBLISHED_FISH}
"""Codecs of published models by the channels of their latents."""
TOLERANCE = 0.05
"""Largest RMS difference between silence latents that still counts as the same codec. Rounding
weights to bfloat16 changes them by less; latents have a standard deviation of about 1."""


def silence_latent(codec: Codec) -> Float[np.ndarray, " c"]:
    """The latent of digital silence, away from the edges of the signal."""
    before, after = codec.encoder_context
    mean, _ = codec.encode(np.zeros((before + 1 + after) * codec.config.hop, np.float32))
    return np.asarray(mean, np.float32)[before]


def codec_identity(codec: Codec) -> str:
    """SHA-256 of what makes the latents: the same for the same codec in any file format."""
    digest = hashlib.sha256()
    for name, leaf in sorted(named_leaves(codec.encoding_parts).items()):
        digest.update(name.encode() + np.asarray(leaf, np.float32).tobytes())
    return digest.hexdigest()


def silence_latents(
    dit: EchoDiT, codec: Codec
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, " c"] | None]:
    """What the model generates after the speech, silence or zeros; and what to decode around
    latents: silence, or None if neither the model nor the codec has a use for it."""
    zeros = np.zeros(codec.config.latent_dim, np.float32)
    has_zeros = dit.generation.padding == "zeros"
    silence = None if has_zeros and not codec.decoder_padding else silence_latent(codec)
    return (zeros if has_zeros or silence is None else silence), silence


def check_latent_dim(dit: EchoDiT, codec: Codec) -> None:
    """**Raises**: `EchoError` if the codec cannot decode what the model generates."""
    if dit.config.latent_dim != codec.config.latent_dim:
        raise EchoError(
            f"codec: expected {dit.config.latent_dim} latent channels, as in this checkpoint, "
            f"got {codec.config.latent_dim}; use the codec that the model was trained with"
        )


def codec_mismatch(generation: GenerationConfig, silence: Float[np.ndarray, " c"]) -> str | None:
    """A warning if a model was trained on latents of another codec, None if there is no sign of it.

    **Arguments**: `generation` of the model; `silence` the `silence_latent` of the codec.
    """
    expected = generation.codec_silence
    if expected is None or len(expected) != len(silence):
        return None
    difference = silence - np.asarray(expected, np.float32)
    rms = float(np.sqrt(np.mean(np.square(difference))))
    if rms < TOLERANCE:
        return None
    return (
        "expected the codec that the model's training data was encoded with, got another one: its "
        f"silence latent differs by {rms:.2f} RMS; the speech may be noise, see --codec"
    )


def find_codec(
    dit: EchoDiT, codec: str | None = None, checkpoint: str | None = None
) -> tuple[str, Path]:
    """Name and file of the codec for a model: `codec`, or else the one that `checkpoint` holds
    beside the model, or else the one its checkpoint names, or else the published one for latents of
    this width.

    **Raises**: `EchoError` if there is none, or it cannot be found.
    """
    if codec is not None:
        return codec, find_weights(codec, "codec")
    if checkpoint is not None:
        beside = find_weights(checkpoint, "codec")
        if beside != find_weights(checkpoint, "dit"):
            return checkpoint, beside
    width, named = dit.config.latent_dim, dit.generation.codec
    name = named or PUBLISHED_CODECS.get(width)
    if name is None:
        known = ", such as --codec voice" if width == DIT_PRESETS["voice"].latent_dim else ""
        raise EchoError(
            f"the checkpoint names no codec, and its latents have {width} channels; give --codec "
            f"with the codec it was trained with{known}"
        )
    try:
        return name, find_weights(name, "codec")
    except EchoError as error:
        origin = "named by the checkpoint" if named else "of the published models"
        raise EchoError(f"the codec {origin}: {error}; or give --codec FILE") from None
