"""Standardizes latents to mean 0 and std 1 per channel, inside the bottleneck's projections."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.prepare.clips import Clip
from echo_eqx.prepare.encode import ClipEncoder, EncodeSettings


def standardize(codec: DACVAE, clips: Sequence[Clip], batch_size: int = 8) -> DACVAE:
    """`codec` with its latents of `clips` standardized; unreadable clips are skipped."""
    encoded = ClipEncoder(codec, EncodeSettings(batch_size=batch_size))(clips, lambda _: None)
    latents = [x.astype(np.float64) for x in encoded.values() if isinstance(x, np.ndarray)]
    joined = np.concatenate(latents)
    return rescaled(codec, joined.mean(0), joined.std(0))


def rescaled(codec: DACVAE, mean: Float[np.ndarray, " c"], std: Float[np.ndarray, " c"]) -> DACVAE:
    """`codec` with latents `(z - mean) / std` instead of z, and the same decoded audio.

    The bottleneck's std is `softplus(scale) + 1e-4`, which a linear map cannot rescale exactly. A
    trained std is small, so it is rescaled as for small values, where softplus is an exponential.
    """
    shift = jnp.asarray(mean, jnp.float32)
    factor = jnp.asarray(std, jnp.float32)
    into, out = codec.bottleneck.in_proj, codec.bottleneck.out_proj
    both = jnp.concatenate([factor, jnp.ones_like(factor)])
    lowered = jnp.concatenate([shift / factor, jnp.log(factor)])
    return eqx.tree_at(
        lambda c: (
            c.bottleneck.in_proj.weight,
            c.bottleneck.in_proj.bias,
            c.bottleneck.out_proj.weight,
            c.bottleneck.out_proj.bias,
        ),
        codec,
        (
            into.weight / both[None, None],
            into.bias / both - lowered,
            out.weight * factor[None, :, None],
            out.bias + jnp.einsum("c,co->o", shift, out.weight[0]),
        ),
    )
