"""An EchoDiT for echo-tts-cpp: `echo-dit.gguf`, in F32, F16, BF16 or, for int8, Q8_0.

    echo-tts --model FOLDER/echo-dit.gguf ...

As there, tensors of less than a million numbers are F32. So are those of `cond_module` in a file of
BF16, which its loader cannot read from that; and in a file of Q8_0, AdaLN, `cond_module` and
`out_proj` are F16, as are rows that Q8_0 cannot divide.

That program turns latents into audio by Fish S1-DAC (44.1 kHz, hop 2048), after a PCA that is part
of the file and comes from the codec given. Without Fish S1-DAC the PCA is written as the identity
onto the first of its 1024 channels, and the file says so: it loads, and what the program samples
are latents of the model, but what it makes of them is no speech.

Source: github.com/Cirius0310/echo-tts-cpp, `scripts/export_gguf.py` and `cpp/src/echo_model.cpp`.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from echo_eqx.codec.codec import Codec
from echo_eqx.codec.fish.dac import FishDAC, PrincipalComponents
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
    dit = models.need_dit(FORM)
    config, pca = dit.config, _pca(dit, models.codec)
    writer = gguf.GGUFWriter(folder / FILE, arch=ARCHITECTURE)
    for key, value in constructor_arguments(config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"echo.{key}", value)
    writer.add_bool("echo.include_blockwise", config.blockwise)
    writer.add_string("echo.dtype", TYPES[dtype].lower())
    writer.add_float32("pca.latent_scale", float(pca.scale))
    if not isinstance(models.codec, FishDAC):
        writer.add_description("The PCA is the identity, since none was given")
        logger.warning(
            f"{FORM}: echo-tts-cpp speaks through Fish S1-DAC, and no --codec with its PCA was "
            "given; the file loads, but only its latents can be used"
        )

    kinds = {}
    for name, shape in _shapes(dit, pca).items():
        kinds[name] = kind = gguf.GGMLQuantizationType[_type(name, shape, TYPES[dtype])]
        as_bytes = gguf.quants.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, as_bytes, np.dtype(np.uint8), math.prod(as_bytes), kind)
    if all(kind.name != TYPES[dtype] for kind in kinds.values()):
        logger.warning(
            f"{FORM}: no tensor is {TYPES[dtype]}; those of less than a million numbers are F32"
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, array in _tensors(dit, pca):
        writer.write_tensor_data(_encode(gguf, name, array, kinds[name]))
    writer.close()


def _pca(dit: EchoDiT, codec: Codec | None) -> PrincipalComponents:
    """Those of Fish S1-DAC, or the identity."""
    channels = dit.config.latent_dim
    if isinstance(codec, FishDAC):
        pca = codec.pca
    else:
        components = np.eye(channels, _FISH_CHANNELS, dtype=np.float32)
        mean, scale = np.zeros(_FISH_CHANNELS, np.float32), np.float32(1)
        pca = PrincipalComponents(*map(jnp.asarray, (components, mean, scale)))
    if channels > _FISH_CHANNELS or pca.components.shape != (channels, _FISH_CHANNELS):
        raise UsageError(
            f"{FORM}: pca.components: expected shape ({channels}, {_FISH_CHANNELS}) for latents of "
            f"{channels} channels, got {pca.components.shape}; the channels of frames are fixed"
        )
    return pca


def _tensors(dit: EchoDiT, pca: PrincipalComponents) -> Iterator[tuple[str, np.ndarray]]:
    """Names and float32 arrays, one leaf of the model in memory at a time."""
    yield "pca.components", np.asarray(pca.components)
    yield "pca.mean", np.asarray(pca.mean)
    for leaf, array in named_leaves(dit).items():
        yield from to_pytorch({leaf: np.asarray(array, np.float32)}, dit.config).items()


def _shapes(dit: EchoDiT, pca: PrincipalComponents) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in _tensors(dit, pca)}


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
