"""Keys and values of texts and references for the sampler, computed once per utterance or voice."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from echo_eqx.errors import UsageError
from echo_eqx.model.dit import ConditionCache, EchoDiT, SpeakerCache


def encode_speaker(
    dit: EchoDiT, latents: Float[Array | np.ndarray, "r c"], frames: int
) -> SpeakerCache:
    """Keys and values of a reference, on the device: compute them once per voice.

    `latents` (r, c) are padded to `frames`, a multiple of `config.patch_size`, and the padding is
    masked. Voices of the same `frames` share a compiled program and can be stacked in a batch, also
    with no reference at all (r = 0).

    **Raises**: `UsageError` if `latents` are longer or have another number of channels.
    """
    patch, channels = dit.config.patch_size, dit.config.latent_dim
    is_latents = latents.shape[1] == channels and len(latents) <= frames
    if not is_latents or frames % patch:
        raise UsageError(
            f"reference: expected at most {frames} frames of {channels} channels, padded to a "
            f"multiple of {patch} frames, got shape {latents.shape} and {frames} frames"
        )
    padded = np.zeros((frames, channels), np.float32)
    padded[: len(latents)] = latents
    return _encode_speaker(dit, jnp.asarray(padded), jnp.asarray(np.arange(frames) < len(latents)))


def encode_conditions(
    dit: EchoDiT,
    text_ids: Int[Array | np.ndarray, "b s"],
    text_mask: Bool[Array | np.ndarray, "b s"],
    speaker: Float[Array | np.ndarray, "b r c"] | None,
    speaker_mask: Bool[Array | np.ndarray, "b r"] | None,
) -> ConditionCache:
    """Keys and values of a batch.

    **Raises**: `UsageError` if shapes do not match.
    """
    batch, patch = text_ids.shape[0], dit.config.patch_size
    if (speaker is None) != (speaker_mask is None):
        raise UsageError("expected both speaker_latents and speaker_mask or neither, got one")
    if speaker is None:
        speaker = jnp.zeros((batch, patch, dit.config.latent_dim))
        speaker_mask = jnp.zeros((batch, patch), bool)
    shape = (batch, speaker.shape[1], dit.config.latent_dim)
    if speaker.shape != shape or shape[1] % patch or shape[1] == 0:
        raise UsageError(
            f"speaker_latents: expected shape ({batch}, frames, {dit.config.latent_dim}), frames a "
            f"multiple of {patch}, got {speaker.shape}"
        )
    inputs = (text_ids, text_mask, speaker, speaker_mask)
    return _encode_conditions(dit, *map(jnp.asarray, inputs))


@eqx.filter_jit
def _encode_conditions(dit: EchoDiT, *inputs: Array) -> ConditionCache:
    return jax.vmap(dit.encode_conditions)(*inputs)


@eqx.filter_jit
def _encode_speaker(dit: EchoDiT, latents: Array, mask: Array) -> SpeakerCache:
    return dit.encode_speaker(latents, mask)
