"""Keys and values of texts and references for the sampler, computed once per utterance or voice."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from echo_eqx.errors import UsageError
from echo_eqx.model.dit import ConditionCache, EchoDiT, SpeakerCache
from echo_eqx.model.joint_attention import KVCache


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


def stack_speakers(speakers: Sequence[SpeakerCache]) -> SpeakerCache:
    """A batch of references, one per row, for `sample`. All must have the same number of frames."""
    return jax.tree.map(lambda *rows: jnp.stack(rows), *speakers)


def encode_conditions(
    dit: EchoDiT,
    text_ids: Int[Array | np.ndarray, "b s"],
    text_mask: Bool[Array | np.ndarray, "b s"],
    speaker: Float[Array | np.ndarray, "b r c"] | SpeakerCache | None,
    speaker_mask: Bool[Array | np.ndarray, "b r"] | None,
) -> ConditionCache:
    """Keys and values of a batch. A `SpeakerCache`, by `stack_speakers`, has its own mask.

    **Raises**: `UsageError` if shapes do not match.
    """
    batch, patch = text_ids.shape[0], dit.config.patch_size
    if isinstance(speaker, SpeakerCache):
        rows = speaker.mask.shape[0] if speaker.mask.ndim == 2 else 0
        if rows != batch or speaker_mask is not None:
            raise UsageError(
                f"speaker: expected {batch} stacked references, and no speaker_mask, got {rows}"
            )
        text, mask = _encode_text(dit, jnp.asarray(text_ids), jnp.asarray(text_mask))
        return ConditionCache(text, mask, speaker.keys_values, speaker.mask)
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
def _encode_text(dit: EchoDiT, ids: Array, mask: Array) -> tuple[KVCache, Array]:
    return jax.vmap(dit.encode_text)(ids, mask)


@eqx.filter_jit
def _encode_speaker(dit: EchoDiT, latents: Array, mask: Array) -> SpeakerCache:
    return dit.encode_speaker(latents, mask)
