"""One step of codec training: state, losses and updates."""

import math
from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig
from echo_eqx.sharding.mesh import batch_sharding, replicated
from echo_eqx.train.codec.config import CodecTrainConfig
from echo_eqx.train.codec.discriminators import Critic, critic_loss, decoder_losses
from echo_eqx.train.codec.losses import divergence, periodicity_distance, spectral_distances
from echo_eqx.train.metrics import StepMetrics
from echo_eqx.train.optimizer import adam, adamw_update, learning_rate, update_ema


class CodecState(eqx.Module):
    """Everything that a step changes; `critic` and its moments only where one is trained along."""

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    """Updates skipped since the beginning."""
    model: DACVAE
    adam: optax.ScaleByAdamState
    ema: DACVAE | None
    critic: Critic | None
    critic_adam: optax.ScaleByAdamState | None


class AudioBatch(eqx.Module):
    """Crops of recordings."""

    audio: Float[Array, "b samples"]


class Decoded(NamedTuple):
    """What goes through the codec and comes out of it."""

    audio: Float[Array, "*b samples"]
    mean: Float[Array, "*b t c"]
    deviation: Float[Array, "*b t c"]


def init_train_state(model: DACVAE, config: CodecTrainConfig, key: PRNGKeyArray) -> CodecState:
    """The state before the first step from `model`."""
    zero = jnp.zeros((), jnp.int32)
    critic = Critic.init(key=key) if config.loss.adversarial else None
    init: Any = adam(config.optimizer).init
    return CodecState(
        step=zero,
        skipped=zero,
        model=model,
        adam=init(model),
        ema=jax.tree.map(jnp.copy, model) if config.optimizer.ema_decay > 0 else None,
        critic=critic,
        critic_adam=None if critic is None else init(critic),
    )


def abstract_state(sizes: CodecConfig, config: CodecTrainConfig, mesh: Mesh) -> CodecState:
    """Shapes of a state. A codec is small: every device has all of it."""
    key = jr.key(0)
    state = jax.eval_shape(lambda: init_train_state(DACVAE.init(sizes, key=key), config, key))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), state
    )


def pass_through(
    codec: DACVAE, audio: Float[Array, " samples"], key: PRNGKeyArray | None, freeze_encoder: bool
) -> Decoded:
    """Encode, draw latents around their mean (without a `key` take the mean), and decode."""
    mean, deviation = codec.bottleneck.moments(codec.encoder(audio))
    if freeze_encoder:
        mean, deviation = jax.lax.stop_gradient((mean, deviation))
    latents = mean if key is None else mean + deviation * jr.normal(key, mean.shape)
    return Decoded(codec.decoder(codec.bottleneck.out_proj(latents)), mean, deviation)


def distances(decoded: Decoded, audio: Float[Array, "b samples"], rate: int) -> dict[str, Array]:
    """The terms of the loss that need no critic, each a mean over the batch."""
    mel, magnitude = jax.vmap(lambda a, b: spectral_distances(a, b, rate))(decoded.audio, audio)
    return {
        "mel": jnp.mean(mel),
        "magnitude": jnp.mean(magnitude),
        "periodicity": jnp.mean(
            jax.vmap(lambda a, b: periodicity_distance(a, b, rate))(decoded.audio, audio)
        ),
        "waveform": jnp.mean(jnp.abs(decoded.audio - audio)),
        "divergence": jnp.mean(jax.vmap(divergence)(decoded.mean, decoded.deviation)),
    }


