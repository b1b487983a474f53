"""Times and peak memory of the models, medians over several runs, one topic a process.

    python scripts/benchmark.py codec            # 5 s of audio through the 48 kHz codec
    python scripts/benchmark.py dit              # one velocity evaluation of the 1.3B model
    python scripts/benchmark.py cache            # a sampling step with and without cached keys

Weights are random: they cost the same.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import tyro

import echo_eqx
from echo_eqx.command import run
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS
from echo_eqx.weights.own_format import array_dtype

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Codec:
    """Encode and decode a recording."""

    preset: Literal["48khz", "tiny"] = "48khz"
    seconds: float = 5.0
    runs: int = 5


@dataclass(frozen=True)
class DiT:
    """One velocity evaluation at the published lengths."""

    preset: Literal["1.3B", "840M", "tiny"] = "1.3B"
    dtype: Dtype = "bfloat16"
    frames: int = 768
    text_bytes: int = 768
    speaker_frames: int = 512
    runs: int = 3


@dataclass(frozen=True)
class Cache:
    """A velocity evaluation from cached keys against one from text and reference."""

    preset: Literal["1.3B", "840M", "tiny"] = "tiny"
    dtype: Dtype = "float32"
    frames: int = 384
    text_bytes: int = 768
    speaker_frames: int = 512
    runs: int = 9


def main() -> None:
    command = tyro.cli(
        Annotated[Codec, tyro.conf.subcommand("codec")]
        | Annotated[DiT, tyro.conf.subcommand("dit")]
        | Annotated[Cache, tyro.conf.subcommand("cache")],
        description=__doc__,
    )
    match command:
        case Codec():
            codec(command)
        case DiT():
            dit(command)
        case Cache():
            cache(command)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_gib = peak / 2**30 if sys.platform == "darwin" else peak / 2**20
    print(f"peak memory of this process: {peak_gib:.2f} GiB")


def median_seconds(name: str, function: Callable[[], object], runs: int) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    first = time.perf_counter() - started
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - started)
    median = statistics.median(times)
    print(
        f"{name}: median {median:.3f} s of {runs} runs ({min(times):.3f} to {max(times):.3f}); "
        f"the first, with compiling, {first:.1f} s"
    )
    return median


def random_weights(init: Callable[[], Any]) -> Any:
    """A model of random numbers, made leaf by leaf as in a load, so that peaks are those of use."""
    rng = np.random.default_rng(0)

    def leaf(abstract: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = rng.standard_normal(abstract.shape, np.float32) * np.float32(0.02)
        return jax.device_put(numbers.astype(abstract.dtype))

    return jax.tree.map(leaf, jax.eval_shape(init))


def codec(args: Codec) -> None:
    config = CODEC_PRESETS[args.preset]
    model = random_weights(lambda: echo_eqx.DACVAE.init(config, key=jr.key(0)))
    audio = 0.1 * np.random.default_rng(0).standard_normal(int(args.seconds * config.sample_rate))
    audio = audio.astype(np.float32)
    latents, _ = model.encode(audio)
    print(f"codec {args.preset}, {args.seconds} s of audio, float32, {jax.devices()[0]}")
    median_seconds("encode", lambda: model.encode(audio), args.runs)
    plain = median_seconds("decode", lambda: model.decode(latents), args.runs)
    message = np.arange(16) % 2
    marked = median_seconds(
        "decode with watermark", lambda: model.decode(latents, message), args.runs
    )
    print(f"the watermark takes {marked / plain:.2f} of the plain decoding time")


def dit_inputs(args: DiT | Cache) -> tuple[echo_eqx.EchoDiT, list[jax.Array]]:
    config = DIT_PRESETS[args.preset]

    def init():
        dit = echo_eqx.EchoDiT.init(config, key=jr.key(0))
        return echo_eqx.cast(dit, array_dtype(args.dtype))

    model = random_weights(init)
    keys = jr.split(jr.key(1), 3)
    inputs = [
        jr.normal(keys[0], (args.frames, config.latent_dim)),
        jnp.float32(0.5),
        jr.randint(keys[1], (args.text_bytes,), 0, 256),
        jnp.ones(args.text_bytes, bool),
        jr.normal(keys[2], (args.speaker_frames, config.latent_dim)),
        jnp.ones(args.speaker_frames, bool),
    ]
    print(
        f"EchoDiT {args.preset}, {args.dtype}, {args.frames} frames, {args.text_bytes} bytes, "
        f"{args.speaker_frames} reference frames, {jax.devices()[0]}"
    )
    return model, inputs


def dit(args: DiT) -> None:
    model, inputs = dit_inputs(args)
    velocity = eqx.filter_jit(lambda model, *inputs: model(*inputs))
    median_seconds("velocity", lambda: velocity(model, *inputs), args.runs)


def cache(args: Cache) -> None:
    model, inputs = dit_inputs(args)
    velocity = eqx.filter_jit(lambda model, *inputs: model(*inputs))
    whole = median_seconds("velocity", lambda: velocity(model, *inputs), args.runs)

    @eqx.filter_jit
    def context_of(model, ids, text_mask, speaker, speaker_mask):
        return model.context(ids, text_mask, speaker, speaker_mask)

    context = context_of(model, *inputs[2:])

    @eqx.filter_jit
    def from_context(model, context, x, t):
        mask = jnp.ones(x.shape[0], bool)
        ones = jnp.ones(model.config.num_layers)
        return model.velocity(x, t, context, frame_mask=mask, speaker_scale=ones)

    x, t = inputs[:2]
    cached = median_seconds(
        "velocity from cached keys", lambda: from_context(model, context, x, t), args.runs
    )
    print(f"the cached evaluation takes {cached / whole:.2f} of the whole one")


if __name__ == "__main__":
    run(main)
