"""`echo-eqx benchmark gpu`: one table of what an accelerator does, most telling rows first.

Every row is printed as soon as it is known, so that a run that is cut off still tells something.
"""

import dataclasses
import json
import math
import platform
import statistics
import time
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import echo_eqx
from echo_eqx.config import CODEC_PRESETS, DIT_PRESETS
from echo_eqx.errors import EchoError
from echo_eqx.flow.objective import Batch
from echo_eqx.generation import SamplerSettings
from echo_eqx.model.attention import KeyMask, dot_product_attention
from echo_eqx.sharding.mesh import batch_sharding, replicated
from echo_eqx.train.config import TRAIN_PRESETS
from echo_eqx.train.data import TrainData
from echo_eqx.train.device_loader import DeviceLoader
from echo_eqx.train.flops import peak_flops, step_flops
from echo_eqx.train.plan import lower_step
from echo_eqx.train.state import init_state

Part = Literal["ceilings", "train", "speech", "codec", "voice", "attention", "exactness"]


@dataclass(frozen=True)
class Gpu:
    """One accelerator: its ceilings, training, speech and the codec."""

    model: Literal["1.3B", "840M", "tiny"] = "1.3B"
    codec: Literal["48khz", "tiny"] = "48khz"
    batch_size: int = 32
    """Of the training step: the largest that fits is the fastest."""
    voice_batch_size: int = 256
    """Of training the small voice."""
    runs: int = 5
    rows: tuple[Part, ...] = typing.get_args(Part)
    """Which rows to measure, in this order."""
    json: Path | None = None
    """Also write the rows to this file, an object per line, the first about the machine."""


@dataclass(frozen=True)
class Row:
    part: str
    what: str
    value: float
    unit: str
    least: float
    """Smallest of the runs, in the same unit."""
    most: float
    note: str = ""


def gpu(args: Gpu) -> None:
    device = jax.devices()[0]
    machine = {
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "jaxlib", "equinox", "echo_eqx")},
    }
    write(args.json, machine, "w")
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    functions = {
        "ceilings": ceilings,
        "train": train,
        "speech": speech,
        "codec": codec,
        "voice": voice,
        "attention": attention,
        "exactness": exactness,
    }
    started = time.perf_counter()
    for part in args.rows:
        try:
            for row in functions[part](args):
                at = time.perf_counter() - started
                spread = f"({row.least:.4g} to {row.most:.4g})"
                print(
                    f"{at:5.0f} s  {row.part:9}  {row.what:44} {row.value:10.4g} {row.unit:14} "
                    f"{spread:22} {row.note}",
                    flush=True,
                )
                write(args.json, dataclasses.asdict(row), "a")
        except (jax.errors.JaxRuntimeError, EchoError) as error:  # such as too little memory
            print(f"{part}: not measured: {str(error)[:300]}", flush=True)


def write(path: Path | None, data: dict[str, Any], mode: str) -> None:
    if path is not None:
        with path.open(mode) as file:
            file.write(json.dumps(data) + "\n")


def times(function: Callable[[], Any], runs: int) -> list[float]:
    """Seconds of each run, after one that compiles."""
    jax.block_until_ready(function())
    found = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - started)
    return found


def row(part: str, what: str, seconds: list[float], unit: str = "ms", amount: float = 0.0, note=""):
    """A row of times in ms, or, with `amount`, of that amount per second."""
    values = [amount / s if amount else 1e3 * s for s in seconds]
    return Row(part, what, statistics.median(values), unit, min(values), max(values), note)


def single(part: str, what: str, value: float, unit: str, note: str = "") -> Row:
    """A row of one run."""
    return Row(part, what, value, unit, value, value, note)


def random_dit(sizes: echo_eqx.DiTConfig) -> echo_eqx.EchoDiT:
    """A bfloat16 model of random numbers, made on the device leaf by leaf."""

    @partial(jax.jit, static_argnums=(1, 2))
    def make(key, shape, dtype):
        return 0.02 * jr.normal(key, shape, dtype)

    abstract = jax.eval_shape(
        lambda: echo_eqx.cast(echo_eqx.EchoDiT.init(sizes, key=jr.key(0)), jnp.bfloat16)
    )
    return jax.tree.map(lambda leaf: make(jr.key(leaf.size), leaf.shape, leaf.dtype), abstract)


