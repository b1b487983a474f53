"""Fish S1-DAC as published (`jordand/fish-s1-dac-min`), and the principal components that an
Echo-TTS model was trained with (`pca_state.safetensors`, in the repository of that model)."""

import itertools
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from echo_eqx.codec.fish.dac import FishDAC
from echo_eqx.codec.fish.transformer import rotation_table
from echo_eqx.config import FishConfig
from echo_eqx.errors import EchoError
from echo_eqx.generation import GenerationConfig
from echo_eqx.weights.assemble import Sources, abstract_model, check_memory, load_into, single
from echo_eqx.weights.dacvae import fold_weight_norm
from echo_eqx.weights.find import find_beside
from echo_eqx.weights.safetensors_reader import SafetensorsFile
from echo_eqx.weights.sharded import WithoutPrefix

PCA_FILE = "pca_state.safetensors"
PUBLISHED_PCA = "jordand/echo-tts-base"
PUBLISHED_FISH = "jordand/fish-s1-dac-min"

_MARK = "quantizer.semantic_quantizer.quantizers.0.codebook.weight"
_BUFFER = re.compile(r".+\.(causal_mask|freqs_cis)")
"""Constants that the published file repeats: masks, and tables of rotations."""


def is_fish(names: Collection[str]) -> bool:
    return _MARK in names


def load_fish(weights: WithoutPrefix, pca: str | Path | None, dtype: Any) -> FishDAC:
    """Read the published file, and the principal components that belong to it.

    **Arguments**: `pca` where to look for `pca_state.safetensors` first: beside a file, in a folder
    or a Hub repository. Then it is looked for beside the weights, and last in the repository of
    Echo-TTS base.

    **Raises**: `EchoError` naming the file and the tensor that is missing, left over, of a wrong
    shape or not finite.
    """
    state = _find_pca(weights.path, pca)
    tensors = _Tensors(weights, state)
    names = {name for name in tensors.names if not _BUFFER.fullmatch(name)}
    where = f"{weights.path} with {state.path.name}"
    try:
        config = _config(tensors.shapes(), _head_dim(weights))
    except EchoError as error:
        raise EchoError(f"{where}: {error}") from None
    skeleton = abstract_model(config, GenerationConfig(), dtype)
    check_memory(skeleton, where)
    return load_into(skeleton, lambda leaf: _sources(leaf, config, names), tensors, names, where)


class _Tensors:
    """The tensors of both files."""

    def __init__(self, weights: WithoutPrefix, state: SafetensorsFile):
        self._weights, self._state = weights, state
        self.names = [*weights.names, *state.names]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._weights.shapes() | self._state.shapes()

    def __getitem__(self, name: str) -> np.ndarray:
        return (self._state if name in self._state.names else self._weights)[name]


def _find_pca(path: Path, pca: str | Path | None) -> SafetensorsFile:
    for place in (pca, path, PUBLISHED_PCA):
        if place is None:
            continue
        try:
            found = find_beside(place, PCA_FILE)
        except EchoError as error:
            raise EchoError(
                f"{path}: the codec needs the {PCA_FILE} of the model that generates its latents: "
                f"{error}; put that file beside the codec"
            ) from None
        if found is not None:
            return SafetensorsFile(found)
    raise EchoError(f"{path}: expected a {PCA_FILE} in {PUBLISHED_PCA}")


def _head_dim(weights: WithoutPrefix) -> int:
    """Width of the heads, which only the tables of rotations tell; they must be ours."""
    widths = set()
    for name in weights.names:
        if name.endswith(".freqs_cis"):
            table = weights[name].astype(np.float32)
            if table.ndim != 3 or table.shape[2] != 2 or 0 in table.shape:
                raise EchoError(f"{name}: expected (positions, pairs, 2), got {table.shape}")
            widths.add(2 * table.shape[1])
            # Angles that differ in an ulp may round to another bfloat16.
            if not np.abs(table - rotation_table(len(table), max(widths))).max() < 0.02:
                raise EchoError(f"{name}: expected the rotations of RoPE with base 10000")
    if len(widths) > 1:
        raise EchoError(f"freqs_cis: expected heads of one width, got {sorted(widths)}")
    return widths.pop() if widths else FishConfig.head_dim


def _config(shapes: Mapping[str, tuple[int, ...]], head_dim: int) -> FishConfig:
    """Sizes, read from the shapes."""

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != rank or 0 in shapes[name]:
            got = shapes.get(name, "no such tensor")
            raise EchoError(f"{name}: expected {rank} dimensions, got {got}")
        return shapes[name]

    def kernel(module: str) -> tuple[int, ...]:
        """(out, in, width), or (in, out, width) for a transposed convolution."""
        return shape(_kernel_names(module, shapes)[-1], 3)

    def count(stack: str) -> int:
        """How many modules the stack has, numbered from 0."""
        pattern = re.compile(rf"{re.escape(stack)}\.(\d{{1,6}})\.")
        numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
        return next(number for number in itertools.count() if number not in numbers)

    # Of encoder and decoder, all but the first and the last two modules are blocks.
    encoder_blocks, decoder_blocks = count("encoder.block") - 3, count("decoder.model") - 3
    transformer = f"encoder.block.{encoder_blocks}.block.5.layers"
    pre, residual = "quantizer.pre_module.layers", "quantizer.quantizer.quantizers"
    codebook_size, codebook_dim = shape(f"{residual}.0.codebook.weight", 2)
    return FishConfig(
        encoder_dim=kernel("encoder.block.0.conv")[0],
        encoder_rates=tuple(
            kernel(f"encoder.block.{i + 1}.block.4.conv")[2] // 2 for i in range(encoder_blocks)
        ),
        encoder_layers=count(transformer),
        encoder_mlp_dim=shape(f"{transformer}.0.feed_forward.w1.weight", 2)[0],
        head_dim=head_dim,
        hidden_dim=kernel(f"encoder.block.{encoder_blocks + 2}.conv")[0],
        quantizer_rates=tuple(
            shape(f"quantizer.downsample.{i}.0.conv.weight", 3)[2]
            for i in range(count("quantizer.downsample"))
        ),
        quantizer_layers=count(pre),
        quantizer_mlp_dim=shape(f"{pre}.0.feed_forward.w1.weight", 2)[0],
        semantic_codebook_size=shape(_MARK, 2)[0],
        num_codebooks=count(residual),
        codebook_size=codebook_size,
        codebook_dim=codebook_dim,
        latent_dim=shape("pca_components", 2)[0],
        decoder_dim=kernel("decoder.model.0.conv")[0],
        decoder_rates=tuple(
            kernel(f"decoder.model.{i + 1}.block.1.conv")[2] // 2 for i in range(decoder_blocks)
        ),
    )


# --- Names --------------------------------------------------------------------------------------

_UNIT = {"snake1": "0", "conv1": "1.conv", "snake2": "2", "conv2": "3.conv"}
_LAYER = {
    "wqkv.weight": "attention.wqkv.weight",
    "wo.weight": "attention.wo.weight",
    "attention_scale": "attention_layer_scale.gamma",
    "attention_norm.weight": "attention_norm.weight",
    "mlp_norm.weight": "ffn_norm.weight",
    "mlp_scale": "ffn_layer_scale.gamma",
    **{f"mlp.w{i}.weight": f"feed_forward.w{i}.weight" for i in (1, 2, 3)},
}
_WEIGHT_NORM = (
    ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ("weight_g", "weight_v"),
)
_CONVNEXT = {
    "depthwise": "dwconv.conv.weight",
    "depthwise_bias": "dwconv.conv.bias",
    "norm": "norm",
    "up": "pwconv1",
    "down": "pwconv2",
    "scale": "gamma",
}


def _sources(leaf: str, config: FishConfig, names: Collection[str]) -> Sources:
    """Tensors behind one of our leaves, and how they make it up."""
    part, _, rest = leaf.partition(".")
    if part == "pca":
        kinds = {"components": "pca_components", "mean": "pca_mean", "scale": "latent_scale"}
        if rest == "components":
            return Sources([kinds[rest]], single)
        # The mean may be a row, the scale a list of one number.
        shape = {"mean": -1, "scale": ()}[rest]
        return Sources([kinds[rest]], lambda arrays: single(arrays).reshape(shape))
    if part == "quantizer":
        return _quantizer_sources(rest, config, names)
    if rest.startswith("transformer."):
        stem = f"encoder.block.{len(config.encoder_rates)}.block.5."
        return _transformer_sources(rest.removeprefix("transformer."), stem, config.encoder_layers)
    return _convolution_sources(leaf, config, names)


def _convolution_sources(leaf: str, config: FishConfig, names: Collection[str]) -> Sources:
    """Of the encoder and the decoder, outside of the transformer."""
    module, field = leaf.rsplit(".", 1)
    side, name = module.split(".", 1)
    is_encoder = side == "encoder"
    stack = "encoder.block" if is_encoder else "decoder.model"
    last = len(config.encoder_rates if is_encoder else config.decoder_rates)
    ends = {"conv_in": "0.conv", "snake_out": str(last + 1), "conv_out": f"{last + 2}.conv"}
    if name in ends:
        place = f"{stack}.{ends[name]}"
    else:
        _, number, *layer = name.split(".")
        block = f"{stack}.{int(number) + 1}.block"
        if layer[0] == "units":
            unit = int(layer[1]) + (0 if is_encoder else 2)
            place = f"{block}.{unit}.block.{_UNIT[layer[2]]}"
        else:
            inner = {"snake": "3" if is_encoder else "0", "down": "4.conv", "up": "1.conv"}
            place = f"{block}.{inner[layer[0]]}"
    if field == "alpha":
        return Sources([f"{place}.alpha"], lambda arrays: single(arrays)[0, :, 0])
    if field == "bias":
        return Sources([f"{place}.bias"], single)
    # (out, in, k), or (in, out, k) for transposed convolutions, to (k, in, out).
    axes = (2, 0, 1) if name.endswith(".up") else (2, 1, 0)
    return _kernel_sources(place, names, lambda kernel: kernel.transpose(axes))


def _quantizer_sources(leaf: str, config: FishConfig, names: Collection[str]) -> Sources:
    part, rest = leaf.split(".", 1)
    if part in ("pre", "post"):
        return _transformer_sources(rest, f"quantizer.{part}_module.", config.quantizer_layers)
    number, field = rest.split(".", 1)
    if part == "codebooks":
        residual = f"quantizer.quantizer.quantizers.{int(number) - 1}"
        stem = residual if int(number) else "quantizer.semantic_quantizer.quantizers.0"
        if field == "codes":
            return Sources([f"{stem}.codebook.weight"], single)
        module, kind = field.split(".")
        if kind == "bias":
            return Sources([f"{stem}.{module}.bias"], single)
        return _kernel_sources(f"{stem}.{module}", names, lambda kernel: kernel[:, :, 0].T)
    stem = f"quantizer.{part}.{number}"
    if field == "bias":
        return Sources([f"{stem}.0.conv.bias"], single)
    if field == "weight":
        axes = (2, 1, 0) if part == "downsample" else (2, 0, 1)
        name = f"{stem}.0.conv.weight"
        return Sources([name], lambda arrays: single(arrays).transpose(axes))
    module, _, kind = field.removeprefix("block.").partition(".")
    name = f"{stem}.1.{_CONVNEXT[module]}" + (f".{kind}" if kind else "")
    if module == "depthwise":
        return Sources([name], lambda arrays: single(arrays)[:, 0].T)
    if module in ("up", "down") and kind == "weight":
        return Sources([name], lambda arrays: single(arrays).T)
    return Sources([name], single)


def _transformer_sources(leaf: str, stem: str, num_layers: int) -> Sources:
    if leaf == "norm.weight":
        return Sources([f"{stem}norm.weight"], single)
    name = _LAYER[leaf.removeprefix("layers.")]
    names = [f"{stem}layers.{layer}.{name}" for layer in range(num_layers)]
    if name.endswith("norm.weight") or name.endswith("gamma"):
        return Sources(names, np.stack)
    return Sources(names, lambda arrays: np.stack([array.T for array in arrays]))


def _kernel_names(module: str, names: Collection[str]) -> list[str]:
    """Tensors of a kernel: with weight norm as PyTorch writes it now or wrote it once, or folded.
    The last has the kernel's shape."""
    for pair in _WEIGHT_NORM:
        if f"{module}.{pair[1]}" in names:
            return [f"{module}.{name}" for name in pair]
    return [f"{module}.weight"]


def _kernel_sources(
    module: str, names: Collection[str], assemble: Callable[[np.ndarray], np.ndarray]
) -> Sources:
    found = _kernel_names(module, names)
    if len(found) == 1:
        return Sources(found, lambda arrays: assemble(single(arrays)))
    return Sources(found, lambda arrays: assemble(fold_weight_norm(*arrays)))
