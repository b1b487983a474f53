"""EchoDiT: the velocity of a flow from noise to speech latents, given text and a reference voice.

Shapes, for one example: x (t, c) noisy latents, text_ids (s,) bytes, speaker_latents (r, c), with
r = patch_size * p. Batches are made with `jax.vmap` around the calls.
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
from echo_eqx.model.blocks import DecoderBlock, scan_layers, stack_layers
from echo_eqx.model.encoders import LatentEncoder, TextEncoder
from echo_eqx.model.joint_attention import KeysValues


class Context(eqx.Module):
    """All that the decoder reads of text and reference: computed once, used by every step."""

    text: KeysValues
    text_mask: Bool[Array, "*b s"]
    speaker: KeysValues
    speaker_mask: Bool[Array, "*b p"]


class Prefix(eqx.Module):
    """Keys and values of latents already generated, and the frame at which `x` goes on."""

    latents: KeysValues
    start: Int[Array, ""]


class EchoDiT(eqx.Module):
    """The velocity model. `EchoDiT.init(config, key=key)` makes one with fresh weights.

    Computes in the type of its matrices (`trees.cast`); norms, softmax, RoPE and time conditioning
    are in float32 always.
    """

    text_encoder: TextEncoder
    text_norm: RMSNorm
    speaker_encoder: LatentEncoder
    speaker_norm: RMSNorm
    latent_encoder: LatentEncoder | None
    latent_norm: RMSNorm | None
    time_conditioner: TimeConditioner
    in_proj: Linear
    blocks: DecoderBlock
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
        """Fresh weights: `out_proj` and the AdaLN up-projections zero, the rest normal of 0.02."""
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
                lambda key: DecoderBlock.init(config, key=key), config.num_layers, keys[5]
            ),
            out_norm=RMSNorm.init(dim, eps),
            out_proj=Linear.init(dim, config.latent_dim, bias=True, zero=True, key=keys[6]),
            config=config,
            generation=generation,
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the matrices, which is the type of the computation."""
        return self.in_proj.weight.dtype

    def __call__(
        self,
        x: Shaped[Array | np.ndarray, "..."],
        t: Shaped[Array | np.ndarray, "..."] | float,
        text_ids: Shaped[Array | np.ndarray, "..."],
        text_mask: Shaped[Array | np.ndarray, "..."],
        speaker_latents: Shaped[Array | np.ndarray, "..."],
        speaker_mask: Shaped[Array | np.ndarray, "..."],
    ) -> Float[Array, "t {self.config.latent_dim}"]:
        """Velocity at `x` (t, c) and time `t` (0 = data, 1 = noise), float32, for one example.

        `text_ids` (s,) are UTF-8 bytes behind a leading 0, and `speaker_latents` are (r, c), with
        `r` a multiple of the config's `patch_size`; where `text_mask` (s,) or `speaker_mask` (r,)
        is false the text or reference is not seen.

        **Raises**: `EchoError` naming an argument of another shape or type.
        """
        self._check(x, t, text_ids, text_mask, speaker_latents, speaker_mask)
        noisy, time, latents = (jnp.asarray(a, jnp.float32) for a in (x, t, speaker_latents))
        text, text_seen = self._text_state(jnp.asarray(text_ids), jnp.asarray(text_mask))
        speaker, speaker_seen = self._speaker_state(latents, jnp.asarray(speaker_mask))

        def sources(block: DecoderBlock, _):
            return [
                (block.attention.text_keys_values(text, text_seen), text_seen),
                (block.attention.speaker_keys_values(speaker, speaker_seen), speaker_seen),
            ]

        return self._decode(noisy, time, sources, None, jnp.ones(x.shape[0], bool), None)

    def _check(self, x, t, text_ids, text_mask, speaker_latents, speaker_mask) -> None:
        width, patch = self.config.latent_dim, self.config.patch_size
        hint = "(one example; jax.vmap makes batches)"
        for name, latents in (("x", x), ("speaker_latents", speaker_latents)):
            shape = jnp.shape(latents)
            if len(shape) != 2 or shape[0] == 0 or shape[1] != width:
                raise EchoError(f"{name}: expected latents (t, {width}), got {shape} {hint}")
        if jnp.shape(t) != ():
            raise EchoError(f"t: expected a single time, got shape {jnp.shape(t)} {hint}")
        frames = speaker_latents.shape[0]
        if frames % patch:
            raise EchoError(
                f"speaker_latents: expected a multiple of {patch} frames, got {frames}; cut or pad "
                "them, and mask what is padded"
            )
        if text_ids.ndim != 1 or not jnp.issubdtype(text_ids.dtype, jnp.integer):
            raise EchoError(
                f"text_ids: expected whole numbers (s,), got {text_ids.dtype} of shape "
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

    def context(
        self,
        text_ids: Int[Array, " s"],
        text_mask: Bool[Array, " s"],
        speaker_latents: Float[Array, "r {self.config.latent_dim}"],
        speaker_mask: Bool[Array, " r"],
    ) -> Context:
        """Keys and values of text and reference for all layers; arguments as in `__call__`."""
        text, text_mask = self._text_state(text_ids, text_mask)
        speaker, speaker_mask = self._speaker_state(speaker_latents, speaker_mask)
        attention = self.blocks.attention
        return Context(
            text=eqx.filter_vmap(lambda layer: layer.text_keys_values(text, text_mask))(attention),
            text_mask=text_mask,
            speaker=eqx.filter_vmap(lambda layer: layer.speaker_keys_values(speaker, speaker_mask))(
                attention
            ),
            speaker_mask=speaker_mask,
        )

    def prefix(
        self, latents: Float[Array, "r {self.config.latent_dim}"], start: Int[Array, ""]
    ) -> Prefix:
        """Keys and values of earlier latents, of which those before frame `start` will be seen.

        Only for models with `config.blockwise`. `r` is a multiple of `patch_size`.
        """
        assert self.latent_encoder is not None and self.latent_norm is not None
        state = self.latent_norm(self.latent_encoder(latents.astype(self.dtype)))
        angles = rotary_angles(state.shape[0], self._head_dim, stride=self.config.patch_size)
        latents_kv = eqx.filter_vmap(lambda layer: layer.latent_keys_values(state, angles))
        return Prefix(latents_kv(self.blocks.attention), start)

    def velocity(
        self,
        x: Float[Array, "t {self.config.latent_dim}"],
        t: Float[Array, ""],
        context: Context,
        *,
        frame_mask: Bool[Array, " t"],
        speaker_scale: Float[Array, " n"],
        prefix: Prefix | None = None,
    ) -> Float[Array, "t {self.config.latent_dim}"]:
        """`__call__` from a `Context`.

        `frame_mask` is false for frames behind the end of the canvas; what comes out there means
        nothing and what stands there does not matter. `speaker_scale` multiplies the keys and
        values of the reference, layer by layer.
        """
        per_layer = (context.text, context.speaker, speaker_scale, prefix and prefix.latents)

        def sources(_, layer):
            text, speaker, scale, latents = layer
            out = [(text, context.text_mask), (speaker.scaled(scale), context.speaker_mask)]
            if prefix is not None:
                frames = self.config.patch_size * jnp.arange(latents.keys.shape[0])
                out.insert(0, (latents, frames < prefix.start))
            return out

        return self._decode(x, t, sources, per_layer, frame_mask, prefix)

    def _decode(self, x, t, sources, per_layer, frame_mask, prefix: Prefix | None):
        time = self.time_conditioner(t)
        if prefix is None:
            angles = rotary_angles(x.shape[0], self._head_dim)
        else:
            end = prefix.latents.keys.shape[1] * self.config.patch_size
            angles = rotary_angles(end, self._head_dim)
            angles = jax.lax.dynamic_slice_in_dim(angles, prefix.start, x.shape[0])

        def body(block: DecoderBlock, x, layer):
            return block(x, time, frame_mask, angles, sources(block, layer))

        # Frames without meaning must not carry NaN into the keys.
        x = jnp.where(frame_mask[:, None], x, 0).astype(self.dtype)
        x = scan_layers(body, self.in_proj(x), self.blocks, per_layer)
        return self.out_proj(self.out_norm(x)).astype(jnp.float32)

    def _text_state(self, ids, mask):
        state = self.text_encoder(jnp.where(mask, ids, 0), mask).astype(self.dtype)
        return self.text_norm(state), mask

    def _speaker_state(self, latents, mask):
        # The encoder is causal and has no mask: clearing what follows the last frame seen keeps
        # it out, and changes nothing before it.
        mask = mask[:: self.config.patch_size]
        seen = jnp.cumsum(mask[::-1])[::-1] > 0
        seen = jnp.repeat(seen, self.config.patch_size)
        latents = jnp.where(seen[:, None], latents, 0).astype(self.dtype)
        return self.speaker_norm(self.speaker_encoder(latents)), mask

    @property
    def _head_dim(self) -> int:
        return self.blocks.attention.head_dim
