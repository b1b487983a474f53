"""Causal transformers with a limited window, as Fish S1-DAC has them in its encoder and around its
quantizers (github.com/fishaudio/fish-speech, `fish_speech/models/dac/modded_dac.py`)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.layers.linear import Linear
from echo_eqx.layers.mlp import SwiGLU
from echo_eqx.layers.norm import RMSNorm
from echo_eqx.layers.precision import matmul_precision
from echo_eqx.layers.rotary import THETA

NORM_EPS = 1e-5
LAYER_SCALE = 1e-2
"""Scale of each residual branch at first."""


def rotation_table(length: int, head_dim: int) -> np.ndarray:
    """(length, head_dim / 2, 2) float32: cosine and sine for each position and rotary pair.

    The published model rounds its table to bfloat16, also where it computes in float32, and was
    trained with that.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1) / np.float32(THETA) ** exponents
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return table.astype(ml_dtypes.bfloat16).astype(np.float32)


def rotate(x: Float[Array, "t h k"], table: Float[Array, "t a 2"]) -> Float[Array, "t h k"]:
    """Rotate each pair `(x[2i], x[2i + 1])` of every head by row i of the table."""
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def window_attention(
    queries: Float[Array, "t h k"],
    keys: Float[Array, "t h k"],
    values: Float[Array, "t h k"],
    window: int,
) -> Float[Array, "t h k"]:
    """Attention of each position to itself and the `window - 1` positions before it.

    A block of `window` queries meets two blocks of keys, so that memory grows with the length, not
    with its square.
    """
    length, head_dim = queries.shape[0], queries.shape[2]
    size = min(window, length)
    blocks = -(-length // size)

    def split(x: Float[Array, "t h k"]) -> Float[Array, "b q h k"]:
        padded = jnp.pad(x, ((0, blocks * size - length), (0, 0), (0, 0)))
        return padded.reshape(blocks, size, *x.shape[1:])

    def with_previous(x: Float[Array, "b q h k"]) -> Float[Array, "b j h k"]:
        return jnp.concatenate([jnp.pad(x, ((1, 0), (0, 0), (0, 0), (0, 0)))[:-1], x], axis=1)

    precision = matmul_precision(queries.dtype)
    logits = jnp.einsum(
        "bqhk,bjhk->bhqj",
        split(queries),
        with_previous(split(keys)),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    # The distance from a key to a query, and whether there is a block before.
    distance = size + np.arange(size)[:, None] - np.arange(2 * size)[None]
    exists = (np.arange(2 * size)[None] >= size) | (np.arange(blocks)[:, None] > 0)
    allowed = ((distance >= 0) & (distance < window))[None] & exists[:, None]
    logits = jnp.where(allowed[:, None], logits * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    out = jnp.einsum("bhqj,bjhk->bqhk", weights, with_previous(split(values)), precision=precision)
    return out.reshape(blocks * size, *queries.shape[1:])[:length]


class TransformerLayer(eqx.Module):
    """Pre-norm attention and pre-norm SwiGLU, each scaled per channel before it is added."""

    attention_norm: RMSNorm
    wqkv: Linear
    wo: Linear
    attention_scale: Float[Array, " d"]
    mlp_norm: RMSNorm
    mlp: SwiGLU
    mlp_scale: Float[Array, " d"]
    head_dim: int = eqx.field(static=True)
    window: int = eqx.field(static=True)

    @classmethod
    def init(
        cls, dim: int, mlp_dim: int, head_dim: int, window: int, *, key: PRNGKeyArray
    ) -> "TransformerLayer":
        key_qkv, key_out, key_mlp = jr.split(key, 3)
        return cls(
            attention_norm=RMSNorm.init(dim, NORM_EPS),
            wqkv=Linear.init(dim, 3 * dim, key=key_qkv),
            wo=Linear.init(dim, dim, key=key_out),
            attention_scale=jnp.full(dim, LAYER_SCALE),
            mlp_norm=RMSNorm.init(dim, NORM_EPS),
            mlp=SwiGLU.init(dim, mlp_dim, key=key_mlp),
            mlp_scale=jnp.full(dim, LAYER_SCALE),
            head_dim=head_dim,
            window=window,
        )

    def __call__(self, x: Float[Array, "t d"], table: Float[Array, "t a 2"]) -> Float[Array, "t d"]:
        parts = jnp.split(self.wqkv(self.attention_norm(x)), 3, axis=1)
        queries, keys, values = (part.reshape(len(x), -1, self.head_dim) for part in parts)
        attended = window_attention(
            rotate(queries, table), rotate(keys, table), values, self.window
        )
        x = x + self.wo(attended.reshape(len(x), -1)) * self.attention_scale.astype(x.dtype)[None]
        return x + self.mlp(self.mlp_norm(x)) * self.mlp_scale.astype(x.dtype)[None]


class WindowTransformer(eqx.Module):
    """Layers, stacked along a leading axis, and a norm."""

    layers: TransformerLayer
    norm: RMSNorm

    @classmethod
    def init(
        cls,
        dim: int,
        num_layers: int,
        mlp_dim: int,
        head_dim: int,
        window: int,
        *,
        key: PRNGKeyArray,
    ) -> "WindowTransformer":
        def layer(key: PRNGKeyArray) -> TransformerLayer:
            return TransformerLayer.init(dim, mlp_dim, head_dim, window, key=key)

        return cls(eqx.filter_vmap(layer)(jr.split(key, num_layers)), RMSNorm.init(dim, NORM_EPS))

    def __call__(self, x: Float[Array, "t d"]) -> Float[Array, "t d"]:
        table = jnp.asarray(rotation_table(len(x), self.layers.head_dim))
        x, _ = jax.lax.scan(lambda x, layer: (layer(x, table), None), x, self.layers)
        return self.norm(x)
