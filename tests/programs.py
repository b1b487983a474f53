"""Small models for exported programs, and what our own code computes: arrays by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import random_model

from echo_eqx import DACVAE, EchoDiT
from echo_eqx.config import CodecConfig, DiTConfig, EncoderConfig, WatermarkConfig
from echo_eqx.export.models import Models
from echo_eqx.generation import GenerationConfig, SamplerSettings
from echo_eqx.model.dit import ConditionCache
from echo_eqx.model.joint_attention import KVCache

Arrays = dict[str, np.ndarray]
DIT = DiTConfig(
    model_dim=24,
    num_layers=3,
    num_heads=4,
    mlp_dim=40,
    text=EncoderConfig(20, 2, 2, 28),
    speaker=EncoderConfig(12, 2, 3, 16),
    latent_dim=6,
    time_embed_dim=10,
    adaln_rank=5,
    speaker_proj_scale=1 / 6,
    max_frames=9,
)
CODEC = CodecConfig(
    encoder_dim=4,
    encoder_rates=(5,),
    hidden_dim=14,
    latent_dim=6,
    decoder_dim=16,
    decoder_rates=(5,),
    sample_rate=8000,
    watermark=WatermarkConfig(dim=6, strides=(5,), bottleneck_dim=7, num_bits=3, num_lstm_layers=1),
)
SETTINGS = SamplerSettings(
    steps=2, cfg_scale=2.0, speaker_scale=1.5, cfg_min_t=0.0, noise_scale=0.8
)


def small_models() -> Models:
    dit = random_model(EchoDiT, DIT, scale=0.3)
    dit = dataclasses.replace(dit, generation=GenerationConfig(SETTINGS))
    return Models(dit, random_model(DACVAE, CODEC, scale=0.15))


def context_case(dit: EchoDiT, batch: int, text: int, patches: int) -> tuple[Arrays, Arrays]:
    """Inputs of the encoders, and the keys and values."""
    rng, config = np.random.default_rng(batch), dit.config
    lengths = rng.integers(1, text + 1, batch), rng.integers(0, patches + 1, batch)
    text_mask, speaker_mask = (
        np.arange(size) < length[:, None]
        for size, length in zip((text, patches), lengths, strict=True)
    )
    frames = np.repeat(speaker_mask, config.patch_size, axis=1)
    latents = rng.standard_normal((*frames.shape, config.latent_dim)).astype(np.float32)
    inputs = {
        "text_ids": rng.integers(0, 256, (batch, text)).astype(np.int32),
        "text_mask": text_mask,
        "speaker_latents": latents * frames[..., None],
        "speaker_mask": speaker_mask,
    }
    arguments = (*list(inputs.values())[:3], frames)
    cache = jax.jit(jax.vmap(dit.encode_conditions))(*map(jnp.asarray, arguments))
    names = "text_keys", "text_values", "speaker_keys", "speaker_values"
    parts = cache.text.keys, cache.text.values, cache.speaker.keys, cache.speaker.values
    return inputs, dict(zip(names, map(np.asarray, parts), strict=True))


def velocity_case(dit: EchoDiT, batch: int, frames: int, context: Arrays) -> tuple[Arrays, Arrays]:
    """Inputs of the velocity, given inputs and outputs of `context_case`, and the velocity.

    Velocities of masked frames mean nothing.
    """
    rng, config = np.random.default_rng(frames), dit.config
    frame_mask = np.arange(frames) < rng.integers(1, frames + 1, (batch, 1))
    inputs = {
        "x": rng.standard_normal((batch, frames, config.latent_dim)).astype(np.float32),
        "t": np.asarray(0.7, np.float32),
        "frame_mask": frame_mask,
        **{name: context[name] for name in ("text_keys", "text_values", "text_mask")},
        **{name: context[name] for name in ("speaker_keys", "speaker_values", "speaker_mask")},
        "speaker_scale": np.linspace(1, 1.5, config.num_layers, dtype=np.float32),
    }

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, *[0] * 7, None))
    def velocity(x, t, frame_mask, text_keys, text_values, text_mask, keys, values, mask, scale):
        text, speaker = KVCache(text_keys, text_values), KVCache(keys, values)
        cache = ConditionCache(text, text_mask, speaker, mask)
        return dit.velocity(x, t, cache, frame_mask=frame_mask, speaker_scale=scale)

    v = np.asarray(velocity(*map(jnp.asarray, inputs.values())))
    return inputs, {"velocity": v}


def codec_cases(codec: DACVAE, batch: int, frames: int) -> dict[str, tuple[Arrays, Arrays]]:
    """Inputs and outputs of the programs `encode`, `decode` and `decode_watermarked`."""
    rng = np.random.default_rng(frames)
    audio = 0.3 * rng.standard_normal((batch, frames * codec.config.hop)).astype(np.float32)
    latents = rng.standard_normal((batch, frames, codec.config.latent_dim)).astype(np.float32)
    mean, std = jax.jit(jax.vmap(codec.encode))(jnp.asarray(audio))
    decode = jax.jit(jax.vmap(codec.decode))
    cases = {
        "encode": ({"audio": audio}, {"mean": np.asarray(mean), "std": np.asarray(std)}),
        "decode": ({"latents": latents}, {"audio": np.asarray(decode(latents))}),
    }
    if codec.watermark is not None:
        message = rng.integers(0, 2, (batch, codec.watermark.num_bits)).astype(np.int32)
        marked = decode(jnp.asarray(latents), jnp.asarray(message))
        inputs = {"latents": latents, "message": message}
        cases["decode_watermarked"] = inputs, {"audio": np.asarray(marked)}
    return cases
