"""Layers under fully sharded data parallelism (FSDP) and tensor parallelism.

Inside `jax.shard_map` a module holds this device's shards of its parameters. Heads and hidden
columns are split over the mesh axis `tensor` (Shoeybi et al., 2019, arXiv:1909.08053). The other
dimension of a matrix is split over `fsdp` and gathered when the layer runs (Rajbhandari et al.,
2020, arXiv:1910.02054). Outside `shard_map` the functions here do nothing.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"


class FSDPShard(eqx.Module):
    """This device's shard of a parameter that is split along `axis` over `fsdp`.

    It takes the place of the parameter until `all_gather_params` puts the full array back. Layers,
    which read the parameter, must not see it.
    """

    shard: Array
    axis: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)
    """The dtype in which it is gathered. If it is not the shard's, which is float32, the gradient
    is summed over devices in float32."""


def all_gather_params(tree: Any) -> Any:
    """`tree` with every `FSDPShard` replaced by the full array.

    The gradient of an all-gather is a reduce-scatter: each device keeps the gradient of its shard.
    """

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, FSDPShard):
            return leaf
        if leaf.shard.dtype != leaf.dtype:
            return _cast_and_gather(leaf.shard, leaf.axis, leaf.dtype)
        return jax.lax.all_gather(leaf.shard, FSDP, axis=leaf.axis, tiled=True)

    return jax.tree.map(gather, tree, is_leaf=lambda leaf: isinstance(leaf, FSDPShard))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _cast_and_gather(shard: Array, axis: int, dtype: Any) -> Array:
    return jax.lax.all_gather(shard.astype(dtype), FSDP, axis=axis, tiled=True)


def _cast_and_gather_forward(shard: Array, axis: int, dtype: Any) -> tuple[Array, None]:
    return _cast_and_gather(shard, axis, dtype), None


def _sum_in_float32(axis: int, dtype: Any, _: None, gradient: Array) -> tuple[Array]:
    wide = gradient.astype(jnp.float32)
    return (jax.lax.psum_scatter(wide, FSDP, scatter_dimension=axis, tiled=True),)


_cast_and_gather.defvjp(_cast_and_gather_forward, _sum_in_float32)


def psum_tensor(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Sum over `tensor` of the devices' partial products; `x` itself outside `shard_map`."""
    return jax.lax.psum(x, TENSOR) if _in_shard_map() else x


def rope_head_mask(num_heads: int) -> Bool[Array, " h"]:
    """Which of this device's heads are in the first half of all heads."""
    first = jax.lax.axis_index(TENSOR) * num_heads if _in_shard_map() else 0
    return first + jnp.arange(num_heads) < num_heads * tensor_size() // 2


def tensor_size() -> int:
    """Devices that share the heads and hidden columns of a layer; 1 outside `shard_map`."""
    return jax.lax.axis_size(TENSOR) if _in_shard_map() else 1


def _in_shard_map() -> bool:
    return TENSOR in jax.sharding.get_abstract_mesh().manual_axes
