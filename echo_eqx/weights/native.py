"""Our own safetensors: leaves by name, with the kind of model and its sizes in the metadata."""

import json
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CONFIGS, CodecConfig, DiTConfig
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.files import write_json, write_whole
from echo_eqx.generation import GenerationConfig, generation_from_json
from echo_eqx.json_data import from_json, parse_json, to_json
from echo_eqx.model.dit import EchoDiT
from echo_eqx.trees import named_leaves
from echo_eqx.weights.names import to_pytorch
from echo_eqx.weights.safetensors_reader import SafetensorsFile
from echo_eqx.weights.safetensors_writer import save_arrays
from echo_eqx.weights.sharded import ShardedSafetensors

FORMAT = "echo_eqx"
GENERATION = "generation"
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def save(
    model: EchoDiT | DACVAE,
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    layout: Literal["echo_eqx", "pytorch"] = "echo_eqx",
    generation: GenerationConfig | None = None,
) -> None:
    """Write a model as safetensors, atomically.

    **Arguments**:
    - `path`: a file `*.safetensors`, or a folder, which gets `model.safetensors` and `config.json`.
    - `dtype`: of the numbers on disk.
    - `layout`: "pytorch" writes an EchoDiT with the names and shapes of the community's PyTorch
      model.
    - `generation`: recommended settings to store with an EchoDiT, by default `model.generation`.

    **Raises**: `EchoError` if `path` cannot be written or a number does not fit `dtype`;
    `UsageError` for an unknown `dtype` or `layout`, or a codec with `layout="pytorch"`.
    """
    path = Path(path)
    array_dtype(dtype)
    if layout not in ("echo_eqx", "pytorch"):
        raise UsageError(f"layout: expected echo_eqx or pytorch, got {layout!r}")
    leaves = {name: np.asarray(leaf, np.float32) for name, leaf in named_leaves(model).items()}
    if layout == "pytorch":
        if not isinstance(model, EchoDiT):
            raise UsageError("layout: expected echo_eqx for a codec, got 'pytorch'")
        leaves = to_pytorch(leaves, model.config)
        metadata = {"format": "pt"}
    else:
        kind = "dit" if isinstance(model, EchoDiT) else "codec"
        config = json.dumps(to_json(model.config))
        metadata = {"format": FORMAT, "kind": kind, "config": config}
        if isinstance(model, EchoDiT):
            metadata |= generation_metadata(generation or model.generation)
    leaves = {name: _to_disk(name, array, dtype) for name, array in leaves.items()}

    is_file = path.suffix == ".safetensors"
    file = path if is_file else path / "model.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda temporary: save_arrays(temporary, leaves, metadata))
        if not is_file:
            readable = {
                name: json.loads(value) if name in ("config", GENERATION) else value
                for name, value in metadata.items()
            }
            write_json(path / "config.json", readable)
    except OSError as error:
        raise EchoError(f"{file} cannot be written: {error}") from None


def _to_disk(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = array.astype(DTYPES[dtype], order="C")
    if not np.isfinite(out.astype(np.float32)).all():
        raise EchoError(f"{name} has values that {dtype} cannot hold")
    return out


def native_kind(file: SafetensorsFile | ShardedSafetensors) -> str | None:
    """ "dit" or "codec" for one of our files, None for any other."""
    if file.metadata.get("format") != FORMAT:
        return None
    kind = file.metadata.get("kind")
    if kind not in ("dit", "codec"):
        raise EchoError(f"{file.path}: expected a file of kind dit or codec, got {kind!r}")
    return kind


def native_config(file: SafetensorsFile | ShardedSafetensors) -> DiTConfig | CodecConfig:
    """The config in one of our files."""
    try:
        data = parse_json(file.metadata["config"].encode("utf-8", "surrogatepass"))
        return from_json(CONFIGS[native_kind(file) or ""], data)
    except KeyError:
        raise EchoError(f"{file.path} carries no config") from None
    except (EchoError, ValueError) as error:
        raise EchoError(f"{file.path} carries no usable config: {error}") from None


def native_generation(file: SafetensorsFile | ShardedSafetensors) -> GenerationConfig:
    """The recommended generation settings in one of our files; defaults if it has none."""
    try:
        return generation_from_json(json.loads(file.metadata.get(GENERATION, "{}")))
    except (EchoError, ValueError, RecursionError) as error:
        raise EchoError(f"{file.path} carries no usable generation settings: {error}") from None


def generation_metadata(generation: GenerationConfig) -> dict[str, str]:
    """`generation` as metadata of a file; empty if it is the default."""
    if generation == GenerationConfig():
        return {}
    return {GENERATION: json.dumps(to_json(generation))}


def array_dtype(name: str) -> Any:
    """The dtype called `name`, for `load_dit` and `load_codec`."""
    if name not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return jnp.dtype(DTYPES[name])
