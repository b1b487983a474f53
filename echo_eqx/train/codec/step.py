"""One step of codec training: state, losses and update."""

from typing import Any, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PRNGKeyArray

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig
from echo_eqx.sharding.mesh import batch_sharding, replicated
from echo_eqx.train.codec.config import CodecTrainConfig
from echo_eqx.train.codec.discriminators import Discriminators, discriminator_loss, generator_losses
from echo_eqx.train.codec.losses import kl_divergence, periodicity_distance, spectral_distances
from echo_eqx.train.optimizer import adam, adamw_update, learning_rate
from echo_eqx.train.update import apply_gradients, jit_step


class CodecState(eqx.Module):
    """Everything that a step changes. Discriminators are None without adversarial training."""

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    """Updates skipped since the start of training."""
    model: DACVAE
    adam: optax.ScaleByAdamState
    ema: DACVAE | None
    discriminators: Discriminators | None
    discriminators_adam: optax.ScaleByAdamState | None


class AudioBatch(eqx.Module):
    """Crops of recordings."""

    audio: Float[Array, "b samples"]


class Decoded(NamedTuple):
    """Decoded audio, and the distribution of the latents it was decoded from."""

    audio: Float[Array, "*b samples"]
    mean: Float[Array, "*b t c"]
    std: Float[Array, "*b t c"]


def init_train_state(model: DACVAE, config: CodecTrainConfig, key: PRNGKeyArray) -> CodecState:
    """The state before the first step from `model`."""
    zero = jnp.zeros((), jnp.int32)
    discriminators = Discriminators.init(key=key) if config.loss.adversarial else None
    init: Any = adam(config.optimizer).init
    return CodecState(
        step=zero,
        skipped=zero,
        model=model,
        adam=init(model),
        ema=jax.tree.map(jnp.copy, model) if config.optimizer.ema_decay > 0 else None,
        discriminators=discriminators,
        discriminators_adam=None if discriminators is None else init(discriminators),
    )


def abstract_state(sizes: CodecConfig, config: CodecTrainConfig, mesh: Mesh) -> CodecState:
    """The shapes and shardings of a state: every leaf is a `jax.ShapeDtypeStruct`.

    It is replicated over the mesh, because a codec is small.
    """
    key = jr.key(0)
    state = jax.eval_shape(lambda: init_train_state(DACVAE.init(sizes, key=key), config, key))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), state
    )


def reconstruct(
    codec: DACVAE, audio: Float[Array, " samples"], key: PRNGKeyArray | None, freeze_encoder: bool
) -> Decoded:
    """Encode, sample latents (or take their mean, without a `key`), and decode."""
    mean, std = codec.bottleneck.moments(codec.encoder(audio))
    if freeze_encoder:
        mean, std = jax.lax.stop_gradient((mean, std))
    latents = mean if key is None else mean + std * jr.normal(key, mean.shape)
    return Decoded(codec.decoder(codec.bottleneck.out_proj(latents)), mean, std)


def distances(decoded: Decoded, audio: Float[Array, "b samples"], rate: int) -> dict[str, Array]:
    """The reconstruction and KL terms of the loss, each a mean over the batch."""
    mel, stft = jax.vmap(lambda a, b: spectral_distances(a, b, rate))(decoded.audio, audio)
    return {
        "mel": jnp.mean(mel),
        "stft": jnp.mean(stft),
        "periodicity": jnp.mean(
            jax.vmap(lambda a, b: periodicity_distance(a, b, rate))(decoded.audio, audio)
        ),
        "waveform": jnp.mean(jnp.abs(decoded.audio - audio)),
        "kl": jnp.mean(jax.vmap(kl_divergence)(decoded.mean, decoded.std)),
    }


def make_step(
    mesh: Mesh, sizes: CodecConfig, config: CodecTrainConfig, state: CodecState
) -> jax.stages.Wrapped:
    """The jitted step `(state, batch, key) -> (state, metrics)`, which donates the old state.

    The batch is sharded over the mesh and the state is replicated.
    """
    weights = config.loss

    def step(state: CodecState, batch: AudioBatch, key: PRNGKeyArray):
        key = jr.fold_in(key, state.step)
        keys = jax.vmap(lambda row: jr.fold_in(key, row))(jnp.arange(batch.audio.shape[0]))

        def loss(model: DACVAE) -> tuple[Array, tuple[dict[str, Array], Array]]:
            decoded = jax.vmap(lambda a, k: reconstruct(model, a, k, config.freeze_encoder))(
                batch.audio, keys
            )
            terms = distances(decoded, batch.audio, sizes.sample_rate)
            if state.discriminators is not None:
                terms |= _generator_terms(state.discriminators, decoded.audio, batch.audio)
            total = sum(getattr(weights, name) * term for name, term in terms.items())
            return cast(Array, total), (terms, decoded.audio)

        (value, (terms, decoded)), gradients = jax.value_and_grad(loss, has_aux=True)(state.model)
        others: dict[str, Any] = {}
        nets, nets_adam = state.discriminators, state.discriminators_adam
        if nets is not None and nets_adam is not None:
            lr = learning_rate(config.optimizer, config.num_steps, state.step)
            loss_and_grad = jax.value_and_grad(_discriminator_loss)
            terms["discriminator"], nets_gradients = loss_and_grad(nets, decoded, batch.audio)
            nets, nets_adam = adamw_update(config.optimizer, lr, nets, nets_gradients, nets_adam)
            others = {"discriminators": nets, "discriminators_adam": nets_adam}
        return apply_gradients(
            config.optimizer,
            config.num_steps,
            state,
            value,
            gradients,
            frames=jnp.array(decoded.size // sizes.hop, jnp.int32),
            terms=terms,
            others=others,
        )

    return jit_step(step, jax.tree.map(lambda _: replicated(mesh), state), mesh)


def _generator_terms(nets: Discriminators, decoded: Array, audio: Array) -> dict[str, Array]:
    losses = jax.vmap(lambda d, a: generator_losses(nets(a), nets(d)))(decoded, audio)
    return {"adversarial": jnp.mean(losses[0]), "feature_matching": jnp.mean(losses[1])}


def _discriminator_loss(nets: Discriminators, decoded: Array, audio: Array) -> Array:
    return jnp.mean(jax.vmap(lambda d, a: discriminator_loss(nets(a), nets(d)))(decoded, audio))


def abstract_batch(mesh: Mesh, batch_size: int, samples: int) -> AudioBatch:
    shape = jax.ShapeDtypeStruct((batch_size, samples), jnp.float32, sharding=batch_sharding(mesh))
    return jax.tree.map(lambda _: shape, jax.eval_shape(lambda: AudioBatch(jnp.zeros((1, 1)))))
