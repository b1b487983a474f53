"""The decoder's attention: one softmax over its own frames, the text and the reference."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from echo_eqx.layers.linear import Linear
from echo_eqx.layers.norm import RMSNorm
from echo_eqx.layers.rotary import rotate_half_of_heads
from echo_eqx.model.attention import attend, split_heads


class KeysValues(eqx.Module):
    """Keys and values of one source. In a cache they carry a leading layer axis."""

    keys: Float[Array, "*n j h k"]
    values: Float[Array, "*n j h k"]

    def scaled(self, scale: Float[Array, ""]) -> "KeysValues":
        scale = scale.astype(self.keys.dtype)
        return KeysValues(self.keys * scale, self.values * scale)


class JointAttention(eqx.Module):
    """Gated attention over [self, latents already generated, text, reference].

    All keys pass one `k_norm`. RoPE turns half of the heads, for queries, self keys and the keys of
    earlier latents; text and reference keys carry no position.
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

    def text_keys_values(self, state: Float[Array, "s e"], mask: Bool[Array, " s"]) -> KeysValues:
        return self._project(self.wk_text, self.wv_text, state, mask)

    def speaker_keys_values(
        self, state: Float[Array, "p e"], mask: Bool[Array, " p"]
    ) -> KeysValues:
        return self._project(self.wk_speaker, self.wv_speaker, state, mask)

    def latent_keys_values(
        self, state: Float[Array, "p e"], angles: Float[Array, "p a"]
    ) -> KeysValues:
        assert self.wk_latent is not None and self.wv_latent is not None
        seen = jnp.ones(state.shape[0], bool)
        projected = self._project(self.wk_latent, self.wv_latent, state, seen)
        return KeysValues(rotate_half_of_heads(projected.keys, angles), projected.values)

    def _project(
        self, wk: Linear, wv: Linear, state: Float[Array, "j e"], mask: Bool[Array, " j"]
    ) -> KeysValues:
        keys = self.k_norm(split_heads(wk(state), self.head_dim))
        values = split_heads(wv(state), self.head_dim)
        # An unseen key has weight zero, but zero times NaN is NaN: its value is cleared too.
        return KeysValues(keys, jnp.where(mask[:, None, None], values, 0))

    def __call__(
        self,
        x: Float[Array, "t d"],
        frame_mask: Bool[Array, " t"],
        angles: Float[Array, "t a"],
        others: list[tuple[KeysValues, Bool[Array, " _"]]],
    ) -> Float[Array, "t d"]:
        """`others` are the sources beside the frames of `x`, each with the mask of its keys."""
        queries = self.q_norm(split_heads(self.wq(x), self.head_dim))
        keys = self.k_norm(split_heads(self.wk(x), self.head_dim))
        values = split_heads(self.wv(x), self.head_dim)
        queries = rotate_half_of_heads(queries, angles)
        keys = rotate_half_of_heads(keys, angles)

        keys = jnp.concatenate([keys, *(source.keys for source, _ in others)])
        values = jnp.concatenate([values, *(source.values for source, _ in others)])
        mask = jnp.concatenate([frame_mask, *(seen for _, seen in others)])
        out = attend(queries, keys, values, mask[None]).reshape(len(x), -1)
        return self.wo(jax.nn.sigmoid(self.gate(x)) * out, split_rows=True)
