"""Transformer blocks and the scan that runs a stack of them."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from echo_eqx.config import DiTConfig, EncoderConfig
from echo_eqx.layers.adaln import LowRankAdaLN, Modulation, modulate
from echo_eqx.layers.mlp import SwiGLU
from echo_eqx.layers.norm import RMSNorm
from echo_eqx.layers.parallel import all_gather_params
from echo_eqx.model.attention import KeyMask, SelfAttention
from echo_eqx.model.joint_attention import JointAttention, KVCache
from echo_eqx.model.pallas_attention import ATTENTION

Remat = Literal["full", "dots", "none"]
"""What the backward pass recomputes. `full`: everything except the input of each layer. `dots`:
elementwise operations; the outputs of linear layers and of fused attention are saved. `none`: only
the all-gather of FSDP shards."""


_is_linear_or_named = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENTION),
)


def _is_linear_or_attention(primitive: Any, *args: Any, **params: Any) -> bool:
    is_cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return is_cudnn or bool(_is_linear_or_named(primitive, *args, **params))


def _is_not_all_gather(primitive: Any, *_: Any, **__: Any) -> bool:
    return not primitive.name.startswith("all_gather")


_POLICIES: dict[Remat, Callable[..., bool] | None] = {
    "full": None,
    "dots": _is_linear_or_attention,
    "none": _is_not_all_gather,
}


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
        self,
        x: Float[Array, "t d"],
        mask: KeyMask | None,
        angles: Float[Array, "t a"],
        *,
        causal: bool = False,
    ) -> Float[Array, "t d"]:
        x = x + self.attention(self.attention_norm(x), mask, angles, causal=causal)
        return x + self.mlp(self.mlp_norm(x))


class DiTBlock(eqx.Module):
    """Joint attention and SwiGLU, each with AdaLN and a gate conditioned on the timestep."""

    attention_adaln: LowRankAdaLN
    attention: JointAttention
    mlp_adaln: LowRankAdaLN
    mlp: SwiGLU
    eps: float = eqx.field(static=True)

    @classmethod
    def init(cls, config: DiTConfig, *, key: PRNGKeyArray) -> "DiTBlock":
        key_adaln0, key_attention, key_adaln1, key_mlp = jr.split(key, 4)
        dim, rank, eps = config.model_dim, config.adaln_rank, config.norm_eps
        return cls(
            attention_adaln=LowRankAdaLN.init(dim, rank, key=key_adaln0),
            attention=JointAttention.init(
                dim,
                config.num_heads,
                config.text.dim,
                config.speaker.dim,
                config.blockwise,
                eps,
                key=key_attention,
            ),
            mlp_adaln=LowRankAdaLN.init(dim, rank, key=key_adaln1),
            mlp=SwiGLU.init(dim, config.mlp_dim, key=key_mlp),
            eps=eps,
        )

    def __call__(
        self,
        x: Float[Array, "t d"],
        modulations: tuple[Modulation, Modulation],
        angles: Float[Array, "t a"],
        extra_kv: list[KVCache],
        mask: KeyMask,
    ) -> Float[Array, "t d"]:
        """`modulations` are the outputs of `attention_adaln` and `mlp_adaln`."""
        attention, mlp = modulations
        normed = modulate(x, attention, self.eps)
        gate = attention.gate.astype(x.dtype)[None]
        x = x + gate * self.attention(normed, angles, extra_kv, mask)
        gate = mlp.gate.astype(x.dtype)[None]
        return x + gate * self.mlp(modulate(x, mlp, self.eps))


def modulate_layers(
    blocks: DiTBlock, time: Modulation
) -> tuple[tuple[Modulation, Modulation], DiTBlock]:
    """The modulations of all blocks, and the blocks without their AdaLN.

    Modulations depend only on the timestep, so all layers are computed together, before the scan.
    """

    def adaln(block: DiTBlock) -> tuple[LowRankAdaLN, LowRankAdaLN]:
        return block.attention_adaln, block.mlp_adaln

    def of_layer(layers: tuple[LowRankAdaLN, LowRankAdaLN]) -> tuple[Modulation, Modulation]:
        attention, mlp = all_gather_params(layers)
        return attention(time), mlp(time)

    rest = eqx.tree_at(adaln, blocks, (None, None))
    return eqx.filter_vmap(of_layer)(adaln(blocks)), rest


def stack_layers(init: Callable[[PRNGKeyArray], Any], num_layers: int, key: PRNGKeyArray) -> Any:
    """`num_layers` modules stacked into one: every leaf has a leading layer axis."""
    return eqx.filter_vmap(init)(jr.split(key, num_layers))


def scan_layers(
    body: Callable[[Any, Array, Any], Array],
    x: Array,
    layers: Any,
    per_layer: Any = None,
    *,
    remat: Remat = "full",
) -> Array:
    """`x = body(layer, x, per_layer[i])` for each layer, compiled once for all of them.

    FSDP shards are gathered inside the body, in the forward and again in the backward pass, so that
    only one layer at a time is held in full.
    """
    arrays, static = eqx.partition(layers, eqx.is_array)

    def step(x, inputs):
        layer, extra = inputs
        return body(all_gather_params(eqx.combine(layer, static)), x, extra), None

    # In a scan, recomputation cannot be merged with the forward pass, so no barrier is needed.
    step = jax.checkpoint(step, policy=_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(step, x, (arrays, per_layer))[0]
