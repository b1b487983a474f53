"""Filling an abstract model with arrays: every leaf once, every source tensor once, all finite."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.codec.fish.dac import FishDAC
from echo_eqx.config import CodecConfig, DiTConfig, FishConfig
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig
from echo_eqx.model.dit import EchoDiT
from echo_eqx.model.int8 import quantize
from echo_eqx.trees import cast, leaf_names

T = TypeVar("T")
FLOATS = {np.dtype(kind) for kind in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Sources:
    """The names of the tensors that make up a leaf, and a function that assembles it from them."""

    names: list[str]
    assemble: Callable[[list[np.ndarray]], np.ndarray]


def single(arrays: list[np.ndarray]) -> np.ndarray:
    (array,) = arrays
    return array


@functools.lru_cache(maxsize=16)
def abstract_model(
    config: DiTConfig | CodecConfig | FishConfig,
    generation: GenerationConfig,
    dtype: Any,
    int8: bool = False,
) -> Any:
    """A model of `ShapeDtypeStruct`s. It is kept, since tracing an initializer takes a second."""

    def init() -> EchoDiT | Codec:
        if isinstance(config, CodecConfig):
            return DACVAE.init(config, key=jax.random.key(0))
        if isinstance(config, FishConfig):
            return FishDAC.init(config, key=jax.random.key(0))
        return EchoDiT.init(config, generation, key=jax.random.key(0))

    model = jax.eval_shape(lambda: cast(init(), dtype))
    return quantize(model) if int8 else model


def load_into(
    skeleton: T, sources: Callable[[str], Sources], arrays: Any, names: Iterable[str], where: str
) -> T:
    """`skeleton`, a module of `ShapeDtypeStruct`s, with each leaf read and cast to its type.

    **Arguments**: `sources` says, for a leaf's name, which tensors it is made of; `arrays[name]`
    reads a tensor and `names` lists them all; `where` names the source in errors.

    **Raises**: `EchoError` naming the tensor that is missing, left over, of another shape, not
    finite, or not floating-point (int8 where the leaf is int8).
    """
    abstract, treedef = jax.tree.flatten(skeleton)
    known = set(names)
    unused = set(known)
    filled = []
    for leaf_name, leaf in zip(leaf_names(skeleton), abstract, strict=True):
        source = sources(leaf_name)
        tensors = [_checked(name, known, arrays, where, leaf.dtype) for name in source.names]
        shapes = " and ".join(sorted({str(tensor.shape) for tensor in tensors}))
        got = f"got {source.names[0]} of shape {shapes}"
        try:
            array = source.assemble(tensors)
        except (ValueError, IndexError) as error:
            raise EchoError(f"{where}: {leaf_name}: {got}, which does not fit: {error}") from None
        if array.shape != leaf.shape:
            raise EchoError(
                f"{where}: {leaf_name}: expected shape {leaf.shape}, got {array.shape} "
                f"(from {source.names[0]} of shape {shapes})"
            )
        unused.difference_update(source.names)
        # Copied and cast on the host, so that no view of the file is kept and nothing is compiled.
        filled.append(jax.device_put(array.astype(leaf.dtype)))
    if unused:
        raise EchoError(
            f"{where}: tensor {min(unused)} belongs to no part of the model "
            f"({len(unused)} left over)"
        )
    return treedef.unflatten(filled)


def _checked(name: str, known: set[str], arrays: Any, where: str, dtype: Any) -> np.ndarray:
    if name not in known:
        raise EchoError(f"{where}: tensor {name} is missing")
    array = arrays[name]
    if dtype == np.int8:
        if array.dtype != np.int8:
            raise EchoError(f"{where}: {name}: expected int8, got {array.dtype}")
        return array
    if array.dtype not in FLOATS:
        raise EchoError(f"{where}: {name}: expected floating-point numbers, got {array.dtype}")
    if not np.isfinite(array.astype(np.float32, copy=False)).all():
        raise EchoError(f"{where}: {name} has values that are not finite")
    return array


def check_sizes(config: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Reject a config whose sizes exceed those of the tensors, before any work is done with it.

    The `shapes` of the source's tensors can be trusted, because the file has enough data for them.
    """
    largest = max((max(shape, default=0) for shape in shapes.values() if 0 not in shape), default=0)
    for name, value in _sizes(dataclasses.asdict(config), ""):
        # Each LSTM layer has tensors of its own; all other sizes are along an axis.
        limit = len(shapes) if name.endswith("num_lstm_layers") else largest
        if value > limit:
            raise EchoError(
                f"{where}: {name} in the config: expected at most {limit} for its tensors, "
                f"got {value}"
            )


def _sizes(fields: Mapping[str, Any], where: str) -> Iterator[tuple[str, int]]:
    """Sizes in a config that occur in the shape of some tensor."""
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _sizes(value, f"{where}{name}.")
        elif isinstance(value, tuple):
            yield from ((where + name, size) for size in value)
        elif type(value) is int and not name.startswith("max_") and name != "sample_rate":
            yield where + name, value


def check_memory(skeleton: Any, where: str) -> None:
    """Reject a model that does not fit into free memory, before anything is allocated."""
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(skeleton))
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        free, place = stats["bytes_limit"] - stats.get("bytes_in_use", 0), str(device)
    else:
        import psutil

        free, place = psutil.virtual_memory().available, "this machine"
    if needed > free:
        raise EchoError(
            f"{where} needs {needed / 2**30:.1f} GiB for its weights; "
            f"{place} has {free / 2**30:.1f} GiB free"
        )
