"""EchoDiT with int8 weights: a quarter of the memory of float32.

The linear layers of attention and SwiGLU, in the blocks and in the encoders, hold their weight as
int8, with one float32 scale per output channel (symmetric, no zero point):

    weight (i, o) ~ q * scale, q int8 in [-127, 127], scale (o,) = max |weight| over i / 127

Activations are not quantized: `Linear` computes `(x @ q) * scale` in the dtype of `x`, which holds
every q exactly. AdaLN and the timestep conditioning are held in bfloat16. Projections of latents
(`in_proj`, `out_proj`), the embedding, norms and biases stay as they are.

Scales are rounded to 16 significant bits, so that `q * scale` is exact in float32. Quantizing what
was dequantized therefore gives the same numbers again.
"""

import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from echo_eqx.layers.linear import Linear
from echo_eqx.model.dit import EchoDiT

_INT8 = re.compile(r"((text|speaker|latent)_encoder\.)?blocks\.(attention|mlp)\.\w+")
_BFLOAT16 = re.compile(r"time_conditioner\.\w+|blocks\.\w+_adaln\.\w+\.\w+")
MARKER = "blocks.attention.wq.scale"
"""A leaf that only an int8 model has."""
MIN_SCALE = np.float32(2.0**-100)
"""Scale of columns whose weights are all zero or nearly so."""


def quantize(dit: EchoDiT) -> EchoDiT:
    """`dit`, which may be abstract, with int8 weights as described above."""

    def layer(path: tuple, node: Linear) -> Linear:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if _INT8.fullmatch(name) and node.scale is None:
            return _with(node, *_quantized(node.weight))
        if _BFLOAT16.fullmatch(name):
            return _with(node, _cast(node.weight, jnp.bfloat16), None)
        return node

    return _map_layers(layer, dit)


def dequantize(dit: EchoDiT) -> EchoDiT:
    """`dit` with all weights of linear layers in float32."""

    def layer(_: tuple, node: Linear) -> Linear:
        if node.scale is None:
            return _with(node, _cast(node.weight, jnp.float32), None)
        weight = np.asarray(node.weight, np.float32) * np.asarray(node.scale)[..., None, :]
        return _with(node, jax.device_put(weight), None)

    return _map_layers(layer, dit)


def _quantized(weight: Any) -> tuple[Any, Any]:
    """The int8 weight and its scale. In NumPy, since each shape would be compiled otherwise."""
    if isinstance(weight, jax.ShapeDtypeStruct):
        *layers, _, columns = weight.shape
        scales = jax.ShapeDtypeStruct((*layers, columns), jnp.float32)
        return jax.ShapeDtypeStruct(weight.shape, jnp.int8), scales
    weight = np.asarray(weight, np.float32)
    scale = np.maximum(_rounded(np.abs(weight).max(axis=-2) / np.float32(127)), MIN_SCALE)
    rounded = np.rint(weight / scale[..., None, :]).astype(np.int8)
    return jax.device_put(rounded), jax.device_put(scale)


def _rounded(x: np.ndarray) -> np.ndarray:
    """Positive float32 numbers rounded to 16 significant bits."""
    return ((x.view(np.uint32) + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).view(np.float32)


def _cast(weight: Any, dtype: Any) -> Any:
    if isinstance(weight, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(weight.shape, dtype)
    return weight if weight.dtype == dtype else jax.device_put(np.asarray(weight).astype(dtype))


def _with(node: Linear, weight: Any, scale: Any) -> Linear:
    def fields(node: Linear) -> Any:
        return node.weight, node.scale

    return eqx.tree_at(fields, node, (weight, scale), is_leaf=lambda leaf: leaf is None)


def _map_layers(layer: Callable[[tuple, Linear], Linear], dit: EchoDiT) -> EchoDiT:
    def is_linear(node: Any) -> bool:
        return isinstance(node, Linear)

    return jax.tree_util.tree_map_with_path(
        lambda path, node: layer(path, node) if is_linear(node) else node, dit, is_leaf=is_linear
    )
