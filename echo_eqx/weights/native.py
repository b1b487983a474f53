"""Our own safetensors: leaves by name, with the kind of model and its sizes in the metadata."""

import json
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.config import CONFIGS, CodecConfig, DiTConfig, FishConfig
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.files import write_json, write_whole
from echo_eqx.generation import GenerationConfig, generation_from_json
from echo_eqx.json_data import from_json, parse_json, to_json
from echo_eqx.model.dit import EchoDiT
from echo_eqx.model.int8 import dequantize, quantize
from echo_eqx.trees import named_leaves
from echo_eqx.weights.safetensors_reader import SafetensorsFile
from echo_eqx.weights.safetensors_writer import Tensor, converted, write_safetensors
from echo_eqx.weights.sharded import ShardedSafetensors

FORMAT = "echo_eqx"
GENERATION = "generation"
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
INT8 = "int8"


def save(
    model: EchoDiT | Codec,
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
    generation: GenerationConfig | None = None,
) -> None:
    """Write a model as safetensors, atomically.

    **Arguments**:
    - `path`: a file `*.safetensors`, or a folder, which gets `model.safetensors` and `config.json`.
    - `dtype`: of the numbers on disk; see `native_tensors`.
    - `generation`: recommended settings to store with an EchoDiT, by default `model.generation`.

    **Raises**: `EchoError` if `path` cannot be written or a number does not fit `dtype`;
    `UsageError` for an unknown `dtype`, or a codec with int8.
    """
    path = Path(path)
    tensors, metadata = native_tensors(model, dtype), native_metadata(model, generation)
    is_file = path.suffix == ".safetensors"
    file = path if is_file else path / "model.safetensors"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda temporary: write_safetensors(temporary, tensors, metadata))
        if not is_file:
            write_json(path / "config.json", readable(metadata))
    except OSError as error:
        raise EchoError(f"{file} cannot be written: {error}") from None


def native_tensors(model: EchoDiT | Codec, dtype: str) -> list[Tensor]:
    """The tensors of a native file: the leaves by name, in `dtype`.

    With int8, a linear layer NAME of attention or SwiGLU is two tensors: `NAME.weight`, int8
    (layers, in, out), and `NAME.scale`, float32 (layers, out), whose product is the weight. AdaLN
    and timestep conditioning are bfloat16, all else is float32. See `echo_eqx.model.int8`.

    **Raises**: `UsageError` if `dtype` is unknown or does not exist for `model`. The tensors raise
    an `EchoError`, when they are written, if a number does not fit `dtype`.
    """
    if dtype == INT8:
        if not isinstance(model, EchoDiT):
            raise UsageError("int8: expected an EchoDiT, got a codec, which has no linear layers")
        leaves = named_leaves(quantize(model))
        return [converted(name, leaf, leaf.dtype) for name, leaf in sorted(leaves.items())]
    if dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join([*DTYPES, INT8])}, got {dtype!r}")
    if isinstance(model, EchoDiT):
        model = dequantize(model)
    leaves = named_leaves(model)
    return [converted(name, leaf, DTYPES[dtype]) for name, leaf in sorted(leaves.items())]


def native_metadata(
    model: EchoDiT | Codec, generation: GenerationConfig | None = None
) -> dict[str, str]:
    """Metadata of a native file: format, kind of model, sizes, and recommended settings."""
    kind = "dit" if isinstance(model, EchoDiT) else "codec"
    metadata = {"config": json.dumps(to_json(model.config)), "format": FORMAT}
    if isinstance(model, EchoDiT):
        metadata |= generation_metadata(generation or model.generation)
    return metadata | {"kind": kind}


def readable(metadata: dict[str, str]) -> dict[str, Any]:
    """`metadata` as `config.json` shows it."""
    nested = ("config", GENERATION)
    return {name: json.loads(text) if name in nested else text for name, text in metadata.items()}


def native_kind(file: SafetensorsFile | ShardedSafetensors) -> str | None:
    """ "dit" or "codec" for one of our files, None for any other."""
    if file.metadata.get("format") != FORMAT:
        return None
    kind = file.metadata.get("kind")
    if kind not in ("dit", "codec"):
        raise EchoError(f"{file.path}: expected a file of kind dit or codec, got {kind!r}")
    return kind


def native_config(
    file: SafetensorsFile | ShardedSafetensors,
) -> DiTConfig | CodecConfig | FishConfig:
    """The config in one of our files."""
    try:
        data = parse_json(file.metadata["config"].encode("utf-8", "surrogatepass"))
        kind = native_kind(file) or ""
        if kind == "codec" and isinstance(data, dict) and "type" in data:
            return from_json(FishConfig, data)
        return from_json(CONFIGS[kind], data)
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
