"""DACVAE as facebook publishes it, both ways: names, sizes, weight norm folded and split.

`weights.pth` is a `torch.save` of `{"state_dict": tensors, "metadata": {"kwargs": sizes}}`. The
same tensors are also read from safetensors, with the sizes as JSON in its metadata.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig
from echo_eqx.json_data import from_json, parse_json
from echo_eqx.weights.assemble import (
    Sources,
    abstract_model,
    check_memory,
    check_sizes,
    load_into,
    single,
)
from echo_eqx.weights.safetensors_reader import SafetensorsFile
from echo_eqx.weights.sharded import ShardedSafetensors
from echo_eqx.weights.torch_file import read_torch_file, tensors

KWARGS = "kwargs"
"""Of the metadata: the arguments of facebook's class, which say the sizes."""
IN_PROJ = "quantizer.in_proj.weight_v"
"""A tensor by which files of these names are recognized."""

Shape = Callable[[str], tuple[int, ...] | None]
"""The shape of a published tensor, or None if there is no such tensor."""


def load_dacvae_pth(path: Path, dtype: Any) -> DACVAE:
    """Read the published file; sizes come from its metadata and shapes.

    **Raises**: `EchoError` naming the file and the tensor that is missing, left over, of a wrong
    shape or not finite.
    """
    content = read_torch_file(path)
    source = tensors(content.get("state_dict"), path)
    metadata = content.get("metadata")
    kwargs = metadata.get(KWARGS) if isinstance(metadata, dict) else None
    shapes = {name: array.shape for name, array in source.items()}
    config = published_config(kwargs, shapes.get, str(path))
    skeleton = abstract_model(config, GenerationConfig(), dtype)
    check_memory(skeleton, str(path))
    return load_into(
        skeleton, lambda leaf: published_sources(leaf, config), source, source, str(path)
    )


def load_dacvae_safetensors(file: SafetensorsFile | ShardedSafetensors, dtype: Any) -> DACVAE:
    """Read the published tensors from safetensors.

    **Raises**: `EchoError` as `load_dacvae_pth`.
    """
    try:
        kwargs = parse_json(file.metadata.get(KWARGS, "").encode("utf-8", "surrogatepass"))
    except ValueError:
        raise EchoError(
            f"{file.path}: expected the sizes of a DACVAE as JSON under {KWARGS} in its metadata, "
            "got none; use weights.pth"
        ) from None
    shapes = file.shapes()
    config = published_config(kwargs, shapes.get, str(file.path))
    check_sizes(config, shapes, str(file.path))
    skeleton = abstract_model(config, GenerationConfig(), dtype)
    check_memory(skeleton, str(file.path))
    return load_into(
        skeleton, lambda leaf: published_sources(leaf, config), file, file.names, str(file.path)
    )


# --- Sizes --------------------------------------------------------------------------------------

_FIELDS = {
    "encoder_dim": "encoder_dim",
    "encoder_rates": "encoder_rates",
    "latent_dim": "hidden_dim",
    "codebook_dim": "latent_dim",
    "decoder_dim": "decoder_dim",
    "decoder_rates": "decoder_rates",
    "sample_rate": "sample_rate",
}
"""Our fields by the arguments of facebook's class."""


def published_config(kwargs: Any, shape: Shape, where: str) -> CodecConfig:
    """Sizes from the arguments of facebook's class and, for the watermark path, from shapes.

    **Raises**: `EchoError` naming `where` and what is missing or of a wrong type.
    """
    if not isinstance(kwargs, Mapping):
        raise EchoError(f"{where}: expected a published DACVAE file, got no metadata kwargs")
    known = {name: kwargs[theirs] for theirs, name in _FIELDS.items() if theirs in kwargs}
    try:
        plain = from_json(CodecConfig, {**known, "watermark": None})
        return from_json(CodecConfig, {**known, "watermark": _watermark(plain, shape)})
    except EchoError as error:
        raise EchoError(f"{where}: {error}") from None


