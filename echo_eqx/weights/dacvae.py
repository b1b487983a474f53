"""The published `weights.pth` of DACVAE: names, sizes, and weight norm folded into the kernels."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig
from echo_eqx.json_data import from_json
from echo_eqx.weights.assemble import Sources, abstract_model, check_memory, load_into, single
from echo_eqx.weights.torch_file import read_torch_file, tensors

Tensors = dict[str, np.ndarray]


def load_dacvae_pth(path: Path, dtype: Any) -> DACVAE:
    """Read the published file; sizes come from its metadata and shapes.

    **Raises**: `EchoError` naming the file and the tensor that is missing, left over, of a wrong
    shape or not finite.
    """
    content = read_torch_file(path)
    source = tensors(content.get("state_dict"), path)
    config = _config(content, source, path)
    skeleton = abstract_model(config, GenerationConfig(), dtype)
    check_memory(skeleton, str(path))
    return load_into(skeleton, lambda leaf: _sources(leaf, config), source, source, str(path))


def _config(content: dict, source: Tensors, path: Path) -> CodecConfig:
    metadata = content.get("metadata")
    kwargs = metadata.get("kwargs") if isinstance(metadata, dict) else None
    if not isinstance(kwargs, dict):
        raise EchoError(f"{path}: expected a published DACVAE file, got no metadata kwargs")
    ours = {
        "encoder_dim": "encoder_dim",
        "encoder_rates": "encoder_rates",
        "latent_dim": "hidden_dim",
        "codebook_dim": "latent_dim",
        "decoder_dim": "decoder_dim",
        "decoder_rates": "decoder_rates",
        "sample_rate": "sample_rate",
    }
    known = {name: kwargs[theirs] for theirs, name in ours.items() if theirs in kwargs}
    try:
        plain = from_json(CodecConfig, {**known, "watermark": None})
        return from_json(CodecConfig, {**known, "watermark": _watermark(plain, source)})
    except EchoError as error:
        raise EchoError(f"{path}: {error}") from None


def _watermark(config: CodecConfig, source: Tensors) -> dict[str, Any]:
    """Sizes of the watermark path, read from shapes because the metadata lacks them."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in source or source[name].ndim != rank:
            raise EchoError(f"tensor {name} is missing or of a wrong rank")
        return source[name].shape

    wm = "decoder.wm_model."
    lstm = re.escape(wm) + r"encoder_block\.post\.0\.lstm\.weight_ih_l\d+"
    embedding = shape(wm + "msg_processor.msg_processor.weight", 2)
    return {
        "dim": shape(wm + "encoder_block.pre.3.weight", 3)[0],
        "strides": [
            shape(f"decoder.model.{i + 1}.block.3.weight", 3)[2] // 2
            for i in range(len(config.decoder_rates))
        ],
        "bottleneck_dim": embedding[1],
        "num_bits": embedding[0] // 2,
        "num_lstm_layers": sum(bool(re.fullmatch(lstm, name)) for name in source),
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


def _sources(leaf: str, config: CodecConfig) -> Sources:
    """The published tensors that make up one of our leaves, and how."""
    if leaf == "watermark.message_embedding":
        return Sources(["decoder.wm_model.msg_processor.msg_processor.weight"], single)
    if lstm := re.fullmatch(r"watermark\.(encoder|decoder)_lstm\.layers\.(\d+)\.(\w+)", leaf):
        side, layer, field = lstm.groups()
        place = {"encoder": "encoder_block.post.0", "decoder": "decoder_block.pre.1"}[side]
        name = f"decoder.wm_model.{place}.lstm."
        if field == "bias":
            names = [f"{name}bias_ih_l{layer}", f"{name}bias_hh_l{layer}"]
            return Sources(names, lambda arrays: np.sum(np.stack(arrays), axis=0))
        kind = {"weight_in": "ih", "weight_hidden": "hh"}[field]
        return Sources([f"{name}weight_{kind}_l{layer}"], lambda arrays: single(arrays).T)
    module, field = leaf.rsplit(".", 1)
    name = _module_name(module, config)
    if field == "alpha":
        return Sources([f"{name}.alpha"], lambda arrays: single(arrays)[0, :, 0])
    if field == "bias":
        return Sources([f"{name}.bias"], single)
    # (out, in, k), or (in, out, k) for transposed convolutions, to (k, in, out).
    axes = (2, 0, 1) if module.endswith((".up", ".up.conv")) else (2, 1, 0)
    if module.startswith("watermark."):
        return Sources([f"{name}.weight"], lambda arrays: single(arrays).transpose(axes))
    names = [f"{name}.weight_g", f"{name}.weight_v"]
    return Sources(names, lambda arrays: _fold_weight_norm(*arrays).transpose(axes))


def _fold_weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """`g * v / |v|`, the norm over all axes but the first (Salimans & Kingma, arXiv:1602.07868)."""
    if g.shape != (v.shape[0], 1, 1):
        raise ValueError(f"expected one weight_g for each channel, got shape {g.shape}")
    wide = v.astype(np.float64)
    norm = np.sqrt(np.sum(wide**2, axis=(1, 2), keepdims=True))
    if not norm.all():
        raise ValueError("a channel of weight_v is zero, so it has no direction")
    return (g.astype(np.float64) * wide / norm).astype(np.float32)
