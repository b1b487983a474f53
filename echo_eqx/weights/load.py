"""`load_dit` and `load_codec`: any file of weights that is known, told apart by its content."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig, DiTConfig
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig
from echo_eqx.model.dit import EchoDiT
from echo_eqx.trees import cast
from echo_eqx.weights.assemble import Arrays, Sources, check_memory, check_sizes, load_into, single
from echo_eqx.weights.checkpoint.reader import TrainingCheckpoint, checkpoint_generation
from echo_eqx.weights.dacvae import load_dacvae_pth
from echo_eqx.weights.find import find_weights
from echo_eqx.weights.flax import read_flax_checkpoint
from echo_eqx.weights.names import (
    flax_config,
    flax_sources,
    pytorch_config,
    pytorch_sources,
)
from echo_eqx.weights.native import native_config, native_generation, native_kind
from echo_eqx.weights.safetensors_reader import SafetensorsFile
from echo_eqx.weights.sharded import INDEX_SUFFIX, ShardedSafetensors, WithoutPrefix


def load_dit(source: str | Path, *, dtype: Any = jnp.float32) -> EchoDiT:
    """Load an EchoDiT.

    **Arguments**: `source` "voice" for the small voice in the package, or a file, a folder or a Hub
    id `owner/name[@revision][:file]`, holding our safetensors, a Flax checkpoint of the published
    trainer (pickle), or the community's PyTorch safetensors, also in parts with an index or under a
    prefix that all names share; or a training checkpoint, or a run folder, of which the newest is
    taken, with the moving average where one was kept; `dtype` of the matrices, and so of the
    computation.

    **Raises**: `EchoError` naming the file and what is wrong with it. No file can run code.
    """
    path = find_weights(source)
    if path.is_dir():
        return _load_checkpoint(path, "dit", dtype)
    kind = _kind(path)
    if kind == "safetensors":
        file = _open(path)
        if native_kind(file) == "dit":
            return _load_own(file, dtype)
        if native_kind(file) == "codec":
            raise EchoError(f"{path} holds a codec; wanted an EchoDiT")
        weights = WithoutPrefix(file)
        shapes = weights.shapes()
        config = _within(path, lambda: pytorch_config(shapes))
        return _fill_dit(config, dtype, path, pytorch_sources, weights.names, weights)
    if kind == "pickle":
        params = read_flax_checkpoint(path).params
        return dit_from_flax(params, path, dtype)
    raise EchoError(f"{path} is a PyTorch file of a codec or another model; wanted an EchoDiT")


def load_codec(source: str | Path, *, dtype: Any = jnp.float32) -> DACVAE:
    """Load a DACVAE.

    **Arguments**: `source` "voice" for the codec of the small voice in the package, or a file, a
    folder or a Hub id `owner/name[@revision][:file]`, holding our safetensors or the published
    `weights.pth`, or a training checkpoint or run folder, as in `load_dit`; `dtype` of the kernels.

    **Raises**: `EchoError` naming the file and what is wrong with it. No file can run code.
    """
    path = find_weights(source, "codec")
    if path.is_dir():
        return _load_checkpoint(path, "codec", dtype)
    kind = _kind(path)
    if kind == "torch":
        return load_dacvae_pth(path, dtype)
    if kind == "safetensors":
        file = _open(path)
        if native_kind(file) == "codec":
            return _load_own(file, dtype)
    raise EchoError(f"{path} holds no codec; wanted a DACVAE weights.pth or safetensors of ours")


def dit_from_flax(tensors: Mapping[str, np.ndarray], path: Path, dtype: Any) -> EchoDiT:
    """An EchoDiT from arrays under Flax names: weights, or moments of the same shapes."""
    shapes = {name: array.shape for name, array in tensors.items()}
    config = _within(path, lambda: flax_config(shapes))
    return _fill_dit(config, dtype, path, flax_sources, tensors, tensors)


def _open(path: Path) -> SafetensorsFile | ShardedSafetensors:
    is_index = path.name.endswith(INDEX_SUFFIX)
    return ShardedSafetensors(path) if is_index else SafetensorsFile(path)


def _kind(path: Path) -> str:
    if path.name.endswith(INDEX_SUFFIX):
        return "safetensors"
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise EchoError(f"{path} cannot be read: {error.strerror}") from None
    if not head:
        raise EchoError(f"{path} is empty; wanted a file of weights")
    # A safetensors file begins with the length of its header, which is JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return "safetensors"
    if head[:2] == b"PK":
        return "torch"
    if head[0] == 0x80:
        return "pickle"
    if path.suffix == ".safetensors":
        return "safetensors"
    raise EchoError(f"{path} is no safetensors, pickle or PyTorch file (it begins {head[:8]!r})")


def _within(path: Path, read: Callable[[], DiTConfig]) -> DiTConfig:
    try:
        return read()
    except EchoError as error:
        raise EchoError(f"{path}: {error}") from None


def _load_checkpoint(path: Path, kind: str, dtype: Any) -> Any:
    checkpoint = TrainingCheckpoint(path)
    if checkpoint.model_kind != kind:
        names = {"dit": "an EchoDiT", "codec": "a codec"}
        raise EchoError(f"{path} holds {names[checkpoint.model_kind]}; wanted {names[kind]}")
    arrays = checkpoint.model_arrays()
    shapes = {name: arrays.shape(name) for name in arrays.names}
    generation = checkpoint_generation(checkpoint)
    return _fill_own(checkpoint.config, generation, dtype, path, shapes, arrays)


def _load_own(file: SafetensorsFile | ShardedSafetensors, dtype: Any) -> Any:
    weights = WithoutPrefix(file)
    config, generation = native_config(file), native_generation(file)
    return _fill_own(config, generation, dtype, file.path, weights.shapes(), weights)


def _fill_own(
    config: DiTConfig | CodecConfig,
    generation: GenerationConfig,
    dtype: Any,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Arrays,
) -> Any:
    check_sizes(config, shapes, str(path))

    def init() -> EchoDiT | DACVAE:
        if isinstance(config, CodecConfig):
            return DACVAE.init(config, key=jax.random.key(0))
        return EchoDiT.init(config, generation, key=jax.random.key(0))

    skeleton = jax.eval_shape(lambda: cast(init(), dtype))
    check_memory(skeleton, str(path))
    return load_into(skeleton, lambda leaf: Sources([leaf], single), arrays, shapes, str(path))


def _fill_dit(
    config: DiTConfig,
    dtype: Any,
    path: Path,
    sources: Callable[[str, DiTConfig], Sources],
    names: Iterable[str],
    arrays: Arrays,
) -> EchoDiT:
    skeleton = jax.eval_shape(lambda: cast(EchoDiT.init(config, key=jax.random.key(0)), dtype))
    check_memory(skeleton, str(path))
    return load_into(skeleton, lambda leaf: sources(leaf, config), arrays, names, str(path))
