"""Scaled dot-product attention, and the gated self-attention of the encoders."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from echo_eqx.layers.linear import Linear
from echo_eqx.layers.norm import RMSNorm
from echo_eqx.layers.rotary import apply_rope


def dot_product_attention(
    queries: Float[Array, "t h k"],
    keys: Float[Array, "j h k"],
    values: Float[Array, "j h k"],
    mask: Bool[Array, "#t j"],
) -> Float[Array, "t h k"]:
    """`softmax(q k^T / sqrt(k)) v` for each head, with the softmax in float32.

    Keys where `mask` is false are ignored. A query with no key left gets the mean of all values.
    """
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum(
        "thk,jhk->htj", queries, keys, precision=exact, preferred_element_type=jnp.float32
    )
    logits = logits * queries.shape[-1] ** -0.5
    logits = jnp.where(mask[None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(values.dtype)
    return jnp.einsum("htj,jhk->thk", weights, values, precision=exact)


def split_heads(x: Float[Array, "t d"], head_dim: int) -> Float[Array, "t h {head_dim}"]:
    return x.reshape(x.shape[0], -1, head_dim)


class SelfAttention(eqx.Module):
    """Self-attention with QK-norm, RoPE on all heads, and a sigmoid gate on the output."""

    wq: Linear
    wk: Linear
    wv: Linear
    wo: Linear
    gate: Linear
    q_norm: RMSNorm
    k_norm: RMSNorm

    @classmethod
    def init(cls, dim: int, num_heads: int, eps: float, *, key: PRNGKeyArray) -> "SelfAttention":
        keys = jr.split(key, 5)
        wq, wk, wv, wo, gate = (Linear.init(dim, dim, key=key) for key in keys)
        q_norm, k_norm = (RMSNorm.init((num_heads, dim // num_heads), eps) for _ in range(2))
        return cls(wq, wk, wv, wo, gate, q_norm, k_norm)

    @property
    def head_dim(self) -> int:
        return self.q_norm.weight.shape[-1]

    def __call__(
        self,
        x: Float[Array, "t d"],
        mask: Bool[Array, "#t t"],
        angles: Float[Array, "t a"],
    ) -> Float[Array, "t d"]:
        queries = apply_rope(self.q_norm(split_heads(self.wq(x), self.head_dim)), angles)
        keys = apply_rope(self.k_norm(split_heads(self.wk(x), self.head_dim)), angles)
        values = split_heads(self.wv(x), self.head_dim)
        out = dot_product_attention(queries, keys, values, mask).reshape(len(x), -1)
        return self.wo(jax.nn.sigmoid(self.gate(x)) * out, row_parallel=True)