def make_step(
    mesh: Mesh, sizes: CodecConfig, config: CodecTrainConfig, state: CodecState
) -> jax.stages.Wrapped:
    """The jitted step `(state, batch, key) -> (state, metrics)`; the old state is donated.

    The batch is split over the mesh, the state repeated; a mean over the batch is one over all
    devices.
    """
    weights = config.loss

    def step(state: CodecState, batch: AudioBatch, key: PRNGKeyArray):
        key = jr.fold_in(key, state.step)
        keys = jax.vmap(lambda row: jr.fold_in(key, row))(jnp.arange(batch.audio.shape[0]))

        def loss(model: DACVAE) -> tuple[Array, tuple[dict[str, Array], Array]]:
            decoded = jax.vmap(lambda a, k: pass_through(model, a, k, config.freeze_encoder))(
                batch.audio, keys
            )
            terms = distances(decoded, batch.audio, sizes.sample_rate)
            if state.critic is not None:
                terms |= _judged(state.critic, decoded.audio, batch.audio)
            total = sum(getattr(weights, name) * term for name, term in terms.items())
            return cast(Array, total), (terms, decoded.audio)

        (value, (terms, decoded)), gradients = jax.value_and_grad(loss, has_aux=True)(state.model)
        norm = optax.tree.norm(gradients)
        rate = learning_rate(config.optimizer, config.num_steps, state.step)
        model, moments = adamw_update(config.optimizer, rate, state.model, gradients, state.adam)
        ema = None
        if state.ema is not None:
            ema = update_ema(state.ema, model, config.optimizer.ema_decay, state.step)
        critic, critic_moments = state.critic, state.critic_adam
        if critic is not None and critic_moments is not None:
            terms["critic_own"], change = jax.value_and_grad(_critic_loss)(
                critic, decoded, batch.audio
            )
            critic, critic_moments = adamw_update(
                config.optimizer, rate, critic, change, critic_moments
            )
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        changed = (model, moments, ema, critic, critic_moments)
        before = (state.model, state.adam, state.ema, state.critic, state.critic_adam)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, before)
        new = CodecState(state.step + 1, state.skipped + jnp.where(finite, 0, 1), *kept)
        metrics = StepMetrics(
            loss=value,
            grad_norm=norm,
            param_norm=optax.tree.norm(model),
            lr=rate,
            updated=finite,
            skipped=new.skipped,
            frames=jnp.array(decoded.size // sizes.hop, jnp.int32),
            terms=terms,
        )
        return new, metrics

    everywhere = replicated(mesh)
    places = jax.tree.map(lambda _: everywhere, state)
    return jax.jit(
        step,
        in_shardings=(places, batch_sharding(mesh), everywhere),
        out_shardings=(places, everywhere),
        donate_argnums=0,
    )


def _judged(critic: Critic, decoded: Array, audio: Array) -> dict[str, Array]:
    def one(decoded: Array, audio: Array) -> tuple[Array, Array]:
        return decoder_losses(critic(audio), critic(decoded))

    verdict, alike = jax.vmap(one)(decoded, audio)
    return {"critic": jnp.mean(verdict), "features": jnp.mean(alike)}


def _critic_loss(critic: Critic, decoded: Array, audio: Array) -> Array:
    return jnp.mean(jax.vmap(lambda d, a: critic_loss(critic(a), critic(d)))(decoded, audio))


def abstract_batch(mesh: Mesh, batch_size: int, samples: int) -> AudioBatch:
    shape = jax.ShapeDtypeStruct((batch_size, samples), jnp.float32, sharding=batch_sharding(mesh))
    return cast(AudioBatch, jax.tree.map(lambda _: shape, jax.eval_shape(_one_sample)))


def _one_sample() -> AudioBatch:
    return AudioBatch(jnp.zeros((1, 1)))


def signal_to_distortion(
    decoded: Float[np.ndarray, " samples"], audio: Float[np.ndarray, " samples"]
) -> float:
    """SI-SDR in decibels (Le Roux et al., 2019, arXiv:1811.02508): the part of `decoded` that is a
    multiple of `audio`, against the rest of it."""
    decoded, audio = decoded - decoded.mean(), audio - audio.mean()
    target = audio * (decoded @ audio) / (audio @ audio + 1e-12)
    rest = decoded - target
    return 10 * math.log10((target @ target + 1e-12) / (rest @ rest + 1e-12))
