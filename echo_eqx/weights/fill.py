"""Filling an abstract model with arrays: every leaf once, every source tensor once, all finite."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np
import psutil

from echo_eqx.errors import EchoError
from echo_eqx.trees import leaf_names

T = TypeVar("T")


def fill(
    skeleton: T,
    read: Callable[[str], tuple[np.ndarray, list[str]]],
    source_names: Iterable[str],
    where: str,
) -> T:
    """`skeleton`, a module of `ShapeDtypeStruct`s, with each leaf read and cast to its type.

    **Arguments**: `read` gives, for a leaf's name, its array and the source tensors it came from;
    `source_names` are all tensors of the source; `where` names the source in errors.

    **Raises**: `EchoError` naming the tensor that is missing, left over, of another shape or not
    finite.
    """
    abstract, treedef = jax.tree.flatten(skeleton)
    unused = set(source_names)
    filled = []
    for name, leaf in zip(leaf_names(skeleton), abstract, strict=True):
        array, names = read(name)
        if array.shape != leaf.shape:
            raise EchoError(
                f"{where}: {names[0]} gives {name} the shape {array.shape}; wanted {leaf.shape}"
            )
        if not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise EchoError(f"{where}: {names[0]} has values that are not finite")
        unused.difference_update(names)
        # A copy of its own, cast here: views of the file stay behind and nothing is compiled.
        filled.append(jax.device_put(array.astype(leaf.dtype)))
    if unused:
        raise EchoError(
            f"{where}: tensor {min(unused)} belongs to no part of the model "
            f"({len(unused)} left over)"
        )
    return treedef.unflatten(filled)


def check_memory(skeleton: Any, where: str) -> None:
    """Refuse, before anything is allocated, a model that does not fit the free memory."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(skeleton))
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        free, place = stats["bytes_limit"] - stats.get("bytes_in_use", 0), str(device)
    else:
        free, place = psutil.virtual_memory().available, "this machine"
    if needed > free:
        raise EchoError(
            f"{where} needs {needed / 2**30:.1f} GiB for its weights; "
            f"{place} has {free / 2**30:.1f} GiB free"
        )
