"""Joint attention of the DiT: one softmax over latent frames, text and reference."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from echo_eqx.layers.linear import Linear
from echo_eqx.layers.norm import RMSNorm
from echo_eqx.layers.rotary import apply_half_rope
from echo_eqx.model.attention import KeyMask, dot_product_attention, split_heads


class KVCache(eqx.Module):
    """Keys and values of one kind of context, for one layer or with a leading layer axis."""

    keys: Float[Array, "*n j h k"]
    values: Float[Array, "*n j h k"]

    def scaled(self, scale: Float[Array, ""]) -> "KVCache":
        scale = scale.astype(self.keys.dtype)
        return KVCache(self.keys * scale, self.values * scale)


class JointAttention(eqx.Module):
    """Gated attention over [own frames, latents already generated, text, reference].

    All keys share one `k_norm`. RoPE is applied to half of the heads of queries, own keys and keys
    of latents already generated. Text and reference keys carry no position.
    """

    wq: Linear
    wk: Linear
    wv: Linear
    wk_text: Linear
    wv_text: Linear
    wk_speaker: Linear
    wv_speaker: Linear
    wk_latent: Linear | None
    wv_latent: Linear | None
    wo: Linear
    gate: Linear
    q_norm: RMSNorm
    k_norm: RMSNorm

    @classmethod
    def init(
        cls,
        dim: int,
        num_heads: int,
        text_dim: int,
        speaker_dim: int,
        blockwise: bool,
        eps: float,
        *,
        key: PRNGKeyArray,
    ) -> "JointAttention":
        keys = iter(jr.split(key, 11))

        def linear(in_dim: int) -> Linear:
            return Linear.init(in_dim, dim, key=next(keys))

        return cls(
            wq=linear(dim),
            wk=linear(dim),
            wv=linear(dim),
            wk_text=linear(text_dim),
            wv_text=linear(text_dim),
            wk_speaker=linear(speaker_dim),
            wv_speaker=linear(speaker_dim),
            wo=linear(dim),
            gate=linear(dim),
            wk_latent=linear(speaker_dim) if blockwise else None,
            wv_latent=linear(speaker_dim) if blockwise else None,
            q_norm=RMSNorm.init((num_heads, dim // num_heads), eps),
            k_norm=RMSNorm.init((num_heads, dim // num_heads), eps),
        )

    @property
    def head_dim(self) -> int:
        return self.q_norm.weight.shape[-1]

    def text_kv(self, state: Float[Array, "s e"], mask: Bool[Array, " s"]) -> KVCache:
        return self._project(self.wk_text, self.wv_text, state, mask)

    def speaker_kv(self, state: Float[Array, "p e"], mask: Bool[Array, " p"]) -> KVCache:
        return self._project(self.wk_speaker, self.wv_speaker, state, mask)

    def latent_kv(self, state: Float[Array, "p e"], angles: Float[Array, "p a"]) -> KVCache:
        assert self.wk_latent is not None and self.wv_latent is not None
        kv = self._project(self.wk_latent, self.wv_latent, state, jnp.ones(state.shape[0], bool))
        return KVCache(apply_half_rope(kv.keys, angles), kv.values)

    def _project(
        self, wk: Linear, wv: Linear, state: Float[Array, "j e"], mask: Bool[Array, " j"]
    ) -> KVCache:
        keys = self.k_norm(split_heads(wk(state), self.head_dim))
        values = split_heads(wv(state), self.head_dim)
        # A masked key has weight zero, but 0 * NaN is NaN, so its value is cleared too.
        return KVCache(keys, jnp.where(mask[:, None, None], values, 0))

    def __call__(
        self,
        x: Float[Array, "t d"],
        angles: Float[Array, "t a"],
        extra_kv: list[KVCache],
        mask: KeyMask,
    ) -> Float[Array, "t d"]:
        """`mask` covers the frames of `x` and then the keys of `extra_kv`, in their order."""
        queries = self.q_norm(split_heads(self.wq(x), self.head_dim))
        keys = self.k_norm(split_heads(self.wk(x), self.head_dim))
        values = split_heads(self.wv(x), self.head_dim)
        queries = apply_half_rope(queries, angles)
        keys = apply_half_rope(keys, angles)

        keys = jnp.concatenate([keys, *(kv.keys for kv in extra_kv)])
        values = jnp.concatenate([values, *(kv.values for kv in extra_kv)])
        out = dot_product_attention(queries, keys, values, mask).reshape(x.shape[0], -1)
        return self.wo(jax.nn.sigmoid(self.gate(x)) * out, row_parallel=True)