def published_kwargs(config: CodecConfig) -> dict[str, Any]:
    """The arguments of facebook's class. Those of its quantizer are unused in a DACVAE."""
    values = {theirs: getattr(config, name) for theirs, name in _FIELDS.items()}
    ours = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return {**ours, "n_codebooks": 16, "codebook_size": 1024, "quantizer_dropout": False}


def _watermark(config: CodecConfig, shape: Shape) -> dict[str, Any]:
    """Sizes of the watermark path, read from shapes because the metadata lacks them."""

    def checked(name: str, rank: int) -> tuple[int, ...]:
        found = shape(name)
        if found is None or len(found) != rank:
            raise EchoError(f"tensor {name} is missing or of a wrong rank")
        return found

    wm = "decoder.wm_model."
    num_layers = 0
    while shape(f"{wm}encoder_block.post.0.lstm.weight_ih_l{num_layers}") is not None:
        num_layers += 1
    embedding = checked(wm + "msg_processor.msg_processor.weight", 2)
    return {
        "dim": checked(wm + "encoder_block.pre.3.weight", 3)[0],
        "strides": [
            checked(f"decoder.model.{i + 1}.block.3.weight", 3)[2] // 2
            for i in range(len(config.decoder_rates))
        ],
        "bottleneck_dim": embedding[1],
        "num_bits": embedding[0] // 2,
        "num_lstm_layers": num_layers,
    }


# --- Names --------------------------------------------------------------------------------------

_UNIT = {"snake1": "0", "conv1": "1", "snake2": "2", "conv2": "3"}
_BLOCKS = {
    "encoder.blocks": {"snake": "3", "down": "4", "units.0": "0", "units.1": "1", "units.2": "2"},
    "decoder.blocks": {"snake": "0", "up": "1", "units.0": "4", "units.1": "5", "units.2": "8"},
    "watermark.encoder": {"down.conv": "11", "unit": "7"},
    "watermark.decoder": {"up.conv": "3", "unit": "6"},
}
"""Index of each layer and residual unit in a published block."""


def _module_name(module: str, config: CodecConfig) -> str:
    """The published name of one of our convolutions, Snakes or LSTM layers."""
    wm = "decoder.wm_model."
    num_encoder, num_decoder = len(config.encoder_rates), len(config.decoder_rates)
    fixed = {
        "encoder.conv_in": "encoder.block.0",
        "encoder.snake_out": f"encoder.block.{num_encoder + 1}",
        "encoder.conv_out": f"encoder.block.{num_encoder + 2}",
        "bottleneck.in_proj": "quantizer.in_proj",
        "bottleneck.out_proj": "quantizer.out_proj",
        "decoder.conv_in": "decoder.model.0",
        "decoder.snake_out": wm + "encoder_block.pre.0",
        "decoder.conv_out": wm + "encoder_block.pre.1",
        "watermark.conv_in.conv": wm + "encoder_block.pre.3",
        "watermark.to_bottleneck.conv": wm + "encoder_block.post.2",
        "watermark.from_bottleneck.conv": wm + "decoder_block.pre.0",
        "watermark.conv_out.conv": wm + "decoder_block.post.1",
    }
    if module in fixed:
        return fixed[module]
    part, number, layer = re.fullmatch(r"(\w+\.\w+)\.(\d+)\.(.+)", module).groups()  # type: ignore[union-attr]
    block = int(number) + 1 if part != "watermark.encoder" else num_decoder - int(number)
    stack = "encoder.block" if part == "encoder.blocks" else "decoder.model"
    unit = re.fullmatch(r"(unit|units\.\d)\.(\w+?[12])(\.conv)?", layer)
    inner = f"{_BLOCKS[part][unit[1]]}.block.{_UNIT[unit[2]]}" if unit else _BLOCKS[part][layer]
    return f"{stack}.{block}.block.{inner}"


