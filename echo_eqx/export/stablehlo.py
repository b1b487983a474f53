"""StableHLO programs by `jax.export`, for CPU, CUDA and TPU, that need no echo_eqx to run.

    context            text_ids, text_mask, speaker_latents, speaker_mask
                       -> text_keys, text_values, speaker_keys, speaker_values
    velocity           x, t, frame_mask, text_keys, text_values, text_mask, speaker_keys,
                       speaker_values, speaker_mask, speaker_scale -> velocity
    encode             audio -> mean, std
    decode             latents -> audio
    decode_watermarked latents, message -> audio

Batch and lengths are free. Programs take their weights, in the order that `programs.json` gives,
and then the inputs above, in the shapes that it gives: axis names are those of `echo_eqx.config`;
`speaker_mask` has one entry per patch of latents. The weights are in `weights.safetensors`.
`run.py` speaks with the programs and is an example of how to call them. JAX promises to load
programs for six months after the version that wrote them (docs.jax.dev/en/latest/export).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from echo_eqx.codec.dacvae import DACVAE
from echo_eqx.config import CodecConfig, DiTConfig
from echo_eqx.errors import UsageError, optional
from echo_eqx.export.models import Models, describe, warn_of_blockwise
from echo_eqx.files import write_json
from echo_eqx.model.attention import attention_kernel
from echo_eqx.model.dit import ConditionCache, EchoDiT
from echo_eqx.model.joint_attention import KVCache
from echo_eqx.trees import cast, named_leaves
from echo_eqx.weights.safetensors_writer import save_arrays

PLATFORMS = ("cpu", "cuda", "tpu")
WEIGHTS = "weights.safetensors"
_CONTEXT = r"text_|speaker_|blocks\.attention\.(w[kv]_(text|speaker)|k_norm)"
_VELOCITY = r"in_proj|time_conditioner|blocks(?!\.attention\.w[kv]_)|out_"


@dataclass(frozen=True)
class Program:
    """`function(model, *inputs)` gives `outputs`."""

    function: Callable[..., Any]
    leaves: str
    """Regular expression that the names of the leaves it reads begin with."""
    inputs: dict[str, tuple[str, Any]]
    """Shape, where letters are free sizes, and dtype."""
    outputs: tuple[str, ...]


def write(models: Models, folder: Path, dtype: str) -> None:
    """Write the programs of the models at hand to `folder`.

    `dtype` is that of the EchoDiT's weights and of its computation, float32 or bfloat16. The codec
    stays in float32, as in `infer`.

    **Raises**: `EchoError` for another `dtype`, or if the package flatbuffers is missing.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"stablehlo: expected --dtype float32 or bfloat16, got {dtype}")
    optional("flatbuffers", "export")  # for jax.export
    weights: dict[str, np.ndarray] = {}
    programs: dict[str, Any] = {}
    for kind, model in (("dit", models.dit), ("codec", models.codec)):
        if isinstance(model, EchoDiT):
            warn_of_blockwise(model, "stablehlo")
            model = cast(model, dtype)
            of_model = dit_programs(model.config, dtype)
        elif model is not None:
            model = models.need_codec("stablehlo")
            of_model = codec_programs(model.config)
        else:
            continue
        for name, program in of_model.items():
            exported, about = export_program(model, program, kind)
            file = f"{name}.jax_export"
            (folder / file).write_bytes(exported.serialize())
            programs[name] = {"file": file, **about}
        for name, leaf in named_leaves(model).items():
            weights[f"{kind}.{name}"] = np.asarray(leaf)
    used = {name for program in programs.values() for name in program["weights"]}
    save_arrays(folder / WEIGHTS, {name: weights[name] for name in sorted(used)}, {})
    about = {"jax": jax.__version__, "platforms": PLATFORMS, "weights": WEIGHTS}
    write_json(folder / "programs.json", {**about, **describe(models), "programs": programs})
    if models.dit is not None and models.codec is not None:
        source = Path(__file__).with_name("run_stablehlo.py")
        (folder / "run.py").write_bytes(source.read_bytes())


def dit_programs(config: DiTConfig, dtype: str) -> dict[str, Program]:
    heads, width, layers = config.num_heads, config.model_dim // config.num_heads, config.num_layers
    channels = config.latent_dim
    text = {"text_ids": ("b, s", "int32"), "text_mask": ("b, s", "bool")}
    speaker = {
        "speaker_latents": (f"b, {config.patch_size}*p, {channels}", "float32"),
        "speaker_mask": ("b, p", "bool"),
    }
    cache = {
        f"{name}_{kind}": (f"b, {layers}, {axis}, {heads}, {width}", dtype)
        for name, axis in (("text", "s"), ("speaker", "p"))
        for kind in ("keys", "values")
    }
    text_kv, speaker_kv = list(cache)[:2], list(cache)[2:]
    inputs = {
        "x": (f"b, t, {channels}", "float32"),
        "t": ("", "float32"),
        "frame_mask": ("b, t", "bool"),
        **{name: cache[name] for name in text_kv},
        "text_mask": text["text_mask"],
        **{name: cache[name] for name in speaker_kv},
        "speaker_mask": speaker["speaker_mask"],
        "speaker_scale": (f"{layers}", "float32"),
    }
    return {
        "context": Program(_context, _CONTEXT, text | speaker, tuple(cache)),
        "velocity": Program(_velocity, _VELOCITY, inputs, ("velocity",)),
    }


def codec_programs(config: CodecConfig) -> dict[str, Program]:
    audio = {"audio": (f"b, {config.hop}*t", "float32")}
    latents = {"latents": (f"b, t, {config.latent_dim}", "float32")}

    encoder, decoder = r"encoder|bottleneck\.in_proj", r"decoder|bottleneck\.out_proj"
    programs = {
        "encode": Program(_encode, encoder, audio, ("mean", "std")),
        "decode": Program(_decode, decoder, latents, ("audio",)),
    }
    if config.watermark is not None:
        inputs = {**latents, "message": (f"b, {config.watermark.num_bits}", "int32")}
        leaves = f"{decoder}|watermark"
        programs["decode_watermarked"] = Program(_decode_watermarked, leaves, inputs, ("audio",))
    return programs


def export_program(
    model: Any, program: Program, kind: str
) -> tuple[jax.export.Exported, dict[str, Any]]:
    """The program with its weights as arguments, and what `programs.json` says of it."""
    from jax import export

    leaves, treedef = named_leaves(model), jax.tree.structure(model)
    names = [name for name in leaves if re.match(program.leaves, name)]
    types = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    scope = export.SymbolicScope()
    inputs = [
        jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)
        for shape, dtype in program.inputs.values()
    ]

    def function(*arguments: Any) -> Any:
        # A weight that is not an argument has a shape and a dtype, but cannot be computed with.
        filled = types | dict(zip(names, arguments, strict=False))
        return program.function(treedef.unflatten(filled.values()), *arguments[len(names) :])

    arguments = [*(types[name] for name in names), *inputs]
    with attention_kernel("none"):
        exported = export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    about = {
        "weights": [f"{kind}.{name}" for name in names],
        "inputs": [_argument(name, of) for name, of in zip(program.inputs, inputs, strict=True)],
        "outputs": [
            _argument(name, of)
            for name, of in zip(program.outputs, exported.out_avals, strict=True)
        ],
    }
    return exported, about


def _argument(name: str, of: Any) -> dict[str, Any]:
    sizes = [size if isinstance(size, int) else str(size) for size in of.shape]
    return {"name": name, "shape": sizes, "dtype": np.dtype(of.dtype).name}


# --- What the programs compute -------------------------------------------------------------------


def _context(dit: EchoDiT, *inputs: Array) -> tuple[Array, ...]:
    def of_one(text_ids, text_mask, speaker_latents, speaker_mask):
        mask = jnp.repeat(speaker_mask, dit.config.patch_size)
        cache = dit.encode_conditions(text_ids, text_mask, speaker_latents, mask)
        return cache.text.keys, cache.text.values, cache.speaker.keys, cache.speaker.values

    return jax.vmap(of_one)(*inputs)


def _velocity(dit: EchoDiT, x: Array, t: Array, frame_mask: Array, *inputs: Array) -> Array:
    *conditions, scale = inputs

    def of_one(x, frame_mask, text_keys, text_values, text_mask, keys, values, speaker_mask):
        text, speaker = KVCache(text_keys, text_values), KVCache(keys, values)
        cache = ConditionCache(text, text_mask, speaker, speaker_mask)
        return dit.velocity(x, t, cache, frame_mask=frame_mask, speaker_scale=scale)

    return jax.vmap(of_one)(x, frame_mask, *conditions)


def _encode(codec: DACVAE, audio: Array) -> tuple[Array, Array]:
    return jax.vmap(lambda audio: codec.bottleneck.moments(codec.encoder(audio)))(audio)


def _decode(codec: DACVAE, latents: Array) -> Array:
    return jax.vmap(lambda latents: codec.decoder(codec.bottleneck.out_proj(latents)))(latents)


def _decode_watermarked(codec: DACVAE, latents: Array, message: Array) -> Array:
    watermark = codec.watermark
    assert watermark is not None

    def signal(audio: Array, message: Array) -> Array:
        return watermark(audio, message, watermark.init_state())[0]

    audio = _decode(codec, latents)
    return audio + jax.vmap(signal)(audio, message)
