"""EchoDiT: velocity of a flow from noise to speech latents, given a text and a reference voice.

Shapes for one example: x (t, c) noisy latents, text_ids (s,) bytes, speaker_latents (r, c) with
r = patch_size * p. Use `jax.vmap` for batches.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from echo_eqx.config import DiTConfig
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig
from echo_eqx.layers.adaln import TimeConditioner
from echo_eqx.layers.linear import Linear
from echo_eqx.layers.norm import RMSNorm
from echo_eqx.layers.rotary import rotary_angles
from echo_eqx.model.attention import KeyMask
from echo_eqx.model.blocks import (
    DiTBlock,
    Remat,
    modulate_layers,
    scan_layers,
    stack_layers,
)
from echo_eqx.model.encoders import LatentEncoder, TextEncoder
from echo_eqx.model.joint_attention import KVCache


class ConditionCache(eqx.Module):
    """Keys and values of text and reference, computed once and used in every sampling step."""

    text: KVCache
    text_mask: Bool[Array, "*b s"]
    speaker: KVCache
    speaker_mask: Bool[Array, "*b p"]


class SpeakerCache(eqx.Module):
    """Keys and values of a reference, which depend on neither text nor noise."""

    keys_values: KVCache
    mask: Bool[Array, "*b p"]


class Prefix(eqx.Module):
    """Keys and values of latents already generated, and the frame at which `x` continues them."""

    latents: KVCache
    start: Int[Array, ""]


class Block(eqx.Module):
    """The part of a canvas that is generated after the latents before it, as in training."""

    latents: Float[Array, "*b t c"]
    """The whole canvas without noise. Only frames before `start` are read."""
    start: Int[Array, "*b"]
    """First frame of the block, a multiple of `config.patch_size`."""
    end: Int[Array, "*b"]
    """The frame after its last."""


class EchoDiT(eqx.Module):
    """The velocity model. `EchoDiT.init(config, key=key)` returns one with random weights.

    It computes in the dtype of its matrices (see `cast`); norms, softmax, RoPE and timestep
    conditioning are always in float32.
    """

    text_encoder: TextEncoder
    text_norm: RMSNorm
    speaker_encoder: LatentEncoder
    speaker_norm: RMSNorm
    latent_encoder: LatentEncoder | None
    latent_norm: RMSNorm | None
    time_conditioner: TimeConditioner
    in_proj: Linear
    blocks: DiTBlock
    out_norm: RMSNorm
    out_proj: Linear
    config: DiTConfig = eqx.field(static=True)
    generation: GenerationConfig = eqx.field(static=True, default=GenerationConfig())

    @classmethod
    def init(
        cls,
        config: DiTConfig,
        generation: GenerationConfig = GenerationConfig(),  # noqa: B008 (it is frozen)
        *,
        key: PRNGKeyArray,
    ) -> "EchoDiT":
        """Truncated normal init with std 0.02; `out_proj` and the AdaLN up-projections are zero."""
        keys = jr.split(key, 7)
        dim, eps = config.model_dim, config.norm_eps
        return cls(
            text_encoder=TextEncoder.init(config, key=keys[0]),
            text_norm=RMSNorm.init(config.text.dim, eps),
            speaker_encoder=LatentEncoder.init(config, key=keys[1]),
            speaker_norm=RMSNorm.init(config.speaker.dim, eps),
            latent_encoder=LatentEncoder.init(config, key=keys[2]) if config.blockwise else None,
            latent_norm=RMSNorm.init(config.speaker.dim, eps) if config.blockwise else None,
            time_conditioner=TimeConditioner.init(config.time_embed_dim, dim, key=keys[3]),
            in_proj=Linear.init(config.latent_dim, dim, bias=True, key=keys[4]),
            blocks=stack_layers(
                lambda key: DiTBlock.init(config, key=key), config.num_layers, keys[5]
            ),
            out_norm=RMSNorm.init(dim, eps),
            out_proj=Linear.init(dim, config.latent_dim, bias=True, zero=True, key=keys[6]),
            config=config,
            generation=generation,
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the matrices, in which the model computes."""
        return self.in_proj.weight.dtype

    def __call__(
        self,
        x: Shaped[Array | np.ndarray, "..."],
        t: Shaped[Array | np.ndarray, "..."] | float,
        text_ids: Shaped[Array | np.ndarray, "..."],
        text_mask: Shaped[Array | np.ndarray, "..."],
        speaker_latents: Shaped[Array | np.ndarray, "..."],
        speaker_mask: Shaped[Array | np.ndarray, "..."],
        *,
        block: Block | None = None,
        remat: Remat = "full",
    ) -> Float[Array, "t {self.config.latent_dim}"]:
        """Velocity at `x` (t, c) and timestep `t` (0 = data, 1 = noise) of one example, float32.

        `text_ids` (s,) are UTF-8 bytes after a leading 0. `speaker_latents` are (r, c), where r is
        a multiple of `config.patch_size`. Text and reference are ignored where `text_mask` (s,) and
        `speaker_mask` (r,) are false. `remat` is what the backward pass recomputes.

        With `block`, which needs `config.blockwise`, the frames of the block have the velocity that
        `velocity` gives them alone behind their `Prefix`; that of other frames is meaningless.

        **Raises**: `EchoError` naming the argument whose shape or dtype is wrong.
        """
        self._check(x, t, text_ids, text_mask, speaker_latents, speaker_mask)
        noisy, time, latents = (jnp.asarray(a, jnp.float32) for a in (x, t, speaker_latents))
        text, text_mask = self._encode_text(jnp.asarray(text_ids), jnp.asarray(text_mask), remat)
        speaker, speaker_mask = self._encode_speaker(latents, jnp.asarray(speaker_mask), remat)

        earlier = None if block is None else self._encode_latents(block.latents, remat)

        def extra_kv(layer: DiTBlock, _):
            attention = layer.attention
            latents = [] if earlier is None else [attention.latent_kv(*earlier)]
            return [
                *latents,
                attention.text_kv(text, text_mask),
                attention.speaker_kv(speaker, speaker_mask),
            ]

        masks = [jnp.ones(x.shape[0], bool), text_mask, speaker_mask]
        if block is not None:
            frames = jnp.arange(x.shape[0])
            in_block = (frames >= block.start) & (frames < block.end)
            patches = frames[: self._whole_patches(x.shape[0]) : self.config.patch_size]
            masks = [in_block, patches < block.start, text_mask, speaker_mask]
        return self._decode(noisy, time, extra_kv, None, masks, None, remat)

    def _check(self, x, t, text_ids, text_mask, speaker_latents, speaker_mask) -> None:
        width, patch = self.config.latent_dim, self.config.patch_size
        hint = "(for a batch use jax.vmap)"
        for name, latents in (("x", x), ("speaker_latents", speaker_latents)):
            shape = jnp.shape(latents)
            if len(shape) != 2 or shape[0] == 0 or shape[1] != width:
                raise EchoError(f"{name}: expected latents (t, {width}), got {shape} {hint}")
        if jnp.shape(t) != ():
            raise EchoError(f"t: expected a scalar, got shape {jnp.shape(t)} {hint}")
        frames = speaker_latents.shape[0]
        if frames % patch:
            raise EchoError(
                f"speaker_latents: expected a multiple of {patch} frames, got {frames}; crop "
                "them, or pad and mask them"
            )
        if text_ids.ndim != 1 or not jnp.issubdtype(text_ids.dtype, jnp.integer):
            raise EchoError(
                f"text_ids: expected integers (s,), got {text_ids.dtype} of shape "
                f"{text_ids.shape} {hint}"
            )
        pairs = {
            "text_mask": (text_mask, text_ids),
            "speaker_mask": (speaker_mask, speaker_latents),
        }
        for name, (mask, masked) in pairs.items():
            if mask.shape != masked.shape[:1] or mask.dtype != bool:
                raise EchoError(
                    f"{name}: expected booleans {masked.shape[:1]}, got {mask.dtype} of shape "
                    f"{mask.shape}"
                )

    def encode_conditions(
        self,
        text_ids: Int[Array, " s"],
        text_mask: Bool[Array, " s"],
        speaker_latents: Float[Array, "r {self.config.latent_dim}"],
        speaker_mask: Bool[Array, " r"],
    ) -> ConditionCache:
        """Keys and values of text and reference for all layers; arguments as in `__call__`."""
        text, text_mask = self.encode_text(text_ids, text_mask)
        speaker = self.encode_speaker(speaker_latents, speaker_mask)
        return ConditionCache(text, text_mask, speaker.keys_values, speaker.mask)

    def encode_text(
        self, text_ids: Int[Array, " s"], text_mask: Bool[Array, " s"]
    ) -> tuple[KVCache, Bool[Array, " s"]]:
        """Keys and values of a text for all layers, and its mask."""
        text, text_mask = self._encode_text(text_ids, text_mask)
        keys_values = eqx.filter_vmap(lambda layer: layer.text_kv(text, text_mask))
        return keys_values(self.blocks.attention), text_mask

    def encode_speaker(
        self,
        speaker_latents: Float[Array, "r {self.config.latent_dim}"],
        speaker_mask: Bool[Array, " r"],
    ) -> SpeakerCache:
        """Keys and values of a reference for all layers, and the mask of its patches."""
        speaker, mask = self._encode_speaker(speaker_latents, speaker_mask)
        keys_values = eqx.filter_vmap(lambda layer: layer.speaker_kv(speaker, mask))
        return SpeakerCache(keys_values(self.blocks.attention), mask)

    def encode_prefix(
        self, latents: Float[Array, "r {self.config.latent_dim}"], start: Int[Array, ""]
    ) -> Prefix:
        """Keys and values of latents already generated: those before frame `start` of `latents`.

        Only for models with `config.blockwise`. r is a multiple of `config.patch_size`.
        """
        state, angles = self._encode_latents(latents)
        latents_kv = eqx.filter_vmap(lambda layer: layer.latent_kv(state, angles))
        return Prefix(latents_kv(self.blocks.attention), start)

    def velocity(
        self,
        x: Float[Array, "t {self.config.latent_dim}"],
        t: Float[Array, ""],
        conditions: ConditionCache,
        *,
        frame_mask: Bool[Array, " t"],
        speaker_scale: Float[Array, " n"],
        prefix: Prefix | None = None,
    ) -> Float[Array, "t {self.config.latent_dim}"]:
        """`__call__` from a `ConditionCache`.

        `frame_mask` is false for padding frames: their content is ignored, and their velocity is
        meaningless. `speaker_scale` multiplies the reference's keys and values, one factor per
        layer.
        """
        per_layer = (conditions.text, conditions.speaker, speaker_scale, prefix and prefix.latents)

        def extra_kv(_, layer):
            text, speaker, scale, latents = layer
            earlier = [] if prefix is None else [latents]
            return [*earlier, text, speaker.scaled(scale)]

        masks = [frame_mask, conditions.text_mask, conditions.speaker_mask]
        if prefix is not None:
            frames = self.config.patch_size * jnp.arange(prefix.latents.keys.shape[1])
            masks.insert(1, frames < prefix.start)
        return self._decode(x, t, extra_kv, per_layer, masks, prefix, "full")

    def _decode(self, x, t, extra_kv, per_layer, masks, prefix, remat: Remat):
        modulations, blocks = modulate_layers(self.blocks, self.time_conditioner(t))
        mask = KeyMask.of(jnp.concatenate(masks))
        if prefix is None:
            angles = rotary_angles(x.shape[0], self._head_dim)
        else:
            end = prefix.latents.keys.shape[1] * self.config.patch_size
            angles = rotary_angles(end, self._head_dim)
            angles = jax.lax.dynamic_slice_in_dim(angles, prefix.start, x.shape[0])

        def body(block: DiTBlock, x, layer):
            modulations, layer = layer
            return block(x, modulations, angles, extra_kv(block, layer), mask)

        # Padding frames must not bring NaN into the keys.
        x = jnp.where(masks[0][:, None], x, 0).astype(self.dtype)
        x = scan_layers(body, self.in_proj(x), blocks, (modulations, per_layer), remat=remat)
        return self.out_proj(self.out_norm(x)).astype(jnp.float32)

    def _encode_text(self, ids, mask, remat: Remat = "full"):
        state = self.text_encoder(jnp.where(mask, ids, 0), mask, remat=remat).astype(self.dtype)
        return self.text_norm(state), mask

    def _encode_speaker(self, latents, mask, remat: Remat = "full"):
        # The encoder is causal and takes no mask. Zeros after the last unmasked patch keep NaN out
        # and change nothing before them.
        mask = mask[:: self.config.patch_size]
        patches = jnp.arange(mask.shape[0])
        last = jnp.max(jnp.where(mask, patches, -1))
        is_before_end = jnp.repeat(patches <= last, self.config.patch_size)
        latents = jnp.where(is_before_end[:, None], latents, 0).astype(self.dtype)
        return self.speaker_norm(self.speaker_encoder(latents, remat=remat)), mask

    def _encode_latents(self, latents, remat: Remat = "full"):
        """States of the latents' whole patches, and the angles of their first frames."""
        assert self.latent_encoder is not None and self.latent_norm is not None
        latents = latents[: self._whole_patches(latents.shape[0])].astype(self.dtype)
        state = self.latent_norm(self.latent_encoder(latents, remat=remat))
        return state, rotary_angles(state.shape[0], self._head_dim, stride=self.config.patch_size)

    def _whole_patches(self, frames: int) -> int:
        return frames - frames % self.config.patch_size

    @property
    def _head_dim(self) -> int:
        return self.blocks.attention.head_dim