def random_codec(sizes: echo_eqx.CodecConfig) -> echo_eqx.DACVAE:
    return jax.jit(lambda: echo_eqx.DACVAE.init(sizes, key=jr.key(1)))()


def ceilings(args: Gpu) -> Iterator[Row]:
    size = 8192 if jax.default_backend() != "cpu" else 1024
    for name, dtype, precision in (
        ("bfloat16", jnp.bfloat16, None),
        ("tensorfloat32", jnp.float32, "tensorfloat32"),
        ("float32", jnp.float32, "highest"),
    ):
        a, b = (jr.normal(jr.key(i), (size, size), dtype) for i in range(2))
        multiply = jax.jit(lambda a, b, p=precision: jnp.matmul(a, b, precision=p))
        seconds = times(lambda f=multiply, a=a, b=b: f(a, b), args.runs)
        what = f"matrix product {size}^3, {name}"
        yield row("ceilings", what, seconds, "TFLOP/s", 2 * size**3 / 1e12)
    numbers = jnp.ones(2**28 if size > 1024 else 2**24)
    add = jax.jit(lambda x: x + 1)
    seconds = times(lambda: add(numbers), args.runs)
    yield row("ceilings", "reading and writing memory", seconds, "TB/s", 2 * numbers.nbytes / 1e12)
    x, kernel = jr.normal(jr.key(0), (1, 24_000, 192)), jr.normal(jr.key(1), (7, 192, 192))
    for name, dtype in (("float32", jnp.float32), ("float16", jnp.float16)):
        convolve = jax.jit(
            lambda x, w: jax.lax.conv_general_dilated(
                x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
        )
        a, b = x.astype(dtype), kernel.astype(dtype)
        seconds = times(lambda f=convolve, a=a, b=b: f(a, b), args.runs)
        flops = 2 * x.size * kernel.shape[0] * kernel.shape[2]
        what = f"convolution 192 to 192, kernel 7, {name}"
        yield row("ceilings", what, seconds, "TFLOP/s", flops / 1e12)


def train(args: Gpu) -> Iterator[Row]:
    mesh = one_device_mesh()
    config = dataclasses.replace(
        TRAIN_PRESETS[args.model], batch_size=args.batch_size, data="", mesh="fsdp=1"
    )
    objective = dataclasses.replace(config.objective, dtype="bfloat16")
    config = dataclasses.replace(config, objective=objective)
    sizes = config.dit_config()
    started = time.perf_counter()
    lowered = lower_step(config, mesh)
    traced = time.perf_counter()
    compiled = lowered.compile()
    ended = time.perf_counter()
    yield single("train", "trace of the step", traced - started, "s")
    yield single("train", "compilation", ended - traced, "s")
    memory: Any = compiled.memory_analysis()
    used = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30
    yield single("train", "memory of the step", used, "GiB")
    state = init_state(sizes, config.optimizer, mesh, 0)
    batch = jax.device_put(random_batch(sizes, args.batch_size), batch_sharding(mesh))
    key = jax.device_put(jr.key(1), replicated(mesh))

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch, key)
        return metrics.loss

    seconds = times(step, args.runs)
    yield row("train", f"{args.model}, bfloat16, batch {args.batch_size}", seconds)
    if peak := peak_flops(jax.devices()[0].device_kind):
        share = [100 * step_flops(sizes, args.batch_size) / s / peak for s in seconds]
        median = statistics.median(share)
        note = "model FLOPs, without what is recomputed"
        yield Row("train", "model FLOPs utilization", median, "%", min(share), max(share), note)


