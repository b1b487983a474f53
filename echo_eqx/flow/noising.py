"""The flow-matching objective: times, noise, and the squared error of the velocity.

A latent x_0 and unit noise n are joined by the straight line `x_t = (1 - t) x_0 + t n`, whose
velocity is `n - x_0` (Lipman et al., 2023, arXiv:2210.02747).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from echo_eqx.model.dit import EchoDiT


class Batch(eqx.Module):
    """Training examples. Where a mask is false, text or reference is not seen."""

    latents: Float[Array, "b t c"]
    frame_mask: Bool[Array, "b t"]
    """Frames of the recording; behind them `latents` hold encoded silence."""
    text_ids: Int[Array, "b s"]
    text_mask: Bool[Array, "b s"]
    speaker_latents: Float[Array, "b r c"]
    speaker_mask: Bool[Array, "b r"]


class Draws(eqx.Module):
    """All that is random in a step."""

    t: Float[Array, " b"]
    noise: Float[Array, "b t c"]
    text_kept: Bool[Array, " b"]
    speaker_kept: Bool[Array, " b"]


def stratified_times(
    offset: Float[Array, ""],
    shift: Int[Array, ""],
    index: Int[Array, " b"],
    batch_size: int,
    mean: float = 0.0,
) -> Float[Array, " b"]:
    """`t_i = sigmoid(mean + Phi^-1(((i + shift) mod B + offset) / B))`: one in each of B strata.

    The times are logit-normal (Esser et al., 2024, arXiv:2403.03206). `index` are rows of the
    global batch of `batch_size`; the shift deals the strata out anew in each step, so that a part
    of the batch does not always get the same ones.
    """
    strata = ((index + shift) % batch_size).astype(jnp.float32)
    return jax.nn.sigmoid(mean + jax.scipy.stats.norm.ppf((strata + offset) / batch_size))


def draw(
    key: PRNGKeyArray,
    index: Int[Array, " b"],
    batch_size: int,
    shape: tuple[int, int],
    *,
    text_dropout: float,
    speaker_dropout: float,
    time_mean: float = 0.0,
) -> Draws:
    """What rows `index` of a global batch draw, each from its row's own key.

    So a row gets the same however the batch lies on devices. `shape` is (t, c).
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

    noise, text_kept, speaker_kept = jax.vmap(row)(index)
    times = stratified_times(offset, shift, index, batch_size, time_mean)
    return Draws(times, noise, text_kept, speaker_kept)


def squared_errors(dit: EchoDiT, batch: Batch, draws: Draws) -> Float[Array, "b t"]:
    """`|v(x_t, t) - (n - x_0)|^2`, the mean over channels, for each frame."""
    t = draws.t[:, None, None]
    noisy = (1.0 - t) * batch.latents + t * draws.noise
    velocity = jax.vmap(dit)(
        noisy,
        draws.t,
        batch.text_ids,
        batch.text_mask & draws.text_kept[:, None],
        batch.speaker_latents,
        batch.speaker_mask & draws.speaker_kept[:, None],
    )
    return jnp.mean(jnp.square(velocity - (draws.noise - batch.latents)), axis=-1)


def flow_loss(
    dit: EchoDiT, batch: Batch, draws: Draws, *, valid_frames_only: bool = False
) -> Float[Array, ""]:
    """Mean squared error over all frames, or only over those of the recordings."""
    errors = squared_errors(dit, batch, draws)
    weight = frame_weight(batch, valid_frames_only)
    return jnp.sum(errors * weight) / jnp.sum(weight)


def frame_weight(batch: Batch, valid_frames_only: bool) -> Float[Array, "b t"]:
    weight = batch.frame_mask if valid_frames_only else jnp.ones_like(batch.frame_mask)
    return weight.astype(jnp.float32)
