"""Checkpoints of the published Flax trainer: a pickle `{params, opt_state, step, samples_seen}`."""

import mmap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.errors import EchoError
from echo_eqx.weights.safe_pickle import NUMPY, PARSE_ERRORS, Builder, Record, load, ordered_dict
from echo_eqx.weights.sharded import shared_prefix

_MAX_LEAVES = 100_000
_MAX_DEPTH = 64
_MAX_LETTERS = 10_000_000


KNOWN: dict[str, Builder] = {
    **NUMPY,
    "collections.OrderedDict": ordered_dict,
    **{
        name: partial(Record, name.rsplit(".", 1)[1])
        for name in (
            "flax.linen.spmd.LogicallyPartitioned",
            "flax.core.meta.Partitioned",
            "flax.core.frozen_dict.FrozenDict",
            "optax._src.base.EmptyState",
            "optax._src.transform.ScaleByAdamState",
            "optax._src.transform.ScaleByScheduleState",
            "optax._src.transform.TraceState",
            "optax._src.wrappers.MaskedNode",
            "optax._src.wrappers.MaskedState",
            "optax.transforms._masking.MaskedNode",
            "optax.transforms._masking.MaskedState",
            "optax._src.wrappers.MultiStepsState",
            "optax.transforms._accumulation.MultiStepsState",
            "optax._src.wrappers.ApplyIfFiniteState",
        )
    },
}


@dataclass(frozen=True)
class FlaxCheckpoint:
    """A training state by Flax names such as `TransformerBlock_0/attention/wq/Dense_0/kernel`."""

    params: dict[str, np.ndarray]
    mu: dict[str, np.ndarray] | None
    """Adam's first moments, under the names of `params`; None without optimizer state."""
    nu: dict[str, np.ndarray] | None
    adam_count: int | None
    """Updates that Adam has made."""
    step: int
    samples_seen: int


def read_flax_checkpoint(path: Path) -> FlaxCheckpoint:
    """Read a checkpoint without Flax or optax, and without running any code that it names.

    **Raises**: `EchoError` naming the file and what is wrong in it.
    """
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise EchoError(f"{path} is empty; expected a pickled checkpoint")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise EchoError(f"{path} cannot be read: {error}") from None
    tree = load(data, str(path), KNOWN)
    try:
        return _checkpoint(tree, path)
    except PARSE_ERRORS as error:
        raise EchoError(f"{path}: the checkpoint is damaged ({type(error).__name__})") from None


def _checkpoint(tree: Any, path: Path) -> FlaxCheckpoint:
    if not isinstance(tree, dict) or "params" not in tree:
        raise EchoError(f"{path}: expected a dict with params, opt_state and step, got no params")
    params = _flatten(tree["params"], path)
    prefix = shared_prefix(params, "/")  # "params/", or that of a wrapper
    adam = _find_adam(tree.get("opt_state"), path)
    return FlaxCheckpoint(
        params=_without(prefix, params),
        mu=_without(prefix, adam["mu"]) if adam else None,
        nu=_without(prefix, adam["nu"]) if adam else None,
        adam_count=adam["count"] if adam else None,
        step=_counter(tree, "step", path),
        samples_seen=_counter(tree, "samples_seen", path),
    )


def _without(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items()}


def _counter(tree: dict, name: str, path: Path) -> int:
    value = _unwrap(tree.get(name, 0))
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, int):
        raise EchoError(f"{path}: {name}: expected a number, got a {type(value).__name__}")
    return value


def _unwrap(value: Any) -> Any:
    """The array in an array record or a partitioning wrapper, or the dict in a FrozenDict."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(value, Record):
            return value
        if value.name == "ndarray" and value.args:
            return value.args[0]
        state = _state_dict(value)
        if value.name in ("LogicallyPartitioned", "Partitioned") and "value" in state:
            value = state["value"]
        elif value.name == "FrozenDict":
            value = value.args[0] if value.args else state.get("_dict", {})
        else:
            return value
    raise EchoError("records are nested too deeply")


def _state_dict(record: Record) -> dict:
    state = record.state
    if isinstance(state, tuple) and len(state) == 2:  # (__dict__, slots)
        state = {**(state[0] or {}), **(state[1] or {})}
    return state if isinstance(state, dict) else {}


def _flatten(tree: Any, path: Path) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    visits = letters = 0

    def visit(value: Any, name: str, depth: int) -> None:
        nonlocal visits, letters
        visits += 1
        letters += len(name)
        if visits > _MAX_LEAVES or depth > _MAX_DEPTH or letters > _MAX_LETTERS:
            raise EchoError(f"{path}: the tree of parameters is larger than any model's")
        value = _unwrap(value)
        if isinstance(value, dict):
            for key, child in value.items():
                visit(child, f"{name}/{key}" if name else str(key), depth + 1)
        elif isinstance(value, np.ndarray):
            out[name] = value
        elif not (isinstance(value, Record) and value.name == "MaskedNode"):
            raise EchoError(f"{path}: {name}: expected an array, got a {type(value).__name__}")

    visit(tree, "", 0)
    return out


def _find_adam(opt_state: Any, path: Path) -> dict[str, Any] | None:
    """The Adam state, wherever it is in a chain of optimizers."""
    visits = 0

    def search(value: Any, depth: int) -> dict[str, Any] | None:
        nonlocal visits
        visits += 1
        if visits > _MAX_LEAVES or depth > _MAX_DEPTH:
            raise EchoError(f"{path}: the optimizer state is larger than any model's")
        value = _unwrap(value)
        if isinstance(value, Record):
            if value.name == "ScaleByAdamState":
                fields = dict(zip(("count", "mu", "nu"), value.args, strict=True))
                return {
                    "count": _counter(fields, "count", path),
                    "mu": _flatten(fields["mu"], path),
                    "nu": _flatten(fields["nu"], path),
                }
            children = value.args
        elif isinstance(value, tuple | list):
            children = value
        elif isinstance(value, dict):
            children = value.values()
        else:
            return None
        for child in children:
            if (found := search(child, depth + 1)) is not None:
                return found
        return None

    return search(opt_state, 0)
