"""The codec for facebook's DACVAE: `weights.pth`, and the same tensors as `model.safetensors`.

    DACVAE.load("FOLDER/weights.pth")

Source of the fixed sizes below: github.com/facebookresearch/dacvae, `dacvae/model/dacvae.py`.
"""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig, WatermarkConfig
from echo_eqx.errors import UsageError
from echo_eqx.export.models import Models, float_dtype
from echo_eqx.trees import named_leaves
from echo_eqx.weights.dacvae import KWARGS, published_kwargs, to_published
from echo_eqx.weights.safetensors_writer import save_arrays, to_dtype
from echo_eqx.weights.torch_writer import write_torch_file

FORM = "dacvae"


def write(models: Models, folder: Path, dtype: str) -> None:
    """Write both files.

    **Raises**: `UsageError` naming the tensor that facebook's class cannot hold.
    """
    number = float_dtype(FORM, dtype)
    codec = models.only_codec(FORM)
    check_fits_class(codec.config, f"{FORM}: facebook's DACVAE")
    write_files(codec, folder, number)


def write_files(codec: DACVAE, folder: Path, number: np.dtype) -> None:
    """Write both files for a codec of any size that has a watermark path."""
    kwargs, arrays = published_kwargs(codec.config), published(codec)
    arrays = {name: to_dtype(name, array, number) for name, array in arrays.items()}
    content = {"state_dict": OrderedDict(arrays), "metadata": {KWARGS: kwargs}}
    write_torch_file(folder / "weights.pth", content)
    metadata = {"format": "pt", KWARGS: json.dumps(kwargs)}
    save_arrays(folder / "model.safetensors", arrays, metadata)


def published(codec: DACVAE) -> dict[str, np.ndarray]:
    """The float32 tensors that facebook would publish of a codec."""
    leaves = {name: np.asarray(leaf, np.float32) for name, leaf in named_leaves(codec).items()}
    return to_published(leaves, codec.config)


_WM = "decoder.wm_model."
_WATERMARK_TENSORS = {
    "dim": f"{_WM}encoder_block.pre.3.weight",
    "strides": "decoder.model.1.block.3.weight",
    "bottleneck_dim": f"{_WM}msg_processor.msg_processor.weight",
    "num_bits": f"{_WM}msg_processor.msg_processor.weight",
    "num_lstm_layers": f"{_WM}encoder_block.post.0.lstm.weight_ih_l0",
}


def check_fits_class(config: CodecConfig, where: str) -> None:
    """Refuse a codec that facebook's class cannot hold.

    The arguments of that class say nothing of the watermark path: its sizes are constants, and the
    widths inside of the decoder's blocks are a third of the decoder's. The class also pads both
    sides of a strided convolution by half the stride, rounded down, which loses a frame if the
    stride is odd.

    **Raises**: `UsageError` naming a tensor.
    """
    found, fixed = config.watermark, WatermarkConfig()
    if found is None:
        raise UsageError(
            f"{where} always has a watermark path, and this codec has none "
            f"({_WATERMARK_TENSORS['dim']} is missing)"
        )
    for name, tensor in _WATERMARK_TENSORS.items():
        if (ours := getattr(found, name)) != (theirs := getattr(fixed, name)):
            raise UsageError(f"{where}: {tensor}: expected {name} {theirs}, got {ours}")
    width, blocks = 3 * fixed.lstm_dim, len(fixed.strides)
    if config.decoder_dim != width or len(config.decoder_rates) != blocks:
        raise UsageError(
            f"{where}: decoder.model.0.weight_v: expected decoder_dim {width} and {blocks} "
            f"decoder_rates, as its watermark path needs them, got {config.decoder_dim} and "
            f"{config.decoder_rates}"
        )
    for block, rate in enumerate(config.encoder_rates, 1):
        if rate % 2:
            raise UsageError(
                f"{where}: encoder.block.{block}.block.4.weight_v: expected an even stride, "
                f"got {rate}"
            )
