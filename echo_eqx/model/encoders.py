"""Encoders of the text and of latents. They depend on neither the noise nor the timestep."""

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from echo_eqx.config import DiTConfig, EncoderConfig
from echo_eqx.layers.linear import Embedding, Linear
from echo_eqx.layers.rotary import rotary_angles
from echo_eqx.model.attention import KeyMask
from echo_eqx.model.blocks import Remat, TransformerBlock, scan_layers, stack_layers


def init_blocks(config: EncoderConfig, eps: float, key: PRNGKeyArray) -> TransformerBlock:
    return stack_layers(
        lambda key: TransformerBlock.init(config, eps, key=key), config.num_layers, key
    )


class TextEncoder(eqx.Module):
    """Byte embedding and bidirectional transformer blocks."""

    text_embedding: Embedding
    blocks: TransformerBlock

    @classmethod
    def init(cls, config: DiTConfig, *, key: PRNGKeyArray) -> "TextEncoder":
        key_embedding, key_blocks = jr.split(key)
        return cls(
            text_embedding=Embedding.init(config.vocab_size, config.text.dim, key=key_embedding),
            blocks=init_blocks(config.text, config.norm_eps, key_blocks),
        )

    def __call__(
        self, ids: Int[Array, " s"], mask: Bool[Array, " s"], *, remat: Remat = "full"
    ) -> Float[Array, "s e"]:
        x = self.text_embedding(ids)
        angles = rotary_angles(ids.shape[0], self.blocks.attention.head_dim)
        keys = KeyMask.of(mask)
        return scan_layers(lambda block, x, _: block(x, keys, angles), x, self.blocks, remat=remat)


class LatentEncoder(eqx.Module):
    """Patches of latents and causal transformer blocks, for the reference and for the prefix."""

    in_proj: Linear
    blocks: TransformerBlock
    patch_size: int = eqx.field(static=True)
    proj_scale: float = eqx.field(static=True)

    @classmethod
    def init(cls, config: DiTConfig, *, key: PRNGKeyArray) -> "LatentEncoder":
        key_proj, key_blocks = jr.split(key)
        patch_dim = config.latent_dim * config.patch_size
        return cls(
            in_proj=Linear.init(patch_dim, config.speaker.dim, bias=True, key=key_proj),
            blocks=init_blocks(config.speaker, config.norm_eps, key_blocks),
            patch_size=config.patch_size,
            proj_scale=config.speaker_proj_scale,
        )

    def __call__(
        self, latents: Float[Array, "r c"], *, remat: Remat = "full"
    ) -> Float[Array, "p e"]:
        num_patches = latents.shape[0] // self.patch_size
        x = self.in_proj(latents.reshape(num_patches, -1)) * self.proj_scale
        angles = rotary_angles(num_patches, self.blocks.attention.head_dim)
        return scan_layers(
            lambda block, x, _: block(x, None, angles, causal=True), x, self.blocks, remat=remat
        )
