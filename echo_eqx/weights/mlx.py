"""DACVAE as mlx-audio holds it: `model.safetensors`, and the sizes in `config.json` beside it.

The tensors are those that facebook publishes, under other names and with channels last: a kernel is
(out, k, in), also of a transposed convolution, and alpha is (1, 1, c). Each LSTM layer has one
bias. Source: `mlx_audio/codec/models/dacvae/codec.py` of mlx-audio 0.6.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig
from echo_eqx.json_data import MAX_JSON_BYTES, parse_json
from echo_eqx.weights.assemble import (
    Sources,
    abstract_model,
    check_memory,
    check_sizes,
    load_into,
    single,
)
from echo_eqx.weights.dacvae import is_transposed, published_config, published_sources
from echo_eqx.weights.safetensors_reader import SafetensorsFile
from echo_eqx.weights.sharded import ShardedSafetensors

MLX_IN_PROJ = "quantizer_in_proj.weight_v"
"""A tensor by which files of these names are recognized."""


def load_dacvae_mlx(file: SafetensorsFile | ShardedSafetensors, dtype: Any) -> DACVAE:
    """Read the tensors of mlx-audio's DACVAE; sizes come from `config.json` and from shapes.

    **Raises**: `EchoError` naming the file and the tensor that is missing, left over, of a wrong
    shape or not finite.
    """
    shapes = file.shapes()
    config_path = file.path.with_name("config.json")
    kwargs = _read_config(config_path)
    rates = {side: kwargs.get(f"{side}_rates") for side in ("encoder", "decoder")}
    counts = {s: len(found) if isinstance(found, list) else 0 for s, found in rates.items()}

    def shape(name: str) -> tuple[int, ...] | None:
        found = shapes.get(mlx_name(name, counts["encoder"]))
        return found and tuple(found[axis] for axis in _axes(name, len(found)))

    config = published_config(kwargs, shape, f"{config_path} and {file.path.name}")
    check_sizes(config, shapes, str(file.path))
    skeleton = abstract_model(config, GenerationConfig(), dtype)
    check_memory(skeleton, str(file.path))
    return load_into(
        skeleton, lambda leaf: _mlx_sources(leaf, config), file, file.names, str(file.path)
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found = parse_json(file.read(MAX_JSON_BYTES + 1))
    except OSError as error:
        raise EchoError(
            f"{path} cannot be read ({error.strerror}); it says the sizes of a codec of mlx-audio"
        ) from None
    except ValueError as error:
        raise EchoError(f"{path} is not a usable config: {error}") from None
    if not isinstance(found, dict):
        raise EchoError(f"{path}: expected an object, got a {type(found).__name__}")
    return found


def _mlx_sources(leaf: str, config: CodecConfig) -> Sources:
    published = published_sources(leaf, config)
    num_encoder = len(config.encoder_rates)
    names = [mlx_name(name, num_encoder) for name in published.names]
    if names[0] == names[-1] and len(names) == 2:  # the two biases of an LSTM layer
        return Sources(names[:1], single)

    def assemble(arrays: list[np.ndarray]) -> np.ndarray:
        pairs = zip(published.names, arrays, strict=True)
        return published.assemble([a.transpose(_axes(name, a.ndim)) for name, a in pairs])

    return Sources(names, assemble)


def _axes(published: str, rank: int) -> tuple[int, ...]:
    """Axes of the array in mlx-audio, in the order of the published tensor."""
    if rank != 3:
        return tuple(range(rank))
    return (2, 0, 1) if is_transposed(published) else (0, 2, 1)


def to_mlx(published: dict[str, np.ndarray], config: CodecConfig) -> dict[str, np.ndarray]:
    """The published tensors under the names and in the layout of mlx-audio."""
    out: dict[str, np.ndarray] = {}
    for name, array in published.items():
        axes = np.argsort(_axes(name, array.ndim)).tolist()
        array = array.transpose(axes)
        other = mlx_name(name, len(config.encoder_rates))
        out[other] = out[other] + array if other in out else array
    return out


# --- Names --------------------------------------------------------------------------------------

_UNIT = ("act1", "conv1", "act2", "conv2")
_ENCODER_BLOCK = ("res1", "res2", "res3", "snake", "conv")
_LSTM = {"weight_ih": "Wx", "weight_hh": "Wh", "bias_ih": "bias", "bias_hh": "bias"}
_RULES = (
    (r"quantizer\.(in|out)_proj\.", lambda m: f"quantizer_{m[1]}_proj."),
    (r"encoder\.block\.0\.", lambda m: "encoder.conv_in."),
    (
        r"encoder\.block\.(\d+)\.block\.(\d)\.",
        lambda m: f"encoder.blocks.{int(m[1]) - 1}.{_ENCODER_BLOCK[int(m[2])]}.",
    ),
    (r"decoder\.model\.0\.", lambda m: "decoder.conv_in."),
    (
        r"decoder\.model\.(\d+)\.block\.(\d+)\.",
        lambda m: f"decoder.blocks.{int(m[1]) - 1}.block_{m[2]}.",
    ),
    (r"decoder\.wm_model\.encoder_block\.pre\.0\.", lambda m: "decoder.snake_out."),
    (r"decoder\.wm_model\.encoder_block\.pre\.1\.", lambda m: "decoder.conv_out."),
    (r"(decoder\.wm_model\.\w+_block\.(?:pre|post))\.(\d)\.", lambda m: f"{m[1]}_{m[2]}."),
)
"""Beginnings of published names, and what mlx-audio has in their place."""


def mlx_name(published: str, num_encoder_blocks: int) -> str:
    """The name in mlx-audio of a published tensor."""
    for number, module in ((1, "snake_out"), (2, "conv_out")):
        end = f"encoder.block.{num_encoder_blocks + number}."
        if published.startswith(end):
            return f"encoder.{module}.{published.removeprefix(end)}"
    name = published
    for pattern, replace in _RULES:
        name, found = re.subn("^" + pattern, replace, name)
        if found:
            break
    name = re.sub(r"\.block\.([0-3])\.", lambda m: f".{_UNIT[int(m[1])]}.", name)
    return re.sub(r"\.lstm\.(\w+)_l(\d+)$", lambda m: f".lstm.layers.{m[2]}.{_LSTM[m[1]]}", name)
