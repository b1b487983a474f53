"""Where each parameter lies on the mesh: one table from its name to a PartitionSpec.

`tensor` splits heads and hidden columns, so that a matrix product is shared between devices; `fsdp`
splits the other dimension, so that no device keeps what all of them use alike.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from echo_eqx.errors import UsageError
from echo_eqx.layers.split import DATA, FSDP, TENSOR, Slice, whole
from echo_eqx.trees import leaf_names

# Of one layer; a stack has its layer axis in front, which is never split.
RULES: tuple[tuple[str, P], ...] = (
    (r"attention\.(w[qkv]|w[kv]_(text|speaker|latent)|gate)\.weight", P(FSDP, TENSOR)),
    (r"attention\.wo\.weight", P(TENSOR, FSDP)),
    (r"attention\.[qk]_norm\.weight", P(TENSOR, None)),
    (r"mlp\.w[13]\.weight", P(FSDP, TENSOR)),
    (r"mlp\.w2\.weight", P(TENSOR, FSDP)),
    (r"(attention|mlp)_adaln\.(shift|scale|gate)\.down\.weight", P(FSDP, TENSOR)),
    (r"(attention|mlp)_adaln\.(shift|scale|gate)\.up\.weight", P(TENSOR, FSDP)),
    (r"(attention|mlp)_adaln\.(shift|scale|gate)\.up\.bias", P(None)),
    (r"(attention|mlp|text|speaker|latent|out)_norm\.weight", P(None)),
    (r"text_encoder\.text_embedding\.weight", P(None, FSDP)),
    (r"((speaker|latent)_encoder\.)?in_proj\.weight", P(None, FSDP)),
    (r"((speaker|latent)_encoder\.)?in_proj\.bias", P(None)),
    (r"time_conditioner\.dense[01]\.weight", P(None, FSDP)),
    (r"time_conditioner\.dense2\.weight", P(FSDP, None)),
    (r"out_proj\.weight", P(FSDP, None)),
    (r"out_proj\.bias", P(None)),
)

_STACK = re.compile(r"((text|speaker|latent)_encoder\.)?blocks\.")


def parameter_spec(name: str) -> P:
    """The spec of the parameter `name`; a name that no rule or several match is our own bug."""
    stack = _STACK.match(name)
    rest = name[stack.end() :] if stack else name
    matches = [spec for pattern, spec in RULES if re.fullmatch(pattern, rest)]
    assert len(matches) == 1, f"{name} is matched by {len(matches)} sharding rules"
    return P(None, *matches[0]) if stack else matches[0]


def parameter_specs(model: Any) -> Any:
    """`model` with the spec of each leaf in its place."""
    treedef = jax.tree.structure(model)
    return treedef.unflatten(parameter_spec(name) for name in leaf_names(model))


def check_mesh(model: Any, sizes: Mapping[str, int]) -> None:
    """Every split dimension divides; `model` may be abstract.

    **Raises**: `UsageError` naming the first parameter that does not.
    """
    names = leaf_names(model)
    # Heads first: they are what a person chooses `tensor` by.
    order = sorted(
        zip(names, jax.tree.leaves(model), strict=True), key=lambda x: "norm" not in x[0]
    )
    for name, leaf in order:
        for dim, axis in zip(leaf.shape, parameter_spec(name), strict=True):
            if axis is not None and dim % sizes[axis]:
                what = "heads" if "norm" in name else "rows or columns"
                raise UsageError(
                    f"the {dim} {what} of {name} do not split over {axis}={sizes[axis]}"
                )


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a training state: moments and averages lie where their parameters do.

    A leaf's name ends with that of its parameter, behind `model.`, `adam.mu.` and the like;
    counters lie everywhere.
    """

    def sharding(name: str, leaf: Any) -> NamedSharding:
        parameter = re.sub(r"^(model|ema|adam\.mu|adam\.nu)\.", "", name)
        return NamedSharding(mesh, P() if leaf.ndim == 0 else parameter_spec(parameter))

    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten(map(sharding, leaf_names(state), leaves))


def as_slices(model: Any) -> Any:
    """In `shard_map`: this device's parts of `model`, marked so that `whole` gathers them.

    Parameters outside the stacks of layers are few, and are gathered here.
    """

    def mark(name: str, leaf: Any) -> Any:
        spec = parameter_spec(name)
        if FSDP not in spec:
            return leaf
        if _STACK.match(name):  # in the body of the scan the layer axis is gone
            return Slice(leaf, spec.index(FSDP) - 1)
        return whole(Slice(leaf, spec.index(FSDP)))

    leaves, treedef = jax.tree.flatten(model)
    return treedef.unflatten(map(mark, leaf_names(model), leaves))


def axes_not_split(spec: P) -> tuple[str, ...]:
    """Axes of the batch over which a parameter with `spec` is repeated."""
    return tuple(axis for axis in (DATA, FSDP) if axis not in spec)
