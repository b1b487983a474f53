"""`echo-eqx benchmark latency`: time to the first sound, and to the whole audio."""

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.random as jr
import numpy as np

import echo_eqx
from echo_eqx.codec.codec import Codec
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS, DiTConfig
from echo_eqx.model.dit import EchoDiT
from echo_eqx.speech.stream import BLOCKS
from echo_eqx.weights.native import array_dtype

TEXT = "The train leaves early. Nine old boats wait near the bridge. We open the green door."


@dataclass(frozen=True)
class Latency:
    """Time to the first sound and to the whole: in one go, by sentences and by blocks."""

    model: Literal["voice", "1.3B", "840M", "tiny"] = "voice"
    """voice has the weights in the package, the others random ones and the 48 kHz codec."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    text: str = TEXT
    runs: int = 5


def latency(args: Latency) -> None:
    dit, codec = _models(args)
    blockwise, text = _with_blocks(dit), args.text
    # Random weights never stop speaking, so nothing is cut, nor spoken again.
    trim = args.model == "voice"
    ways: dict[str, Callable[[], Iterator[np.ndarray]]] = {
        "in one go": lambda: iter([echo_eqx.synthesize(dit, codec, text, trim=trim)]),
        "sentence by sentence": lambda: echo_eqx.stream(dit, codec, text, blocks=(), trim=trim),
        "growing blocks": lambda: echo_eqx.stream(blockwise, codec, text, trim=False),
    }
    logging.getLogger("echo_eqx.speech").setLevel(logging.ERROR)  # not of missing ends
    for way in ways.values():  # compiles
        list(way())
    times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(args.runs):
        for name, way in ways.items():  # interleaved, so that a slow moment slows all
            times[name].append(_measure(way, codec.config.sample_rate))
    print(
        f"{len(args.text)} characters, {args.model}, {args.dtype}, {jax.devices()[0]}, medians of "
        f"{args.runs} interleaved runs"
    )
    for name, runs in times.items():
        first, whole, seconds = zip(*runs, strict=True)
        print(
            f"{name}: first sound after {_spread(first)}, whole after {_spread(whole)}, "
            f"{statistics.median(seconds):.2f} s of audio"
        )
    sizes = ", ".join(f"{frames} frames in {steps} steps" for frames, steps in BLOCKS)
    print(f"growing blocks: {sizes}, of a model of this size with random weights, nothing cut")


def _models(args: Latency) -> tuple[EchoDiT, Codec]:
    dtype = array_dtype(args.dtype)
    if args.model == "voice":
        return echo_eqx.load_dit("voice", dtype=dtype), echo_eqx.load_codec("voice")
    dit = _random_dit(DIT_PRESETS[args.model], dtype)
    codec = jax.jit(lambda: echo_eqx.DACVAE.init(CODEC_PRESETS["48khz"], key=jr.key(1)))()
    return dit, codec


def _with_blocks(dit: EchoDiT) -> EchoDiT:
    config = dataclasses.replace(dit.config, blockwise=True)
    return _random_dit(config, jax.tree.leaves(dit)[0].dtype)


def _random_dit(config: DiTConfig, dtype: Any) -> EchoDiT:
    return jax.jit(lambda: echo_eqx.cast(EchoDiT.init(config, key=jr.key(0)), dtype))()


def _measure(way: Callable[[], Iterator[np.ndarray]], rate: int) -> tuple[float, float, float]:
    """Seconds to the first piece and to the last, and seconds of audio."""
    started = time.perf_counter()
    first, samples = None, 0
    for audio in way():
        first = time.perf_counter() - started if first is None else first
        samples += len(audio)
    assert first is not None
    return first, time.perf_counter() - started, samples / rate


def _spread(seconds: tuple[float, ...]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"