def random_batch(sizes: echo_eqx.DiTConfig, rows: int) -> Batch:
    """Texts and references of random lengths, as in the published data."""
    rng = np.random.default_rng(0)
    t, s, r = sizes.max_frames, sizes.max_text_bytes, sizes.max_speaker_frames

    def mask(length: int) -> np.ndarray:
        return np.arange(length) < rng.integers(length // 8, length, (rows, 1))

    arrays = {
        "latents": rng.standard_normal((rows, t, sizes.latent_dim), np.float32),
        "frame_mask": np.ones((rows, t), bool),
        "text_ids": rng.integers(0, 256, (rows, s), np.int32),
        "text_mask": mask(s),
        "speaker_latents": rng.standard_normal((rows, r, sizes.latent_dim), np.float32),
        "speaker_mask": mask(r),
    }
    return Batch(**jax.tree.map(jnp.asarray, arrays))


def speech(args: Gpu) -> Iterator[Row]:
    """30 s of speech from 512 bytes of text and a reference of 10 s, in 40 steps."""
    sizes, codec_sizes = DIT_PRESETS[args.model], CODEC_PRESETS[args.codec]
    dit = random_dit(sizes)
    model = echo_eqx.cast(random_codec(codec_sizes), jnp.float16)
    settings = SamplerSettings(steps=40, cfg_scale=3.0, speaker_scale=5.0)
    whole = {}
    for rows in (1, 16):
        ids, seen = jr.randint(jr.key(2), (rows, 512), 0, 256), jnp.ones((rows, 512), bool)
        speaker = jr.normal(jr.key(3), (rows, 256, sizes.latent_dim))
        heard = jnp.ones((rows, 256), bool)

        def generate(ids=ids, seen=seen, speaker=speaker, heard=heard) -> Any:
            options: Any = {"num_frames": 750, "settings": settings, "key": jr.key(5)}
            return echo_eqx.sample(dit, ids, seen, speaker, heard, **options)

        sampled = times(generate, args.runs)
        yield row("speech", f"sampling, {rows} at once", sampled)
        if sizes.latent_dim == codec_sizes.latent_dim:

            def decode(rows=rows) -> Any:
                latents = jr.normal(jr.key(4), (rows, 750, codec_sizes.latent_dim))
                return [model.decode(x) for x in latents]

            decoded = times(decode, args.runs)
            yield row("speech", f"decoding in float16, {rows} at once", decoded)
            whole[rows] = [a + b for a, b in zip(sampled, decoded, strict=True)]
            yield row("speech", f"30 s of speech, {rows} at once", whole[rows])
    if whole:
        ratio = 16 * statistics.median(whole[1]) / statistics.median(whole[16])
        yield single("speech", "throughput of 16 at once over one", ratio, "x")


def codec(args: Gpu) -> Iterator[Row]:
    """100 s of audio. Errors are in dB below the signal of exact float32."""
    config = CODEC_PRESETS[args.codec]
    exact = random_codec(config)
    rng = np.random.default_rng(0)
    audio = (0.1 * rng.standard_normal(100 * config.sample_rate)).astype(np.float32)
    latents = jnp.asarray(rng.standard_normal((2500, config.latent_dim)), jnp.float32)
    expected: tuple[np.ndarray, np.ndarray] | None = None
    for name, dtype, precision in (
        ("float32", jnp.float32, "highest"),
        ("tensorfloat32", jnp.float32, "tensorfloat32"),
        ("float16", jnp.float16, "highest"),
    ):
        model = echo_eqx.cast(exact, dtype)
        with jax.default_matmul_precision(precision):
            encoded = times(lambda m=model: m.encode(audio), args.runs)
            decoded = times(lambda m=model: m.decode(latents), args.runs)
            found = np.asarray(model.encode(audio)[0]), np.asarray(model.decode(latents))
        expected = expected or found
        notes = [f"{decibels(a, b):.0f} dB" for a, b in zip(found, expected, strict=True)]
        yield row("codec", f"encoding 100 s, {name}", encoded, note=notes[0])
        yield row("codec", f"decoding 100 s, {name}", decoded, note=notes[1])
    if exact.watermark is not None:
        message = np.arange(16) % 2
        marked = times(lambda: exact.decode(latents, message), args.runs)
        yield row("codec", "decoding 100 s with watermark, float32", marked)


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    """Power of `expected` over that of the error; infinite without an error."""
    error = float(np.sum((found - expected).astype(np.float64) ** 2))
    power = float(np.sum(expected.astype(np.float64) ** 2))
    return 10 * math.log10(power / error) if error else math.inf


def voice(args: Gpu) -> Iterator[Row]:
    """Training of the small voice on the shards in the package, as `echo-eqx train` does it."""
    mesh = one_device_mesh()
    config = dataclasses.replace(
        TRAIN_PRESETS["voice"], batch_size=args.voice_batch_size, mesh="fsdp=1", num_streams=1
    )
    objective = dataclasses.replace(config.objective, dtype="bfloat16")
    config = dataclasses.replace(config, objective=objective)
    sizes = config.dit_config()
    compiled = lower_step(config, mesh).compile()
    state = init_state(sizes, config.optimizer, mesh, 0)
    key = jax.device_put(jr.key(1), replicated(mesh))
    data = TrainData(str(config.data), config, sizes, mesh)
    loader = DeviceLoader(data.loader(config.batch_size), Batch, mesh, config.batch_size)
    try:
        samples, waits = [], []
        for _ in range(args.runs + 1):
            loader.waited = 0.0
            started = time.perf_counter()
            metrics = None
            for _ in range(20):
                state, metrics = compiled(state, loader.next().arrays, key)
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - started
            samples.append(20 * config.batch_size / seconds)
            waits.append(100 * loader.waited / seconds)
    finally:
        loader.close()
    for what, values, unit in (
        (f"voice, batch {config.batch_size}", samples[1:], "samples/s"),
        ("time spent waiting for data", waits[1:], "%"),
    ):
        yield Row("voice", what, statistics.median(values), unit, min(values), max(values))


def attention(args: Gpu) -> Iterator[Row]:
    """Of the 1.3B model's shape, 16 rows: the kernel of this platform, and JAX's plain one."""
    rows, t, j, heads, width = 16, 768, 1664, 12, 128
    if jax.default_backend() == "cpu":
        rows = 1
    keys = jr.split(jr.key(0), 4)
    q, k, v = (
        jr.normal(keys[i], (rows, n, heads, width), jnp.bfloat16) for i, n in enumerate((t, j, j))
    )
    seen = jnp.arange(j)[None] < jr.randint(keys[3], (rows, 1), j // 2, j)

    def ours(q, k, v):
        return jax.vmap(lambda q, k, v, s: dot_product_attention(q, k, v, KeyMask.of(s)))(
            q, k, v, seen
        )

    def plain(q, k, v):
        mask = jnp.broadcast_to(seen[:, None, None, :], (rows, 1, t, j))
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    for name, function in (("this project's", ours), ("jax.nn's", plain)):
        forward = jax.jit(function)
        both = jax.jit(
            jax.grad(lambda *x, f=function: jnp.sum(f(*x).astype(jnp.float32)), (0, 1, 2))
        )
        yield row("attention", f"forward, {name}", times(lambda f=forward: f(q, k, v), args.runs))
        yield row("attention", f"and backward, {name}", times(lambda f=both: f(q, k, v), args.runs))


def exactness(args: Gpu) -> Iterator[Row]:
    """The codec here against the same on the CPU."""
    config = CODEC_PRESETS[args.codec]
    model = random_codec(config)
    latents = np.random.default_rng(1).standard_normal((125, config.latent_dim), np.float32)
    here = np.asarray(model.decode(latents))
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        there = np.asarray(jax.device_put(model, cpu).decode(latents))
    difference = float(np.abs(here - there).max())
    note = f"of audio up to {np.abs(there).max():.3g}"
    yield single("exactness", "codec, largest difference to the CPU", difference, "", note)


def one_device_mesh() -> Any:
    return jax.make_mesh(
        (1, 1, 1),
        ("data", "fsdp", "tensor"),
        devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )
