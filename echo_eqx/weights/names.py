"""Names of EchoDiT's weights in other trainers and runtimes.

Each table maps a leaf of our model to the source tensors that it is made of. Our kernels are
(in, out), and all layers of a stack are one leaf with a leading layer axis.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from echo_eqx.config import DIT_PRESETS, DiTConfig, EncoderConfig
from echo_eqx.errors import EchoError, UsageError
from echo_eqx.weights.assemble import Sources, single

Shapes = Mapping[str, tuple[int, ...]]


_STACK = re.compile(r"(?:^|\.)blocks\.")
_PATCH_PROJECTION = re.compile(r"(speaker|latent)_encoder\.in_proj\.(weight|bias)")


def _num_layers(leaf: str, config: DiTConfig) -> int:
    if leaf.startswith("text_encoder."):
        return config.text.num_layers
    if leaf.startswith(("speaker_encoder.", "latent_encoder.")):
        return config.speaker.num_layers
    return config.num_layers


def _is_matrix(leaf: str) -> bool:
    return leaf.endswith(".weight") and not leaf.endswith(("norm.weight", "embedding.weight"))


# --- PyTorch: Echo-TTS ---------------------------------------------------------------------------


def pytorch_sources(leaf: str, config: DiTConfig) -> Sources:
    """The tensors of the community's PyTorch EchoDiT that make up one of our leaves."""
    name = re.sub(r"time_conditioner\.dense(\d)", lambda m: f"cond_module.{2 * int(m[1])}", leaf)
    name = re.sub(r"_adaln\.(shift|scale|gate)\.(down|up)\.", r"_adaln.\1_\2.", name)
    if not _STACK.search(name):
        return Sources([name], (lambda arrays: single(arrays).T) if _is_matrix(leaf) else single)
    layers = range(_num_layers(leaf, config))
    names = [_STACK.sub(rf"\g<0>{layer}.", name) for layer in layers]
    if _is_matrix(leaf):
        return Sources(names, lambda arrays: np.stack([array.T for array in arrays]))
    return Sources(names, np.stack)


def pytorch_config(tensors: Shapes) -> DiTConfig:
    """Sizes of a PyTorch EchoDiT, read from its shapes."""
    shapes = _CheckedShapes(tensors)

    def encoder(prefix: str) -> EncoderConfig:
        return EncoderConfig(
            dim=shapes[f"{prefix}.blocks.0.attention_norm.weight"][0],
            num_layers=shapes.count_layers(rf"{prefix}\.blocks\.(\d+)\."),
            num_heads=shapes[f"{prefix}.blocks.0.attention.q_norm.weight"][0],
            mlp_dim=shapes[f"{prefix}.blocks.0.mlp.w1.weight"][0],
        )

    latent_dim = shapes["in_proj.weight"][1]
    return _with_limits(
        DiTConfig(
            model_dim=shapes["in_proj.weight"][0],
            num_layers=shapes.count_layers(r"blocks\.(\d+)\."),
            num_heads=shapes["blocks.0.attention.q_norm.weight"][0],
            mlp_dim=shapes["blocks.0.mlp.w1.weight"][0],
            text=encoder("text_encoder"),
            speaker=encoder("speaker_encoder"),
            latent_dim=latent_dim,
            patch_size=shapes["speaker_encoder.in_proj.weight"][1] // latent_dim,
            vocab_size=shapes["text_encoder.text_embedding.weight"][0],
            time_embed_dim=shapes["cond_module.0.weight"][1],
            adaln_rank=shapes["blocks.0.attention_adaln.shift_down.weight"][0],
            speaker_proj_scale=1 / 6,  # that implementation divides the projection by 6
            blockwise="latent_encoder.in_proj.weight" in tensors,
        )
    )


def to_pytorch(leaves: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Our leaves under the names and in the layout of the PyTorch EchoDiT.

    That implementation divides the reference projection by 6, so the layer is multiplied by
    `6 * config.speaker_proj_scale`, which is 1 for models that came from it.
    """
    out = {}
    for leaf, array in leaves.items():
        sources = pytorch_sources(leaf, config)
        if _PATCH_PROJECTION.fullmatch(leaf):
            array = array * np.float32(6 * config.speaker_proj_scale)
        layers = array if _STACK.search(leaf) else array[None]
        for name, layer in zip(sources.names, layers, strict=True):
            out[name] = layer.T if _is_matrix(leaf) else layer
    return out


# --- Flax: the published trainer ----------------------------------------------------------------

_FLAX_STACKS = {
    "text_encoder.blocks.": "text_encoder.TextTransformerBlock_",
    "speaker_encoder.blocks.": "speaker_encoder.EncoderTransformerBlock_",
    "blocks.": "TransformerBlock_",
}
_FLAX_GLOBALS = ("shift", "scale", "gate")


def flax_sources(leaf: str, config: DiTConfig) -> Sources:
    """The arrays of a Flax checkpoint that make up one of our leaves."""
    if leaf == "time_conditioner.dense2.weight":
        names = [f"cond_dense_global_{kind}/kernel" for kind in _FLAX_GLOBALS]
        return Sources(names, lambda arrays: np.concatenate(arrays, axis=1))
    name = re.sub(r"time_conditioner\.dense", "cond_dense_", leaf)
    name = re.sub(r"^out_norm\.", "norm.", name)
    name = re.sub(r"attention_adaln", "attn_adaln", name)
    name = re.sub(r"_adaln\.(\w+)\.down\.", r"_adaln.adaln_rank_\1.", name)
    name = re.sub(r"_adaln\.(\w+)\.up\.", r"_adaln.\1.", name)
    if leaf.startswith("blocks."):
        name = re.sub(r"attention\.w([kv])\.", r"attention.w\1_self.", name)
    name = re.sub(r"attention\.gate\.", "attention.wgate.", name)
    name = re.sub(r"(attention\.w\w+)\.weight$", r"\1.Dense_0.weight", name)
    if name.endswith("embedding.weight"):
        name = name.removesuffix("weight") + "embedding"
    elif _is_matrix(leaf):
        name = name.removesuffix("weight") + "kernel"
    for ours, theirs in _FLAX_STACKS.items():
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            names = [f"{theirs}{layer}.{rest}" for layer in range(_num_layers(leaf, config))]
            return Sources([name.replace(".", "/") for name in names], np.stack)
    return Sources([name.replace(".", "/")], single)


def to_flax(leaves: Mapping[str, np.ndarray], config: DiTConfig) -> dict[str, np.ndarray]:
    """Our leaves under the names and in the layout of the Flax EchoDiT.

    That implementation does not scale the reference projection: the layer is multiplied by
    `config.speaker_proj_scale`, which is 1 for the models that came from there.

    **Raises**: `UsageError` naming the first tensor that it has no place for.
    """
    out = {}
    for leaf, array in leaves.items():
        if "latent" in leaf:
            raise UsageError(
                f"flax: it has no place for {leaf}: the published trainer has no block-wise models"
            )
        if _PATCH_PROJECTION.fullmatch(leaf) and config.speaker_proj_scale != 1:
            array = array * np.float32(config.speaker_proj_scale)
        names = flax_sources(leaf, config).names
        if leaf == "time_conditioner.dense2.weight":
            parts = np.split(array, len(names), axis=1)
        else:
            parts = array if _STACK.search(leaf) else array[None]
        out.update(zip(names, parts, strict=True))
    return out


def flax_config(tensors: Shapes) -> DiTConfig:
    """Sizes of a Flax EchoDiT, read from its shapes."""
    shapes = _CheckedShapes(tensors)

    def encoder(stack: str) -> EncoderConfig:
        return EncoderConfig(
            dim=shapes[f"{stack}_0/attention_norm/weight"][0],
            num_layers=shapes.count_layers(rf"{stack}_(\d+)/"),
            num_heads=shapes[f"{stack}_0/attention/q_norm/weight"][0],
            mlp_dim=shapes[f"{stack}_0/mlp/w1/kernel"][1],
        )

    latent_dim, model_dim = shapes["in_proj/kernel"]
    return _with_limits(
        DiTConfig(
            model_dim=model_dim,
            num_layers=shapes.count_layers(r"TransformerBlock_(\d+)/"),
            num_heads=shapes["TransformerBlock_0/attention/q_norm/weight"][0],
            mlp_dim=shapes["TransformerBlock_0/mlp/w1/kernel"][1],
            text=encoder("text_encoder/TextTransformerBlock"),
            speaker=encoder("speaker_encoder/EncoderTransformerBlock"),
            latent_dim=latent_dim,
            patch_size=shapes["speaker_encoder/in_proj/kernel"][0] // latent_dim,
            vocab_size=shapes["text_encoder/text_embedding/embedding"][0],
            time_embed_dim=shapes["cond_dense_0/kernel"][0],
            adaln_rank=shapes["TransformerBlock_0/attn_adaln/adaln_rank_shift/kernel"][1],
        )
    )


# --- Sizes --------------------------------------------------------------------------------------


class _CheckedShapes:
    def __init__(self, tensors: Shapes):
        self.tensors = tensors

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise EchoError(f"expected an EchoDiT, but tensor {name} is missing")
        shape = self.tensors[name]
        rank = 1 if "norm" in name and "q_norm" not in name else 2
        if len(shape) != rank or 0 in shape:
            raise EchoError(f"tensor {name}: expected {rank} dimensions, got shape {shape}")
        return shape

    def count_layers(self, pattern: str) -> int:
        matches = (re.match(pattern, name) for name in self.tensors)
        count = 1 + max((int(match[1][:6]) for match in matches if match), default=-1)
        if not 0 < count <= len(self.tensors):
            raise EchoError(
                f"tensors {pattern}: expected layers numbered from 0, got {count} layers in "
                f"{len(self.tensors)} tensors"
            )
        return count


def _with_limits(config: DiTConfig) -> DiTConfig:
    """`config` with the training lengths, which no shape reveals, of the preset of the same sizes.

    If there is no such preset, they keep their defaults.
    """
    for preset in DIT_PRESETS.values():
        limits = {
            name: getattr(preset, name)
            for name in ("max_frames", "max_text_bytes", "max_speaker_frames")
        }
        # The block-wise parts of a model may have been left out.
        candidate = dataclasses.replace(config, **limits)
        if candidate == dataclasses.replace(preset, blockwise=config.blockwise):
            return candidate
    return config
