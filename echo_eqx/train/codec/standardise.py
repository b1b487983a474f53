"""Latents of mean 0 and deviation 1 in every channel, by the bottleneck's own projections."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.prepare.clips import Clip
from echo_eqx.prepare.encode import ClipEncoder, EncodeSettings


def standardise(codec: DACVAE, clips: Sequence[Clip], batch_size: int = 8) -> DACVAE:
    """`codec` with the latents of `clips` standardised; clips that cannot be read are left out."""
    encoded = ClipEncoder(codec, EncodeSettings(batch_size=batch_size))(clips, lambda _: None)
    latents = [x.astype(np.float64) for x in encoded.values() if isinstance(x, np.ndarray)]
    joined = np.concatenate(latents)
    return rescaled(codec, joined.mean(0), joined.std(0))


def rescaled(
    codec: DACVAE, mean: Float[np.ndarray, " c"], deviation: Float[np.ndarray, " c"]
) -> DACVAE:
    """`codec` whose latents are `(z - mean) / deviation` where they were z; it decodes the same.

    The bottleneck's own deviation is `softplus(scale) + 1e-4`, which no projection divides;
    it is scaled as its small values are, which is where a trained bottleneck has them.
    """
    shift = jnp.asarray(mean, jnp.float32)
    factor = jnp.asarray(deviation, jnp.float32)
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
