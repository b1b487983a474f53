"""A layer that is split over the devices of a mesh: the few things its code has to know.

Inside `jax.shard_map` a module holds this device's slices of its parameters. Heads and hidden
columns lie along the mesh axis `tensor` (Shoeybi et al., 2019, arXiv:1909.08053); the other
dimension of a matrix lies along `fsdp` and is gathered when the layer runs (Rajbhandari et al.,
2020, arXiv:1910.02054). Anywhere else the functions here change nothing.
"""

from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"

T = TypeVar("T")


class Slice(eqx.Module):
    """This device's part of an array that is split along `axis` over `fsdp`.

    It stands where the array would, until `whole` puts the array there.
    """

    part: Array
    axis: int = eqx.field(static=True)


def whole(tree: T) -> T:
    """`tree` with every `Slice` gathered.

    The gradient of a gather is a reduce-scatter: each device is left with the gradient of its part.
    """

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, Slice):
            return leaf
        return jax.lax.all_gather(leaf.part, FSDP, axis=leaf.axis, tiled=True)

    return jax.tree.map(gather, tree, is_leaf=lambda leaf: isinstance(leaf, Slice))


def sum_over_tensor(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Sum of the devices' products, where the dimension summed over is split along `tensor`."""
    return jax.lax.psum(x, TENSOR) if _is_split() else x


def in_first_half(num_heads: int) -> Bool[Array, " h"]:
    """Which of this device's heads are among the first half of all heads."""
    heads = jnp.arange(num_heads)
    if not _is_split():
        return heads < num_heads // 2
    first = jax.lax.axis_index(TENSOR) * num_heads
    return first + heads < num_heads * jax.lax.axis_size(TENSOR) // 2


def _is_split() -> bool:
    return TENSOR in jax.sharding.get_abstract_mesh().manual_axes
