"""The speed of a training step of EchoDiT in Flax, as its users would write it.

    python speed_flax.py SIZES.json

Unrolled blocks, each under `nn.remat`, `jax.nn.dot_product_attention`, and AdamW of optax. Prints
`ready` once all is compiled; then each line on stdin runs a step, and its seconds are printed.
"""

import json
import sys
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

EPS = 1e-6


class RMSNorm(nn.Module):
    """One weight for each head, if there are heads."""

    heads: int = 0

    @nn.compact
    def __call__(self, x):
        weight = self.param(
            "weight", nn.initializers.ones, x.shape[-2:] if self.heads else x.shape[-1:]
        )
        return rms(x) * weight


def rms(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS)


def rotate(x):
    """RoPE over interleaved pairs; x (batch, position, head, width)."""
    width = x.shape[-1]
    frequencies = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = (jnp.arange(x.shape[1])[:, None] * frequencies)[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def rotate_half_of_the_heads(x):
    half = x.shape[2] // 2
    return jnp.concatenate([rotate(x[:, :, :half]), x[:, :, half:]], axis=2)


def linear(features, bias=False):
    return nn.Dense(features, use_bias=bias, kernel_init=nn.initializers.truncated_normal(0.02))


class SwiGLU(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x):
        gated = nn.silu(linear(self.hidden)(x)) * linear(self.hidden)(x)
        return linear(x.shape[-1])(gated)


class EncoderBlock(nn.Module):
    heads: int
    hidden: int
    causal: bool

    @nn.compact
    def __call__(self, x, mask):
        dim, normed = x.shape[-1], RMSNorm()(x)
        q, k, v = (linear(dim)(normed).reshape(*x.shape[:2], self.heads, -1) for _ in range(3))
        q, k = rotate(RMSNorm(self.heads)(q)), rotate(RMSNorm(self.heads)(k))
        mask = None if mask is None else mask[:, None, None]
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=self.causal)
        x = x + linear(dim)(out.reshape(x.shape) * nn.sigmoid(linear(dim)(normed)))
        return x + SwiGLU(self.hidden)(RMSNorm()(x))


class AdaLN(nn.Module):
    rank: int

    @nn.compact
    def __call__(self, shared):
        shift, scale, gate = (
            (linear(v.shape[-1], bias=True)(linear(self.rank)(nn.silu(v))) + v)[:, None]
            for v in shared
        )
        return shift, scale, jnp.tanh(gate)


class Block(nn.Module):
    heads: int
    hidden: int
    rank: int

    @nn.compact
    def __call__(self, x, shared, text, speaker, mask):
        dim = x.shape[-1]
        q_norm, k_norm = RMSNorm(self.heads), RMSNorm(self.heads)

        def split(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        shift, scale, gate = AdaLN(self.rank)(shared)
        normed = rms(x) * (1 + scale) + shift
        queries = rotate_half_of_the_heads(q_norm(split(linear(dim)(normed))))
        keys = [rotate_half_of_the_heads(k_norm(split(linear(dim)(normed))))]
        keys += [k_norm(split(linear(dim)(condition))) for condition in (text, speaker)]
        values = [split(linear(dim)(y)) for y in (normed, text, speaker)]
        out = jax.nn.dot_product_attention(
            queries, jnp.concatenate(keys, 1), jnp.concatenate(values, 1), mask=mask[:, None, None]
        )
        x = x + gate * linear(dim)(out.reshape(x.shape) * nn.sigmoid(linear(dim)(normed)))
        shift, scale, gate = AdaLN(self.rank)(shared)
        return x + gate * SwiGLU(self.hidden)(rms(x) * (1 + scale) + shift)


class EchoDiT(nn.Module):
    sizes: dict

    @nn.compact
    def __call__(self, x, t, text_ids, text_mask, speaker_latents, speaker_mask):
        sizes = self.sizes
        text_sizes, speaker_sizes = sizes["text"], sizes["speaker"]
        half = sizes["time_embed_dim"] // 2
        angles = 1000 * t[:, None] * jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
        time_embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)
        dim = sizes["model_dim"]
        c = linear(dim)(nn.silu(linear(dim)(time_embedding)))
        shared = jnp.split(linear(3 * dim)(nn.silu(c)), 3, axis=1)

        text = nn.Embed(256, text_sizes["dim"])(text_ids)
        for _ in range(text_sizes["num_layers"]):
            block = nn.remat(EncoderBlock)(text_sizes["num_heads"], text_sizes["mlp_dim"], False)
            text = block(text, text_mask)
        text = RMSNorm()(text)
        patches = speaker_latents.reshape(len(x), -1, 4 * x.shape[-1])
        speaker = linear(speaker_sizes["dim"], bias=True)(patches) / 6
        for _ in range(speaker_sizes["num_layers"]):
            block = nn.remat(EncoderBlock)(
                speaker_sizes["num_heads"], speaker_sizes["mlp_dim"], True
            )
            speaker = block(speaker, None)
        speaker = RMSNorm()(speaker)

        mask = [jnp.ones(x.shape[:2], bool), text_mask, speaker_mask[:, ::4]]
        mask = jnp.concatenate(mask, axis=1)
        channels = x.shape[-1]
        x = linear(dim, bias=True)(x)
        for _ in range(sizes["num_layers"]):
            block = nn.remat(Block)(sizes["num_heads"], sizes["mlp_dim"], sizes["adaln_rank"])
            x = block(x, shared, text, speaker, mask)
        return linear(channels, bias=True)(RMSNorm()(x))


def main(path: str) -> None:
    sizes = json.loads(Path(path).read_text())
    batch, channels = sizes["batch_size"], sizes["latent_dim"]
    keys = jax.random.split(jax.random.key(0), 6)
    latents = jax.random.normal(keys[0], (batch, sizes["frames"], channels))
    text_ids = jax.random.randint(keys[1], (batch, sizes["text_bytes"]), 0, 256)
    speaker = jax.random.normal(keys[2], (batch, sizes["speaker_frames"], channels))
    conditions = (
        text_ids,
        jnp.ones(text_ids.shape, bool),
        speaker,
        jnp.ones(speaker.shape[:2], bool),
    )
    model = EchoDiT(sizes)
    times = jnp.full(batch, 0.5)
    params = jax.jit(model.init)(keys[3], latents, times, *conditions)
    print(sum(leaf.size for leaf in jax.tree.leaves(params)), "parameters", file=sys.stderr)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.01))

    def step(state, key):
        params, moments = state

        def loss(params):
            noise_key, time_key = jax.random.split(key)
            noise = jax.random.normal(noise_key, latents.shape)
            t = jax.nn.sigmoid(jax.random.normal(time_key, (batch,)))
            x = (1 - t[:, None, None]) * latents + t[:, None, None] * noise
            return jnp.mean(jnp.square(model.apply(params, x, t, *conditions) - (noise - latents)))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    step = jax.jit(step, donate_argnums=0)
    state = params, optimizer.init(params)
    state, _ = jax.block_until_ready(step(state, keys[4]))
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, keys[5]))
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
