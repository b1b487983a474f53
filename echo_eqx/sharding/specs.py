"""The sharding of each parameter: one table from its name to a PartitionSpec.

`tensor` splits heads and hidden columns, so that devices share a matrix product; `fsdp` splits the
other dimension, so that parameters are not replicated.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from echo_eqx.errors import UsageError
from echo_eqx.layers.parallel import DATA, FSDP, TENSOR, FSDPShard, all_gather_params
from echo_eqx.trees import cast, leaf_names

# Specs of a single layer. Stacked layers have a leading layer axis, which is never split.
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
    """The spec of the parameter `name`. Exactly one rule must match it."""
    if name.endswith(".scale"):  # one number for each column of an int8 weight
        *layers, _, columns = parameter_spec(f"{name.removesuffix('scale')}weight")
        return P(*layers, columns)
    stack = _STACK.match(name)
    rest = name[stack.end() :] if stack else name
    matches = [spec for pattern, spec in RULES if re.fullmatch(pattern, rest)]
    assert len(matches) == 1, f"{name} is matched by {len(matches)} sharding rules"
    return P(None, *matches[0]) if stack else matches[0]


def parameter_specs(model: Any) -> Any:
    """A tree like `model` with each leaf replaced by its spec."""
    treedef = jax.tree.structure(model)
    return treedef.unflatten(parameter_spec(name) for name in leaf_names(model))


def check_mesh(model: Any, sizes: Mapping[str, int]) -> None:
    """Check that the mesh divides every split dimension; `model` may be abstract.

    **Raises**: `UsageError` naming the first parameter that does not divide.
    """
    names = leaf_names(model)
    # Norm weights first: their first axis is the heads, which limit the choice of `tensor`.
    order = sorted(
        zip(names, jax.tree.leaves(model), strict=True), key=lambda x: "norm" not in x[0]
    )
    for name, leaf in order:
        for dim, axis in zip(leaf.shape, parameter_spec(name), strict=True):
            if axis is not None and dim % sizes[axis]:
                what = "heads" if "norm" in name else "rows or columns"
                raise UsageError(
                    f"mesh: expected {axis} to divide the {dim} {what} of {name}, got "
                    f"{axis}={sizes[axis]}"
                )


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Shardings of a training state: moments and EMA are sharded like their parameters.

    A leaf's name is its parameter's with a prefix such as `model.` or `adam.mu.`; counters are
    replicated.
    """

    def sharding(name: str, leaf: Any) -> NamedSharding:
        parameter = re.sub(r"^(model|ema|adam\.mu|adam\.nu)\.", "", name)
        return NamedSharding(mesh, P() if leaf.ndim == 0 else parameter_spec(parameter))

    leaves, treedef = jax.tree.flatten(state)
    return treedef.unflatten(map(sharding, leaf_names(state), leaves))


def mark_fsdp_shards(model: Any, dtype: Any, grad_reduce_dtype: Any = None) -> Any:
    """Inside `shard_map`: replace the stacked layers' shards by `FSDPShard`s and gather the others.

    Parameters are gathered in `dtype`, as `cast` has it. Their gradients are summed over devices in
    that dtype, or in float32 if that is `grad_reduce_dtype`.

    The result has the structure of `model` but not its types: only `scan_layers` can use the marked
    shards, which it gathers layer by layer. The other parameters are few and are gathered here.
    """

    def mark(name: str, master: Any, leaf: Any) -> Any:
        spec = parameter_spec(name)
        if FSDP not in spec:
            return leaf
        shard = master if grad_reduce_dtype == "float32" else leaf
        if _STACK.match(name):  # the scan's body sees no layer axis
            return FSDPShard(shard, spec.index(FSDP) - 1, leaf.dtype)
        return all_gather_params(FSDPShard(shard, spec.index(FSDP), leaf.dtype))

    leaves, treedef = jax.tree.flatten(model)
    marked = map(mark, leaf_names(model), leaves, jax.tree.leaves(cast(model, dtype)))
    return treedef.unflatten(marked)


def replicated_axes(spec: P) -> tuple[str, ...]:
    """Batch axes over which a parameter with `spec` is replicated."""
    return tuple(axis for axis in (DATA, FSDP) if axis not in spec)
