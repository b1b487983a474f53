"""Names, counts and casts of a module's leaves. The path is the name: `blocks.mlp.w1.weight`."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")
_MATRICES = ("weight", "weight_in", "weight_hidden", "message_embedding")


def leaf_names(tree: Any) -> list[str]:
    """Dotted names of the leaves of `tree`, in the order of `jax.tree.leaves`."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of `tree` by name."""
    return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def num_parameters(tree: Any) -> int:
    """Number of parameters: the total size of the leaves of `tree`, which may be abstract."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def cast(tree: T, dtype: Any) -> T:
    """A copy of the model `tree` with its matrices, embeddings and kernels in `dtype`.

    `dtype` is anything that `jnp.dtype` takes, such as "bfloat16". Norm weights, biases, the
    Snake's alpha and the scales of int8 weights are float32 whatever `dtype` is: they are small and
    used in float32 arithmetic. int8 weights stay int8.
    """
    dtype = jnp.dtype(dtype)

    def leaf_dtype(name: str, leaf: Any) -> Any:
        if leaf.dtype == jnp.int8:
            return leaf.dtype
        is_matrix = name.endswith(_MATRICES) and not name.endswith("norm.weight")
        return dtype if is_matrix else jnp.float32

    leaves, treedef = jax.tree.flatten(tree)
    names = leaf_names(tree)
    return treedef.unflatten(
        leaf.astype(leaf_dtype(name, leaf)) for name, leaf in zip(names, leaves, strict=True)
    )
