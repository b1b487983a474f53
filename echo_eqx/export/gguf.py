"""An EchoDiT for echo-tts-cpp: `echo-dit.gguf`, in F32, F16, BF16 or, for int8, Q8_0.

    echo-tts --model FOLDER/echo-dit.gguf ...

As there, tensors of less than a million numbers are F32. So are those of `cond_module` in a file of
BF16, which its loader cannot read from that; and in a file of Q8_0, AdaLN, `cond_module` and
`out_proj` are F16, as are rows that Q8_0 cannot divide.

That program turns latents into audio by Fish S1-DAC (44.1 kHz, hop 2048), after a PCA that is part
of the file. For latents of another codec the PCA is written as the identity onto the first of its
1024 channels: the file is complete and the velocities are right, but the audio is not.

Source: github.com/Cirius0310/echo-tts-cpp, `scripts/export_gguf.py` and `cpp/src/echo_model.cpp`.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from echo_eqx.errors import EchoError, UsageError, optional
from echo_eqx.export.models import Models
from echo_eqx.export.pytorch import constructor_arguments
from echo_eqx.model.dit import EchoDiT
from echo_eqx.trees import named_leaves
from echo_eqx.weights.names import to_pytorch

logger = logging.getLogger(__name__)
FORM = "gguf"
ARCHITECTURE = "echo-tts"
FILE = "echo-dit.gguf"
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}
_SMALL = 1_000_000
"""Tensors with fewer numbers are F32."""
_FISH_CHANNELS = 1024


def write(models: Models, folder: Path, dtype: str) -> None:
    """Write the file, one tensor at a time.

    **Raises**: `EchoError` if the package `gguf` is missing, or naming the tensor that the format
    cannot hold.
    """
    gguf = optional("gguf", "export")
    dit = models.only_dit(FORM)
    config = dit.config
    if config.latent_dim > _FISH_CHANNELS:
        raise UsageError(
            f"{FORM}: pca.components: expected latents of at most {_FISH_CHANNELS} channels, got "
            f"{config.latent_dim}"
        )
    writer = gguf.GGUFWriter(folder / FILE, arch=ARCHITECTURE)
    for key, value in constructor_arguments(config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"echo.{key}", value)
    writer.add_bool("echo.include_blockwise", config.blockwise)
    writer.add_string("echo.dtype", TYPES[dtype].lower())
    writer.add_float32("pca.latent_scale", 1.0)
    writer.add_description("The latents are of another codec than Fish S1-DAC; the PCA is identity")
    logger.warning(
        f"{FORM}: echo-tts-cpp speaks through Fish S1-DAC only, and the latents of this model are "
        "not its own; the file loads, but only its latents can be used"
    )

    kinds = {}
    for name, shape in _shapes(dit).items():
        kinds[name] = kind = gguf.GGMLQuantizationType[_type(name, shape, TYPES[dtype])]
        as_bytes = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, as_bytes, np.dtype(np.uint8), math.prod(as_bytes), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, array in _tensors(dit):
        writer.write_tensor_data(_encode(gguf, name, array, kinds[name]))
    writer.close()


def _tensors(dit: EchoDiT) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 arrays, one leaf of the model in memory at a time."""
    channels = dit.config.latent_dim
    yield "pca.components", np.eye(channels, _FISH_CHANNELS, dtype=np.float32)
    yield "pca.mean", np.zeros(_FISH_CHANNELS, np.float32)
    for leaf, array in named_leaves(dit).items():
        yield from to_pytorch({leaf: np.asarray(array, np.float32)}, dit.config).items()


def _shapes(dit: EchoDiT) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in _tensors(dit)}


def _type(name: str, shape: tuple[int, ...], wanted: str) -> str:
    is_conditioning = name.startswith("cond_module.")
    if math.prod(shape) < _SMALL or (wanted == "BF16" and is_conditioning):
        return "F32"
    stays_float = is_conditioning or "_adaln." in name or name.startswith("out_proj.")
    if wanted == "Q8_0" and (stays_float or shape[-1] % 32):
        return "F16"
    return wanted


def _encode(gguf: Any, name: str, array: np.ndarray, kind: Any) -> np.ndarray:
    """Bytes of a tensor."""
    with np.errstate(over="ignore"):
        data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
    match kind.name:
        case "Q8_0":  # blocks of a scale in float16 and 32 integers
            floats = data.reshape(-1, 34)[:, :2].copy().view(np.float16)
        case "BF16":
            floats = data.view(ml_dtypes.bfloat16).astype(np.float32)
        case _:
            floats = data
    if not np.isfinite(floats).all():
        raise EchoError(f"{FORM}: {name} has values that {kind.name} cannot hold")
    return data.view(np.uint8)
