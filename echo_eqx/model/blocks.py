"""Transformer blocks and the scan that runs a stack of them."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from echo_eqx.config import DiTConfig, EncoderConfig
from echo_eqx.layers.adaln import LowRankAdaLN, Modulation
from echo_eqx.layers.mlp import SwiGLU
from echo_eqx.layers.norm import RMSNorm
from echo_eqx.layers.parallel import all_gather_params
from echo_eqx.model.attention import SelfAttention
from echo_eqx.model.joint_attention import JointAttention, KVCache


class TransformerBlock(eqx.Module):
    """Pre-norm self-attention and pre-norm SwiGLU, as in the text and latent encoders."""

    attention_norm: RMSNorm
    attention: SelfAttention
    mlp_norm: RMSNorm
    mlp: SwiGLU

    @classmethod
    def init(cls, config: EncoderConfig, eps: float, *, key: PRNGKeyArray) -> "TransformerBlock":
        key_attention, key_mlp = jr.split(key)
        return cls(
            attention_norm=RMSNorm.init(config.dim, eps),
            attention=SelfAttention.init(config.dim, config.num_heads, eps, key=key_attention),
            mlp_norm=RMSNorm.init(config.dim, eps),
            mlp=SwiGLU.init(config.dim, config.mlp_dim, key=key_mlp),
        )

    def __call__(
        self, x: Float[Array, "t d"], mask: Bool[Array, "#t t"], angles: Float[Array, "t a"]
    ) -> Float[Array, "t d"]:
        x = x + self.attention(self.attention_norm(x), mask, angles)
        return x + self.mlp(self.mlp_norm(x))


class DiTBlock(eqx.Module):
    """Joint attention and SwiGLU, each with AdaLN and a gate conditioned on the timestep."""

    attention_adaln: LowRankAdaLN
    attention: JointAttention
    mlp_adaln: LowRankAdaLN
    mlp: SwiGLU

    @classmethod
    def init(cls, config: DiTConfig, *, key: PRNGKeyArray) -> "DiTBlock":
        key_adaln0, key_attention, key_adaln1, key_mlp = jr.split(key, 4)
        dim, rank, eps = config.model_dim, config.adaln_rank, config.norm_eps
        return cls(
            attention_adaln=LowRankAdaLN.init(dim, rank, eps, key=key_adaln0),
            attention=JointAttention.init(
                dim,
                config.num_heads,
                config.text.dim,
                config.speaker.dim,
                config.blockwise,
                eps,
                key=key_attention,
            ),
            mlp_adaln=LowRankAdaLN.init(dim, rank, eps, key=key_adaln1),
            mlp=SwiGLU.init(dim, config.mlp_dim, key=key_mlp),
        )

    def __call__(
        self,
        x: Float[Array, "t d"],
        time: Modulation,
        frame_mask: Bool[Array, " t"],
        angles: Float[Array, "t a"],
        extra_kv: list[tuple[KVCache, Bool[Array, " _"]]],
    ) -> Float[Array, "t d"]:
        normed, gate = self.attention_adaln(x, time)
        x = x + gate * self.attention(normed, frame_mask, angles, extra_kv)
        normed, gate = self.mlp_adaln(x, time)
        return x + gate * self.mlp(normed)


def stack_layers(init: Callable[[PRNGKeyArray], Any], num_layers: int, key: PRNGKeyArray) -> Any:
    """`num_layers` modules stacked into one: every leaf has a leading layer axis."""
    return eqx.filter_vmap(init)(jr.split(key, num_layers))


def scan_layers(
    body: Callable[[Any, Array, Any], Array], x: Array, layers: Any, per_layer: Any = None
) -> Array:
    """`x = body(layer, x, per_layer[i])` for each layer, compiled once for all of them.

    The body is checkpointed: the backward pass keeps one activation per layer and recomputes the
    rest. FSDP shards are gathered inside it, so that only one layer at a time is held in full.
    """
    arrays, static = eqx.partition(layers, eqx.is_array)

    @jax.checkpoint
    def step(x, inputs):
        layer, extra = inputs
        return body(all_gather_params(eqx.combine(layer, static)), x, extra), None

    return jax.lax.scan(step, x, (arrays, per_layer))[0]
