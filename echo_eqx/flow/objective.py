"""The flow-matching objective: timesteps, noise, and the squared error of the velocity.

A latent x_0 and unit noise n are joined by the straight line `x_t = (1 - t) x_0 + t n`, whose
velocity is `n - x_0` (Lipman et al., 2023, arXiv:2210.02747).
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from echo_eqx.model.blocks import Remat
from echo_eqx.model.dit import Block, EchoDiT


class Batch(eqx.Module):
    """Training examples. Masked text and reference positions are not attended to."""

    latents: Float[Array, "b t c"]
    frame_mask: Bool[Array, "b t"]
    """True for frames of the recording; the latents after them are encoded silence."""
    text_ids: Int[Array, "b s"]
    text_mask: Bool[Array, "b s"]
    speaker_latents: Float[Array, "b r c"]
    speaker_mask: Bool[Array, "b r"]


class NoiseSample(eqx.Module):
    """Everything random in a training step."""

    t: Float[Array, " b"]
    noise: Float[Array, "b t c"]
    keep_text: Bool[Array, " b"]
    keep_speaker: Bool[Array, " b"]


class Bounds(eqx.Module):
    """The block that each row trains: frames `start` to `end`, as in `Block`."""

    start: Int[Array, " b"]
    end: Int[Array, " b"]


def sample_timesteps(
    offset: Float[Array, ""],
    shift: Int[Array, ""],
    index: Int[Array, " b"],
    batch_size: int,
    logit_mean: float = 0.0,
) -> Float[Array, " b"]:
    """Stratified logit-normal timesteps (Esser et al., 2024, arXiv:2403.03206), one per stratum.

    `t_i = sigmoid(logit_mean + Phi^-1(((i + shift) mod B + offset) / B))`, where `index` are rows
    of the global batch of `B = batch_size`. A new `shift` in each step assigns the strata to other
    rows, so that no part of the batch always gets the same ones.
    """
    strata = ((index + shift) % batch_size).astype(jnp.float32)
    return jax.nn.sigmoid(logit_mean + jax.scipy.stats.norm.ppf((strata + offset) / batch_size))


def sample_noise(
    key: PRNGKeyArray,
    index: Int[Array, " b"],
    batch_size: int,
    shape: tuple[int, int],
    *,
    text_dropout: float,
    speaker_dropout: float,
    timestep_logit_mean: float = 0.0,
) -> NoiseSample:
    """Timesteps, noise of `shape` (t, c) and dropout for rows `index` of a global batch.

    Each row has its own key, so the sample does not depend on how the batch is sharded.
    """
    key_offset, key_shift, key_rows = jr.split(key, 3)
    offset = jr.uniform(key_offset)
    shift = jr.randint(key_shift, (), 0, batch_size)

    def row(i: Int[Array, ""]) -> tuple[Array, Array, Array]:
        key_noise, key_text, key_speaker = jr.split(jr.fold_in(key_rows, i), 3)
        return (
            jr.normal(key_noise, shape),
            jr.bernoulli(key_text, 1.0 - text_dropout),
            jr.bernoulli(key_speaker, 1.0 - speaker_dropout),
        )

    noise, keep_text, keep_speaker = jax.vmap(row)(index)
    t = sample_timesteps(offset, shift, index, batch_size, timestep_logit_mean)
    return NoiseSample(t, noise, keep_text, keep_speaker)


_BOUNDS = 2**31
"""Folded into the step's key. `sample_noise` splits that key, which amounts to small numbers."""


def sample_bounds(
    key: PRNGKeyArray,
    index: Int[Array, " b"],
    num_frames: int,
    patch_size: int,
    *,
    prefix_probability: float,
    cut_probability: float,
) -> Bounds:
    """Blocks for rows `index` of a global batch, on a canvas of `num_frames`, in whole patches.

    With `prefix_probability` a block starts at any patch but the first, otherwise at frame 0. With
    `cut_probability` it ends behind any patch after that, otherwise with the canvas. `key` is the
    one of `sample_noise`; the blocks do not depend on how the batch is sharded.
    """
    num_patches = -(-num_frames // patch_size)
    key = jr.fold_in(key, _BOUNDS)

    def row(i: Int[Array, ""]) -> tuple[Array, Array]:
        keys = jr.split(jr.fold_in(key, i), 4)
        later = jr.randint(keys[0], (), 1, num_patches)
        start = jnp.where(jr.bernoulli(keys[1], prefix_probability), later, 0)
        earlier = jr.randint(keys[2], (), start + 1, num_patches + 1)
        end = jnp.where(jr.bernoulli(keys[3], cut_probability), earlier, num_patches)
        return start * patch_size, jnp.minimum(end * patch_size, num_frames)

    return Bounds(*jax.vmap(row)(index))


def squared_errors(
    dit: EchoDiT,
    batch: Batch,
    sample: NoiseSample,
    remat: Remat = "full",
    bounds: Bounds | None = None,
) -> Float[Array, "b t"]:
    """`|v(x_t, t) - (n - x_0)|^2` for each frame, averaged over channels.

    With `bounds`, only the frames inside them mean anything: they follow the clean latents of the
    frames before.
    """
    block = None if bounds is None else Block(batch.latents, bounds.start, bounds.end)
    t = sample.t[:, None, None]
    noisy = (1.0 - t) * batch.latents + t * sample.noise
    velocity = jax.vmap(functools.partial(dit, remat=remat))(
        noisy,
        sample.t,
        batch.text_ids,
        batch.text_mask & sample.keep_text[:, None],
        batch.speaker_latents,
        batch.speaker_mask & sample.keep_speaker[:, None],
        block=block,
    )
    return jnp.mean(jnp.square(velocity - (sample.noise - batch.latents)), axis=-1)


def frame_weight(
    batch: Batch, valid_frames_only: bool, bounds: Bounds | None = None
) -> Float[Array, "b t"]:
    """1 for frames that count in the loss: those inside `bounds`, and of recordings if asked."""
    weight = batch.frame_mask if valid_frames_only else jnp.ones_like(batch.frame_mask)
    if bounds is not None:
        frames = jnp.arange(weight.shape[1])[None]
        weight &= (frames >= bounds.start[:, None]) & (frames < bounds.end[:, None])
    return weight.astype(jnp.float32)