def published_sources(leaf: str, config: CodecConfig) -> Sources:
    """The published tensors that make up one of our leaves, and how."""
    names = _tensor_names(leaf, config)
    if leaf.endswith(".alpha"):
        return Sources(names, lambda arrays: single(arrays)[0, :, 0])
    if leaf.endswith(".bias"):  # an LSTM has two
        return Sources(names, lambda arrays: np.sum(np.stack(arrays), axis=0))
    if _LSTM.fullmatch(leaf):
        return Sources(names, lambda arrays: single(arrays).T)
    if leaf == _EMBEDDING:
        return Sources(names, single)
    # (out, in, k), or (in, out, k) if transposed, to (k, in, out).
    axes = (2, 0, 1) if is_transposed(names[-1]) else (2, 1, 0)
    if len(names) == 1:
        return Sources(names, lambda arrays: single(arrays).transpose(axes))
    return Sources(names, lambda arrays: fold_weight_norm(*arrays).transpose(axes))


def to_published(leaves: Mapping[str, np.ndarray], config: CodecConfig) -> dict[str, np.ndarray]:
    """Our float32 leaves as the published tensors: the inverse of `published_sources`.

    `weight_v` is the kernel and `weight_g` its norm, so that folding gives the kernel again, up to
    the last bit. One bias of an LSTM layer is ours, the other zero.
    """
    out: dict[str, np.ndarray] = {}
    for leaf, array in leaves.items():
        names = _tensor_names(leaf, config)
        if leaf.endswith(".alpha"):
            arrays = [array[None, :, None]]
        elif leaf.endswith(".bias"):
            arrays = [array, np.zeros_like(array)][: len(names)]
        elif _LSTM.fullmatch(leaf):
            arrays = [array.T]
        elif leaf == _EMBEDDING:
            arrays = [array]
        else:
            kernel = array.transpose((1, 2, 0) if is_transposed(names[-1]) else (2, 1, 0))
            arrays = [kernel] if len(names) == 1 else _split_weight_norm(kernel)
        out.update(zip(names, arrays, strict=True))
    return out


_EMBEDDING = "watermark.message_embedding"
_LSTM = re.compile(r"watermark\.(encoder|decoder)_lstm\.layers\.(\d+)\.(\w+)")
_LSTM_PLACES = {"encoder": "encoder_block.post.0", "decoder": "decoder_block.pre.1"}
_LSTM_FIELDS = {
    "weight_in": ["weight_ih"],
    "weight_hidden": ["weight_hh"],
    "bias": ["bias_ih", "bias_hh"],
}


def _tensor_names(leaf: str, config: CodecConfig) -> list[str]:
    if leaf == _EMBEDDING:
        return ["decoder.wm_model.msg_processor.msg_processor.weight"]
    if lstm := _LSTM.fullmatch(leaf):
        side, layer, field = lstm.groups()
        place = f"decoder.wm_model.{_LSTM_PLACES[side]}.lstm"
        return [f"{place}.{name}_l{layer}" for name in _LSTM_FIELDS[field]]
    module, field = leaf.rsplit(".", 1)
    name = _module_name(module, config)
    if field == "weight" and not module.startswith("watermark."):
        return [f"{name}.weight_g", f"{name}.weight_v"]
    return [f"{name}.{field}"]


def is_transposed(tensor: str) -> bool:
    """Whether a published tensor is of a transposed convolution: (in, out, k)."""
    return re.fullmatch(r"decoder\.model\.\d+\.block\.[13]\.weight(_[gv])?", tensor) is not None


def fold_weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """`g * v / |v|`, the norm over all axes but the first (Salimans & Kingma, arXiv:1602.07868)."""
    if g.shape != (v.shape[0], 1, 1):
        raise ValueError(f"expected one weight_g for each channel, got shape {g.shape}")
    norm = _norm(v)
    if not norm.all():
        raise ValueError("a channel of weight_v is zero, so it has no direction")
    return (g.astype(np.float64) * v.astype(np.float64) / norm).astype(np.float32)


def _split_weight_norm(kernel: np.ndarray) -> list[np.ndarray]:
    """`weight_g` and `weight_v` of a kernel. Of a channel of zeros any direction will do."""
    norm = _norm(kernel)
    return [norm.astype(np.float32), np.where(norm == 0, np.float32(1), kernel)]


def _norm(v: np.ndarray) -> np.ndarray:
    return np.sqrt(np.sum(v.astype(np.float64) ** 2, axis=(1, 2), keepdims=True))
